"""Full causal attention: what every sparse method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerContext, Method, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """softmax(scale * q k^T, causal) v through torch's scaled_dot_product_attention (FlashAttention-2 on CUDA)."""

    name = "dense"
    phases = frozenset({"prefill", "decode"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return dense_attention(q, k, v, ctx.scale)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention, q's last row at k's last row. q [B, H, q_len, D], k, v [B, H_kv, kv_len, D] -> [B, H, q_len, D]."""
    q_len, kv_len = q.shape[2], k.shape[2]
    mask = None
    if 1 < q_len < kv_len:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=q_len == kv_len and q_len > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
