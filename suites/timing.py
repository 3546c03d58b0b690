"""Times and memory on a GPU: what speed and latency share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Figure = tuple[str, float, str]  # metric, value, unit
BUDGET_MS = 1500.0  # of measuring per operation
PRODUCT = 8192  # rows and columns of the matrices whose product shows what the card can do


def spread(metric: str, times: Tensor) -> list[Figure]:
    """(name, value, unit) of the median, the 20th and the 80th percentile of times [n] in ms; metric ends in "_ms"."""
    low, median, high = (float(times.quantile(p)) for p in (0.2, 0.5, 0.8))
    stem = metric.removesuffix("_ms")
    return [(metric, median, "ms"), (f"{stem}_p20_ms", low, "ms"), (f"{stem}_p80_ms", high, "ms")]


def peak_memory(run: Callable[[], T]) -> tuple[T, float]:
    """What run() returns, and the most device memory allocated meanwhile on top of what was before, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def timed_call(run: Callable[[], T]) -> tuple[T, float]:
    """What run() returns, and its time on the device in ms, the device idle before and after."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return result, start.elapsed_time(end)


def event_times(*runs: Callable[[], Any]) -> list[Tensor]:
    """Of every run times of single calls in ms, fp64; 3 to 100 of them after warm-up, the L2 cache flushed in between.

    The runs take turns: a card that slows down as it gets warm slows all of them.
    """
    if not runs:
        return []
    estimates = [max(timed_call(run)[1], 1e-3) for run in runs for _ in range(2)][1::2]
    repeats = int(min(max(BUDGET_MS * len(runs) / sum(estimates), 3), 100))
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(min(repeats, 10)):
        for run in runs:
            run()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, events):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            run()
            end.record()
            taken.append((start, end))
    torch.cuda.synchronize()
    return [torch.tensor([start.elapsed_time(end) for start, end in taken], dtype=torch.float64) for taken in events]


@functools.cache
def product_tflops(dtype: torch.dtype) -> float:
    """Rate of torch.matmul on two random 8192 x 8192 matrices, TFLOP/s by the median time: what this card does in this run."""
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    return 2 * PRODUCT**3 / float(event_times(lambda: a @ b)[0].median()) / 1e9
