"""gate_project: reference and Triton kernel against the definition in fp64.

On a CPU the Triton kernel runs in the interpreter; on a CUDA device the same tests run it compiled, in bf16 too.
"""

import pytest
import torch

from sparsebench.kernels.gate_project import gate_project
from sparsebench.kernels.launch import HALF

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), BF16)
SHAPES = {  # heads, kv_heads, rows of q, rows of k, channels, poolings of q, of k, outer, channels turned, maps of q
    "released gates": (4, 2, 5, 9, 32, 1, 3, 32, 32, False),
    "several tiles": (2, 1, 40, 70, 16, 1, 2, 16, 16, False),
    "both sides mapped": (4, 2, 6, 6, 32, 2, 1, 64, 32, True),
    "part of the channels turned": (2, 2, 6, 7, 48, 1, 1, 48, 20, False),
    "one block": (2, 1, 1, 1, 64, 1, 1, 16, 16, True),
    "two channels": (2, 1, 3, 4, 16, 1, 1, 16, 2, True),
}


def definition(x, w, tables, sign=-1):
    if w is not None:
        x = x.repeat_interleave(w.shape[0] // x.shape[1], dim=1) @ w
    turned = tables[0].shape[1]
    x1, x2, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
    partner = torch.cat((sign * x2, x1), dim=-1)
    return torch.cat((x[..., :turned] * tables[0] + partner * tables[1], rest), dim=-1)


def tensors(device, dtype, heads, kv_heads, q_rows, k_rows, channels, q_pools, k_pools, outer, turned, maps_q):
    def draw(*shape):
        return torch.randn(shape, device=device)

    q, k = draw(2, heads, q_rows, q_pools * channels), draw(2, kv_heads, k_rows, k_pools * channels)
    w_q = draw(heads, q_pools * channels, outer).to(dtype) if maps_q else None
    w_k = draw(kv_heads if maps_q else heads, k_pools * channels, outer).to(dtype)
    return q, k, w_q, w_k, (draw(q_rows, turned), draw(q_rows, turned)), (draw(k_rows, turned), draw(k_rows, turned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equals_the_definition(device, within_budget, impl, shape, dtype):
    q, k, w_q, w_k, tables_q, tables_k = tensors(device, dtype, *shape)
    got = gate_project(q, k, w_q, w_k, tables_q, tables_k, impl=impl)
    for out, x, w, tables in zip(got, (q, k), (w_q, w_k), (tables_q, tables_k)):
        exact = definition(x.double(), None if w is None else w.double(), [t.double() for t in tables])
        assert out.dtype == dtype
        if impl == "triton" and dtype == torch.float32:
            terms = definition(x.double().abs(), None if w is None else w.double().abs(), [t.double().abs() for t in tables], 1)
            assert ((out - exact).abs() <= 2**-16 * terms).all()  # a single term may err by three times as much
        else:
            within_budget(out, exact, definition(x.to(dtype), w, [t.to(dtype) for t in tables]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_halves_sum_to_the_whole(device, shape):
    """In the interpreter, whose halves are fp32, the low ones are 0: there this tests where they are written."""
    inputs = tensors(device, torch.float32, *shape)
    for out, parts in zip(gate_project(*inputs, impl="triton"), gate_project(*inputs, halves=True, impl="triton")):
        assert parts.dtype == HALF and parts.shape == (*out.shape[:3], 2, out.shape[3])
        assert ((parts.float().sum(3) - out).abs() <= 2**-16 * out.abs()).all()
        assert parts[..., 1, :].abs().max() <= 2**-8 * out.abs().max()
    for out, whole in zip(gate_project(*inputs, halves=True, impl="reference"), gate_project(*inputs, impl="reference")):
        assert torch.equal(out, whole)  # the reference has nothing to gain


def test_gradients_reach_the_weights(device):
    q, k, w_q, w_k, *tables = tensors(device, torch.float32, *SHAPES["both sides mapped"])
    w_q.requires_grad_(), w_k.requires_grad_()
    sum(out.square().sum() for out in gate_project(q, k, w_q, w_k, *tables)).backward()
    assert w_q.grad.count_nonzero() == w_q.numel() and w_k.grad.count_nonzero() == w_k.numel()


def test_refuses_what_does_not_fit(device):
    q, k, w_q, w_k, tables_q, tables_k = tensors(device, torch.float32, *SHAPES["both sides mapped"])
    with pytest.raises(ValueError, match="RoPE tables"):
        gate_project(q, k, w_q, w_k, tables_k, (tables_k[0][1:], tables_k[1][1:]))
    with pytest.raises(ValueError, match="does not fit pooled k"):
        gate_project(q, k, w_q, w_k[:, 1:], tables_q, tables_k)
    with pytest.raises(ValueError, match="does not fit pooled q"):
        gate_project(q, k, None, w_k[..., :32], tables_q, tables_k)
    with pytest.raises(ValueError, match="float64"):
        gate_project(q, k, w_q.double(), w_k.double(), tables_q, tables_k, impl="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        gate_project(q, k, w_q, w_k, tables_q, tables_k, impl="cuda")
