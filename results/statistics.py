"""Estimates with their uncertainty, and what two of them differ by on the same examples. Knows numbers, no tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.05
FEWEST = 6  # of n units only 2**n sign patterns exist, and two of them are the most extreme: 2 / 2**5 > LEVEL


@dataclass
class Ratio:
    """sum(num) / sum(den) over independent units (documents or examples), or its exponential."""

    units: list[str]
    num: np.ndarray  # [n]
    den: np.ndarray  # [n]
    exponential: bool = False

    @cached_property
    def value(self) -> float:
        return float(self._of(np.ones(len(self.units))))

    @cached_property
    def se(self) -> float:
        """Standard error by linearisation; for equal denominators that is the standard error of a mean."""
        n, total = len(self.units), self.den.sum()
        if n < 2:
            return float("nan")
        residual = self.num - self.num.sum() / total * self.den
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / total * (self.value if self.exponential else 1))

    @cached_property
    def shares(self) -> np.ndarray:
        """[n] what every unit adds to the value (to its logarithm where it is an exponential)."""
        return self.num / self.den.sum()

    @cached_property
    def resampled(self) -> np.ndarray:
        """[RESAMPLES] bootstrap values. Equal n means equal draws, which pairs two Ratios over the same units."""
        return self._of(_draws(len(self.units)))

    def ordered_like(self, other: Ratio) -> Ratio | None:
        """Its units in the order of `other`; None when the two saw different units."""
        if self.units == other.units:
            return self
        place = {unit: number for number, unit in enumerate(self.units)}
        if place.keys() != set(other.units):
            return None
        order = [place[unit] for unit in other.units]
        return Ratio(other.units, self.num[order], self.den[order], self.exponential)

    def _of(self, weights: np.ndarray) -> np.ndarray:
        ratio = weights @ self.num / (weights @ self.den)
        return np.exp(ratio) if self.exponential else ratio


@dataclass
class Mixture:
    """A weighted sum of means over strata (the tasks of a suite), which are resampled each by itself."""

    parts: dict[str, Ratio]  # by stratum, none of them an exponential
    weights: dict[str, float]

    @property
    def units(self) -> list[str]:
        return [f"{name}/{unit}" for name, part in self.parts.items() for unit in part.units]

    @cached_property
    def value(self) -> float:
        return float(sum(self.weights[name] * part.value for name, part in self.parts.items()))

    @cached_property
    def se(self) -> float:
        """Not a number as soon as a stratum has one unit, whose spread is unknown."""
        return float(np.sqrt(sum((self.weights[name] * part.se) ** 2 for name, part in self.parts.items())))

    @cached_property
    def shares(self) -> np.ndarray:
        return np.concatenate([self.weights[name] * part.shares for name, part in self.parts.items()])

    @cached_property
    def resampled(self) -> np.ndarray:
        """[RESAMPLES] bootstrap values, paired as those of the parts."""
        # Strata of one size share their draws: shifted against each other, they are independent within a resample.
        parts = enumerate(self.parts.items())
        return np.sum([self.weights[name] * np.roll(part.resampled, shift) for shift, (name, part) in parts], axis=0)

    def ordered_like(self, other: Mixture) -> Mixture | None:
        if self.weights != other.weights:
            return None
        parts = {name: self.parts[name].ordered_like(part) for name, part in other.parts.items()}
        same = {name: part for name, part in parts.items() if part is not None}
        return Mixture(same, other.weights) if len(same) == len(parts) else None


@lru_cache(maxsize=128)
def _draws(n: int) -> np.ndarray:
    """int16 [RESAMPLES, n] how often each unit is drawn; always the same for one n."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.int16)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.percentile(values, [50 * LEVEL, 100 - 50 * LEVEL])
    return float(low), float(high)


def compare(ours: Ratio | Mixture, theirs: Ratio | Mixture) -> dict[str, float]:
    """What `ours` differs by from `theirs`, paired by unit; nothing where the two saw different units.

    diff = ours - theirs with its bootstrap interval diff_low, diff_high; ratio = ours / theirs with ratio_low, ratio_high
    (left out where theirs is 0); p of the hypothesis that neither is better, see sign_flip_p. Over one unit (or a stratum of
    one) there are no intervals.
    """
    if type(ours) is not type(theirs) or (paired := theirs.ordered_like(ours)) is None:  # type: ignore[arg-type]
        return {}
    result = {"diff": ours.value - theirs.value, "p": sign_flip_p(ours.shares - paired.shares)}
    if paired.value != 0:
        result["ratio"] = ours.value / theirs.value
    if not np.isnan(ours.se):
        mine, other = ours.resampled, paired.resampled
        result["diff_low"], result["diff_high"] = interval(mine - other)
        if (other != 0).all():
            result["ratio_low"], result["ratio_high"] = interval(mine / other)
    return result


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the paired permutation test: were the two methods alike, every difference [n] could as well have
    the other sign, and the sum of differences is compared with the sums under such flips.

    Exact for differences of one size (right against wrong answers: McNemar's exact test) and for up to 10 that are not 0;
    otherwise from RESAMPLES random flips with a fixed seed, never below 2 / (RESAMPLES + 1).
    """
    return _sign_flip_p(np.asarray(differences, float).tobytes())


@lru_cache(maxsize=2**14)
def _sign_flip_p(differences: bytes) -> float:
    values = np.frombuffer(differences)
    values = values[np.abs(values) > 1e-9 * np.abs(values).max(initial=0)]  # equal examples flip to themselves
    if not len(values):
        return 1.0
    sizes, signs = np.abs(values), np.sign(values)
    if np.ptp(sizes) <= 1e-9 * sizes.max():
        return float(stats.binomtest(int((signs > 0).sum()), len(signs)).pvalue)
    options = {"vectorized": True, "n_resamples": RESAMPLES}
    if 2 ** len(values) <= RESAMPLES:
        test = stats.permutation_test((values,), np.sum, permutation_type="samples", **options)
    else:  # permutation_test would draw the same flips anew for every test, a hundred times slower
        test = stats.monte_carlo_test(signs, lambda size: _flips(*size), lambda flips, axis: flips @ sizes, **options)
    return float(test.pvalue)


@lru_cache(maxsize=32)
def _flips(tests: int, n: int) -> np.ndarray:
    """int8 [tests, n] of random signs; always the same for one size."""
    return 2 * np.random.default_rng(0).integers(0, 2, (tests, n), np.int8) - 1
