"""The dense causal attention map in bounded memory, and its softmax mass per block of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mass", "max", "row_mass")
SCRATCH_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 21}  # logits alive at a time: fills a GPU, stays near a CPU's cache


def attention_map(
    q: Tensor, k: Tensor, scale: float, row_step: int = 1, key_step: int = 1, first_row: int = 0
) -> Iterator[tuple[slice, int, Tensor]]:
    """softmax(scale * q k^T, causal) in fp32, a few heads and rows at a time, so that the whole map never exists.

    Args:
        q: [B, H, q_len, D];  k: [B, H_kv, kv_len, D], H % H_kv == 0; q's last row sits at k's last row.
        row_step, key_step: every piece starts at first_row + a multiple of row_step, and has a multiple of row_step rows
            (the last one may have fewer) and a multiple of key_step keys (those after kv_len are 0).

    Yields: (query heads, first row in q, P [B, heads, rows, keys]), keys cut after the last one that the rows see.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group, offset = heads // kv_heads, kv_len - q_len
    one_head = batch * group * row_step * kv_len
    scratch = SCRATCH_ELEMENTS.get(q.device.type, SCRATCH_ELEMENTS["cpu"])
    heads_at_once = min(max(scratch // one_head, 1), kv_heads)
    rows = max(scratch // (one_head * heads_at_once), 1) * row_step
    for h in range(0, kv_heads, heads_at_once):
        # Padded keys come after the last query, so the causal mask hides them.
        k_part = F.pad(k[:, h : h + heads_at_once].float(), (0, 0, 0, -kv_len % key_step))
        part = slice(h * group, (h + k_part.shape[1]) * group)
        for start in range(first_row, q_len, rows):
            end = min(start + rows, q_len)
            keys = -(-(offset + end) // key_step) * key_step
            x = q[:, part, start:end].float().reshape(batch, k_part.shape[1], group * (end - start), dim)
            logits = ((x * scale) @ k_part[:, :, :keys].transpose(-1, -2)).view(batch, -1, end - start, keys)
            first = offset + start
            future = torch.ones(end - start, keys - first, dtype=torch.bool, device=q.device).triu(1)
            logits[..., first:].masked_fill_(future, float("-inf"))
            yield part, start, logits.softmax(-1)


def block_mass(q: Tensor, k: Tensor, scale: float, q_block: int, kv_block: int, reduce: str = "mass") -> Tensor:
    """Exact attention probability in every block of the dense causal map.

    Args:
        q: [B, H, q_len, D];  k: [B, H_kv, kv_len, D], H % H_kv == 0, q_len <= kv_len.
        scale: logits factor.
        q_block, kv_block: tokens.
        reduce: "mass" sums the softmax probability over the block, so a row of blocks sums to its number of queries; "max"
            takes the largest (the teacher of SeerAttention's distillation, arXiv 2410.13276 section 3.2); "row_mass" sums over
            the keys and takes the largest row: what the query that needs the block most would lose without it.

    Returns: fp32 [B, H, NQ, NK]; blocks after the causal end hold 0.
    Raises: ValueError for another `reduce`.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    shape = (*q.shape[:2], -(-q.shape[2] // q_block), -(-k.shape[2] // kv_block))
    out = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for heads, start, p in attention_map(q, k, scale, q_block, kv_block):
        per_key_block = p.unflatten(-1, (-1, kv_block))
        per_key_block = per_key_block.amax(-1) if reduce == "max" else per_key_block.sum(-1)
        per_key_block = F.pad(per_key_block, (0, 0, 0, -p.shape[2] % q_block))
        blocks = per_key_block.unflatten(2, (-1, q_block))
        blocks = blocks.sum(3) if reduce == "mass" else blocks.amax(3)
        r = start // q_block
        out[:, heads, r : r + blocks.shape[2], : blocks.shape[3]] = blocks
    return out
