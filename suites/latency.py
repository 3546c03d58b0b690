"""Latency of a whole model on a GPU: time to first token, decode rate and memory, with the bare model in the same rounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm
from transformers import DynamicCache

from ..methods.base import Method
from ..methods.spec import build, first_line
from ..models.attach import attach
from ..models.trace import Trace
from .base import Cell, Score, register_suite
from .baselines import DENSE_BACKENDS
from .corpora import CorpusSuite, token_windows
from .timing import peak_memory, spread, timed_call

TOKENS = 32  # generated after a prompt; the first of them is the prefill's
WARM_UP = 2  # rounds
LEAST_ROUNDS, MOST_ROUNDS = 10, 100
BUDGET_MS = 20_000.0  # of timed rounds
# What bf16 roundings in another order do to the logits of a deep model, relative to the largest of them.
LOGIT_TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps

Timer = Callable[[Callable[[], Any]], tuple[Any, float]]  # a call -> (what it returns, ms)


@register_suite
class Latency(CorpusSuite):
    """Latency of the whole model on a GPU: time to first token, decode rate, peak memory, and the bare model beside them.

    The prompts are the first ctx_len tokens of documents of the corpus, a batch of one, taken in turn. ttft = prefill with an
    empty cache and the choice of the first token, selection included; median, 20th and 80th percentile of device-event times.
    Decode is greedy; its rate is that of the tokens after the first. sdpa (torch's own choice), fa2 and cudnn are the bare
    model's times on the same prompts in the same rounds. Nothing is timed before the logits are finite, and for the method
    dense those of the bare model. density is a score of its own, "layer/head", over all prompts.
    """

    name = "latency"
    attached = False
    needs_gpu = True
    default_limit = (1, 4)

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        method = build(cell.method, cell.settings).prepare(model.spec)
        windows = token_windows(model.tokenizer, cell.task, "eval", cell.ctx_len, cell.limit)
        prompts = [torch.tensor([ids], device=model.model.device) for _, ids in windows.ids]
        trace = check(model.model, method, prompts)
        self.notes |= windows.notes() | {"kernel": trace.impl, "dense_phases": " ".join(sorted(trace.dense_phases))}
        for layer, heads in enumerate(trace.density.tolist()):
            for head, density in enumerate(heads):
                yield Score(cell.task, f"{layer}/{head}", "density", density, "ratio")
        variants = ways_to_run(model.model, method)
        times, failed = time_rounds(model.model, variants, prompts, timed_call)
        self.notes |= failed | {"rounds": len(times["ttft", ""])}
        for metric, value, unit in [*_figures(times), *_peaks(model.model, variants, prompts[0], failed)]:
            yield Score(cell.task, model.spec.name, metric, value, unit)


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str  # "" is the method; the others are the bare model with torch's dense kernels
    context: Callable[[], AbstractContextManager[Any]]  # what is active around its passes
    decodes: bool = False


def ways_to_run(model: Any, method: Method) -> list[Variant]:
    """The method and the bare model's baselines, in the order of a round."""
    dense = [Variant(name, functools.partial(sdpa_kernel, backend)) for name, backend in DENSE_BACKENDS.items()]
    return [Variant("", lambda: attach(model, method), True), Variant("sdpa", nullcontext, True), *dense]


@torch.no_grad()
def check(model: Any, method: Method, prompts: list[Tensor]) -> Trace:
    """Run the method once over prompts [1, L] and a token behind each.

    Returns: what ran. Raises: ValueError for logits that are not finite or, of the method dense, are not the bare model's:
    another first token, and further off than bf16 explains.
    """
    bare = [step(model, ids, DynamicCache()) if method.name == "dense" else None for ids in prompts]
    with attach(model, method) as trace:
        for ids, expected in zip(prompts, bare):
            cache = DynamicCache()
            logits = step(model, ids, cache)
            following = step(model, logits.argmax(-1, keepdim=True), cache)
            if not (logits.isfinite().all() and following.isfinite().all()):
                raise ValueError(f"{method.name}: the logits are not finite, nothing was timed")
            if expected is not None and not _same_choice(logits, expected):
                raise ValueError(f"{method.name}: the logits are not those of the bare model, nothing was timed")
    return trace


def _same_choice(logits: Tensor, expected: Tensor) -> bool:
    close = (logits - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()
    return bool(close | (logits.argmax() == expected.argmax()))


def step(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Logits [1, V] behind ids [1, n], which are added to the cache."""
    return model(ids, use_cache=True, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def prefill(model: Any, ids: Tensor) -> tuple[Tensor, DynamicCache]:
    """The first token [1, 1] behind the prompt ids [1, L], greedy, and the cache that holds the prompt."""
    cache = DynamicCache()
    return step(model, ids, cache).argmax(-1, keepdim=True), cache


def decode(model: Any, token: Tensor, cache: DynamicCache) -> Tensor:
    """TOKENS greedy tokens [1, TOKENS], `token` [1, 1] the first of them; nothing waits for the device in between."""
    tokens = [token]
    while len(tokens) < TOKENS:
        tokens.append(step(model, tokens[-1], cache).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def time_rounds(
    model: Any, variants: list[Variant], prompts: list[Tensor], timer: Timer
) -> tuple[dict[tuple[str, str], list[float]], dict[str, str]]:
    """Times in ms by (kind, variant's name), kind "ttft" or "decode" (of TOKENS - 1 tokens), and why baselines have none.

    A round is one pass of every variant over the same prompt, so that a drift of the clock meets all of them alike. After
    WARM_UP rounds as many follow as BUDGET_MS allows, LEAST_ROUNDS at least, every prompt equally often.
    """
    failed: dict[str, str] = {}

    def run_round(ids: Tensor) -> dict[tuple[str, str], float]:
        taken = {}
        for variant in variants:
            if variant.name in failed:
                continue
            try:
                with variant.context():
                    (token, cache), taken["ttft", variant.name] = timer(lambda: prefill(model, ids))
                    if variant.decodes:
                        taken["decode", variant.name] = timer(lambda: decode(model, token, cache))[1]  # noqa: B023
            except Exception as error:  # a baseline that cannot run this is a blank with its reason, not a failure of ours
                if not variant.name:
                    raise
                failed[variant.name] = f"not timed: {first_line(error)[:200]}"
        return taken

    for _ in range(WARM_UP):
        cost = sum(run_round(prompts[0]).values())
    rounds = min(max(BUDGET_MS / max(cost, 1e-3), LEAST_ROUNDS), MOST_ROUNDS)
    order = prompts * math.ceil(rounds / len(prompts))
    taken = [run_round(ids) for ids in tqdm(order, desc="rounds", leave=False)]
    return {key: [times[key] for times in taken] for key in taken[0] if key[1] not in failed}, failed


def _figures(times: dict[tuple[str, str], list[float]]) -> Iterator[tuple[str, float, str]]:
    for (kind, name), values in times.items():
        stem = "_".join(filter(None, (kind, name)))
        median, *tails = spread(f"{stem}_ms", torch.tensor(values, dtype=torch.float64))
        if kind == "ttft":
            yield from (median, *tails)
        else:
            yield f"{stem}_tokens_per_s", (TOKENS - 1) * 1e3 / median[1], "tokens/s"


@torch.no_grad()
def _peaks(model: Any, variants: list[Variant], ids: Tensor, failed: dict[str, str]) -> Iterator[tuple[str, float, str]]:
    """Memory on top of the model during prefill and decode of one prompt."""
    for variant in variants:
        if variant.decodes and variant.name not in failed:
            with variant.context():
                peak = peak_memory(lambda: decode(model, *prefill(model, ids)))[1]
            yield "_".join(filter(None, ("peak", variant.name, "mb"))), peak, "MiB"
