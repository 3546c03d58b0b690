import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import sparsebench
from sparsebench.methods import METHODS

BlockTopK = METHODS["block_topk"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    def test_blocks(self, conformance, check_conforms, case):
        inputs, theirs = conformance(f"{case}_inputs"), conformance(f"{case}_minference")
        q, k = (inputs[name][None].float() for name in ("q", "k"))
        mask = sparsebench.select(BlockTopK(8), q, k)
        check_conforms("block_topk", case, "top8", mask.dense()[0], theirs["blocksparse/top8/block_map.bits"])
        index = theirs["blocksparse/top8/index"].long()[:, : mask.kv_indices.shape[2]]
        listed = torch.arange(8) < mask.kv_num_blocks[0, ..., None]
        assert torch.equal(mask.kv_indices[0].long()[listed], index[listed])

    def test_outputs(self, conformance, case):
        inputs, theirs, reference = (conformance(f"{case}_{part}") for part in ("inputs", "minference", "reference"))
        q, k, v = (inputs[part][None].float() for part in ("q", "k", "v"))
        first = k.shape[2] - 512  # whole blocks: the last rows of the same selection
        out = sparsebench.attention(BlockTopK(8), q[:, :, first:], k, v)[0][0]
        rows, name = reference["rows"].long() - first, "blocksparse/top8"
        late, expected = rows[rows >= 0], theirs[f"{name}.O_rows"].float()[:, rows >= 0]
        # Their kernel rounds the scaled q to bf16; the manifest gives 0.08 as its largest distance from fp32.
        assert (out[:, late] - expected).abs().max() < 0.08
        assert (expected - reference["dense.O_rows"].float()[:, rows >= 0]).abs().max() > 0.2
        if f"{name}.O_proj" in set(theirs.keys()):  # all rows, in the full folder only
            assert (out @ reference["proj"].float() - theirs[f"{name}.O_proj"][:, first:]).abs().max() < 0.08


def tensors(q_len, kv_len, batch=1):
    return torch.randn(batch, 4, q_len, 32), torch.randn(batch, 2, kv_len, 32)


def by_definition(q, k, topk, block):
    """bool [B, H, N, N]: pooled with zeros after the last token, ranked among the causal blocks alone."""
    padding = -q.shape[2] % block
    pooled = [F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block)).mean(3) for x in (q, k.repeat_interleave(2, 1))]
    scores = torch.einsum("bhmd,bhnd->bhmn", *pooled)
    rows = scores.shape[-1]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(rows):
        best = scores[:, :, row, : row + 1].sort(dim=-1, descending=True).indices[..., :topk]
        chosen[:, :, row].scatter_(-1, best, True)
    return chosen


@pytest.mark.parametrize("length, block", [(1000, 64), (961, 64), (1, 64), (60, 64), (640, 64), (500, 32), (701, 100)])
@pytest.mark.parametrize("topk", [1, 3, 100])
def test_selection_by_definition(length, block, topk):
    q, k = tensors(length, length, batch=2)
    k[:, :, length // block * block :] *= 3  # or the last block would hardly ever be near the cut
    mask = sparsebench.select(BlockTopK(topk, block), q, k)
    assert torch.equal(mask.dense(), by_definition(q, k, topk, block))
    dataclasses.replace(mask, trusted=False).check()


def test_ragged_last_block_is_divided_by_the_whole_block():
    q, k = torch.ones(1, 1, 130, 16), torch.ones(1, 1, 130, 16)
    k[:, :, 128:] = 20.0  # two keys: 20 as their mean, 0.625 as the sum of them over 64
    assert sparsebench.select(BlockTopK(2), q, k).dense()[0, 0, -1].tolist() == [True, True, False]
    k[:, :, 128:] = 40.0
    assert sparsebench.select(BlockTopK(2), q, k).dense()[0, 0, -1, -1]


def test_selection_in_pieces(monkeypatch):
    q, k = tensors(700, 700)
    whole = sparsebench.select(BlockTopK(3), q, k).dense()
    monkeypatch.setattr("sparsebench.methods.block_topk.SCRATCH_BYTES", 1)
    assert torch.equal(sparsebench.select(BlockTopK(3), q, k).dense(), whole)


def test_bf16_is_pooled_in_fp32():
    q, k = (x.bfloat16() for x in tensors(640, 640))
    ours = sparsebench.select(BlockTopK(3), q, k).dense()
    assert torch.equal(ours, sparsebench.select(BlockTopK(3), q.float(), k.float()).dense())


def test_masks_nest_and_end_dense():
    q, k = tensors(1000, 1000)
    masks = [sparsebench.select(BlockTopK(topk), q, k).dense() for topk in (1, 2, 7, 15, 16)]
    assert all((more | ~fewer).all() and (more & ~fewer).any() for fewer, more in itertools.pairwise(masks))
    assert torch.equal(masks[-1][0, 0], torch.ones(16, 16, dtype=torch.bool).tril())


@pytest.mark.parametrize("start, end", [(256, 512), (512, 700), (448, 512)])
def test_chunks_of_whole_blocks_are_exact(start, end):
    q, k = tensors(700, 700)
    whole = sparsebench.select(BlockTopK(3), q, k).tokens()
    chunk = sparsebench.select(BlockTopK(3), q[:, :, start:end], k[:, :, :end]).tokens()
    assert torch.equal(chunk, whole[:, :, start:end, :end])


@pytest.mark.parametrize("q_len, kv_len", [(200, 500), (65, 100), (10, 70), (1, 1)])
@pytest.mark.parametrize("topk", [1, 2, 100])
def test_no_query_is_blind_when_a_chunk_starts_inside_a_block(q_len, kv_len, topk):
    q, k = tensors(q_len, kv_len)
    q[..., 0], k[..., 0] = 5, torch.arange(kv_len) / 10  # the best block begins after the row's first query
    mask = sparsebench.select(BlockTopK(topk), q, k)
    dataclasses.replace(mask, trusted=False).check()
    assert mask.tokens().any(-1).all()
    last = (torch.arange(kv_len - q_len, kv_len, 64) + 64).clamp(max=kv_len) - 1
    assert torch.equal(mask.kv_num_blocks, (last // 64 + 1).clamp(max=topk).int().expand(1, 4, -1))


@pytest.mark.parametrize("fields", [{"topk": 0}, {"block": 0}])
def test_refuses_values_out_of_range(fields):
    with pytest.raises(ValueError, match="out of range"):
        BlockTopK(**fields)
