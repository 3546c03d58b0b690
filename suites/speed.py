"""Speed of one attention layer at Llama-3.1-8B's shape: selection, attention, and other kernels in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import BlockMask, block_sparse_attention
from ..kernels.attention_with_map import attention_with_map, resolve_map_impl
from ..kernels.block_sparse_attention import resolve_impl
from ..methods.base import LayerContext, Method, attended, dense_mask
from ..methods.dense import Dense
from ..methods.spec import build
from ..models.calibrate import calibrate, calibration_facts
from .base import Cell, Score, Suite, register_suite
from .baselines import Kernel, dense_baselines, sparse_kernels, time_all, time_backward
from .checks import Case
from .inputs import SHAPE, RandomMask, RealMask, Source, saved_facts
from .timing import Figure, host_time, peak_memory, product_tflops

BLOCKS = {"kernel_64x64": (64, 64), "kernel_128x64": (128, 64), "kernel_128x128": (128, 128)}  # queries, keys of a block
BLOCKS |= {"kernel_64x64_shared": (64, 64)}
MAP_BLOCK = 64  # tokens
RATES = {"": "total_ms", "attend_": "attend_ms"}
MASKS = {mask.name: mask for mask in (RandomMask, RealMask)}


@register_suite
class Speed(Suite):
    """Times of one layer on a GPU: selection, attention, and other kernels beside them.

    Median, 20th and 80th percentile of device-event times in ms, B = 1, causal, bf16, on random q, k, v or on those of --qkv.
    Task attention: total = the method end to end as a user calls it; select and attend are its two halves timed alone. Tasks
    kernel_*: total = our kernel alone over a mask of such blocks, random or from --qkv; of _shared the query heads of a KV head
    have one mask. Task block_map: total = dense attention with its block map, own_dense = our dense attention without it.
    host_ms = the host's time for one call of total. What is compared takes turns, dense kernels of others excepted. With
    --backward also dq, dk and dv.
    Every kernel is checked against the reference on samples before it is timed. tflops counts 4 D per selected pair.
    """

    name = "speed"
    attached = False
    needs_model = False
    needs_gpu = True
    tasks = ("attention", *BLOCKS, "block_map")
    default_tasks = ("attention",)
    options: ClassVar[tuple[str, ...]] = ("qkv", "backward")

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        return [path] if (path := options.get("qkv")) else []

    @classmethod
    def methods(cls, task: str, options: Mapping[str, Any], asked: list[Method]) -> list[Method]:
        if task in BLOCKS:
            return [RealMask() if options.get("qkv") else RandomMask()]
        return [Dense()] if task == "block_map" else asked

    @classmethod
    def subject(cls, task: str, options: Mapping[str, Any]) -> tuple[str, str]:
        facts = saved_facts(options["qkv"]) if options.get("qkv") else None
        return (facts["model"], facts["revision"]) if facts and task == "attention" else (SHAPE.name, "")

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        measure = {"attention": self._method, "block_map": self._block_map}.get(cell.task, self._kernel)
        example, figures = measure(cell)
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
        runs, case, facts = parts(method, ctx)
        sparse = ctx.mask is not None
        self.notes["kernel"] = kernel_of(case) if sparse else "sdpa"
        return source.example, facts + self._times(cell, source, runs, case, sparse_kernels(case) if sparse else {})

    def _kernel(self, cell: Cell) -> tuple[str, list[Figure]]:
        density = cell.settings["density"] if cell.density is None else cell.density
        kind, path = MASKS[cell.method], cell.option("qkv") or ""
        heads = SHAPE.kv_heads if cell.task.endswith("_shared") else SHAPE.heads
        source = Source(cell.ctx_len, cell.seed, cell.dtype)
        mask = kind.make(Source(cell.ctx_len, cell.seed, cell.dtype, path=path), BLOCKS[cell.task], density, heads)
        case = _case(source.load(), mask)
        self.notes["kernel"] = kernel_of(case)
        kernel = ours(case)
        out, peak = peak_memory(kernel.forward)
        facts = _facts(case, case.check(out), peak)
        del out
        return source.example, facts + self._times(cell, source, {"total": kernel}, case, sparse_kernels(case))

    def _block_map(self, cell: Cell) -> tuple[str, list[Figure]]:
        source = Source(cell.ctx_len, cell.seed, cell.dtype)
        ctx = source.load()
        case = _case(ctx, dense_mask(cell.ctx_len, cell.ctx_len, ctx.v.device, block=128))
        self.notes["kernel"] = resolve_map_impl("auto", case.q, MAP_BLOCK, "max")

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return attention_with_map(q, k, v, MAP_BLOCK, scale=case.scale)

        (out, _, blocks), peak = peak_memory(lambda: run(case.q, case.k, case.v))
        facts = _facts(case, case.check(out), peak)
        facts.append(("map_error_vs_reference", case.check_map(blocks, MAP_BLOCK), "ratio"))
        del out, blocks
        dense = ours(case)
        dense.check(case)
        runs = {"total": Kernel(run, (case.q, case.k, case.v), has_backward=False), "own_dense": dense}
        return source.example, facts + self._times(cell, source, runs, case, {})

    def _times(
        self, cell: Cell, source: Source, runs: dict[str, Kernel], case: Case, others: Mapping[str, Callable[[], Kernel]]
    ) -> list[Figure]:
        """NAME_ms of `runs`, all ours and found right, in turn with the others' kernels on the same problem; rates; with
        --backward what the gradients cost; and the dense kernels."""
        backward = bool(cell.option("backward"))
        figures, reasons = time_all(runs, others, case, backward)
        self.notes |= reasons
        figures.append(("host_ms", host_time(runs["total"].forward), "ms"))
        times = {metric: value for metric, value, _ in figures}
        figures += [_rate(f"{part}tflops", case, times[name]) for part, name in RATES.items() if name in times]
        if backward:
            figures += self._backward(runs.get("attend", runs["total"]), case)
        dense, reasons = dense_baselines(source, backward)
        self.notes |= reasons | {"baselines": "dense ones timed once in this run, on the same q, k and v"}
        return figures + dense

    def _backward(self, kernel: Kernel, case: Case) -> list[Figure]:
        """What the gradients cost; a blank with its reason where our kernels have none for the mask."""
        try:
            if not kernel.has_backward:
                raise ValueError("it has no backward")
            figures = time_backward(kernel, case, "backward")
        except ValueError as error:
            self.notes["backward"] = f"not timed: {error}"
            return []
        metric, value, unit = _rate("backward_tflops", case, figures[0][1])
        return [*figures, (metric, 2.5 * value, unit)]  # five matrix products a pair where the forward has two


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


def parts(method: Method, ctx: LayerContext) -> tuple[dict[str, Kernel], Case, list[Figure]]:
    """What of a method is timed on ctx's q, k and v: the whole ("total") and, where they are apart, "select" and "attend"; the
    problem that it chose; what was found when it ran once.

    Raises: ArithmeticError when its output is wrong.
    """
    assert ctx.q is not None and ctx.k is not None
    q, k, v = ctx.q, ctx.k, ctx.v
    out, peak = peak_memory(lambda: attended(method, q, k, v, ctx))
    case = _case(ctx, dense_mask(q.shape[2], k.shape[2], q.device) if ctx.mask is None else ctx.mask)
    facts = _facts(case, case.check(out), peak)
    del out

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.state.clear()
        return method.attend(q, k, v, ctx)

    def select(q: Tensor, k: Tensor) -> BlockMask:
        ctx.state.clear()
        return method.select(q, k, ctx)

    runs = {"total": Kernel(run, (q, k, v))}
    if type(method).attend is Method.attend:
        runs |= {"select": Kernel(select, (q, k)), "attend": ours(case)}
        runs["attend"].check(case)
    return runs, case, facts


def _case(ctx: LayerContext, mask: BlockMask) -> Case:
    assert ctx.q is not None and ctx.k is not None
    return Case(ctx.q, ctx.k, ctx.v, mask, ctx.scale)


def _facts(case: Case, error: float, peak: float) -> list[Figure]:
    density = float(case.mask.density().mean())
    return [("peak_mb", peak, "MiB"), ("error_vs_reference", error, "ratio"), ("density", density, "ratio")]


def _rate(metric: str, case: Case, time_ms: float) -> Figure:
    return metric, 4 * case.q.shape[3] * case.pairs / time_ms / 1e9, "TFLOP/s"
