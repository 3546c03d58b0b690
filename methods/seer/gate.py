"""AttnGate: SeerAttention's learned block scorer, one per attention layer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..base import rotate_half

POOLS = ("max", "min", "avg")  # the order in which several poolings of one side are concatenated
GATE_TYPE = re.compile(r"Q((?:max)?(?:min)?(?:avg)?)_K((?:max)?(?:min)?(?:avg)?)")


def parse_gate_type(gate_type: str) -> tuple[list[str], list[str]]:
    """Poolings of Q and of K: "Qavg_Kmaxmin" -> (["avg"], ["max", "min"]).

    Raises: ValueError for anything but Q<pools>_K<pools>, pools a non-empty choice of max, min, avg in this order.
    """
    match = GATE_TYPE.fullmatch(gate_type)
    if match is None or not match[1] or not match[2]:
        raise ValueError(f"gate type is Q<pools>_K<pools> with pools from max, min, avg in this order, got {gate_type!r}")
    return [p for p in POOLS if p in match[1]], [p for p in POOLS if p in match[2]]


def pool_blocks(x: Tensor, pools: list[str], block: int) -> Tensor:
    """Poolings over the tokens of each block, concatenated on the channels.

    Args: x [B, H, N, D]; the last block is pooled over the tokens it has. Max and min keep x's dtype, the mean is fp32.
    Returns: [B, H, ceil(N / block), len(pools) * D].
    """
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (-1, block))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])

    def reduce(part: Tensor, pool: str) -> Tensor:
        if pool == "avg":
            return part.mean(3, dtype=torch.promote_types(x.dtype, torch.float32))
        return part.amax(3) if pool == "max" else part.amin(3)

    return torch.cat([torch.cat([reduce(part, pool) for part in parts], dim=2) for pool in pools], dim=-1)


class HeadLinear(nn.Module):
    """One linear map without bias per head: [B, heads, N, inner] -> [B, heads, N, outer]; weight [heads, inner, outer]."""

    def __init__(self, heads: int, inner: int, outer: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inner, outer).uniform_(-(inner**-0.5), inner**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class AttnGate(nn.Module):
    """Scores of key blocks from q and k before RoPE (Gao et al. 2024, arXiv 2410.13276, section 3.1).

    logits = R(W_q pool(q)) R(W_k pool(k))^T / sqrt(gate_dim), pool per block of tokens, W per head, R the model's RoPE at
    the blocks' first positions. Where the type has one pooling of q, gate_dim == head_dim and force_double is off, there is no
    W_q, and W_k has one matrix per query head, applied to the K of its group (the authors' released gates are of this kind).

    Args:
        gate_type: Q<pools>_K<pools>, e.g. "Qavg_Kmaxminavg".
        block: tokens per block of both queries and keys.
        gate_rope_dim: channels that RoPE turns, the first of gate_dim. Default: head_dim, as the authors' code builds it, and
            gate_dim where that is smaller (their code raises there).

    Parameters: mask_linear_q.weight [heads, pools * head_dim, gate_dim], mask_linear_k.weight [kv_heads (no W_q: heads), ...].
    Raises: ValueError for an unknown type or dimensions that do not fit together.
    """

    def __init__(
        self, gate_type: str, block: int, head_dim: int, gate_dim: int, heads: int, kv_heads: int,
        force_double: bool = False, gate_rope_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.q_pools, self.k_pools = parse_gate_type(gate_type)
        if min(block, head_dim, gate_dim, heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(f"AttnGate sizes must be positive, heads a multiple of kv_heads; got {heads} and {kv_heads}")
        self.gate_type, self.block, self.force_double = gate_type, block, force_double
        self.head_dim, self.gate_dim, self.heads, self.kv_heads = head_dim, gate_dim, heads, kv_heads
        self.gate_rope_dim = gate_rope_dim
        self.rope_dim = min(head_dim, gate_dim) if gate_rope_dim is None else gate_rope_dim
        if not 0 < self.rope_dim <= gate_dim or self.rope_dim % 2:
            raise ValueError(f"gate_rope_dim must be even and at most gate_dim={gate_dim}, got {self.rope_dim}")
        self.single = len(self.q_pools) == 1 and gate_dim == head_dim and not force_double
        if not self.single:
            self.mask_linear_q = HeadLinear(heads, len(self.q_pools) * head_dim, gate_dim)
        self.mask_linear_k = HeadLinear(heads if self.single else kv_heads, len(self.k_pools) * head_dim, gate_dim)

    def options(self) -> dict:
        """The constructor's arguments."""
        names = ("gate_type", "block", "head_dim", "gate_dim", "heads", "kv_heads", "force_double", "gate_rope_dim")
        return {name: getattr(self, name) for name in names}

    def forward(
        self, q_pre: Tensor, k_pre: Tensor, cos: Tensor, sin: Tensor, cos_q: Tensor | None = None, sin_q: Tensor | None = None
    ) -> Tensor:
        """Logits [B, H, NQ, NK], before the causal mask and softmax, in the weights' dtype.

        Args:
            q_pre [B, H, q_len, D], k_pre [B, H_kv, kv_len, D] before RoPE; q's last row sits at k's last row.
            cos, sin [NK, rope_dim]: tables of the key blocks' first positions, half-split.
            cos_q, sin_q [NQ, rope_dim]: of the query blocks' first positions kv_len - q_len + i * block; taken from cos and
            sin when that offset is a multiple of the block.

        Raises: ValueError when shapes disagree or the query tables are missing.
        """
        return self.logits(*self.project(q_pre, k_pre, cos, sin, cos_q, sin_q))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """From project()'s output, whole or of some heads."""
        return q @ k.transpose(-1, -2) * self.gate_dim**-0.5

    def project(
        self, q_pre: Tensor, k_pre: Tensor, cos: Tensor, sin: Tensor, cos_q: Tensor | None = None, sin_q: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Block representations of q [B, H, NQ, gate_dim] and k [B, H, NK, gate_dim]; arguments as for forward()."""
        for name, x, heads in (("q", q_pre, self.heads), ("k", k_pre, self.kv_heads)):
            if x.shape[1] != heads or x.shape[3] != self.head_dim:
                raise ValueError(f"this gate is for {heads} {name} heads of {self.head_dim} channels, got {tuple(x.shape)}")
        offset = k_pre.shape[2] - q_pre.shape[2]
        if cos_q is None or sin_q is None:
            if offset % self.block:
                raise ValueError(f"query blocks start at {offset}, between key blocks of {self.block}: pass cos_q and sin_q")
            cos_q, sin_q = cos[offset // self.block :], sin[offset // self.block :]
        dtype = self.mask_linear_k.weight.dtype
        q = pool_blocks(q_pre, self.q_pools, self.block)
        q = q.to(dtype) if self.single else self.mask_linear_q(q)
        k, group = pool_blocks(k_pre, self.k_pools, self.block), self.heads // self.kv_heads
        if self.single:
            k = self.mask_linear_k(k.repeat_interleave(group, dim=1))
        else:
            k = self.mask_linear_k(k).repeat_interleave(group, dim=1)
        return self._rotate(q, cos_q, sin_q), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dim = cos.shape[-1]
        if cos.shape != sin.shape or cos.shape[0] != x.shape[2] or dim > self.gate_dim:
            raise ValueError(
                f"RoPE tables [blocks={x.shape[2]}, at most {self.gate_dim}] expected, got cos {tuple(cos.shape)} and "
                f"sin {tuple(sin.shape)}"
            )
        turned = x[..., :dim] * cos.to(x.dtype) + rotate_half(x[..., :dim]) * sin.to(x.dtype)
        return turned if dim == self.gate_dim else torch.cat((turned, x[..., dim:]), dim=-1)
