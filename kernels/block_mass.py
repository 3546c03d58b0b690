"""Softmax mass of the dense causal attention per block of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 21}  # logits alive at a time: fills a GPU, stays near a CPU's cache


def block_mass(q: Tensor, k: Tensor, scale: float, q_block: int, kv_block: int, reduce: str = "mass") -> Tensor:
    """Exact attention probability in every block of the dense causal map.

    P = softmax(scale * q k^T, causal) with q's last row at k's last row, computed in fp32 a few query blocks at a time, so
    the whole map never exists.

    Args:
        q: [B, H, q_len, D];  k: [B, H_kv, kv_len, D], H % H_kv == 0, q_len <= kv_len.
        scale: logits factor.
        q_block, kv_block: tokens.
        reduce: "mass" sums P over the block, so a row of blocks sums to its number of queries; "max" takes its largest P
            (the teacher of SeerAttention's distillation, arXiv 2410.13276 section 3.2).

    Returns: fp32 [B, H, NQ, NK]; blocks after the causal end hold 0.
    Raises: ValueError for another `reduce`.
    """
    if reduce not in ("mass", "max"):
        raise ValueError(f"reduce is 'mass' or 'max', got {reduce!r}")
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group, offset = heads // kv_heads, kv_len - q_len
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    out = torch.zeros(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    scratch = SCRATCH_ELEMENTS.get(q.device.type, 1 << 24)
    one_head = batch * group * q_block * columns * kv_block
    heads_at_once = min(max(scratch // one_head, 1), kv_heads)
    rows_at_once = max(scratch // (one_head * heads_at_once), 1)
    for h in range(0, kv_heads, heads_at_once):
        # Padded keys come after the last query, so the causal mask hides them.
        k_part = F.pad(k[:, h : h + heads_at_once].float(), (0, 0, 0, columns * kv_block - kv_len))
        q_part = q[:, h * group : (h + heads_at_once) * group]
        for r in range(0, rows, rows_at_once):
            start, end = r * q_block, min((r + rows_at_once) * q_block, q_len)
            blocks = -(-(offset + end) // kv_block)
            x = q_part[:, :, start:end].float().reshape(batch, k_part.shape[1], group * (end - start), dim)
            logits = (x * scale) @ k_part[:, :, : blocks * kv_block].transpose(-1, -2)
            p = _causal_softmax(logits.view(batch, -1, end - start, blocks * kv_block), offset + start)
            part = _reduce_blocks(p, q_block, kv_block, reduce)
            out[:, h * group : (h + heads_at_once) * group, r : r + part.shape[2], :blocks] = part
    return out


def _causal_softmax(logits: Tensor, first: int) -> Tensor:
    """softmax over the keys j <= i, where row 0 of logits [..., rows, keys] is query i = first. Overwrites logits."""
    rows, keys = logits.shape[-2:]
    future = torch.ones(rows, keys - first, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., first:].masked_fill_(future, float("-inf"))
    return logits.softmax(-1)


def _reduce_blocks(p: Tensor, q_block: int, kv_block: int, reduce: str) -> Tensor:
    """[B, H, rows, keys] -> [B, H, ceil(rows / q_block), keys / kv_block]."""
    per_key_block = p.unflatten(-1, (-1, kv_block))
    per_key_block = per_key_block.sum(-1) if reduce == "mass" else per_key_block.amax(-1)
    per_key_block = F.pad(per_key_block, (0, 0, 0, -p.shape[2] % q_block))
    blocks = per_key_block.unflatten(2, (-1, q_block))
    return blocks.sum(3) if reduce == "mass" else blocks.amax(3)
