"""The conversion of lines when distance 0 is not among them (tests/methods/test_minference.py has it in every head)."""

import dataclasses

import pytest
import torch

from sparsebench.kernels.vertical_slash import vertical_slash_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def by_definition(vertical, slash, end, kv_len):
    """Block starts and columns of the 64 queries before `end`, slash after slash from the farthest."""
    starts, covered = [], 0
    for distance in reversed(slash.nonzero().flatten().tolist()):
        p = max(end - distance, 64)
        if distance >= end or p <= covered:
            continue
        starts.append(p - 64 if p > covered + 64 else covered)
        covered = starts[-1] + 64
    columns = [
        column
        for column in vertical.nonzero().flatten().tolist()
        if column < min(covered or end, end) and not any(start <= column < start + 64 for start in starts)
    ]
    return [start for start in starts if start < kv_len], columns


def lines(kv_len, nearest):
    """Random lines of two batch rows and two heads; `nearest` is the least distance, whose residue decides the last block."""
    vertical, slash = torch.rand(2, 2, kv_len) < 0.2, torch.rand(2, 2, kv_len) < 0.05
    slash[..., : nearest + 1] = torch.arange(min(nearest + 1, kv_len)) == nearest
    return vertical, slash, max(int(vertical.sum(-1).max()), 1), max(int(slash.sum(-1).max()), 1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("q_len, kv_len", [(300, 300), (200, 401), (70, 192), (60, 60)])
@pytest.mark.parametrize("nearest", [0, 1, 63, 64, 150, 1000])
def test_conversion_by_definition(impl, q_len, kv_len, nearest):
    vertical, slash, *bounds = lines(kv_len, nearest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = vertical_slash_mask(vertical.to(device), slash.to(device), *bounds, q_len, impl=impl)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, mask.kv_num_blocks.shape)).tolist():
        starts, columns = by_definition(vertical[b, h], slash[b, h], kv_len - q_len + 64 * (r + 1), kv_len)
        assert mask.kv_indices[b, h, r, : mask.kv_num_blocks[b, h, r]].tolist() == starts
        assert mask.column_indices[b, h, r, : mask.column_num[b, h, r]].tolist() == columns


@pytest.mark.parametrize("nearest", [1, 63])
def test_a_distance_below_64_leaves_no_query_blind(nearest):
    slash = torch.arange(300) == nearest
    mask = vertical_slash_mask(torch.zeros(1, 1, 300, dtype=torch.bool), slash[None, None], 1, 1, 300, impl="reference")
    dataclasses.replace(mask, trusted=False).check()
    assert mask.tokens().any(-1).all()
    none = vertical_slash_mask(torch.zeros(1, 1, 300, dtype=torch.bool), (slash & False)[None, None], 1, 1, 300)
    assert not none.tokens().any()
