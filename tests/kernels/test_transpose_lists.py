import pytest
import torch

from sparsebench.kernels import BlockMask, causal_blocks
from sparsebench.kernels.transpose_lists import transpose_lists

# batch, heads, group, q_len, kv_len, q_block, kv_block
SIZES = {
    "square": (1, 4, 4, 300, 300, 64, 64),
    "batch, group of 3": (2, 3, 3, 2100, 2100, 64, 256),
    "chunked": (1, 2, 1, 70, 333, 64, 64),
    "more than a word of rows": (1, 2, 2, 4300, 4300, 128, 1024),
}


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_lists_are_the_columns_of_the_map(size, density, device):
    batch, heads, group, *lengths = size
    visible = causal_blocks(*lengths, device=device)
    dense = (torch.rand(batch, heads, *visible.shape, device=device) < density) & visible
    mask = BlockMask.from_dense(dense, *lengths)
    rows, blocks = visible.shape
    columns = dense.unflatten(1, (-1, group)).permute(0, 1, 4, 3, 2).reshape(-1, rows * group)  # a list, its entries
    expected = [column.nonzero()[:, 0].tolist() for column in columns]
    for impl in ("reference", "triton"):
        start, entries = transpose_lists(mask.kv_num_blocks, mask.kv_indices, blocks, group, impl=impl)
        assert start.dtype == torch.int64 and entries.dtype == torch.int32 and start[0] == 0
        assert [entries[a:b].tolist() for a, b in zip(start[:-1].tolist(), start[1:].tolist())] == expected


def test_bad_input_raises(device):
    num, index = (torch.ones(shape, dtype=torch.int32, device=device) for shape in ((1, 3, 2), (1, 3, 2, 2)))
    with pytest.raises(ValueError, match="groups of 2"):
        transpose_lists(num, index, 2, group=2)
    with pytest.raises(ValueError, match="impl is"):
        transpose_lists(num, index, 2, impl="cuda")
