"""What gates learn and how well they do: the block map of true attention, the loss against it, the recall of its mass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention_with_map import has_kernel
from ...kernels.block_mass import block_mass

LOSS_FACTOR = 10.0  # the authors'; it moves no optimum, and with AdamW hardly the path
RECALL_DENSITY = 0.1  # of the recall that training records


def block_map(q: Tensor, k: Tensor, of: str = "max", block: int = 64, scale: float | None = None) -> Tensor:
    """The teacher: causal softmax probabilities pooled per block x block and normalised to sum 1 in every row, exact.

    Args: q [B, H, N, D], k [B, H_kv, N, D] after RoPE; of: block_mass()'s reduce, of which "max" is the paper's.
    Returns: fp32 [B, H, NB, NB], NB = ceil(N / block).
    """
    pooled = block_mass(q, k, q.shape[-1] ** -0.5 if scale is None else scale, block, block, of)
    return pooled / pooled.sum(-1, keepdim=True)


def resolve_teacher(teacher: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int, of: str) -> str:
    """Who computes the ground truth: "kernel" (attention_with_map) or "torch" (block_map); "auto" is the kernel where it runs.

    Raises: ValueError for another name, or where the kernel was asked for and does not run.
    """
    runs = device.type == "cuda" and has_kernel(torch.empty(0, head_dim, dtype=dtype), block, of)
    if teacher == "auto":
        return "kernel" if runs else "torch"
    if teacher not in ("kernel", "torch"):
        raise ValueError(f"teacher is auto, kernel or torch, got {teacher!r}")
    if teacher == "kernel" and not runs:
        raise ValueError(
            f"the ground-truth kernel does not run on {device.type} with {dtype}, head_dim {head_dim}, blocks of {block} and "
            f"loss {of}: use --teacher torch"
        )
    return teacher


def gate_loss(logits: Tensor, teacher: Tensor, drop: float) -> Tensor:
    """KL(teacher || softmax of the block-causal logits), mean over all entries, without the first `drop` of rows, x 10."""
    blocks = logits.shape[-1]
    future = torch.ones(blocks, blocks, dtype=torch.bool, device=logits.device).triu(1)
    # Finite, because F.kl_div multiplies the log by the teacher's 0 there.
    student = logits.float().masked_fill(future, -1e30).log_softmax(-1)
    first = int(blocks * drop)
    return LOSS_FACTOR * F.kl_div(student[..., first:, :], teacher[..., first:, :], reduction="none").mean()


@torch.no_grad()
def recall(scores: Tensor, teacher: Tensor) -> Tensor:
    """Share of the teacher's map that the best blocks by `scores` hold, RECALL_DENSITY of those that a row sees, at least 1.

    Args: scores, teacher [B, H, NB, NB]; the teacher's rows sum to 1. Returns: mean over rows and heads, 0-d.
    """
    blocks = scores.shape[-1]
    seen = torch.arange(1, blocks + 1, device=scores.device)
    order = scores.masked_fill(seen[None, :] > seen[:, None], float("-inf")).argsort(dim=-1, descending=True, stable=True)
    last = (RECALL_DENSITY * seen).round().long().clamp(min=1)[:, None] - 1
    kept = teacher.gather(-1, order).cumsum(-1)
    return kept.gather(-1, last.expand(*kept.shape[:-1], 1)).mean()
