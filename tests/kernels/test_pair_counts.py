"""Counts of selected pairs against the token map, for every kind of mask."""

import dataclasses

import pytest
import torch

from sparsebench.kernels import BlockMask
from sparsebench.kernels.pair_counts import add_pairs
from sparsebench.kernels.patterns import sink_and_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def masks():
    torch.manual_seed(1)
    for q_len, kv_len, q_block, kv_block in ((200, 200, 64, 64), (70, 333, 32, 64), (1, 90, 16, 64), (130, 1000, 64, 16)):
        dense = torch.rand(2, 3, -(-q_len // q_block), -(-kv_len // kv_block), device=DEVICE) < 0.4
        mask = BlockMask.from_dense(dense, q_len, kv_len, q_block, kv_block)
        yield mask
        yield dataclasses.replace(mask, window=50, sink=20, last=30)
        yield dataclasses.replace(mask, kv_indices=mask.kv_indices * kv_block, kv_step=1)
        columns = torch.tensor([0, 3, 17, 40, 89], dtype=torch.int32, device=DEVICE).expand(*mask.kv_num_blocks.shape, 5)
        lone = dataclasses.replace(mask, kv_num_blocks=torch.zeros_like(mask.kv_num_blocks))
        num = torch.randint(0, 6, mask.kv_num_blocks.shape, dtype=torch.int32, device=DEVICE)
        yield dataclasses.replace(lone, column_indices=columns, column_num=num)  # expanded, not contiguous
    yield sink_and_window(300, 300, 20, 100, device=torch.device(DEVICE))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mask", list(masks()))
def test_counts_are_those_of_the_token_map(mask, impl):
    batch, heads, rows = mask.kv_num_blocks.shape
    tokens = mask.tokens()
    tail = min(2, rows)
    last = mask.rows(rows - tail, rows).q_len
    expected = torch.stack((tokens.sum((-1, -2)), tokens[:, :, -last:].sum((-1, -2))))  # [2, B, H]
    apart = torch.full((2, batch * heads), 7, dtype=torch.int64, device=DEVICE)
    add_pairs(mask, apart, tail, impl=impl)
    assert torch.equal(apart - 7, expected.flatten(1))
    summed = torch.zeros(2, heads, dtype=torch.int64, device=DEVICE)
    add_pairs(mask, summed, tail, weight=5, impl=impl)
    assert torch.equal(summed, 5 * expected.sum(1))
    assert torch.equal(mask.pairs(), expected[0])


def test_a_stride_is_counted_by_the_reference_alone():
    mask = next(masks())
    strided = dataclasses.replace(mask, window=8, sink=4, stride=5)
    counts = torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)
    add_pairs(strided, counts)
    assert torch.equal(counts[0].view(2, 3), strided.tokens().sum((-1, -2)))
    with pytest.raises(ValueError, match="stride"):
        add_pairs(strided, counts, impl="triton")


def test_no_overflow_at_128k():
    rows = 2048
    num = torch.full((1, 1, rows), 1, dtype=torch.int32, device=DEVICE)
    index = torch.zeros(1, 1, rows, 1, dtype=torch.int32, device=DEVICE)
    everything = BlockMask(num, index, 131072, 131072, 64, 131072, trusted=True)
    counts = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    add_pairs(everything, counts, impl="reference")
    assert int(counts[0]) == 131072 * 131073 // 2
    few = everything.rows(0, 40)
    add_pairs(few, counts, weight=1 << 20, impl="triton")
    assert int(counts[0]) == 131072 * 131073 // 2 + (1 << 20) * (2560 * 2561 // 2)
