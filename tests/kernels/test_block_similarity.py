import pytest
import torch

from sparsebench.kernels.block_similarity import block_similarity


def alike(batch, heads, length, dim, dtype=torch.float32, device="cpu"):
    """Tokens around a direction that changes every 50: some blocks are alike, some are not."""
    common = torch.randn(batch, heads, -(-length // 50), dim).repeat_interleave(50, dim=2)[:, :, :length]
    return (3 * common * torch.rand(length, 1) + torch.randn(batch, heads, length, dim)).to(device, dtype)


def definition(x, block, mean=None):
    """(means, mean of the Gram matrix of the normalised tokens) of every block; products and sums in fp64."""
    parts = (x.float() if mean is None else x.float() - mean).split(block, dim=2)
    normal = [(part / part.norm(dim=-1, keepdim=True)).half().double() for part in parts]
    grams = [(n @ n.transpose(-1, -2)).mean((-1, -2)) for n in normal]
    return torch.stack([part.double().mean(2) for part in parts], dim=2), torch.stack(grams, dim=2)


SHAPES = [(1, 2, 256, 64, 64), (2, 3, 200, 32, 128), (1, 1, 1, 16, 64), (1, 2, 65, 48, 64), (1, 2, 130, 128, 32)]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("batch, heads, length, dim, block", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_equals_the_gram_matrix(impl, batch, heads, length, dim, block, dtype, smooth, device):
    x = alike(batch, heads, length, dim, dtype, device)
    mean = torch.randn(batch, heads, 1, dim).to(device) if smooth else None
    pooled, similarity = block_similarity(x, block, mean, impl)
    expected_pooled, expected = definition(x, block, mean)
    assert pooled.dtype == similarity.dtype == torch.float32
    assert (pooled - expected_pooled).abs().max() < 1e-5
    # A normalised token next to the middle between two fp16 numbers may be rounded either way.
    assert (similarity - expected).abs().max() < 5e-6
    assert (similarity - expected).abs().median() < 2e-7
    if length > 100:
        assert similarity.max() - similarity.min() > 0.1


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_any_strides(impl, device):
    x = alike(2, 70, 3, 32, device=device).transpose(1, 2)  # [2, 3, 70, 32], tokens apart
    for view in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
        got, expected = block_similarity(view, 64, impl=impl), block_similarity(x.contiguous(), 64, impl="reference")
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(got, expected))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_token_without_direction_spoils_its_own_block_only(impl, device):
    x = alike(1, 1, 200, 16, device=device)
    x[0, 0, 70] = 0
    pooled, similarity = block_similarity(x, 64, impl=impl)
    assert similarity.isnan().tolist() == [[[False, True, False, False]]]
    assert pooled.isfinite().all()


def test_pieces_change_nothing(monkeypatch):
    x, mean = alike(1, 2, 500, 16), torch.randn(1, 2, 1, 16)
    whole = block_similarity(x, 64, mean, impl="reference")
    monkeypatch.setattr("sparsebench.kernels.block_similarity.SCRATCH_ELEMENTS", 2 * 64 * 16 * 3)
    parts = block_similarity(x, 64, mean, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


@pytest.mark.parametrize("options, message", [({"impl": "cuda"}, "'cuda'"), ({"block": 96}, "power of 2, got 96")])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        block_similarity(torch.randn(1, 1, 100, 16), **{"block": 64, **options})
