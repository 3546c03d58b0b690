"""Softmax mass of sums over antidiagonals, per block: op, reference, Triton kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block_mass import block_mass
from .block_sparse_attention import has_triton
from .launch import LOG2E, aligned, runs_triton

MAX_GROUPS = 128  # stride groups of a block; a tile of the kernel has as many columns
SCRATCH_BYTES = 1 << 28  # the kernel's partial sums alive at a time


def antidiagonal_mass(q: Tensor, k: Tensor, scale: float, stride: int, block: int, impl: str = "auto") -> Tensor:
    """Softmax mass of every block in the map of antidiagonal sums.

    The tokens are taken in groups of `stride`. Entry (a, b) of the map is the sum of q . k over the antidiagonal of query
    group a and key group b, in which query stride - 1 - p meets key p, times scale / stride. Softmax runs over the key groups
    b <= a, and the probabilities are summed over the groups of each block.

    A group at the end that has fewer than `stride` tokens counts whole, with zeros for what it lacks. Groups and blocks of q
    are counted from its first row, and its last group sits at k's last group: with fewer queries than keys the map is that of
    the last rows of a whole prompt where q starts at a multiple of `stride`, and up to stride - 1 tokens off elsewhere.

    Source: Xu et al. 2025 (arXiv 2503.16428), section 2.1 and Algorithm 1.

    Args:
        q: [B, H, q_len, D] bf16/fp16/fp32;  k: [B, H_kv, kv_len, D], H % H_kv == 0, q_len <= kv_len.
        scale: logits factor of the attention.
        stride, block: tokens; stride divides block. The Triton kernels take powers of 2, block at most 128 strides.
        impl: "auto" | "triton" | "reference"; a named one never falls back.

    Returns: fp32 [B, H, NQ, NK]; a row sums to its number of groups, blocks after the causal end hold 0. Products are summed
    in fp32. The Triton kernels keep up to 256 MiB of partial sums, or those of one head, and copy a q or k of ragged length.
    Raises: ValueError for an unknown impl, or what the Triton kernels do not take.
    """
    if runs_triton(impl, has_triton(q)):
        return _triton_mass(q, k, scale, stride, block)
    return antidiagonal_mass_reference(q, k, scale, stride, block)


def antidiagonal_mass_reference(q: Tensor, k: Tensor, scale: float, stride: int, block: int) -> Tensor:
    """The definition in torch: a group's tokens become channels of one row, the queries' in reverse."""
    q_rows, k_rows = (_whole_groups(x, stride).unflatten(2, (-1, stride)) for x in (q, k))
    q_rows, k_rows = q_rows.flip(3).flatten(3), k_rows.flatten(3)
    return block_mass(q_rows, k_rows, scale / stride, block // stride, block // stride)


def _whole_groups(x: Tensor, stride: int) -> Tensor:
    """x [B, H, L, D], with zeros after the last token when it does not end a group."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % stride)) if x.shape[2] % stride else x


@triton.jit(do_not_specialize=["first_head"])
def antidiagonal_blocks_fwd_kernel(
    q_box, k_box, part, lse, q_row_b, q_row_h, q_col_h, q_col_n, k_row_b, k_row_h, k_col_h, k_col_n,
    first_head, heads, group, shift, key_groups, rows, width, scale_log2,
    S: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head's map. Writes log2 of the sum of 2^logit over the G columns of every block, and over
    all columns: the row's normaliser is known only at the end, and a second pass over q and k would double the products."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_tile = tl.num_programs(1) - 1 - tl.program_id(1)  # long rows first
    i_b = (i_bh // heads).to(tl.int32)
    i_h = (i_bh % heads).to(tl.int32)
    i_kv = (first_head + i_h) // group
    first = i_tile * BM
    i_q = i_b * q_row_b + i_h * q_row_h + first
    i_k = i_b * k_row_b + i_kv * k_row_h
    o_row = first + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    p_part = part + (i_bh * rows + o_row)[:, None] * width + tl.arange(0, BN // G)[None, :]
    CHUNKS: tl.constexpr = (D + BK - 1) // BK
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for n in range(0, tl.minimum(key_groups, shift + first + BM), BN):
        # [BM, BN]
        b_s = tl.zeros([BM, BN], tl.float32)
        for step in range(S * CHUNKS):
            phase = step // CHUNKS
            channel = step % CHUNKS * BK
            # [BM, BK]
            b_q = q_box.load([i_q, i_h * q_col_h + (S - 1 - phase) * q_col_n + channel])
            # [BN, BK]
            b_k = k_box.load([i_k + n, i_kv * k_col_h + phase * k_col_n + channel])
            b_s = tl.dot(b_q, b_k.T, b_s, input_precision=PRECISION)
        seen = n + o_n[None, :] <= shift + o_row[:, None]
        b_s = tl.where(seen, b_s * scale_log2, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # finite: every row sees the first column
        b_p = tl.exp2(b_s - b_m_new[:, None])
        # [BM, BN / G]
        b_sum = tl.sum(b_p.reshape(BM, BN // G, G), 2)
        tl.store(p_part + n // G, b_m_new[:, None] + tl.log2(b_sum))
        b_l = b_l * tl.exp2(b_m - b_m_new) + tl.sum(b_sum, 1)
        b_m = b_m_new
    tl.store(lse + i_bh * rows + o_row, b_m + tl.log2(b_l))


@triton.jit
def antidiagonal_sum_fwd_kernel(
    part, lse, mass, stride_mass_batch, heads, q_groups, shift, rows, width, blocks,
    G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: one query block of one head. Sums the normalised probabilities over the block's G rows."""
    i_block = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_row = i_block * G + tl.arange(0, G)
    m_row = o_row < q_groups
    # [G]
    b_lse = tl.load(lse + i_bh * rows + o_row, mask=m_row, other=0.0)
    p_part = part + (i_bh * rows + o_row)[:, None] * width
    p_mass = mass + i_bh // heads * stride_mass_batch + (i_bh % heads * tl.num_programs(0) + i_block) * blocks
    for c in range(0, blocks, BC):
        o_c = c + tl.arange(0, BC)
        m_part = m_row[:, None] & (o_c[None, :] * G <= shift + o_row[:, None])
        # [G, BC]
        b_part = tl.load(p_part + o_c[None, :], mask=m_part, other=float("-inf"))
        tl.store(p_mass + o_c, tl.sum(tl.exp2(b_part - b_lse[:, None]), 0), mask=o_c < blocks)


def _launch_options(q: Tensor, groups: int) -> dict:
    """Tile shape, warps and stages, measured on an H100 (docs/kernels.md): every tile reads its queries again from the
    second-level cache, so wide ones are faster, though only one of them fits a multiprocessor."""
    if q.dtype == torch.float32:  # exact fp32 products run on the ordinary cores; wider tiles spill registers
        return dict(BM=64, BN=max(groups, 64), BK=16, PRECISION="ieee", num_warps=8, num_stages=1)
    return dict(BM=128, BN=256, BK=math.gcd(q.shape[-1], 64), PRECISION="tf32", num_warps=8, num_stages=4)


def _box(x: Tensor, stride: int, rows: int, channels: int) -> tuple[TensorDescriptor, tuple[int, int, int, int]]:
    """Descriptor of x [B, H, L, D] as a matrix with a stride group a row, so that a box holds one phase of `rows` groups; and
    where its parts lie: rows from batch to batch and from head to head, columns from head to head and from token to token.

    A matrix, because only a box that needs no reshaping goes to the tensor cores straight from shared memory. A box that
    reaches over a head's last group holds another head's, whose products no result depends on.
    """
    x = aligned(_whole_groups(x, stride))
    batch, heads, length, dim = x.shape
    row = stride * x.stride(2)
    beside = (heads - 1) * x.stride(1) + dim <= x.stride(2)  # heads lie side by side in a token
    if not ((batch == 1 or x.stride(0) % row == 0) and (heads == 1 or x.stride(1) % row == 0 or beside)):
        x = x.contiguous()
        beside, row = heads == 1, stride * dim
    step_b, step_h, step_n, _ = x.stride()
    head_rows, head_columns = (0, step_h) if beside else (step_h // row, 0)
    number = (batch - 1) * (step_b // row) + (heads - 1) * head_rows + length // stride
    width = (heads - 1) * head_columns + (stride - 1) * step_n + dim
    box = TensorDescriptor.from_tensor(x.as_strided((number, width), (row, 1)), [rows, channels])
    return box, (step_b // row, head_rows, head_columns, step_n)


def _triton_mass(q: Tensor, k: Tensor, scale: float, stride: int, block: int) -> Tensor:
    batch, heads, q_len, dim = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernel supports fp16, bf16 and fp32, got {q.dtype}")
    groups = block // stride
    if stride & (stride - 1) or groups & (groups - 1) or groups * stride != block or not 0 < groups <= MAX_GROUPS:
        raise ValueError(
            f"the Triton kernel needs powers of 2 with block at most {MAX_GROUPS} strides, got stride {stride}, block {block}"
        )
    if dim % 16:
        raise ValueError(f"the Triton kernel needs a head_dim of a multiple of 16, got {dim}")
    options = _launch_options(q, groups)
    q_groups, key_groups = triton.cdiv(q_len, stride), triton.cdiv(k.shape[2], stride)
    tiles = triton.cdiv(q_groups, options["BM"])
    rows, width = tiles * options["BM"], triton.cdiv(key_groups, options["BN"]) * options["BN"] // groups
    shape = (batch, heads, triton.cdiv(q_len, block), triton.cdiv(k.shape[2], block))
    mass = torch.empty(shape, dtype=torch.float32, device=q.device)
    heads_at_once = min(max(SCRATCH_BYTES // (batch * rows * width * 4), 1), heads)
    part = torch.empty(batch * heads_at_once, rows, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * heads_at_once, rows, dtype=torch.float32, device=q.device)
    k_box, k_steps = _box(k, stride, options["BN"], options["BK"])
    shift = key_groups - q_groups
    for h in range(0, heads, heads_at_once):
        q_part, out = q[:, h : h + heads_at_once], mass[:, h : h + heads_at_once]
        now = q_part.shape[1]
        q_box, q_steps = _box(q_part, stride, options["BM"], options["BK"])
        antidiagonal_blocks_fwd_kernel[(batch * now, tiles)](
            q_box, k_box, part, lse, *q_steps, *k_steps, h, now, heads // k.shape[1], shift, key_groups, rows, width,
            scale / stride * LOG2E, S=stride, D=dim, G=groups, **options,
        )  # fmt: skip
        antidiagonal_sum_fwd_kernel[(shape[2], batch * now)](
            part, lse, out, mass.stride(0), now, q_groups, shift, rows, width, shape[3],
            G=groups, BC=min(triton.next_power_of_2(shape[3]), max(2048 // groups, 16)), num_warps=4,
        )  # fmt: skip
    return mass
