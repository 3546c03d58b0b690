"""Speed of one attention layer at Llama-3.1-8B's shape: selection, attention, and the dense kernels in the same run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import BlockMask, block_sparse_attention
from ..kernels.block_sparse_attention import block_sparse_attention_reference
from ..methods.base import LayerContext, Method, ModelSpec, dense_mask, plain_rope
from ..methods.spec import build
from ..models.calibrate import calibrate, calibration_facts
from .base import Cell, Score, Suite, first_line, register_suite

T = TypeVar("T")
SHAPE = ModelSpec("llama-3.1-8b-shape", layers=1, heads=32, kv_heads=8, head_dim=128)
ROPE_THETA = 500_000.0
BUDGET_MS = 1500.0  # of measuring per operation
MOST_ERROR = 1e-2  # relative, bf16 operands; a wrong kernel gets no time
DENSE_BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@register_suite
class Speed(Suite):
    """Times of one layer on a GPU: selection, attention, and the dense kernels beside them.

    Median, 20th and 80th percentile of device-event times in ms on random q, k, v, B = 1, causal, bf16.
    total = the method end to end as a user calls it; select and attend are its two halves timed alone. fa2, cudnn and flex
    (FlexAttention over the same BlockMask) are timed on the same inputs in the same cell. tflops counts 4 D per selected pair.
    A method's output is checked against the reference on three query blocks before anything is timed.
    """

    name = "speed"
    attached = False
    needs_model = False
    needs_gpu = True

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        method = build(cell.method, cell.settings)
        q, k, v, ctx = _inputs(cell)
        if cell.density is None:
            method = method.synthetic(SHAPE, cell.seed)
        else:
            method, reached = calibrate(method, cell.density, [(q, k, ctx)], lambda m: m.synthetic(SHAPE, cell.seed))
            self.notes |= calibration_facts(method, cell.density, reached, "the same random q and k")
        note = "; ".join(filter(None, (method.note, self.notes.get("note"))))
        self.notes |= {"note": note, "kernel": "triton"} if note else {"kernel": "triton"}
        for metric, value, unit in _measure(method, q, k, v, ctx):
            yield Score(cell.task, SHAPE.name, metric, value, unit)
        for name, context, prepare in _baselines(q, k, v, ctx.mask):
            try:
                with context:
                    timed = list(_timed(f"{name}_ms", prepare()))
            except Exception as error:  # a baseline that cannot run this is a blank with its reason, not a failure of ours
                self.notes[name] = f"not timed: {first_line(error)[:200]}"
                continue
            for metric, value, unit in timed:
                yield Score(cell.task, SHAPE.name, metric, value, unit)


def _inputs(cell: Cell) -> tuple[Tensor, Tensor, Tensor, LayerContext]:
    device, dtype = torch.device("cuda"), getattr(torch, cell.dtype)
    generator = torch.Generator(device).manual_seed(cell.seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, cell.ctx_len, SHAPE.head_dim, device=device, dtype=dtype, generator=generator)

    q, k, v = draw(SHAPE.heads), draw(SHAPE.kv_heads), draw(SHAPE.kv_heads)
    positions = torch.arange(cell.ctx_len, device=device)
    # Independent normal channels stay so under RoPE: q and k serve as their own pre-RoPE tensors, which a model has for free.
    ctx = LayerContext(
        0, "prefill", SHAPE.head_dim**-0.5, v, positions, rope=plain_rope(ROPE_THETA), q=q, k=k, _q_pre=q, _k_pre=k
    )
    return q, k, v, ctx


def _measure(method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Iterator[tuple[str, float, str]]:
    selects = type(method).attend is Method.attend
    out, peak = peak_memory(lambda: method.attend(q, k, v, ctx))
    yield "peak_mb", peak, "MiB"
    mask = ctx.mask if ctx.mask is not None else dense_mask(q.shape[2], k.shape[2], q.device)
    error = sampled_error(out, q, k, v, mask, ctx.scale)
    if not error < MOST_ERROR:
        raise ValueError(f"{method.name}: output differs from the reference by {error:.2e} (relative), nothing was timed")
    yield "error_vs_reference", error, "ratio"
    yield "density", float(mask.density().mean()), "ratio"
    del out

    def run_method() -> None:
        ctx.state.clear()
        method.attend(q, k, v, ctx)

    def run_select() -> None:
        ctx.state.clear()
        method.select(q, k, ctx)

    total = yield from _timed("total_ms", run_method)
    if selects:
        yield from _timed("select_ms", run_select)
        yield from _timed("attend_ms", lambda: block_sparse_attention(q, k, v, mask, scale=ctx.scale))
    pairs = int(mask.pairs().sum()) * q.shape[1] // mask.kv_num_blocks.shape[1]
    yield "tflops", 4 * q.shape[3] * pairs / total / 1e9, "TFLOP/s"


def _baselines(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Iterator[tuple[str, AbstractContextManager, Any]]:
    """(name, what must be active, function that makes the call to time); without a mask there is nothing for FlexAttention."""

    def run_dense() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for name, backend in DENSE_BACKENDS.items():
        yield name, sdpa_kernel(backend), lambda: run_dense
    if mask is not None:
        yield "flex", nullcontext(), lambda: _flex(q, k, v, mask)


def _timed(metric: str, run: Callable[[], Any]) -> Generator[tuple[str, float, str], None, float]:
    """Yields metric, _p20 and _p80; the median is also the generator's return value."""
    scores = spread(metric, event_times(run))
    yield from scores
    return scores[0][1]


def spread(metric: str, times: Tensor) -> list[tuple[str, float, str]]:
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


def event_times(run: Callable[[], Any]) -> Tensor:
    """Times of single calls in ms, fp64; 3 to 100 of them after warm-up, the L2 cache flushed in between."""
    run()
    estimate = max(timed_call(run)[1], 1e-3)
    repeats = int(min(max(BUDGET_MS / estimate, 3), 100))
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(min(repeats, 10)):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return torch.tensor([start.elapsed_time(end) for start, end in events], dtype=torch.float64)


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> float:
    """The largest ||out - reference|| / ||reference|| of three samples: the query blocks at the start, in the middle and at the
    end, 64 queries or more each; NaN counts as infinite."""
    worst = torch.zeros((), dtype=torch.float64, device=q.device)
    rows = mask.kv_num_blocks.shape[2]
    group = min(max(64 // mask.q_block, 1), rows)
    for r in {0, min(rows // 2, rows - group), rows - group}:
        one = mask.rows(r, r + group)
        first = r * mask.q_block
        end = first + one.q_len
        inputs = q[:, :, first:end], k[:, :, : one.kv_len], v[:, :, : one.kv_len]
        expected, _ = block_sparse_attention_reference(*inputs, one, scale)
        difference = (out[:, :, first:end].double() - expected.double()).norm() / expected.double().norm()
        worst = worst.maximum(difference.nan_to_num(nan=float("inf")))
    return float(worst)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Past dynamo's limit of recompilations, which every mask counts towards, the call would quietly run uncompiled.
    torch.compiler.reset()
    compiled, flex_mask = torch.compile(flex_attention), mask.to_flex(q.shape[1], compiled=True)
    options = {"BLOCK_M": min(mask.q_block, 128), "BLOCK_N": min(mask.kv_block, 128)}
    return lambda: compiled(q, k, v, block_mask=flex_mask, enable_gqa=True, kernel_options=options)
