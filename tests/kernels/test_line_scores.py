import pytest
import torch

from sparsebench.kernels import line_scores as module
from sparsebench.kernels.line_scores import line_scores

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(300, 300, 128), (300, 300, 64), (40, 300, 128), (1, 140, 64), (1, 1, 128), (128, 128, 128), (129, 500, 128)]


def expected(q, k, scale, last):
    """In fp64, diagonal by diagonal."""
    q, kv_len = q[:, :, -last:].double(), k.shape[2]
    rows = q.shape[2]
    logits = q @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    visible = torch.ones(rows, kv_len, dtype=torch.bool).tril(kv_len - rows)
    p = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    slash = [torch.diagonal(p, kv_len - rows - d, 2, 3).sum(-1) for d in range(kv_len)]
    return p.sum(2), torch.stack(slash, dim=-1)


@pytest.mark.parametrize("q_len, kv_len, last", SHAPES)
@pytest.mark.parametrize("scratch", [1, 1 << 28])
def test_reference(monkeypatch, q_len, kv_len, last, scratch):
    monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
    q, k = torch.randn(2, 4, q_len, 32), torch.randn(2, 2, kv_len, 32)
    for ours, theirs in zip(line_scores(q, k, 0.3, last), expected(q, k, 0.3, last)):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)


@pytest.mark.parametrize("q_len, kv_len, last", SHAPES)
def test_triton_equals_the_reference(monkeypatch, q_len, kv_len, last):
    monkeypatch.setattr(module, "SPAN", 256)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 2, q_len, 24, dtype=torch.float16, device=device) * 2
    k = torch.randn(1, kv_len, 1, 24, dtype=torch.float16, device=device).transpose(1, 2)
    got = line_scores(q, k, 0.125, last, impl="triton")
    for ours, theirs in zip(got, line_scores(q, k, 0.125, last, impl="reference")):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("dtype, dim, last, impl, message", [
    (torch.float32, 64, 128, "triton", "16-bit"), (torch.float16, 256, 128, "triton", "256"),
    (torch.float16, 64, 129, "triton", "129"), (torch.float16, 64, 128, "cuda", "'cuda'"),
])  # fmt: skip
def test_refuses(dtype, dim, last, impl, message):
    q = torch.zeros(1, 1, 200, dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        line_scores(q, q, 1.0, last, impl=impl)
