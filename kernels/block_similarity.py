"""Mean and self-similarity of every block of tokens, in one pass over them: op, reference, Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import runs_triton

SCRATCH_ELEMENTS = 1 << 22  # of fp32 copies alive at a time in the reference


def block_similarity(x: Tensor, block: int, mean: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean over every `block` tokens, and the mean cosine between all pairs of them (each with itself included).

    Source: SpargeAttn (Zhang et al. 2025, arXiv 2502.18137), section 3.2, and its code, which takes the mean of the Gram
    matrix of normalised tokens. That is |sum of the n normalised tokens|^2 / n^2, so no Gram matrix is made here. As in the
    code, normalised tokens are rounded to fp16: it moves the result by up to 5e-5, which decides for blocks that close to a
    threshold.

    Args:
        x: [B, H, L, D] bf16, fp16 or fp32, any strides; computed in fp32 without an fp32 copy of x.
        block: tokens, a power of 2; the last block takes the tokens that are left.
        mean: subtracted from every token first, fp32 [B, H, 1, D].
        impl: "auto" (Triton on CUDA) | "triton" | "reference".

    Returns: means fp32 [B, H, N, D] and similarities fp32 [B, H, N], N = ceil(L / block). A token of length 0 has no
        direction: its block's similarity is NaN.
    Raises: ValueError for an unknown impl or a block that is no power of 2.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of 2, got {block}")
    if runs_triton(impl, x.is_cuda):
        return _similarity_triton(x, block, mean)
    return block_similarity_reference(x, block, mean)


def block_similarity_reference(x: Tensor, block: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition in torch, a few blocks at a time."""
    batch, heads, length, dim = x.shape
    step = max(SCRATCH_ELEMENTS // (batch * heads * block * dim), 1) * block
    means, similarities = [], []
    for start in range(0, length, step):
        part = x[:, :, start : start + step].float()
        part = part if mean is None else part - mean
        part = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[2] % block)).unflatten(2, (-1, block))
        real = torch.arange(start, start + part.shape[2] * block, device=x.device).view(-1, block, 1) < length
        count = real.sum(1)  # [blocks, 1]
        normal = (part / part.square().sum(-1, keepdim=True).sqrt()).half().float().where(real, 0)
        means.append(part.sum(3) / count)
        similarities.append(normal.sum(3).square().sum(-1) / count[:, 0].square())
    return torch.cat(means, dim=2), torch.cat(similarities, dim=2)


@triton.jit
def block_similarity_fwd_kernel(
    x, mean, pooled, similarity, stride_b, stride_h, stride_n, heads, length,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head."""
    i_block = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < length
    m_x = m_n[:, None] & (o_d < D)[None, :]
    p_x = x + i_bh // heads * stride_b + i_bh % heads * stride_h + o_n[:, None] * stride_n + o_d[None, :]
    # [BLOCK, BD]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    if HAS_MEAN:
        b_mean = tl.load(mean + i_bh * D + o_d, mask=o_d < D, other=0.0)
        b_x = tl.where(m_x, b_x - b_mean[None, :], 0.0)
    # [BLOCK, BD]
    b_normal = b_x / tl.sqrt(tl.sum(b_x * b_x, 1))[:, None]
    b_normal = tl.where(m_n[:, None], b_normal.to(tl.float16).to(tl.float32), 0.0)
    # [BD]
    b_sum = tl.sum(b_normal, 0)
    count = tl.minimum(length - i_block * BLOCK, BLOCK).to(tl.float32)
    i_out = i_bh * tl.num_programs(0) + i_block
    tl.store(pooled + i_out * D + o_d, tl.sum(b_x, 0) / count, mask=o_d < D)
    tl.store(similarity + i_out, tl.sum(b_sum * b_sum, 0) / (count * count))


def _similarity_triton(x: Tensor, block: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    blocks = triton.cdiv(length, block)
    pooled = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    similarity = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    block_similarity_fwd_kernel[(blocks, batch * heads)](
        x, x if mean is None else mean.contiguous(), pooled, similarity, *x.stride()[:3], heads, length,
        D=dim, BD=triton.next_power_of_2(dim), BLOCK=block, HAS_MEAN=mean is not None, num_warps=8 if block > 64 else 4,
    )  # fmt: skip
    return pooled, similarity
