import pytest
import torch

from sparsebench.kernels import block_lists, causal_blocks
from sparsebench.kernels.block_lists import block_lists_reference

SIZES = [(256, 256, 64, 64), (201, 201, 64, 64), (70, 205, 64, 64), (150, 2100, 128, 1), (1, 77, 64, 64), (50, 60, 16, 8)]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_triton_equals_the_reference(size, density, device, monkeypatch):
    visible = causal_blocks(*size)
    dense = torch.rand(2, 3, *visible.shape, device=device) < density
    num, index = block_lists_reference(dense, *size)
    for limit, width in ((0, max(int(dense.sum(-1).max()), 1)), (1 << 28, dense.shape[-1])):
        monkeypatch.setattr(block_lists, "FULL_WIDTH_BYTES", limit)
        found, listed = block_lists.block_lists(dense, *size, impl="triton")
        assert torch.equal(found, num) and listed.shape[-1] == width
        real = torch.arange(index.shape[-1], device=device) < num[..., None]
        assert torch.equal(listed[..., : index.shape[-1]][real], index[real])


def test_refuses_what_is_no_map():
    with pytest.raises(ValueError, match="from_dense takes bool"):
        block_lists.block_lists(torch.zeros(1, 1, 2, 2), 128, 128, 64, 64)
    with pytest.raises(ValueError, match="impl is"):
        block_lists.block_lists(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 128, 128, 64, 64, impl="cuda")
