"""Gradients of block_sparse_attention through Triton: the op for autograd, and the launches of its kernels.

The reference is autograd through block_sparse_attention_reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_mask import BlockMask
from .block_sparse_attention import _box, _edge_tiles, heads_in_turn
from .block_sparse_attention_backward_kernels import (
    block_sparse_attention_bwd_dkdv_kernel,
    block_sparse_attention_bwd_dq_kernel,
)
from .launch import LOG2E, aligned, power_of_2
from .transpose_lists import transpose_lists

PARTS = 4  # programs that share the longest possible list of query tiles
LEAST_TILES = 64  # of such a share, so that its start and end stay small beside it


def differentiable(forward: Callable, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of forward(q, k, v, mask, scale, True), differentiable once in q, k and v through the Triton kernels.

    Both outputs pass gradients on. Every run gives the same bits: no sum depends on the order in which programs finish.
    Raises: ValueError for masks without a backward kernel: single columns, blocks that do not tile the keys, query blocks
        other than 64 and 128, key blocks that are no multiple of 64, pv_threshold.
    """
    unfit = {
        "single key columns": mask.column_indices is not None,
        "key blocks that do not tile the keys": mask.step != mask.kv_block,
        f"query blocks of {mask.q_block} (64 and 128 have one)": mask.q_block not in (64, 128),
        f"key blocks of {mask.kv_block} (multiples of 64 have one)": mask.kv_block % 64,
        "pv_threshold": mask.pv_threshold is not None,
    }
    if any(unfit.values()):
        found = ", ".join(name for name, is_so in unfit.items() if is_so)
        raise ValueError(f"no Triton backward for masks with {found}: use impl='reference', or torch.no_grad()")
    return _BlockSparseAttention.apply(q, k, v, mask, scale, forward)


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale, forward):
        out, lse = forward(q, k, v, mask, scale, True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale = mask, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return *block_sparse_attention_backward(dout, dlse, *ctx.saved_tensors, ctx.mask, ctx.scale), None, None, None


def block_sparse_attention_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the shapes and dtype of q, k, v, accumulated in fp32 and over the query heads of a KV head.

    Source: Dao et al. 2022 (arXiv 2205.14135), Algorithm 4, over the listed blocks; dlse adds P * dlse to its dS.
    Args: dout like out, dlse like lse, None means zero; the rest as in block_sparse_attention, `mask` checked.
    """
    dout = torch.zeros_like(out) if dout is None else dout
    dout, q, k, v, out = (aligned(x) for x in (dout, q, k, v, out))
    # dq goes first: the transposed lists take many small launches, which then wait for nobody.
    dq, terms = backward_of_queries(dout, dlse, q, k, v, out, lse, mask, scale)
    lists = lists_of_keys(mask, q.shape[1], k.shape[1])
    return dq, *backward_of_keys(dout, terms, q, k, v, mask, scale, lists)


def _dq_options(q: Tensor, k: Tensor, mask: BlockMask) -> dict:
    """Tile shape, heads that take turns, warps and stages of the kernel of the queries; picked by what ptxas reports."""
    together = heads_in_turn(q, k, mask.kv_block)
    if q.dtype == torch.float32:
        return dict(BM=16, BN=16, together=together, num_warps=8, num_stages=1)
    if k.shape[3] > 128:
        return dict(BM=64, BN=32, together=together, num_warps=4, num_stages=2)
    return dict(BM=64, BN=64, together=together, num_warps=4, num_stages=2)


def _dkdv_options(q: Tensor, mask: BlockMask) -> dict:
    """Tile shape, warps and stages of the kernel of the keys; picked by what ptxas reports."""
    dim = q.shape[3]
    if q.dtype == torch.float32:
        return dict(BM=16, BN=16, num_warps=8, num_stages=1)
    if dim > 128:
        return dict(BM=32, BN=64, num_warps=8, num_stages=2)
    return dict(BM=32 if mask.window is not None else 64, BN=64, num_warps=4, num_stages=2)  # masks take registers


def _cut(mask: BlockMask) -> dict:
    return dict(WINDOW=-1 if mask.window is None else mask.window, SINK=mask.sink, LAST=mask.last, STRIDE=mask.stride or 0)


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def backward_of_queries(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq; fp32 [B, H, 2, NQ * q_block]: lse * log2(e) and minus delta of every query row and the padding after the last."""
    batch, heads, q_len, dim = q.shape
    num, index = mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous()
    mask_batch, mask_heads, rows, width = index.shape
    options = _dq_options(q, k, mask)
    together, BM, BN = options.pop("together"), options["BM"], options["BN"]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    terms = torch.empty(batch, heads, 2, rows * mask.q_block, dtype=torch.float32, device=q.device)
    grid = (rows * (mask.q_block // BM) * together, batch * heads // together)
    block_sparse_attention_bwd_dq_kernel[grid](
        _box(q, BM), _box(k, BN), _box(v, BN), _box(out, BM), _box(dout, BM), _box(dq, BM),
        lse.contiguous(), lse if dlse is None else dlse.contiguous(), terms, num, index,
        mask_heads if mask_batch > 1 else 0, heads, heads // k.shape[1], mask_heads, q_len, k.shape[2], rows, width,
        _edge_tiles(mask, BN), together, scale, scale * LOG2E,
        BD=power_of_2(dim), Q_BLOCK=mask.q_block, KV_BLOCK=mask.kv_block, HAS_DLSE=dlse is not None,
        PRECISION=_precision(q), **_cut(mask), **options,
    )  # fmt: skip
    return dq, terms


def lists_of_keys(mask: BlockMask, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, int]:
    """transpose_lists() of the mask, and how many lists the query heads of a KV head have: one each, or one together."""
    listed = heads // kv_heads if mask.kv_num_blocks.shape[1] == heads else 1
    rows, blocks = mask.kv_num_blocks.shape[2], triton.cdiv(mask.kv_len, mask.kv_block)
    # Causality leaves the query block r at most (offset + (r + 1) * q_block + kv_block - 1) / kv_block key blocks.
    keys = rows * (mask.kv_len - mask.q_len + mask.kv_block - 1) + rows * (rows + 1) // 2 * mask.q_block
    visible = mask.kv_num_blocks.shape[:2].numel() * (keys // mask.kv_block)
    capacity = min(mask.kv_indices.numel(), visible)
    return *transpose_lists(mask.kv_num_blocks, mask.kv_indices, blocks, listed, capacity, impl="triton"), listed


def backward_of_keys(
    dout: Tensor, terms: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float,
    lists: tuple[Tensor, Tensor, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, from the terms of backward_of_queries() and lists_of_keys()."""
    start, entries, listed = lists
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group, rows = heads // kv_heads, mask.kv_num_blocks.shape[2]
    blocks, lists_of_heads = triton.cdiv(kv_len, mask.kv_block), mask.kv_num_blocks.shape[1] // listed
    options = _dkdv_options(q, mask)
    BM, BN, BD = options["BM"], options["BN"], power_of_2(dim)
    tiles, tiles_of_entry = triton.cdiv(kv_len, BN), group // listed * (mask.q_block // BM)
    limit = max(triton.cdiv(rows * listed, PARTS), LEAST_TILES // tiles_of_entry, 1)
    parts = triton.cdiv(rows * listed, limit)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    slots = batch * kv_heads * tiles if parts > 1 else 0
    sums = torch.empty(slots, 2, BN, BD, dtype=torch.float32, device=k.device)
    turns = torch.zeros(slots, dtype=torch.int32, device=k.device)
    # Query blocks that list a key block and start before its end.
    edge = (mask.kv_block + mask.q_block - 2) // mask.q_block + 1
    block_sparse_attention_bwd_dkdv_kernel[(tiles * parts, batch * kv_heads)](
        _box(q, BM), _box(k, BN), _box(v, BN), _box(dout, BM), _box(dk, BN), _box(dv, BN), terms,
        start, entries, sums, turns, lists_of_heads if len(mask.kv_num_blocks) > 1 else 0, int(lists_of_heads > 1),
        blocks, kv_heads, q_len, kv_len, terms.shape[3], limit, parts, scale, scale * LOG2E,
        BD=BD, Q_BLOCK=mask.q_block, KV_BLOCK=mask.kv_block, GROUP=group, LISTED=listed,
        EDGE=power_of_2(edge * listed), PRECISION=_precision(q), **_cut(mask), **options,
    )  # fmt: skip
    return dk, dv
