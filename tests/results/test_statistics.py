"""p-values and intervals against numbers worked out by hand and against scipy's own test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sparsebench.results.statistics import Mixture, Ratio, compare, sign_flip_p


def mean(values, names="abcdefghijklmnopqrstuvwxyz") -> Ratio:
    values = np.array(values, float)
    return Ratio(list(names[: len(values)]), values, np.ones(len(values)))


@pytest.mark.parametrize(
    "lost, won, p",
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),  # McNemar: 2 * P(at most 2 of 10 coins)
        (6, 0, 2 / 2**6),
        (5, 0, 2 / 2**5),  # five examples cannot reach 0.05
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_right_and_wrong_answers_give_mcnemars_exact_p(lost, won, p):
    differences = [-100.0] * lost + [100.0] * won + [0.0] * 7
    assert sign_flip_p(np.array(differences)) == pytest.approx(p, rel=1e-12)


def test_few_differences_are_enumerated():
    # Of the eight sign patterns of 1, 2, 4 only +++ and --- sum to 7 or more in size; 5 or more: also -++ and +--.
    assert sign_flip_p(np.array([1.0, 2.0, 4.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(np.array([-1.0, 2.0, 4.0, 0.0])) == pytest.approx(4 / 8)


def test_many_differences_agree_with_scipys_permutation_test():
    differences = np.random.default_rng(1).normal(0.25, 1, 60)
    exact = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=20_000, rng=2
    )
    p = sign_flip_p(differences)
    assert p == pytest.approx(exact.pvalue, abs=4 * math.sqrt(exact.pvalue / 2000)) and 0.01 < p < 0.3
    assert sign_flip_p(-differences) == pytest.approx(p, abs=0.02)
    assert sign_flip_p(differences + 10) == pytest.approx(1 / 2001, rel=1.01)


def test_difference_is_paired_by_name_and_seeded():
    ours, theirs = mean([1, 5, 9, 4]), Ratio(["d", "c", "b", "a"], np.array([3.0, 8, 4, 0]), np.ones(4))
    found = compare(ours, theirs)
    assert found["diff"] == found["diff_low"] == found["diff_high"] == 1.0  # every example gains exactly one
    assert found["ratio"] == pytest.approx(4.75 / 3.75) and found["p"] == pytest.approx(2 / 16)
    noisy = np.random.default_rng(0).normal(size=20)
    pair = [mean(noisy), mean(noisy[::-1])]
    assert compare(*pair) == compare(*[Ratio(r.units, r.num, r.den) for r in pair])


def test_perplexitys_difference_weighs_documents_by_tokens():
    tokens = np.array([10.0, 30.0, 10.0])
    dense = Ratio(["a", "b", "c"], np.array([20.0, 30.0, 10.0]), tokens, True)
    sparse = Ratio(["a", "b", "c"], np.array([22.0, 33.0, 10.5]), tokens, True)
    found = compare(sparse, dense)
    assert found["diff"] == pytest.approx(math.exp(65.5 / 50) - math.exp(60 / 50))
    assert (sparse.shares - dense.shares).sum() == pytest.approx(math.log(found["ratio"]))  # what the test flips
    assert found["p"] == pytest.approx(2 / 8)


def test_other_examples_are_not_compared():
    assert compare(mean([1, 2], "ab"), mean([1, 2], "ac")) == {}
    assert compare(mean([1, 2], "ab"), mean([1, 2, 3], "abc")) == {}


def test_zero_and_single_examples_leave_blanks():
    found = compare(mean([0, 100, 0]), mean([0, 0, 0]))
    assert found["diff"] == pytest.approx(100 / 3) and "ratio" not in found and "ratio_low" not in found
    assert set(compare(mean([2]), mean([1]))) == {"diff", "p", "ratio"}


def test_mixture_weighs_strata_and_resamples_within_them():
    parts = {"x": mean([0, 100, 100, 100]), "y": mean([0, 100])}
    both = Mixture(parts, {"x": 0.5, "y": 0.5})
    assert both.value == 62.5 and len(both.units) == 6  # the mean of 75 and 50, not 4 of 6
    # var of the means: 2500 / 4 (sample variance 7500 / 3) and 5000 / 2
    assert both.se == pytest.approx(0.5 * math.sqrt(2500 / 4 + 5000 / 2))
    flat = Mixture({"x": mean([75] * 4), "y": mean([0, 100])}, both.weights)
    assert set(np.round(np.unique(flat.resampled), 6)) == {37.5, 62.5, 87.5}  # x never varies, y by itself
    alike = Mixture({name: mean([0, 100] * 10) for name in "xy"}, both.weights)
    assert np.var(alike.resampled) == pytest.approx(np.var(alike.parts["x"].resampled) / 2, rel=0.1)  # independent strata


def test_mixtures_are_compared_over_the_same_strata_only():
    weights = {"x": 0.5, "y": 0.5}
    dense = Mixture({"x": mean([100] * 4), "y": mean([100] * 2)}, weights)
    sparse = Mixture({"y": mean([100, 0]), "x": mean([100, 0, 0, 100])}, weights)
    found = compare(sparse, dense)
    assert found["diff"] == -50
    # differences .5 * 25 twice, .5 * 50 once: all three lost, 2 of 8 patterns are as extreme
    assert found["p"] == pytest.approx(2 / 8)
    assert compare(sparse, Mixture({"x": dense.parts["x"]}, {"x": 1.0})) == {}
    assert compare(sparse, dense.parts["x"]) == {}
