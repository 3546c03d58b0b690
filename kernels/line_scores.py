"""Attention of the last queries, summed along vertical and slash lines: op, reference, Triton kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2E, runs_triton

SCRATCH_BYTES = 1 << 28  # of probabilities at a time
MAX_ROWS, MAX_DIM = 128, 128  # of the Triton kernels; more channels need more shared memory than an H100 has
SPAN = 2048  # keys of one program


def line_scores(q: Tensor, k: Tensor, scale: float, last: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, causal) of the last queries, summed over every key column and over every diagonal.

    Args:
        q: [B, H, q_len, D];  k: [B, H_kv, kv_len, D], H % H_kv == 0; q's last row sits at k's last row.
        scale: logits factor.
        last: how many queries, all if there are fewer.
        impl: "auto" (Triton for 16-bit tensors on CUDA, at most 128 queries and channels) | "triton" | "reference".

    Returns: vertical fp32 [B, H, kv_len] by key, slash fp32 [B, H, kv_len] by distance i - j. No sync.
    Raises: ValueError for an unknown impl, or where "triton" does not apply.
    """
    q = q[:, :, -last:]
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] <= MAX_ROWS and q.shape[3] <= MAX_DIM
    if impl == "triton" and not fits:
        raise ValueError(f"the Triton kernels take 16-bit q of at most {MAX_ROWS} rows and {MAX_DIM} channels, got "
                         f"{q.dtype} {tuple(q.shape)}")  # fmt: skip
    return (_line_scores_triton if runs_triton(impl, fits and q.is_cuda) else line_scores_reference)(q, k, scale)


def line_scores_reference(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition in torch, a few heads at a time; q holds the last queries alone."""
    batch, kv_heads, kv_len, _ = k.shape
    q = q.float() * scale
    heads, rows = q.shape[1:3]
    group = heads // kv_heads
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    step = min(max(SCRATCH_BYTES // (4 * batch * group * rows * kv_len), 1), kv_heads)
    vertical, slash = (torch.empty(batch, heads, kv_len, device=q.device) for _ in range(2))
    for h in range(0, kv_heads, step):
        keys = k[:, h : h + step].float()
        part = slice(h * group, (h + keys.shape[1]) * group)
        x = q[:, part].reshape(batch, keys.shape[1], group * rows, -1)
        logits = (x @ keys.transpose(-1, -2)).view(batch, -1, rows, kv_len)
        logits[..., -rows:].masked_fill_(future, float("-inf"))
        p = logits.softmax(-1)
        del logits  # two maps at a time, not three
        vertical[:, part] = p.sum(-2)
        slash[:, part] = _diagonal_sums(p)
    return vertical, slash


def _diagonal_sums(p: Tensor) -> Tensor:
    """[B, H, rows, keys], the last row at the last key -> [B, H, keys]: entry d sums p over i - j = d."""
    batch, heads, rows, keys = p.shape
    # With rows - 1 zeros before every row, one element further from row to row follows a diagonal.
    padded = F.pad(p, (rows - 1, 0))
    width = padded.shape[-1]
    diagonals = padded.as_strided((batch, heads, rows, keys), (heads * rows * width, rows * width, width + 1, 1))
    return diagonals.sum(-2).flip(-1)


@triton.jit
def _logits(
    b_q, k, o_m, o_n, stride_kn, rows, kv_len, scale_log2, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Base-2 logits of the rows o_m [BM] and the keys o_n [BN], -inf where a row does not see the key."""
    o_d = tl.arange(0, BD)
    m_k = (o_n < kv_len)[:, None] & (o_d < D)[None, :]
    # [BN, BD]
    b_k = tl.load(k + o_n[:, None].to(tl.int64) * stride_kn + o_d[None, :], mask=m_k, other=0.0)
    # [BM, BN]
    b_s = tl.dot(b_q, b_k.T) * scale_log2
    seen = (o_n[None, :] <= (kv_len - rows + o_m)[:, None]) & (o_m < rows)[:, None]
    return tl.where(seen, b_s, float("-inf"))


@triton.jit
def line_lse_kernel(
    q, k, lse, stride_kb, stride_kh, stride_kn, heads, group, rows, kv_len, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: log2 of the sum of exponentials of one head's rows over SPAN keys."""
    i_span = tl.program_id(0)
    i_bh = tl.program_id(1)
    k += (i_bh // heads).to(tl.int64) * stride_kb + (i_bh % heads // group).to(tl.int64) * stride_kh
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_q = (o_m < rows)[:, None] & (o_d < D)[None, :]
    # [BM, BD]
    b_q = tl.load(q + (i_bh * rows + o_m[:, None]) * D + o_d[None, :], mask=m_q, other=0.0)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for first in range(i_span * SPAN, tl.minimum((i_span + 1) * SPAN, kv_len), BN):
        b_s = _logits(b_q, k, o_m, first + tl.arange(0, BN), stride_kn, rows, kv_len, scale_log2, D, BD)
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_m = b_new
    b_l = tl.maximum(b_l, 1.0)  # the largest logit adds 1; a row that sees none of these keys stays at -inf
    tl.store(lse + (i_bh * tl.num_programs(0) + i_span) * rows + o_m, b_m + tl.log2(b_l), mask=o_m < rows)


@triton.jit
def line_sums_kernel(
    q, k, lse, vertical, diagonal, stride_kb, stride_kh, stride_kn, stride_side, heads, group, rows, kv_len, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: the column and diagonal sums of one head's probabilities over BN >= rows keys.

    A tile has rows + BN - 1 diagonals. Row m is turned left by m, so that a column of the turned tile holds the diagonal
    that starts in it (side 0 of `diagonal`) and the one that starts BN keys before (side 1), which the neighbour adds to.
    """
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1)
    k += (i_bh // heads).to(tl.int64) * stride_kb + (i_bh % heads // group).to(tl.int64) * stride_kh
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_c = tl.arange(0, BN)
    o_n = i_tile * BN + o_c
    m_q = (o_m < rows)[:, None] & (o_d < D)[None, :]
    # [BM, BD]
    b_q = tl.load(q + (i_bh * rows + o_m[:, None]) * D + o_d[None, :], mask=m_q, other=0.0)
    b_lse = tl.load(lse + i_bh * rows + o_m, mask=o_m < rows, other=0.0)
    b_s = _logits(b_q, k, o_m, o_n, stride_kn, rows, kv_len, scale_log2, D, BD)
    # [BM, BN]
    b_p = tl.exp2(b_s - b_lse[:, None])
    tl.store(vertical + i_bh.to(tl.int64) * kv_len + o_n, tl.sum(b_p, 0), mask=o_n < kv_len)
    turn = o_c[None, :] + o_m[:, None]
    b_t = tl.gather(b_p, turn % BN, 1)
    diagonal += (i_bh.to(tl.int64) * tl.num_programs(0) + i_tile) * BN
    tl.store(diagonal + o_c, tl.sum(tl.where(turn < BN, b_t, 0.0), 0))
    tl.store(diagonal + stride_side + o_c, tl.sum(tl.where(turn < BN, 0.0, b_t), 0))


def _line_scores_triton(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    q, k = q.contiguous(), k if k.stride(-1) == 1 else k.contiguous()
    shape = dict(D=dim, BD=triton.next_power_of_2(dim), BM=max(triton.next_power_of_2(rows), 16), BN=MAX_ROWS, num_warps=8)
    numbers = (heads, heads // kv_heads, rows, kv_len, scale * LOG2E)
    spans, tiles = triton.cdiv(kv_len, SPAN), triton.cdiv(kv_len, MAX_ROWS)
    new = dict(dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * heads, spans, rows, **new)
    line_lse_kernel[(spans, batch * heads)](q, k, lse, *k.stride()[:3], *numbers, **shape, SPAN=SPAN)
    lse = (lse / LOG2E).logsumexp(1) * LOG2E
    vertical = torch.empty(batch, heads, kv_len, **new)
    diagonal = torch.empty(2, batch, heads, tiles * MAX_ROWS, **new)
    line_sums_kernel[(tiles, batch * heads)](
        q, k, lse, vertical, diagonal, *k.stride()[:3], diagonal.stride(0), *numbers, **shape
    )  # fmt: skip
    # Entry c of `starts` is the diagonal that meets the first row at key c - MAX_ROWS, at distance kv_len - rows - that key.
    starts = F.pad(diagonal[0], (MAX_ROWS, 0)) + F.pad(diagonal[1], (0, MAX_ROWS))
    slash = starts[..., MAX_ROWS - rows + 1 : MAX_ROWS - rows + 1 + kv_len].flip(-1)
    return vertical, slash
