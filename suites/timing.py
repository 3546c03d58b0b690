"""Times and memory on a GPU: what speed and latency share."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Figure = tuple[str, float, str]  # metric, value, unit
BUDGET_MS = 1500.0  # of measuring per operation
HEAD_START = 1.5  # of the host before a timed call, in its own time for that call
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


def host_time(run: Callable[[], Any]) -> float:
    """How long the host needs for one call in ms, the device idle before: median of 3."""
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def event_times(*runs: Callable[[], Any]) -> list[Tensor]:
    """Of every run the times of single calls on the device in ms, fp64; 3 to 100 of them after warm-up.

    Before each the L2 cache is flushed, for so long that the host is ahead: what it needs is not in the times, unless the call
    waits for the device. The runs take turns in an order that is drawn anew every time: a card that slows down as it gets
    warm, or under the call before, slows all of them.
    """
    if not runs:
        return []
    for run in runs:
        run()
    repeats = int(min(max(BUDGET_MS * len(runs) / sum(max(timed_call(run)[1], 1e-3) for run in runs), 3), 100))
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    ahead = max(map(host_time, runs)) / max(timed_call(cache.zero_)[1], 1e-3)
    flushes = 1 + min(math.ceil(HEAD_START * ahead), 100)
    order = random.Random(0)
    taken: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for turn in range(-min(repeats, 10), repeats):
        for i in order.sample(range(len(runs)), len(runs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(flushes):
                cache.zero_()
            start.record()
            runs[i]()
            end.record()
            if turn >= 0:
                taken[i].append((start, end))
    torch.cuda.synchronize()
    return [torch.tensor([start.elapsed_time(end) for start, end in times], dtype=torch.float64) for times in taken]


@functools.cache
def product_tflops(dtype: torch.dtype) -> float:
    """Rate of torch.matmul on two random 8192 x 8192 matrices, TFLOP/s by the median time: what this card does in this run."""
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    return 2 * PRODUCT**3 / float(event_times(lambda: a @ b)[0].median()) / 1e9
