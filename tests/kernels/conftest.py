"""Poisoned and guarded memory, the definition in fp64, and the one tolerance rule of the kernel tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty and empty_like hand out NaN, so an output element that nothing wrote is seen."""

    def poison(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


class Guard:
    """The memory operations of Triton's interpreter, which must stay inside the storages of the tensors of a launch."""

    def __init__(self, memory):
        self.memory = memory

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def allow(self, args):
        tensors = [getattr(x, "base", x) for x in args]  # a descriptor's
        storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        ranges = sorted({(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages})
        self.first, self.end = np.array(ranges, dtype=np.uint64).reshape(-1, 2).T

    def check(self, pointers, mask, size):
        wanted = pointers[mask]
        owner = np.searchsorted(self.first, wanted, side="right") - 1
        outside = (owner < 0) | (wanted + np.uint64(size) > self.end[owner])
        assert not outside.any(), f"{outside.sum()} of {outside.size} addresses are outside of all tensors of the launch"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.check(pointers, mask, value.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, order):
        self.check(pointers, mask, value.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, order)


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch):
    """An interpreted kernel that reads or writes outside of its tensors fails the test."""
    guard, to_host = Guard(interpreter._interpreter), interpreter.GridExecutor._init_args_hst

    def to_guarded_host(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        guard.allow([*args, *kwargs.values()])
        return args, kwargs

    monkeypatch.setattr(interpreter, "_interpreter", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", to_guarded_host)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dense_attention(q, k, v, tokens, scale=None):
    """(out, lse) over the pairs in tokens [B or 1, H or H_kv or 1, q_len, kv_len], every step in the dtype of q."""
    heads, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    tokens = tokens.repeat_interleave(heads // tokens.shape[1], dim=1)
    unread = ~tokens.any(-2)[..., None]  # keys that no query reads may hold NaN
    k, v = k.masked_fill(unread, 0), v.masked_fill(unread, 0)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~tokens, float("-inf"))
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def assert_within_budget(actual, exact, plain, factor=3.0):
    """The error of `actual` is at most `factor` times that of `plain`, both against `exact`.

    exact: fp64. plain: an independent run of the same computation, all in the low precision. The largest and the root mean
    square error are held separately; one rounding of the output dtype is free, since `plain` may be exact by luck.
    """
    assert actual.shape == exact.shape and exact.dtype == torch.float64
    rounding = torch.finfo(actual.dtype).eps / 2
    wrong, allowed = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    worst, worst_allowed = wrong.max(), factor * allowed.max() + rounding * exact.abs().max()
    mean = wrong.square().mean().sqrt()
    mean_allowed = factor * allowed.square().mean().sqrt() + rounding * exact.square().mean().sqrt()
    assert worst <= worst_allowed, f"largest error {worst:.3e}, budget {worst_allowed:.3e}"
    assert mean <= mean_allowed, f"rms error {mean:.3e}, budget {mean_allowed:.3e}"


@pytest.fixture
def within_budget():
    return assert_within_budget


@pytest.fixture
def check_attention():
    """check_attention(out, lse, q, k, v, mask, scale=None) compares with the dense definition over mask.tokens()."""

    def check(out, lse, q, k, v, mask, scale=None):
        tokens = mask.tokens()
        exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), tokens, scale)
        plain, plain_lse = dense_attention(q, k, v, tokens, scale)
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        assert_within_budget(out, exact, plain)
        assert_within_budget(lse, exact_lse, plain_lse)

    return check
