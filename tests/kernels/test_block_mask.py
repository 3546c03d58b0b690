"""BlockMask: conversions, counts and checks against loops over single tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsebench.kernels import BlockMask, block_mask, causal_blocks

SIZES = {
    # q_len, kv_len, q_block, kv_block
    "square": (256, 256, 64, 64),
    "odd": (201, 201, 64, 64),
    "chunked": (70, 205, 64, 64),
    "tall": (150, 210, 128, 64),
    "wide": (150, 210, 64, 128),
    "small blocks": (50, 60, 16, 8),
    "one query": (1, 77, 64, 64),
}


def random_dense(q_len, kv_len, q_block, kv_block, batch=2, heads=3, density=0.5):
    dense = torch.rand(batch, heads, -(-q_len // q_block), -(-kv_len // kv_block)) < density
    dense[..., 0] = True
    return dense


def lists(rows, fill=-7):
    """int32 num [1, 1, NQ] and indices [1, 1, NQ, K], padded with an invalid value that must be ignored."""
    width = max(1, *(len(row) for row in rows))
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32), torch.tensor([[padded]], dtype=torch.int32)


def untiled(columns=None, **kwargs):
    num, index = lists([[0], [3, 70], [0, 64, 130], [17, 100, 199]])
    column_num, column_index = lists(columns) if columns else (None, None)
    return BlockMask(num, index, 230, 230, 64, 64, column_index, column_num, kv_step=1, **kwargs)


def tokens_by_loop(mask):
    """tokens() one pair at a time, straight from the definition of the fields."""
    out = torch.zeros(*mask.kv_num_blocks.shape[:2], mask.q_len, mask.kv_len, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        r, i = row // mask.q_block, row + mask.kv_len - mask.q_len
        keys = set()
        for first in mask.kv_indices[b, h, r, : mask.kv_num_blocks[b, h, r]].tolist():
            keys.update(range(first * mask.step, min(first * mask.step + mask.kv_block, mask.kv_len)))
        if mask.column_indices is not None:
            keys.update(mask.column_indices[b, h, r, : mask.column_num[b, h, r]].tolist())
        for j in keys:
            near = mask.window is None or i - j < mask.window or j < mask.sink or i >= mask.kv_len - mask.last
            near = near or (mask.stride is not None and (i - j) % mask.stride == 0)
            out[b, h, row, j] = j <= i and near
    return out


def masks():
    for name, size in SIZES.items():
        mask = BlockMask.from_dense(random_dense(*size, batch=1, heads=2), *size)
        yield pytest.param(mask, id=name)
        yield pytest.param(replace(mask, window=40, sink=5, last=3), id=f"{name}, window")
        yield pytest.param(replace(mask, window=1, sink=70, last=66), id=f"{name}, sink")
        yield pytest.param(replace(mask, window=20, sink=3, last=2, stride=17), id=f"{name}, stride")
    yield pytest.param(untiled(), id="untiled")
    yield pytest.param(untiled(window=50, sink=9, last=4), id="untiled, window")
    columns = [[], [0, 2, 69], [129], [0, 81, 90, 198]]
    yield pytest.param(untiled(columns), id="untiled, columns")
    yield pytest.param(untiled(columns, window=50, sink=1, last=4), id="untiled, columns, window")


@pytest.mark.parametrize("mask", list(masks()))
def test_tokens_and_counts_match_a_loop(mask):
    expected = tokens_by_loop(mask)
    assert torch.equal(mask.tokens(), expected)
    assert torch.equal(mask.pairs(), expected.sum((-1, -2)))
    visible = sum(mask.kv_len - mask.q_len + n for n in range(1, mask.q_len + 1))
    assert mask.visible_pairs() == visible
    torch.testing.assert_close(mask.density(), expected.sum((-1, -2)).double() / visible)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_causal_blocks_match_a_loop(size):
    q_len, kv_len, q_block, kv_block = size
    visible = causal_blocks(*size)
    for r, c in torch.cartesian_prod(*(torch.arange(n) for n in visible.shape)).tolist():
        last_query = min((r + 1) * q_block, q_len) - 1 + kv_len - q_len
        assert bool(visible[r, c]) == (c * kv_block <= last_query)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_dense_round_trip(size):
    dense = random_dense(*size)
    mask = BlockMask.from_dense(dense, *size)
    kept = dense & causal_blocks(*size)
    assert torch.equal(mask.dense(), kept)
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    assert mask.kv_indices.shape[-1] == kept.sum(-1).max()
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in kept.shape[:3])).tolist():
        assert mask.kv_indices[b, h, r, : mask.kv_num_blocks[b, h, r]].tolist() == kept[b, h, r].nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [(150, 210, 16, 64), (70, 205, 1, 32), (64, 64, 4, 8)])
def test_union_by_tile(size):
    mask = BlockMask.from_dense(random_dense(*size, density=0.1), *size)
    union, member = mask.by_tile(64)
    assert torch.equal(member, mask.dense()) and union.q_block == 64
    group = 64 // size[2]
    for r in range(union.kv_num_blocks.shape[2]):
        assert torch.equal(union.dense()[:, :, r], member[:, :, r * group : (r + 1) * group].any(2))


def test_union_by_tile_refuses_other_tiles():
    with pytest.raises(ValueError, match="do not make up tiles"):
        BlockMask.from_dense(random_dense(150, 210, 16, 64), 150, 210, 16, 64).by_tile(24)


def test_padding_is_ignored():
    num, index = lists([[0], [0, 1], [2]])
    mask = BlockMask(num, index, 192, 192, 64, 64)
    other = BlockMask(*lists([[0], [0, 1], [2]], fill=2**31 - 1), 192, 192, 64, 64)
    assert torch.equal(mask.tokens(), other.tokens()) and torch.equal(mask.dense(), other.dense())
    assert torch.equal(mask.pairs(), other.pairs())
    assert mask.check().trusted and other.check().trusted


def test_full_mask_has_density_one():
    size = (100, 260, 64, 64)
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 5, dtype=torch.bool), *size)
    assert mask.density().tolist() == [[1.0]]


BAD = {
    "would see no key: batch 0, head 0, query block 1": [[0], []],
    "would see no key: batch 0, head 0, query block 0": [[], [0]],
    "may see .*after its causal end": [[0], [0, 2]],
    "may see .negative": [[0], [-1]],
    "must be ascending": [[0], [1, 0]],
    "without overlap": [[0], [0, 0]],
}


@pytest.mark.parametrize("message, rows", BAD.items(), ids=BAD.keys())
def test_check_raises(message, rows):
    mask = BlockMask(*lists(rows), 128, 128, 64, 64)
    with pytest.raises(ValueError, match=message):
        mask.check()
    assert replace(mask, trusted=True).check().trusted  # a builder that vouches for its rows spares the check


def test_check_of_counts():
    num, index = lists([[0], [0, 1]])
    for wrong in (num + 1, num - 2):
        with pytest.raises(ValueError, match="negative or larger"):
            BlockMask(wrong, index, 128, 128, 64, 64).check()


@pytest.mark.parametrize(
    "columns, message",
    [
        ([[5], [0], [], []], "inside a chosen block"),
        ([[], [2, 2], [], []], "ascending"),
        ([[], [2, 1], [], []], "ascending"),
        ([[], [230], [], []], "out of range"),
        ([[], [-1], [], []], "out of range"),
    ],
)
def test_check_of_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        untiled(columns).check()
    assert untiled([[], [0], [129], [2]]).check().trusted


def test_check_of_overlapping_untiled_blocks():
    num, index = lists([[0, 63]])
    with pytest.raises(ValueError, match="without overlap"):
        BlockMask(num, index, 64, 128, 64, 64, kv_step=1).check()


def test_blind_rows_are_found_exactly():
    """check() raises if and only if some row of tokens() is empty."""
    generator, blind = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        q_len, kv_len = sorted(torch.randint(1, 60, (2,), generator=generator).tolist())
        q_block, kv_block = (2 ** int(torch.randint(2, 5, (), generator=generator)) for _ in range(2))
        dense = torch.rand(1, 2, -(-q_len // q_block), -(-kv_len // kv_block), generator=generator) < 0.6
        mask = BlockMask.from_dense(dense, q_len, kv_len, q_block, kv_block)
        if torch.rand((), generator=generator) < 0.6:
            window, sink, last = torch.randint(1, 20, (3,), generator=generator).tolist()
            mask = replace(mask, window=window, sink=sink - 1, last=last - 1)
        if mask.tokens().any(-1).all():
            assert mask.check().trusted
        else:
            blind += 1
            with pytest.raises(ValueError, match="would see no key"):
                mask.check()
    assert 50 < blind < 250


def test_wrong_shapes_raise():
    num, index = lists([[0], [0, 1]])
    with pytest.raises(ValueError, match="0 < q_len <= kv_len"):
        BlockMask(num, index, 129, 128, 64, 64)
    with pytest.raises(ValueError, match="3 query blocks"):
        BlockMask(num, index, 129, 129, 64, 64)
    with pytest.raises(ValueError, match="together or neither"):
        BlockMask(num, index, 128, 128, 64, 64, column_indices=index)
    for column_num, columns in (
        (num[..., :1], index),
        (num, index[..., :1, :]),
        (num.expand(2, 1, 2), index.expand(2, 1, 2, 2)),
    ):
        with pytest.raises(ValueError, match="column_num of"):
            BlockMask(num, index, 128, 128, 64, 64, columns, column_num)


@pytest.mark.parametrize("dense", [
    torch.ones(1, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool),
], ids=["integers", "one block", "no heads"])  # fmt: skip
def test_from_dense_refuses_what_would_broadcast_or_invert_wrongly(dense):
    with pytest.raises(ValueError, match=r"takes bool \[B, H, 4, 4\]"):
        BlockMask.from_dense(dense, 256, 256, 64, 64)


def test_pieces_change_nothing(monkeypatch):
    """from_dense and pairs work through large masks in pieces."""
    size = SIZES["odd"]
    dense = random_dense(*size)
    whole, columns = BlockMask.from_dense(dense, *size), untiled([[], [0, 2, 69], [129], [0, 81, 90, 198]])
    expected = columns.pairs()
    monkeypatch.setattr(block_mask, "SCRATCH_ELEMENTS", 9)
    pieces = BlockMask.from_dense(dense, *size)
    assert torch.equal(whole.dense(), pieces.dense()) and torch.equal(whole.kv_num_blocks, pieces.kv_num_blocks)
    assert torch.equal(pieces.pairs(), pieces.tokens().sum((-1, -2)))
    assert torch.equal(columns.pairs(), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("size", [(256, 256, 64, 64), (128, 256, 128, 64), (200, 200, 64, 64)])
def test_to_flex_is_the_same_selection(size, window, compiled):
    q_len, kv_len = size[:2]
    mask = replace(BlockMask.from_dense(random_dense(*size, batch=1, heads=2), *size), window=window, sink=3, last=9)
    flex = mask.to_flex(compiled=compiled)
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
    if not compiled:  # mask_mod is all that FlexAttention looks at then
        assert torch.equal(torch.stack([flex.mask_mod(0, h, i, j) for h in range(2)]), mask.tokens()[0])
    seen = torch.zeros(1, 2, q_len, kv_len, dtype=torch.bool)
    for num, index, whole in (
        (flex.kv_num_blocks, flex.kv_indices, False),
        (flex.full_kv_num_blocks, flex.full_kv_indices, True),
    ):
        for h, r in torch.cartesian_prod(torch.arange(2), torch.arange(num.shape[-1])).tolist():
            rows = slice(r * size[2], (r + 1) * size[2])
            for block in index[0, h, r, : num[0, h, r]].tolist():
                keys = slice(block * size[3], (block + 1) * size[3])
                seen[0, h, rows, keys] = True if whole else flex.mask_mod(0, h, i, j)[rows, keys]
    assert torch.equal(seen, mask.tokens())
    assert int(flex.full_kv_num_blocks.sum()) > 0 or window is not None


def test_to_flex_repeats_kv_heads():
    size = SIZES["square"]
    mask = BlockMask.from_dense(random_dense(*size, batch=1, heads=2), *size)
    flex = mask.to_flex(heads=6)
    assert torch.equal(flex.to_dense().bool(), mask.dense().repeat_interleave(3, dim=1))
    i, j = torch.arange(256)[:, None], torch.arange(256)
    assert torch.equal(flex.mask_mod(0, 3, i, j), mask.tokens()[0, 1])
    with pytest.raises(ValueError, match="2 heads does not fit 3"):
        mask.to_flex(heads=3)


def test_what_flex_and_dense_cannot_express_raises():
    with pytest.raises(ValueError, match="tile"):
        untiled().dense()
    with pytest.raises(ValueError, match="FlexAttention"):
        untiled().to_flex()
    tiled = BlockMask(*lists([[0], [1]]), 128, 128, 64, 64, *reversed(lists([[], [3]])))
    with pytest.raises(ValueError, match="FlexAttention"):
        tiled.to_flex()
