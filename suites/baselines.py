"""The kernels that others wrote, called as their authors mean them to be, checked and timed like ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import BlockMask
from ..methods.base import dense_mask
from ..methods.spec import first_line
from .checks import Case
from .inputs import Source
from .timing import Figure, event_times, spread

DENSE_BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Kernel:
    """An implementation on one problem: run(*inputs) is what is timed, inputs are q, k, v in the layout it wants. check() is
    for those that return the attention output alone."""

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    tokens_first: bool = False  # [B, L, H, D] instead of [B, H, L, D]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # active around run and its backward
    has_backward: bool = True

    def heads_first(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.tokens_first else x

    def forward(self) -> Any:
        return self.run(*self.inputs)

    def check(self, case: Case) -> None:
        """Raises: ArithmeticError when the output is wrong."""
        with self.context(), torch.no_grad():
            case.check(self.heads_first(self.forward()))


def time_backward(kernel: Kernel, case: Case, name: str) -> list[Figure]:
    """NAME_ms with its percentiles: dq, dk and dv for a random gradient.

    Raises: ArithmeticError when they are wrong, ValueError when there is no backward or no check of it for this mask.
    """
    leaves = [x.detach().requires_grad_() for x in kernel.inputs]
    with kernel.context(), torch.enable_grad():
        out = kernel.run(*leaves)
        # In the strides of the output, as a model's would come: torch's kernels copy any other within the time.
        grad = torch.empty_like(out).normal_(generator=torch.Generator(out.device).manual_seed(0))

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        dq, dk, dv = (kernel.heads_first(x) for x in run())
        case.check_gradients((dq, dk, dv), kernel.heads_first(out.detach()), kernel.heads_first(grad))
        del dq, dk, dv
        return spread(f"{name}_ms", event_times(run)[0])


def time_all(
    own: Mapping[str, Kernel], others: Mapping[str, Callable[[], Kernel]], case: Case, backward: bool
) -> tuple[list[Figure], dict[str, str]]:
    """NAME_ms of our `own` and of others' kernels, which take turns, and with backward NAME_backward_ms of the others; and of
    others that cannot run this or are wrong the reason: a blank in the table, no failure of ours."""
    ready: dict[str, Kernel] = {}
    reasons: dict[str, str] = {}
    for name, make in others.items():
        try:
            kernel = make()
            kernel.check(case)
            ready[name] = kernel
        except Exception as error:
            reasons[name] = f"not timed: {first_line(error)[:200]}"
    figures: list[Figure] = []
    timed = {**own, **ready}
    with ExitStack() as stack, torch.no_grad():
        for kernel in timed.values():
            stack.enter_context(kernel.context())
        for name, times in zip(timed, event_times(*(kernel.forward for kernel in timed.values()))):
            figures += spread(f"{name}_ms", times)
    for name, kernel in ready.items():
        if not (backward and kernel.has_backward):
            continue
        try:
            figures += time_backward(kernel, case, f"{name}_backward")
        except Exception as error:
            reasons[f"{name}_backward"] = f"not timed: {first_line(error)[:200]}"
    return figures, reasons


@functools.cache
def dense_baselines(source: Source, backward: bool) -> tuple[list[Figure], dict[str, str]]:
    """time_all() of the dense kernels, once per run: what they cost depends on no method."""
    ctx = source.load()
    assert ctx.q is not None and ctx.k is not None
    q, k, v = ctx.q, ctx.k, ctx.v
    case = Case(q, k, v, dense_mask(q.shape[2], k.shape[2], q.device), ctx.scale)
    kernels = {name: functools.partial(_sdpa, case, backend) for name, backend in DENSE_BACKENDS.items()}
    kernels |= {"fa3": functools.partial(_fa3, case), "fa4": functools.partial(_fa4, case)}
    figures: list[Figure] = []
    reasons: dict[str, str] = {}
    for name, make in kernels.items():  # no turns: torch's choice of a backend is one for the whole process
        found, missing = time_all({}, {name: make}, case, backward)
        figures, reasons = figures + found, reasons | missing
    return figures, reasons


def sparse_kernels(case: Case) -> dict[str, Callable[[], Kernel]]:
    """The kernels of others that take the same mask."""
    return {"flex": lambda: _flex(case), "fa4_sparse": lambda: _fa4_sparse(case)}


def _sdpa(case: Case, backend: SDPBackend) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True)

    return Kernel(run, (case.q, case.k, case.v), context=lambda: sdpa_kernel(backend))


def _flash(case: Case, flash_attn_func: Callable[..., Any], **options: Any) -> Kernel:
    """FlashAttention-3 or 4. Their layout is made before the timing."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=case.scale, **options)
        return out[0] if isinstance(out, tuple) else out  # some versions return lse as well

    inputs = tuple(x.transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))
    return Kernel(run, inputs, tokens_first=True, has_backward="block_sparse_tensors" not in options)


def _fa3(case: Case) -> Kernel:
    from flash_attn_interface import flash_attn_func

    return _flash(case, flash_attn_func, causal=True)


def _fa4(case: Case) -> Kernel:
    from flash_attn.cute.interface import flash_attn_func

    return _flash(case, flash_attn_func, causal=True)


def _fa4_sparse(case: Case) -> Kernel:
    lists = edge_and_whole(case.mask, case.q.shape[1])  # before the import: a mask it cannot take is the better reason
    import cutlass.cute as cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    @cute.jit
    def causal(batch, head, q_index, kv_index, lengths, tensors):
        return kv_index <= q_index

    blocks = BlockSparseTensorsTorch(*lists, block_size=(case.mask.q_block, case.mask.kv_block))
    return _flash(case, flash_attn_func, mask_mod=causal, block_sparse_tensors=blocks)


def edge_and_whole(mask: BlockMask, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(number, indices) of every row's blocks that hold keys after its first query, and (number, indices) of the others: int32
    [B, heads or 1, NQ] and [B, heads or 1, NQ, K], as FlexAttention and FlashAttention-4 want them.

    Raises: ValueError for single columns, untiled blocks, windows, or more keys than queries.
    """
    plain = mask.column_indices is None and mask.step == mask.kv_block and mask.window is None
    if not plain or mask.q_len != mask.kv_len:
        raise ValueError("single columns, windows and blocks that do not tile the keys have no form as block lists")
    num, index = mask.kv_num_blocks, mask.kv_indices
    if num.shape[1] not in (1, heads):
        num, index = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (num, index))
    width = index.shape[-1]
    slot = torch.arange(width, device=index.device)
    before_last = (index + 1) * mask.kv_block - 1 <= mask.row_bounds()[0][:, None]
    whole = (before_last & (slot < num[..., None])).sum(-1, dtype=torch.int32)
    most = min((mask.q_block + mask.kv_block - 2) // mask.kv_block + 1, width)  # of a row at the diagonal
    edge = index.gather(-1, (whole[..., None] + slot[:most]).clamp(max=width - 1).long())
    return num - whole, edge.contiguous(), whole, index.contiguous()


def _flex(case: Case) -> Kernel:
    from torch.nn.attention.flex_attention import flex_attention

    # Past dynamo's limit of recompilations, which every mask counts towards, the call would quietly run uncompiled.
    torch.compiler.reset()
    mask = case.mask
    compiled, flex_mask = torch.compile(flex_attention), mask.to_flex(case.q.shape[1], compiled=True)
    options: dict[str, Any] = {"fwd_BLOCK_N": mask.kv_block} if mask.kv_block < 128 else {}  # else torch's own choice
    if mask.q_block < 128:  # with as many warps as torch gives such tiles
        options |= {"fwd_BLOCK_M": mask.q_block, "fwd_num_warps": 4}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=flex_mask, scale=case.scale, enable_gqa=True, kernel_options=options)

    # A buffer given away to the backward would be missing when it is timed again.
    return Kernel(run, (case.q, case.k, case.v), context=lambda: torch._functorch.config.patch(donated_buffer=False))
