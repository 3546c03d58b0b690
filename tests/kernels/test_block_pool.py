"""block_pool: reference and Triton kernel against the definition in fp64.

On a CPU the Triton kernel runs in the interpreter; on a CUDA device the same tests run it compiled, in bf16 too.
"""

import pytest
import torch

from sparsebench.kernels.block_pool import POOLS, block_pool, block_pool_pair

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), BF16)
SHAPES = {  # batch, heads, length, dim, block
    "whole blocks": (2, 3, 128, 32, 32),
    "ragged": (1, 2, 133, 16, 32),
    "less than a block": (1, 2, 5, 16, 64),
    "one token": (2, 1, 1, 16, 64),
    "blocks of one": (1, 2, 7, 16, 1),
    "head_dim 96": (1, 2, 70, 96, 32),
    "odd block": (1, 2, 100, 16, 24),
    "block of several tiles": (1, 2, 400, 16, 150),
    "a block for all": (1, 1, 200, 16, 4096),
}


def definition(x, block, pools):
    parts = x.split(block, dim=2)
    of = {"max": lambda p: p.amax(2), "min": lambda p: p.amin(2), "avg": lambda p: p.mean(2)}
    return torch.cat([torch.stack([of[pool](part) for part in parts], dim=2) for pool in pools], dim=-1)


def check(within_budget, got, x, block, pools):
    assert got.dtype == torch.float32
    within_budget(got, definition(x.double(), block, pools), definition(x.float(), block, pools))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equals_the_definition(device, within_budget, impl, shape, dtype):
    *sizes, block = shape
    x = (torch.randn(sizes, device=device) - 0.5).to(dtype)
    for pools in (POOLS, ("avg",), ("max", "avg"), ("min",)):
        check(within_budget, block_pool(x, block, pools, impl=impl), x, block, pools)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_q_and_k_together_are_each_alone(device, impl):
    q, k = torch.randn(2, 4, 77, 32, device=device), torch.randn(2, 2, 133, 32, device=device)
    for q_pools, k_pools in ((("avg",), POOLS), (("max", "min"), ("min", "avg"))):
        q_pooled, k_pooled = block_pool_pair(q, k, 32, q_pools, k_pools, impl=impl)
        assert torch.equal(q_pooled, block_pool(q, 32, q_pools, impl=impl))
        assert torch.equal(k_pooled, block_pool(k, 32, k_pools, impl=impl))


def test_any_strides(device):
    """Heads and tokens may lie in memory as a transposed projection leaves them, or as slices of something larger."""
    whole = torch.randn(1, 41, 5, 16, device=device)
    for x in (whole.transpose(1, 2)[:, 1:4, 7:], whole.permute(0, 3, 1, 2), torch.randn(2, 1, 41, 17, device=device)[..., 1:]):
        assert torch.equal(block_pool(x, 32, POOLS, impl="triton"), block_pool(x.contiguous(), 32, POOLS, impl="triton"))


def test_infinite_values_stay_in_their_block(device):
    x = torch.randn(1, 1, 100, 16, device=device)
    x[:, :, 40], x[:, :, 70] = float("inf"), float("-inf")
    got = block_pool(x, 32, POOLS, impl="triton")
    assert torch.equal(got.isinf(), block_pool(x, 32, POOLS, impl="reference").isinf())
    assert got[:, :, [0, 3]].isfinite().all()


def test_gradients_take_the_reference():
    x = torch.randn(1, 1, 40, 16, requires_grad=True)
    block_pool(x, 32, POOLS).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0


@pytest.mark.parametrize("pools", [(), ("avg", "max"), ("sum",), ("max", "max")])
def test_refuses_other_pools(pools):
    with pytest.raises(ValueError, match="max, min, avg"):
        block_pool(torch.randn(1, 1, 40, 16), 32, pools)


def test_refuses_what_it_cannot_pool():
    with pytest.raises(ValueError, match="tokens and blocks"):
        block_pool(torch.randn(1, 1, 0, 16), 32)
    with pytest.raises(ValueError, match="float64"):
        block_pool(torch.randn(1, 1, 40, 16).double(), 32, impl="triton")
    with pytest.raises(ValueError, match="same channels"):
        block_pool_pair(torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 32), 32, ("avg",), ("avg",), impl="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        block_pool(torch.randn(1, 1, 40, 16), 32, impl="cuda")
