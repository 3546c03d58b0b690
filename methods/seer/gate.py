"""AttnGate: SeerAttention's learned block scorer, one per attention layer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ...kernels.block_pool import POOLS, block_pool_pair
from ...kernels.gate_project import gate_project

GATE_TYPE = re.compile(r"Q((?:max)?(?:min)?(?:avg)?)_K((?:max)?(?:min)?(?:avg)?)")


def parse_gate_type(gate_type: str) -> tuple[list[str], list[str]]:
    """Poolings of Q and of K: "Qavg_Kmaxmin" -> (["avg"], ["max", "min"]).

    Raises: ValueError for anything but Q<pools>_K<pools>, pools a non-empty choice of max, min, avg in this order.
    """
    match = GATE_TYPE.fullmatch(gate_type)
    if match is None or not match[1] or not match[2]:
        raise ValueError(f"gate type is Q<pools>_K<pools> with pools from max, min, avg in this order, got {gate_type!r}")
    return [p for p in POOLS if p in match[1]], [p for p in POOLS if p in match[2]]


class HeadLinear(nn.Module):
    """The weight of one linear map without bias per head, [heads, inner, outer]; gate_project() applies it."""

    def __init__(self, heads: int, inner: int, outer: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inner, outer).uniform_(-(inner**-0.5), inner**-0.5))


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
            raise ValueError(
                "a gate's sizes must be positive and heads a multiple of kv_heads, got "
                f"{block=}, {head_dim=}, {gate_dim=}, {heads=}, {kv_heads=}"
            )
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
        if k.shape[1] < q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return q @ k.transpose(-1, -2) * self.gate_dim**-0.5

    def project(
        self, q_pre: Tensor, k_pre: Tensor, cos: Tensor, sin: Tensor, cos_q: Tensor | None = None, sin_q: Tensor | None = None,
        *, halves: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Block representations of q [B, H, NQ, gate_dim] and of k [B, H, NK, gate_dim], with H_kv heads where there is a W_q;
        arguments as for forward() and gate_project()."""
        for name, x, heads in (("q", q_pre, self.heads), ("k", k_pre, self.kv_heads)):
            if x.shape[1] != heads or x.shape[3] != self.head_dim:
                raise ValueError(f"this gate is for {heads} {name} heads of {self.head_dim} channels, got {tuple(x.shape)}")
        offset = k_pre.shape[2] - q_pre.shape[2]
        if cos_q is None or sin_q is None:
            if offset % self.block:
                raise ValueError(f"query blocks start at {offset}, between key blocks of {self.block}: pass cos_q and sin_q")
            cos_q, sin_q = cos[offset // self.block :], sin[offset // self.block :]
        q, k = block_pool_pair(q_pre, k_pre, self.block, self.q_pools, self.k_pools)
        w_q = None if self.single else self.mask_linear_q.weight
        return gate_project(q, k, w_q, self.mask_linear_k.weight, (cos_q, sin_q), (cos, sin), halves)
