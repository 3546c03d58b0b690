"""antidiagonal_mass: reference and Triton kernels against the definition in fp64.

On a CPU the Triton kernels run in the interpreter; on a CUDA device the same tests run them compiled, in bf16 too.
"""

import pytest
import torch

from sparsebench.kernels import antidiagonal
from sparsebench.kernels.antidiagonal import antidiagonal_mass

# Blocks that a row cannot reach have the logarithm of 0, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float16, id="fp16"), BF16)
SHAPES = {
    # batch, heads, kv_heads, q_len, kv_len, dim, stride, block
    "whole blocks": (1, 2, 2, 512, 512, 64, 8, 128),
    "several tiles": (1, 1, 1, 1100, 1100, 32, 8, 64),
    "odd length": (1, 2, 2, 301, 301, 64, 8, 128),
    "gqa, batch": (2, 4, 2, 150, 150, 32, 16, 128),
    "head_dim 96": (1, 2, 1, 200, 200, 96, 8, 128),
    "head_dim 128": (1, 1, 1, 140, 140, 128, 8, 128),
    "head_dim 256": (1, 1, 1, 70, 70, 256, 8, 64),
    "stride 1": (1, 1, 1, 270, 270, 16, 1, 128),
    "stride of a block": (1, 2, 1, 300, 300, 16, 64, 64),
    "chunk": (1, 2, 1, 256, 640, 64, 8, 128),
    "chunk inside a block": (1, 2, 1, 70, 333, 64, 8, 128),
    "chunk inside a group": (1, 2, 1, 9, 300, 64, 8, 128),
    "stride 1, chunk inside a block": (1, 2, 1, 197, 200, 16, 1, 128),
    "one query": (1, 2, 1, 1, 150, 64, 8, 128),
    "one token": (1, 2, 1, 1, 1, 64, 8, 128),
}


def definition(q, k, scale, stride, block):
    """The map entry by entry from token pairs: antidiagonal sums, causal softmax, sums over blocks; in the dtype of q."""
    q_len, kv_len = q.shape[2], k.shape[2]
    pairs = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    rows, columns = -(-q_len // stride), -(-kv_len // stride)
    logits = pairs.new_zeros(*q.shape[:2], rows, columns)
    for p in range(stride):
        own = pairs[:, :, stride - 1 - p :: stride, p::stride]
        logits[:, :, : own.shape[2], : own.shape[3]] += own
    future = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
    p = (logits * (scale / stride)).masked_fill(future, float("-inf")).softmax(-1)
    p = torch.nn.functional.pad(p, (0, -columns % (block // stride), 0, -rows % (block // stride)))
    return p.unflatten(3, (-1, block // stride)).sum(-1).unflatten(2, (-1, block // stride)).sum(3)


def tensors(device, dtype, batch, heads, kv_heads, q_len, kv_len, dim):
    q = torch.randn(batch, heads, q_len, dim, device=device).to(dtype)
    return q, (torch.randn(batch, kv_heads, kv_len, dim, device=device) * 2).to(dtype)


def check(within_budget, impl, q, k, stride, block):
    got = antidiagonal_mass(q, k, 0.3, stride, block, impl=impl)
    exact = definition(q.double(), k.double(), 0.3, stride, block)
    # The given dtype's products are exact and summed in fp32, so the budget is fp32's for every dtype.
    within_budget(got, exact, definition(q.float(), k.float(), 0.3, stride, block), factor=8.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equals_the_definition(device, within_budget, impl, shape):
    *sizes, stride, block = shape
    check(within_budget, impl, *tensors(device, torch.float32, *sizes), stride, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd length", "gqa, batch", "chunk inside a group", "one token"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_half_precision_inputs_are_summed_in_fp32(device, within_budget, impl, shape, dtype):
    *sizes, stride, block = SHAPES[shape]
    check(within_budget, impl, *tensors(device, dtype, *sizes), stride, block)


def test_pieces_give_the_same_sums(device, monkeypatch):
    q, k = tensors(device, torch.float32, 2, 6, 2, 150, 150, 16)
    whole = antidiagonal_mass(q, k, 0.3, 8, 128, impl="triton")
    monkeypatch.setattr(antidiagonal, "SCRATCH_BYTES", 1)
    assert torch.equal(antidiagonal_mass(q, k, 0.3, 8, 128, impl="triton"), whole)


@pytest.mark.parametrize("length", [80, 75])
def test_any_strides(device, length):
    """Heads and tokens may lie in memory as a transposed projection leaves them, or as slices of something larger."""
    whole = [torch.randn(2, 4, length + 8, 16, device=device), torch.randn(2, length, 5, 16, device=device).transpose(1, 2)]
    odd = torch.randn(2, 4, length, 17, device=device)[..., 1:]  # not at 16 bytes
    for x in (whole[0][:, 1:3, 8:], whole[1][:, 2:4], odd[:, :2]):
        q, k = x, x[:, 1:]
        expected = antidiagonal_mass(q.contiguous(), k.contiguous(), 0.3, 8, 64, impl="triton")
        assert torch.equal(antidiagonal_mass(q, k, 0.3, 8, 64, impl="triton"), expected)


def test_logits_far_apart_do_not_overflow(device):
    q, k = tensors(device, torch.float32, 1, 1, 1, 256, 256, 64)
    for impl in ("reference", "triton"):
        mass = antidiagonal_mass(q * 300, k, 1.0, 8, 128, impl=impl)
        assert torch.allclose(mass.sum(-1), torch.full_like(mass[..., 0], 16.0), atol=1e-3)


@pytest.mark.parametrize("stride, block", [(12, 96), (1, 256), (8, 100), (256, 128)])
def test_kernel_refuses_other_sizes(device, stride, block):
    q, k = tensors(device, torch.float32, 1, 1, 1, 300, 300, 64)
    with pytest.raises(ValueError, match="powers of 2"):
        antidiagonal_mass(q, k, 0.3, stride, block, impl="triton")


def test_refuses_other_dtypes_and_implementations(device):
    q, k = tensors(device, torch.float64, 1, 1, 1, 20, 20, 64)
    with pytest.raises(ValueError, match="float64"):
        antidiagonal_mass(q, k, 0.3, 8, 128, impl="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        antidiagonal_mass(q, k, 0.3, 8, 128, impl="cuda")
    q, k = tensors(device, torch.float32, 1, 1, 1, 20, 20, 40)
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        antidiagonal_mass(q, k, 0.3, 8, 128, impl="triton")
