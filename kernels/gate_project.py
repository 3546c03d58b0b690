"""A learned gate's view of pooled blocks: one linear map per head, then RoPE. Op, reference, Triton kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import HALF, INTERPRETED, Launch, power_of_2, runs_triton


def gate_project(
    q: Tensor, k: Tensor, w_q: Tensor | None, w_k: Tensor, tables_q: tuple[Tensor, Tensor], tables_k: tuple[Tensor, Tensor],
    halves: bool = False, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """R(q w_q) and R(k w_k): what SeerAttention's gate compares (Gao et al. 2024, arXiv 2410.13276, section 3.1).

    Args:
        q [B, H, NQ, C_q], k [B, H_kv, NK, C_k]: pooled blocks.
        w_q [H, C_q, G], or None for no map (C_q = G);  w_k [H_w, C_k, G], H_w a multiple of H_kv: neighbouring heads of w_k
            read the same head of k.
        tables_q, tables_k: RoPE's cos and sin, fp32 [NQ or NK, R], R even and at most G, half-split: channels c and c + R / 2
            turn together, those from R on stay.
        halves: the kernel writes what would be fp32 as choose_blocks.halves(), [B, H, N, 2, G].
        impl: "auto" (Triton on CUDA, where no gradient is asked for) | "triton" | "reference".

    Returns: [B, H, NQ, G] and [B, H_w, NK, G] in the weights' dtype, but for `halves`. The reference computes in that dtype,
        the kernel in fp32 from operands of that dtype (fp32 ones as three bf16 products, which err by at most 3 * 2^-16 of
        sum |x_c w_c|).
    Raises: ValueError for shapes that do not fit together, an unknown impl, or a dtype that the kernel does not take.
    """
    _check("q", q.shape, None if w_q is None else w_q.shape, w_k.shape[2], *(table.shape for table in tables_q))
    _check("k", k.shape, w_k.shape, w_k.shape[2], *(table.shape for table in tables_k))
    taken = w_k.dtype in (torch.float16, torch.bfloat16, torch.float32)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, w_q, w_k))
    if not runs_triton(impl, taken and not trained and q.is_cuda):
        return gate_project_reference(q, w_q, w_k.dtype, tables_q), gate_project_reference(k, w_k, w_k.dtype, tables_k)
    if not taken:
        raise ValueError(f"the Triton kernel supports fp16, bf16 and fp32 weights, got {w_k.dtype}")
    return _project_triton(q, k, w_q, w_k, tables_q, tables_k, halves and w_k.dtype == torch.float32)


@functools.lru_cache(256)
def _check(
    name: str, x: tuple[int, ...], w: tuple[int, ...] | None, outer: int, cos: tuple[int, ...], sin: tuple[int, ...]
) -> None:
    if cos != sin or cos[0] != x[2] or cos[1] > outer or cos[1] % 2:
        raise ValueError(
            f"RoPE tables [blocks={x[2]}, at most {outer}] of {name} expected, got cos {tuple(cos)} and sin {tuple(sin)}"
        )
    if not (x[3] == outer if w is None else w[0] % x[1] == 0 and w[1:] == (x[3], outer)):
        raise ValueError(f"the gate's map {None if w is None else tuple(w)} does not fit pooled {name} {tuple(x)}")


def gate_project_reference(x: Tensor, w: Tensor | None, dtype: torch.dtype, tables: tuple[Tensor, Tensor]) -> Tensor:
    """The definition in torch, of one side; every step in the weights' dtype."""
    x = x.to(dtype)
    if w is not None:
        x = x.repeat_interleave(w.shape[0] // x.shape[1], dim=1) @ w
    half = tables[0].shape[1] // 2
    (cos_a, cos_b), (sin_a, sin_b) = (table.to(dtype).split(half, dim=1) for table in tables)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b, rest), dim=-1)


@triton.jit
def _rows(p, o_m, o_c, stride, m_m, limit):
    """[BM, BC] of fp32 rows; o_c counts up to `limit`."""
    return tl.load(p + o_m[:, None] * stride + o_c[None, :], mask=m_m[:, None] & (o_c < limit)[None, :], other=0.0)


@triton.jit
def _store(p, x, mask, LOW: tl.constexpr):
    """fp32 x, or its halves where the low ones belong LOW > 0 numbers behind the high ones."""
    tl.store(p, x, mask=mask)
    if LOW:
        tl.store(p + LOW, x - x.to(p.dtype.element_ty).to(tl.float32), mask=mask)


@triton.jit
def _project_tile(
    x, w, cos, sin, out, i_program, x_heads, out_heads, rows,
    C: tl.constexpr, G: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    tiles = (rows + BM - 1) // BM
    i_bh = i_program // tiles
    i_h = i_bh % out_heads
    i_x = i_bh // out_heads * x_heads + i_h // (out_heads // x_heads)
    o_m = i_program % tiles * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_h = tl.arange(0, BH)
    o_g = tl.arange(0, BG)
    H: tl.constexpr = R // 2
    x += i_x.to(tl.int64) * rows * C
    STRIDE: tl.constexpr = 2 * G if LOW else G
    out += i_bh.to(tl.int64) * rows * STRIDE
    # The channels that RoPE turns together come as two tiles, those it leaves alone as a third.
    if MAP:
        w += i_h.to(tl.int64) * C * G
        o_k = tl.arange(0, BK)
        b_a = tl.zeros([BM, BH], tl.float32)
        b_b = tl.zeros([BM, BH], tl.float32)
        b_rest = tl.zeros([BM, BG], tl.float32)
        for c in range(0, C, BK):
            m_k = c + o_k < C
            # [BM, BK]
            b_x = _rows(x + c, o_m, o_k, C, m_m, C - c).to(w.dtype.element_ty)
            # [BK, BH]
            p_w = w + (c + o_k)[:, None] * G + o_h[None, :]
            m_w = m_k[:, None] & (o_h < H)[None, :]
            b_a = tl.dot(b_x, tl.load(p_w, mask=m_w, other=0.0), b_a, input_precision=PRECISION)
            b_b = tl.dot(b_x, tl.load(p_w + H, mask=m_w, other=0.0), b_b, input_precision=PRECISION)
            if R < G:
                p_rest = w + R + (c + o_k)[:, None] * G + o_g[None, :]
                b_w = tl.load(p_rest, mask=m_k[:, None] & (o_g < G - R)[None, :], other=0.0)
                b_rest = tl.dot(b_x, b_w, b_rest, input_precision=PRECISION)
    else:
        b_a = _rows(x, o_m, o_h, C, m_m, H)
        b_b = _rows(x + H, o_m, o_h, C, m_m, H)
        b_rest = _rows(x + R, o_m, o_g, C, m_m, G - R)
    b_cos = _rows(cos, o_m, o_h, R, m_m, H)
    b_sin = _rows(sin, o_m, o_h, R, m_m, H)
    p_out = out + o_m[:, None] * STRIDE + o_h[None, :]
    m_out = m_m[:, None] & (o_h < H)[None, :]
    _store(p_out, b_a * b_cos - b_b * b_sin, m_out, LOW)
    b_cos = _rows(cos + H, o_m, o_h, R, m_m, H)
    b_sin = _rows(sin + H, o_m, o_h, R, m_m, H)
    _store(p_out + H, b_b * b_cos + b_a * b_sin, m_out, LOW)
    if R < G:
        _store(out + R + o_m[:, None] * STRIDE + o_g[None, :], b_rest, m_m[:, None] & (o_g < G - R)[None, :], LOW)


@triton.jit
def gate_project_fwd_kernel(
    q, k, w_q, w_k, cos_q, sin_q, cos_k, sin_k, q_out, k_out, k_programs, heads, kv_heads, w_heads, q_rows, k_rows,
    CQ: tl.constexpr, CK: tl.constexpr, G: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, MAP_Q: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """One program: BM blocks of one head, first those of k, whose map is always there and takes longer."""
    i_program = tl.program_id(0)
    if i_program < k_programs:
        _project_tile(
            k, w_k, cos_k, sin_k, k_out, i_program, kv_heads, w_heads, k_rows,
            CK, G, R, BH, BG, BM, BK, True, PRECISION, LOW,
        )  # fmt: skip
    else:
        _project_tile(
            q, w_q, cos_q, sin_q, q_out, i_program - k_programs, heads, heads, q_rows,
            CQ, G, R, BH, BG, BM, BK, MAP_Q, PRECISION, LOW,
        )  # fmt: skip


def _launch_options(dtype: torch.dtype) -> dict[str, Any]:
    """BM: blocks of a program. On an H100 512 and 2048 blocks take 0.035 and 0.117 ms; as three TF32 products 0.044 and 0.179,
    with 8 warps 0.048 and 0.175, with 64 blocks 0.036 and 0.118 (and 128 blocks 0.023 instead of 0.019)."""
    split = dtype == torch.float32 and not INTERPRETED  # the interpreter is exact and does not know the word
    return dict(BM=32, BK=32, num_warps=4, num_stages=3, PRECISION="bf16x3" if split else "tf32")


@functools.lru_cache(256)
def _launch(
    q: tuple[int, ...], k: tuple[int, ...], weights: tuple[int, ...], dtype: torch.dtype, turned: int, map_q: bool,
    halves: bool,
) -> tuple[Launch, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The launch for these shapes, and the shapes of what it writes."""
    (batch, heads, q_rows, q_channels), (_, kv_heads, k_rows, k_channels), (w_heads, _, outer) = q, k, weights
    options = _launch_options(dtype)
    k_programs = batch * w_heads * -(-k_rows // options["BM"])
    q_programs = batch * heads * -(-q_rows // options["BM"])
    launch = Launch(
        gate_project_fwd_kernel, (k_programs + q_programs,), k_programs, heads, kv_heads, w_heads, q_rows, k_rows,
        CQ=q_channels, CK=k_channels, G=outer, R=turned, BH=power_of_2(max(turned // 2, 16)),
        BG=power_of_2(max(outer - turned, 16)), MAP_Q=map_q, LOW=outer if halves else 0, **options,
    )  # fmt: skip
    parts = (2, outer) if halves else (outer,)
    return launch, (batch, heads, q_rows, *parts), (batch, w_heads, k_rows, *parts)


def _project_triton(
    q: Tensor, k: Tensor, w_q: Tensor | None, w_k: Tensor, tables_q: tuple[Tensor, Tensor], tables_k: tuple[Tensor, Tensor],
    halves: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    turned = tables_k[0].shape[1]
    if tables_q[0].shape[1] != turned:
        raise ValueError(f"RoPE turns {tables_q[0].shape[1]} channels of q and {turned} of k")
    launch, *shapes = _launch(q.shape, k.shape, w_k.shape, w_k.dtype, turned, w_q is not None, halves)
    q_out, k_out = (torch.empty(shape, dtype=HALF if halves else w_k.dtype, device=q.device) for shape in shapes)
    read = (q, k, w_k if w_q is None else w_q, w_k, *tables_q, *tables_k)
    launch(*(x.contiguous() for x in read), q_out, k_out)
    return q_out, k_out
