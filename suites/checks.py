"""Whether an attention kernel is right, on samples: before that nothing is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels import BlockMask, block_sparse_attention
from ..kernels.block_mass import block_mass
from ..kernels.block_sparse_attention import block_sparse_attention_reference

MOST_ERROR = 1e-2  # relative, bf16 operands
MOST_GRADIENT_ERROR = 2e-2  # the same: probabilities and their gradients are rounded to bf16 on the way


@dataclass(frozen=True)
class Case:
    """One attention problem. q [1, H, q_len, D], k, v [1, H_kv, kv_len, D]; scale: logits factor."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    scale: float

    @property
    def pairs(self) -> int:
        """Selected (query, key) pairs over all query heads."""
        return int(self.mask.pairs().sum()) * self.q.shape[1] // self.mask.kv_num_blocks.shape[1]

    @cached_property
    def lse(self) -> Tensor:
        """Natural-log sums of exponentials, fp32 [1, H, q_len], by our forward."""
        with torch.no_grad():
            return block_sparse_attention(self.q, self.k, self.v, self.mask, scale=self.scale, return_lse=True)[1]

    def check(self, out: Tensor) -> float:
        """sampled_error() of an output. Raises: ArithmeticError when it is too large."""
        error = sampled_error(out, self.q, self.k, self.v, self.mask, self.scale)
        if not error < MOST_ERROR:
            raise ArithmeticError(f"the output differs from the reference by {error:.2e} (relative), nothing was timed")
        return error

    def check_map(self, blocks: Tensor, block: int) -> float:
        """The largest ||map - reference|| / ||reference|| of rows of a dense attention map [1, H, NQ, NK] with the largest
        probability of every block, in rows of sum 1: those of three samples. Raises: ArithmeticError when it is too large."""
        errors = []
        for rows, one in _samples(self.mask):
            expected = block_mass(self.q[:, :, rows], self.k[:, :, : one.kv_len], self.scale, block, block, "max")
            first, (found, width) = rows.start // block, expected.shape[2:]
            errors.append(_relative(blocks[:, :, first : first + found, :width], expected / expected.sum(-1, keepdim=True)))
        if not max(errors) < MOST_ERROR:
            raise ArithmeticError(f"the map differs from the reference by {max(errors):.2e} (relative), nothing was timed")
        return max(errors)

    def check_gradients(self, grads: tuple[Tensor, Tensor, Tensor], out: Tensor, grad: Tensor) -> float:
        """gradient_error() of (dq, dk, dv). Raises: ArithmeticError when it is too large, and what that raises."""
        error = gradient_error(grads, out, grad, self)
        if not error < MOST_GRADIENT_ERROR:
            raise ArithmeticError(f"the gradients differ from the reference by {error:.2e} (relative), nothing was timed")
        return error


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> float:
    """The largest ||out - reference|| / ||reference|| of three samples: the query blocks at the start, in the middle and at the
    end, 64 queries or more each; NaN counts as infinite."""
    errors = []
    for rows, one in _samples(mask):
        expected, _ = block_sparse_attention_reference(q[:, :, rows], k[:, :, : one.kv_len], v[:, :, : one.kv_len], one, scale)
        errors.append(_relative(out[:, :, rows], expected))
    return max(errors)


def gradient_error(grads: tuple[Tensor, Tensor, Tensor], out: Tensor, grad: Tensor, case: Case) -> float:
    """The largest relative error, as in sampled_error(), of dq in three samples of queries, by the reference's autograd, and of
    dk and dv of the first, the middle and the last key block, over all queries that chose them.

    Args: grads = dq [1, H, q_len, D], dk, dv [1, H_kv, kv_len, D]; out and grad (the gradient that came in) [1, H, q_len, D].
    Raises: ValueError for a mask with single columns or untiled blocks, which has no key blocks.
    """
    mask = case.mask
    if mask.column_indices is not None or mask.step != mask.kv_block:
        raise ValueError("gradients can only be checked for blocks that tile the keys, without single columns")
    errors = []
    for rows, one in _samples(mask):
        k, v = (x[:, :, : one.kv_len].float() for x in (case.k, case.v))
        with torch.enable_grad():
            q = case.q[:, :, rows].float().requires_grad_()
            expected, _ = block_sparse_attention_reference(q, k, v, one, case.scale)
            (dq,) = torch.autograd.grad(expected, q, grad[:, :, rows].float())
        errors.append(_relative(grads[0][:, :, rows], dq))
    blocks = -(-mask.kv_len // mask.kv_block)
    for block in sorted({0, blocks // 2, blocks - 1}):
        keys = slice(block * mask.kv_block, min((block + 1) * mask.kv_block, mask.kv_len))
        for found, expected in zip(grads[1:], _of_keys(case, out, grad, block, keys)):
            errors.append(_relative(found[:, :, keys], expected))
    return max(errors)


def _samples(mask: BlockMask) -> Iterator[tuple[slice, BlockMask]]:
    """Queries, and their part of the mask."""
    blocks = mask.kv_num_blocks.shape[2]
    group = min(max(64 // mask.q_block, 1), blocks)
    for first in sorted({0, min(blocks // 2, blocks - group), blocks - group}):
        one = mask.rows(first, first + group)
        yield slice(first * mask.q_block, first * mask.q_block + one.q_len), one


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def _of_keys(case: Case, out: Tensor, grad: Tensor, block: int, keys: slice) -> tuple[Tensor, Tensor]:
    """dk, dv [1, H_kv, n, D] of the keys of one block, fp32: Dao et al. 2022 (arXiv 2205.14135), Algorithm 4, lines 12 to 22,
    whose sums over the keys are `lse` and rowsum(grad * out)."""
    mask, kv_heads = case.mask, case.k.shape[1]
    group = case.q.shape[1] // kv_heads
    position = torch.arange(mask.kv_len - mask.q_len, mask.kv_len, device=mask.device)[:, None]
    causal = mask.sees(position, torch.arange(keys.start, keys.stop, device=mask.device))
    chosen = mask.dense()[..., block].repeat_interleave(mask.q_block, dim=2)[:, :, : mask.q_len]
    chosen = chosen.repeat_interleave(case.q.shape[1] // chosen.shape[1], dim=1)
    dk, dv = [], []
    for head in range(kv_heads):  # one at a time: scores of all queries are large
        part = slice(head * group, (head + 1) * group)
        q, o, g = (x[:, part].float() for x in (case.q, out, grad))
        k, v = (x[:, head : head + 1, keys].float() for x in (case.k, case.v))
        p = ((q @ k.mT * case.scale) - case.lse[:, part, :, None]).exp()
        p = p.where(causal & chosen[:, part, :, None], 0)
        dv.append((p.mT @ g).sum(1))
        ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        dk.append(case.scale * (ds.mT @ q).sum(1))
    return torch.stack(dk, 1), torch.stack(dv, 1)
