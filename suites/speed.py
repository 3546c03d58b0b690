"""Speed of one attention layer at Llama-3.1-8B's shape: selection, attention, and other kernels in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import BlockMask, block_sparse_attention
from ..kernels.block_sparse_attention import resolve_impl
from ..methods.base import LayerContext, Method, dense_mask
from ..methods.spec import build
from ..models.calibrate import calibrate, calibration_facts
from .base import Cell, Score, Suite, register_suite
from .baselines import Kernel, dense_baselines, sparse_baselines, time_backward, time_forward
from .checks import Case
from .inputs import SHAPE, RandomMask, RealMask, Source, saved_facts
from .timing import Figure, event_times, peak_memory, product_tflops, spread

BLOCKS = {"kernel_64x64": (64, 64), "kernel_128x64": (128, 64), "kernel_128x128": (128, 128)}  # queries, keys of a block
MASKS = {mask.name: mask for mask in (RandomMask, RealMask)}


@register_suite
class Speed(Suite):
    """Times of one layer on a GPU: selection, attention, and other kernels beside them.

    Median, 20th and 80th percentile of device-event times in ms, B = 1, causal, bf16, on random q, k, v or on those of --qkv.
    Task attention: total = the method end to end as a user calls it; select and attend are its two halves timed alone. Tasks
    kernel_*: total = our kernel alone over a mask of such blocks, random or from --qkv. With --backward also dq, dk and dv.
    Every kernel is checked against the reference on samples before it is timed. tflops counts 4 D per selected pair.
    """

    name = "speed"
    attached = False
    needs_model = False
    needs_gpu = True
    tasks = ("attention", *BLOCKS)
    default_tasks = ("attention",)
    options: ClassVar[tuple[str, ...]] = ("qkv", "backward")

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        return [path] if (path := options.get("qkv")) else []

    @classmethod
    def methods(cls, task: str, options: Mapping[str, Any], asked: list[Method]) -> list[Method]:
        return [RealMask() if options.get("qkv") else RandomMask()] if task in BLOCKS else asked

    @classmethod
    def subject(cls, task: str, options: Mapping[str, Any]) -> tuple[str, str]:
        facts = saved_facts(options["qkv"]) if options.get("qkv") else None
        return (facts["model"], facts["revision"]) if facts and task not in BLOCKS else (SHAPE.name, "")

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        example, figures = self._kernel(cell) if cell.task in BLOCKS else self._method(cell)
        for metric, value, unit in figures:
            yield Score(cell.task, example, metric, value, unit)
        yield Score(cell.task, example, "matmul_tflops", product_tflops(getattr(torch, cell.dtype)), "TFLOP/s")

    def _method(self, cell: Cell) -> tuple[str, list[Figure]]:
        source = Source(cell.ctx_len, cell.seed, cell.dtype, path=cell.option("qkv") or "")
        ctx, spec = source.load(), source.spec
        assert ctx.q is not None and ctx.k is not None
        method = build(cell.method, cell.settings)

        def ready(candidate: Method) -> Method:
            return candidate.prepare(spec) if source.path else candidate.synthetic(spec, cell.seed)

        if cell.density is None:
            method = ready(method)
        else:
            method, reached = calibrate(method, cell.density, [(ctx.q, ctx.k, ctx)], ready)
            self.notes |= calibration_facts(method, cell.density, reached, "the same q and k")
        if note := "; ".join(filter(None, (method.note, self.notes.get("note")))):
            self.notes["note"] = note
        figures, whole, case = measure(method, ctx)
        self.notes["kernel"] = "sdpa" if ctx.mask is None else kernel_of(case)
        figures += self._backward(cell, whole, case)
        return source.example, figures + self._others(cell, source, case if ctx.mask is not None else None)

    def _kernel(self, cell: Cell) -> tuple[str, list[Figure]]:
        density = cell.settings["density"] if cell.density is None else cell.density
        kind, blocks, path = MASKS[cell.method], BLOCKS[cell.task], cell.option("qkv") or ""
        source = Source(cell.ctx_len, cell.seed, cell.dtype)
        mask = kind.make(Source(cell.ctx_len, cell.seed, cell.dtype, path=path), blocks, density)
        ctx = source.load()
        assert ctx.q is not None and ctx.k is not None
        case = Case(ctx.q, ctx.k, ctx.v, mask, ctx.scale)
        self.notes["kernel"] = kernel_of(case)
        figures = measure_kernel(case) + self._backward(cell, ours(case), case)
        return source.example, figures + self._others(cell, source, case)

    def _backward(self, cell: Cell, kernel: Kernel, case: Case) -> list[Figure]:
        """With --backward what the gradients cost; a blank with its reason where our kernels have none for the mask."""
        if not cell.option("backward"):
            return []
        try:
            figures = time_backward(kernel, case, "backward")
        except ValueError as error:
            self.notes["backward"] = f"not timed: {error}"
            return []
        metric, value, unit = _rate("backward_tflops", case, figures[0][1])
        return [*figures, (metric, 2.5 * value, unit)]  # five matrix products a pair where the forward has two

    def _others(self, cell: Cell, source: Source, case: Case | None) -> list[Figure]:
        backward = bool(cell.option("backward"))
        dense, reasons = dense_baselines(source, backward)
        self.notes |= reasons | {"baselines": "dense ones timed once in this run, on the same q, k and v"}
        sparse, reasons = ([], {}) if case is None else sparse_baselines(case, backward)
        self.notes |= reasons
        return dense + sparse


def kernel_of(case: Case) -> str:
    """The implementation that block_sparse_attention runs on `case`."""
    return resolve_impl("auto", case.q, case.mask)


def ours(case: Case) -> Kernel:
    """block_sparse_attention on `case`."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = block_sparse_attention(q, k, v, case.mask, scale=case.scale)
        assert isinstance(out, Tensor)
        return out

    return Kernel(run, (case.q, case.k, case.v))


def measure(method: Method, ctx: LayerContext) -> tuple[list[Figure], Kernel, Case]:
    """What a method costs on ctx's q, k and v, what gradients are to be taken of, and the problem that it chose.

    Raises: ArithmeticError when its output is wrong.
    """
    assert ctx.q is not None and ctx.k is not None
    q, k, v = ctx.q, ctx.k, ctx.v
    out, peak = peak_memory(lambda: method.attend(q, k, v, ctx))
    mask: BlockMask = dense_mask(q.shape[2], k.shape[2], q.device) if ctx.mask is None else ctx.mask
    case = Case(q, k, v, mask, ctx.scale)
    figures = _facts(case, case.check(out), peak)
    del out

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.state.clear()
        return method.attend(q, k, v, ctx)

    def select() -> None:
        ctx.state.clear()
        method.select(q, k, ctx)

    figures += spread("total_ms", event_times(lambda: run(q, k, v)))
    figures.append(_rate("tflops", case, figures[-3][1]))
    whole = Kernel(run, (q, k, v))
    if type(method).attend is Method.attend:
        figures += spread("select_ms", event_times(select))
        whole = ours(case)
        figures += time_forward(whole, case, "attend")
        figures.append(_rate("attend_tflops", case, figures[-3][1]))
    return figures, whole, case


def measure_kernel(case: Case) -> list[Figure]:
    """What our kernel alone costs on `case`. Raises: ArithmeticError when its output is wrong."""
    kernel = ours(case)
    out, peak = peak_memory(lambda: kernel.run(*kernel.inputs))
    figures = _facts(case, case.check(out), peak)
    del out
    figures += spread("total_ms", event_times(lambda: kernel.run(*kernel.inputs)))
    figures.append(_rate("tflops", case, figures[-3][1]))
    return figures


def _facts(case: Case, error: float, peak: float) -> list[Figure]:
    density = float(case.mask.density().mean())
    return [("peak_mb", peak, "MiB"), ("error_vs_reference", error, "ratio"), ("density", density, "ratio")]


def _rate(metric: str, case: Case, time_ms: float) -> Figure:
    return metric, 4 * case.q.shape[3] * case.pairs / time_ms / 1e9, "TFLOP/s"
