"""Poolings over every block of tokens, in one read of them: op, reference, Triton kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, power_of_2, runs_triton

POOLS = ("max", "min", "avg")  # the order in which several poolings of a tensor are concatenated
# BN: tokens a program holds at a time. On an H100 128k tokens take 0.48 ms with 2 warps (2.8 TB/s), 0.64 with 4, 1.13 with 8 or
# with 32 tokens; 8k take 0.045, 0.053, 0.079.
LAUNCH = dict(BN=64, num_warps=2)


def block_pool(x: Tensor, block: int, pools: Sequence[str] = ("avg",), impl: str = "auto") -> Tensor:
    """Poolings over the tokens of each block, concatenated on the channels in the order of POOLS.

    Args:
        x: [B, H, L, D], any strides; the last block is pooled over the tokens it has.
        block: tokens.
        pools: a choice of "max", "min" and "avg".
        impl: "auto" (Triton on CUDA, where no gradient is asked for) | "triton" | "reference".

    Returns: [B, H, ceil(L / block), len(pools) * D], fp32 (fp64 for fp64); sums are fp32 and no fp32 copy of x is made.
    Raises: ValueError for other poolings, no tokens, an unknown impl, or a dtype that the kernel does not take.
    """
    return _pool([(x, tuple(pools))], block, impl)[0]


def block_pool_pair(
    q: Tensor, k: Tensor, block: int, q_pools: Sequence[str], k_pools: Sequence[str], impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """block_pool() of q [B, H, q_len, D] and of k [B, H_kv, kv_len, D] in one launch."""
    q_pooled, k_pooled = _pool([(q, tuple(q_pools)), (k, tuple(k_pools))], block, impl)
    return q_pooled, k_pooled


def _pool(inputs: list[tuple[Tensor, tuple[str, ...]]], block: int, impl: str) -> list[Tensor]:
    for x, pools in inputs:
        _check(x.shape, pools, block)
    taken = all(x.dtype in (torch.float16, torch.bfloat16, torch.float32) for x, _ in inputs)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x, _ in inputs)
    if not runs_triton(impl, taken and not trained and inputs[0][0].is_cuda):
        return [block_pool_reference(x, block, pools) for x, pools in inputs]
    if not taken:
        raise ValueError(f"the Triton kernel supports fp16, bf16 and fp32, got {', '.join(str(x.dtype) for x, _ in inputs)}")
    return _pool_triton(inputs, block)


@functools.lru_cache(256)
def _check(shape: tuple[int, ...], pools: tuple[str, ...], block: int) -> None:
    if not pools or pools != tuple(p for p in POOLS if p in pools):
        raise ValueError(f"pools is a choice of {', '.join(POOLS)} in this order, got {pools}")
    if shape[2] < 1 or block < 1:
        raise ValueError(f"there must be tokens and blocks to pool, got {tuple(shape)} in blocks of {block}")


def block_pool_reference(x: Tensor, block: int, pools: Sequence[str]) -> Tensor:
    """The definition in torch."""
    whole = x.shape[2] // block * block
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = [x[:, :, :whole].unflatten(2, (-1, block))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])

    def reduce(part: Tensor, pool: str) -> Tensor:
        if pool == "avg":
            return part.mean(3, dtype=dtype)
        return (part.amax(3) if pool == "max" else part.amin(3)).to(dtype)

    return torch.cat([torch.cat([reduce(part, pool) for part in parts], dim=2) for pool in pools], dim=-1)


@triton.jit
def _pool_block(
    x, out, i_program, heads, length, stride_b, stride_h, stride_n, block,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SINGLE: tl.constexpr,
    MAX: tl.constexpr, MIN: tl.constexpr, AVG: tl.constexpr,
):  # fmt: skip
    blocks = (length + block - 1) // block
    i_bh = i_program // blocks
    first = i_program % blocks * block
    count = tl.minimum(length - first, block)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    x += (i_bh // heads).to(tl.int64) * stride_b + (i_bh % heads).to(tl.int64) * stride_h
    b_max = tl.full([BD], float("-inf"), tl.float32)
    b_min = tl.full([BD], float("inf"), tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    # Known at compile time where a tile holds a block, so that no loop is left.
    tokens = BN if SINGLE else count
    for n in range(0, tokens, BN):
        m_n = n + o_n < count
        m_x = m_n[:, None] & m_d[None, :]
        # [BN, BD]
        p_x = x + (first + n).to(tl.int64) * stride_n + o_n[:, None] * stride_n + o_d[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        if MAX:
            b_max = tl.maximum(b_max, tl.max(tl.where(m_n[:, None], b_x, float("-inf")), 0))
        if MIN:
            b_min = tl.minimum(b_min, tl.min(tl.where(m_n[:, None], b_x, float("inf")), 0))
        if AVG:
            b_sum += tl.sum(b_x, 0)
    p_out = out + i_program.to(tl.int64) * ((MAX + MIN + AVG) * D) + o_d
    if MAX:
        tl.store(p_out, b_max, mask=m_d)
    if MIN:
        tl.store(p_out + MAX * D, b_min, mask=m_d)
    if AVG:
        tl.store(p_out + (MAX + MIN) * D, b_sum / count.to(tl.float32), mask=m_d)


@triton.jit
def block_pool_fwd_kernel(
    q, k, q_out, k_out, q_programs, q_heads, k_heads, q_len, kv_len,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, block,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SINGLE: tl.constexpr,
    Q_MAX: tl.constexpr, Q_MIN: tl.constexpr, Q_AVG: tl.constexpr,
    K_MAX: tl.constexpr, K_MIN: tl.constexpr, K_AVG: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, first those of q, then those of k."""
    i_program = tl.program_id(0)
    if i_program < q_programs:
        _pool_block(
            q, q_out, i_program, q_heads, q_len, q_stride_b, q_stride_h, q_stride_n, block,
            D, BD, BN, SINGLE, Q_MAX, Q_MIN, Q_AVG,
        )  # fmt: skip
    else:
        _pool_block(
            k, k_out, i_program - q_programs, k_heads, kv_len, k_stride_b, k_stride_h, k_stride_n, block,
            D, BD, BN, SINGLE, K_MAX, K_MIN, K_AVG,
        )  # fmt: skip


@functools.lru_cache(256)
def _launch(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], q_strides: tuple[int, ...], k_strides: tuple[int, ...], single: bool,
    q_pools: tuple[str, ...], k_pools: tuple[str, ...], block: int,
) -> tuple[Launch, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The launch, and the shapes of what it writes."""
    (batch, q_heads, q_len, dim), (_, k_heads, k_len, k_dim) = q_shape, k_shape
    if k_dim != dim:
        raise ValueError(f"q and k must have the same channels, got {tuple(q_shape)} and {tuple(k_shape)}")
    q_out = (batch, q_heads, -(-q_len // block), len(q_pools) * dim)
    k_out = (k_shape[0], k_heads, -(-k_len // block), len(k_pools) * dim)
    q_programs, k_programs = math.prod(q_out[:3]), 0 if single else math.prod(k_out[:3])
    tile = min(power_of_2(block), LAUNCH["BN"])
    launch = Launch(
        block_pool_fwd_kernel, (q_programs + k_programs,), q_programs, q_heads, k_heads, q_len, k_len,
        *q_strides[:3], *k_strides[:3], block, D=dim, BD=power_of_2(dim), SINGLE=block <= tile,
        Q_MAX="max" in q_pools, Q_MIN="min" in q_pools, Q_AVG="avg" in q_pools,
        K_MAX="max" in k_pools, K_MIN="min" in k_pools, K_AVG="avg" in k_pools,
        **(LAUNCH | {"BN": tile}),
    )  # fmt: skip
    return launch, q_out, k_out


def _pool_triton(inputs: list[tuple[Tensor, tuple[str, ...]]], block: int) -> list[Tensor]:
    inputs = [(x if x.stride(-1) == 1 else x.contiguous(), pools) for x, pools in inputs]
    (q, q_pools), (k, k_pools), single = inputs[0], inputs[-1], len(inputs) == 1
    launch, *shapes = _launch(q.shape, k.shape, q.stride(), k.stride(), single, q_pools, k_pools, block)
    outs = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes[: len(inputs)]]
    launch(q, k, outs[0], outs[-1])
    return outs
