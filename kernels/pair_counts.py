"""How many (query, key) pairs a BlockMask selects: op, reference, Triton kernel. One launch, since every layer is counted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_lists import SCRATCH_ELEMENTS, row_bounds
from .launch import runs_triton

LISTED = 128  # entries of a list that the kernel takes at a time


def add_pairs(mask: Any, into: Tensor, tail: int = 0, weight: int = 1, impl: str = "auto") -> None:
    """Add the selected (query, key) pairs of `mask`, a BlockMask, to `into`; nothing syncs with the GPU.

    Args:
        into: int64 [2, B * H], or [2, H] to sum over the batch: [0] of all query blocks, [1] of the last `tail` ones.
        weight: what every pair counts, e.g. the rows of a batch that share the mask.
        impl: "auto" (Triton on CUDA, but for masks with a stride) | "triton" | "reference".

    Raises: ValueError for an unknown impl, or a mask with a stride for Triton.
    """
    if runs_triton(impl, mask.device.type == "cuda" and mask.stride is None):
        _add_pairs_triton(mask, into, tail, weight)
    else:
        add_pairs_reference(mask, into, tail, weight)


def add_pairs_reference(mask: Any, into: Tensor, tail: int, weight: int) -> None:
    """The closed form in torch, a few query blocks at a time."""
    q0, q1 = (bound[:, None] for bound in row_bounds(mask.q_len, mask.kv_len, mask.q_block, mask.device))
    first_of_tail = mask.kv_num_blocks.shape[2] - tail
    for index, num, step, size in _lists(mask):
        rows = max(SCRATCH_ELEMENTS // max(index[:, :, 0].numel() * (mask.q_block if mask.stride else 1), 1), 1)
        for start in range(0, index.shape[2], rows):
            part = slice(start, start + rows)
            first = index[:, :, part].long() * step
            listed = torch.arange(index.shape[-1], device=index.device) < num[:, :, part, None]
            pairs = weight * (_pairs_between(mask, first, first + size, q0[part], q1[part]) * listed).sum(-1)
            in_tail = torch.arange(start, start + pairs.shape[2], device=pairs.device) >= first_of_tail
            both = torch.stack((pairs.sum(-1), (pairs * in_tail).sum(-1)))  # [2, B, H]
            into += both.flatten(1).unflatten(1, (-1, into.shape[1])).sum(1)


def _lists(mask: Any) -> list[tuple[Tensor, Tensor, int, int]]:
    """(indices, how many count, tokens between two of them, tokens of one) of the blocks and of the columns."""
    lists = [(mask.kv_indices, mask.kv_num_blocks, mask.step, mask.kv_block)]
    if mask.column_indices is not None:
        lists.append((mask.column_indices, mask.column_num, 1, 1))
    return lists


def _pairs_from(first: Tensor, q0: Tensor, q1: Tensor) -> Tensor:
    """Sum over the rows i in [q0, q1) of the keys j with first <= j <= i (closed form, int64)."""
    q0 = torch.maximum(q0, first)
    rows = (q1 - q0).clamp(min=0)
    return rows * ((q0 + 1 - first) + (q1 - first)) // 2


def _pairs_between(mask: Any, lo: Tensor, hi: Tensor, q0: Tensor, q1: Tensor) -> Tensor:
    """Pairs of the queries q0 <= i < q1 with the keys lo <= j < hi; lo, hi int64 [B, H, rows, *], q0, q1 [rows, 1]."""

    def causal(q0, q1, a, b):
        return _pairs_from(a, q0, q1) - _pairs_from(torch.maximum(a, b), q0, q1)

    if mask.window is None:
        return causal(q0, q1, lo, hi)
    cut = q0.clamp(min=mask.kv_len - mask.last).minimum(q1)  # rows from here on ignore the window
    sink_hi = hi.clamp(max=mask.sink).maximum(lo)
    near = causal(q0, cut, sink_hi, hi) - causal(q0, cut, sink_hi + mask.window, hi + mask.window)
    pairs = causal(cut, q1, lo, hi) + causal(q0, cut, lo, sink_hi) + near
    return pairs if mask.stride is None else pairs + _strided_pairs(mask, sink_hi, hi, q0, cut)


def _strided_pairs(mask: Any, lo: Tensor, hi: Tensor, q0: Tensor, q1: Tensor) -> Tensor:
    """As _pairs_between, those whose distance is a multiple of the stride and not inside the window."""
    stride = mask.stride
    i = q0[..., None] + torch.arange(mask.q_block, device=lo.device)  # [rows, 1, q_block]

    def before(key: Tensor) -> Tensor:
        """Keys below `key` at a multiple of the stride from i."""
        return (key - i % stride + stride - 1).div(stride, rounding_mode="floor").clamp(min=0)

    count = before(hi[..., None].minimum(i - mask.window + 1)) - before(lo[..., None])
    return (count.clamp(min=0) * (i < q1[..., None])).sum(-1)


@triton.jit
def _from(first, q0, q1):
    q0 = tl.maximum(q0, first)
    return tl.maximum(q1 - q0, 0) * ((q0 + 1 - first) + (q1 - first)) // 2


@triton.jit
def _causal(q0, q1, lo, hi):
    return _from(lo, q0, q1) - _from(tl.maximum(lo, hi), q0, q1)


@triton.jit
def pair_counts_kernel(
    num, index, into, heads, into_heads, num_b, num_h, num_r, index_b, index_h, index_r, index_k, into_tail,
    q_len, kv_len, q_block, step, size, tail_row, weight, window, sink, last,
    WINDOW: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    i_r, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    count = tl.load(num + b * num_b + h * num_h + i_r * num_r)
    p_row = index + b * index_b + h * index_h + i_r.to(tl.int64) * index_r
    q0 = (kv_len - q_len + i_r * q_block).to(tl.int64)
    q1 = tl.minimum(q0 + q_block, kv_len)
    pairs = tl.zeros([LISTED], dtype=tl.int64)
    for start in range(0, count, LISTED):
        k = start + tl.arange(0, LISTED)
        lo = tl.load(p_row + k * index_k, mask=k < count, other=0).to(tl.int64) * step
        hi = lo + size
        if WINDOW:
            cut = tl.minimum(tl.maximum(q0, kv_len - last), q1)
            sink_hi = tl.maximum(tl.minimum(hi, sink), lo)
            near = _causal(q0, cut, sink_hi, hi) - _causal(q0, cut, sink_hi + window, hi + window)
            found = _causal(cut, q1, lo, hi) + _causal(q0, cut, lo, sink_hi) + near
        else:
            found = _causal(q0, q1, lo, hi)
        pairs += tl.where(k < count, found, 0)
    total = tl.sum(pairs) * weight
    p_into = into + i_bh % into_heads
    tl.atomic_add(p_into, total)
    if i_r >= tail_row:
        tl.atomic_add(p_into + into_tail, total)


def _add_pairs_triton(mask: Any, into: Tensor, tail: int, weight: int) -> None:
    if mask.stride is not None:
        raise ValueError("the Triton kernel does not count masks with a stride")
    batch, heads, rows = mask.kv_num_blocks.shape
    for index, num, step, size in _lists(mask):
        pair_counts_kernel[(rows, batch * heads)](
            num, index, into, heads, into.shape[1], *num.stride(), *index.stride(), into.stride(0), mask.q_len, mask.kv_len,
            mask.q_block, step, size, rows - tail, weight, mask.window or 0, mask.sink, mask.last,
            WINDOW=mask.window is not None, LISTED=LISTED,
        )  # fmt: skip
