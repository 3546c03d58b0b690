"""Choosing blocks from scores: what several methods share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .block_pool import block_pool


def block_pairs(q_len: int, kv_len: int, q_block: int, kv_block: int, device=None) -> Tensor:
    """Causally visible (query, key) pairs in every block, int64 [NQ, NK]."""
    q0 = torch.arange(kv_len - q_len, kv_len, q_block, device=device)[:, None]
    q1 = (q0 + q_block).clamp(max=kv_len)

    def pairs_up_to(key: Tensor) -> Tensor:
        """Pairs of the rows [q0, q1) with the keys j < key: row i sees min(i + 1, key) of them."""
        full = (q1 - key.maximum(q0)).clamp(min=0)  # rows that see all of these keys
        partial = q1 - q0 - full
        return full * key + partial * (2 * q0 + partial + 1) // 2

    start = torch.arange(0, kv_len, kv_block, device=device)[None, :]
    return pairs_up_to((start + kv_block).clamp(max=kv_len)) - pairs_up_to(start)


def keep_top(
    scores: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, density: float, across_rows: bool = False
) -> BlockMask:
    """BlockMask of the best-scored causal blocks of every row, exact about density and without a sync.

    Every row keeps at least one block; a head's total is within half a block of `density` of its visible pairs, unless one
    block a row is more already. Every row keeps about `density` of its visible pairs, so one with a cheap block on the
    diagonal gets more blocks than one without; with `across_rows` instead the pairs go where a pair brings the highest
    score, whatever the row. Masks nest: a higher density only adds blocks. Ties go to the earlier block.

    Args:
        scores: [B, H, NQ, NK], NaN counts as -inf; lengths and blocks in tokens; density in (0, 1].
        across_rows: scores are amounts (mass), comparable between rows.
    Raises: ValueError for another shape.
    """
    pairs = block_pairs(q_len, kv_len, q_block, kv_block, scores.device)
    if scores.shape[-2:] != pairs.shape:
        raise ValueError(f"score() must return [B, H, {pairs.shape[0]}, {pairs.shape[1]}], got {tuple(scores.shape)}")
    scores = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    scores = scores.masked_fill(pairs == 0, float("-inf"))
    offset = kv_len - q_len
    if offset % kv_block or kv_block % q_block:
        scores = seen_first(scores, offset, q_block, kv_block)
    # No row needs more: it takes its share of pairs, the half block of every row by which rounding may raise the share,
    # and the blocks at the diagonal that are smaller than they look.
    width = pairs.shape[1] if across_rows else math.ceil(density * pairs.shape[1]) + 3 + -(-q_block // kv_block)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    gain = pairs.expand(scores.shape).gather(-1, order)
    # Blocks are taken as they fall due, a row's in the order of their scores.
    if across_rows:
        due = -(scores.gather(-1, order) / gain).cummin(-1).values
    else:  # a row's n-th block at the share of pairs that it brings the row nearest to
        due = (gain.cumsum(-1) - gain / 2) / pairs.sum(-1, keepdim=True)
    due = due.float().masked_fill(gain == 0, float("inf"))
    due[..., 0] = float("-inf")
    sequence = due.flatten(-2).sort(dim=-1, stable=True)
    taken = gain.flatten(-2).gather(-1, sequence.indices)
    target = density * (q_len * offset + q_len * (q_len + 1) // 2)
    within = 2 * taken.cumsum(-1) - taken <= int(2 * target)  # in integers: fp32 cannot count the pairs of 8k tokens
    taken = within & sequence.values.isfinite() | (sequence.values == float("-inf"))
    kept = torch.zeros_like(taken).scatter_(-1, sequence.indices, taken).view(gain.shape)
    index = order.masked_fill(~kept, pairs.shape[1]).sort(dim=-1).values.to(torch.int32)
    return BlockMask(kept.sum(-1, dtype=torch.int32), index, q_len, kv_len, q_block, kv_block, trusted=True)


def seen_first(scores: Tensor, offset: int, q_block: int, kv_block: int) -> Tensor:
    """Scores with +inf for every row's best block among those that its first query sees, so that no query is left blind."""
    rows, columns = scores.shape[-2:]
    first_query = offset + q_block * torch.arange(rows, device=scores.device)
    first_key = kv_block * torch.arange(columns, device=scores.device)
    best = scores.masked_fill(first_key > first_query[:, None], float("-inf")).argmax(-1, keepdim=True)
    return scores.scatter(-1, best, float("inf"))


def top_blocks(scores: Tensor, width: int) -> Tensor:
    """The numbers of every row's `width` <= NK best blocks, ascending, then NK where fewer are candidates; no sync.

    scores [..., NQ, NK], -inf where a block is no candidate -> int32 [..., NQ, width]. Ties are torch.topk's to break.
    """
    best = scores.topk(width, dim=-1, sorted=False)
    index = best.indices.to(torch.int32).masked_fill_(best.values == float("-inf"), scores.shape[-1])
    return index.sort(dim=-1).values


def block_mean(x: Tensor, block: int) -> Tensor:
    """Mean over every `block` tokens, the ragged last block over what it has; no fp32 copy of x is made.

    x [B, H, L, D] -> fp32 [B, H, ceil(L / block), D].
    """
    return block_pool(x, block).float()


def random_scores(seed: int, layer: int, head: Tensor, row: Tensor, blocks: int) -> Tensor:
    """Uniform fp32 numbers in [0, 2^24), [heads, rows, blocks]: a hash of (seed, layer, head, row, block), so the same on
    every device and for every batch size. head, row: int64 [heads], [rows], what names each."""
    column = torch.arange(blocks, device=row.device)
    hashed = _mix(head[:, None, None] ^ _mix(layer ^ _mix(seed)))
    return (_mix(column ^ _mix(row[:, None] ^ hashed)) >> 8).float()  # 24 bits, exact in fp32


MASK_32 = 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """A bijection of 32-bit integers (an int, or int64 tensor) that flips about half of the bits for every input bit changed.

    Source: the finaliser of MurmurHash3 (Appleby, public domain), after a step of the golden ratio so that 0 moves.
    """
    x = (x + 0x9E3779B9) & MASK_32
    # A product may overflow int64; its low 32 bits are right all the same.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)
