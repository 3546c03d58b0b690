import dataclasses
import itertools
import math
import re

import pytest
import torch

import sparsebench
from sparsebench.kernels.block_similarity import block_similarity
from sparsebench.methods import METHODS, spargeattn

SpargeAttn = METHODS["spargeattn"]
NAME = re.compile(r"sparge/(\d+)x(\d+)/sim([-.\d]+)_(cdf|topk)([.\d]+)/(plain|smoothk)/block_map\.bits")


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    def load(self, conformance, case):
        theirs = conformance(f"{case}_spargeattn")
        settings = [match for match in map(NAME.fullmatch, theirs.keys()) if match]
        assert len(settings) == 16
        inputs = conformance(f"{case}_inputs")
        q, k = (inputs[name][None].float() for name in "qk")
        return q, k, theirs, settings

    def test_maps(self, conformance, check_conforms, case):
        q, k, theirs, settings = self.load(conformance, case)
        for match in settings:
            q_block, kv_block, sim, rule, value, smooth = match.groups()
            method = SpargeAttn(
                simthreshd1=float(sim), smooth_k=smooth == "smoothk", q_block=int(q_block), kv_block=int(kv_block),
                **{"cdfthreshd" if rule == "cdf" else "topk": float(value)},
            )  # fmt: skip
            mask = sparsebench.select(method, q, k)
            check_conforms("spargeattn", case, match[0], mask.dense()[0], theirs[match[0]])
            dataclasses.replace(mask, trusted=False).check()

    def test_similarity(self, conformance, case):
        q, k, theirs, settings = self.load(conformance, case)
        mean = k.mean(2, keepdim=True)
        for match in settings:
            q_block, kv_block, sim, _, _, smooth = match.groups()
            for x, name, block, shift in ((q, "q", q_block, None), (k, "k", kv_block, mean if smooth == "smoothk" else None)):
                similarity = block_similarity(x, int(block), shift)[1][0]
                group = q.shape[1] // len(similarity)
                exact = theirs[f"sparge/helper_meancos_fp32/{name}{'' if shift is None else '_smooth'}_b{block}"]
                assert (
                    similarity.repeat_interleave(group, 0) - exact
                ).abs().max() < 1e-4  # theirs is exact, ours rounds to fp16
                flags = theirs[f"sparge/{q_block}x{kv_block}/sim{sim}/{smooth}/sim_{name}.bits"]
                assert torch.equal((similarity > float(sim)).repeat_interleave(group, 0), flags)


def tensors(q_len, kv_len, batch=1, heads=2, kv_heads=1, dim=32):
    """q, k with stretches of 128 tokens that are alike, every third of them too noisy to be similar at 0.5."""

    def drift(n, length):
        common = torch.randn(batch, n, length // 128 + 1, dim).repeat_interleave(128, dim=2)[:, :, :length]
        noise = torch.where(torch.arange(length) // 128 % 3 == 1, 1.4, 0.5)[:, None]
        return common + noise * torch.randn(batch, n, length, dim)

    return drift(heads, kv_len)[:, :, kv_len - q_len :], drift(kv_heads, kv_len)


def similar(x, block, threshold):
    """Definition: mean of the cosines of all pairs, in fp64; a ragged block never."""
    parts = (part / part.norm(dim=-1, keepdim=True) for part in x.split(block))
    return [len(part) == block and bool((part @ part.T).mean() > threshold) for part in parts]


def definition(method, q, k):
    """bool [B, H, NQ, NK], one row at a time in fp64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    k = k - k.mean(2, keepdim=True) if method.smooth_k else k
    offset = k.shape[2] - q.shape[2]
    starts = range(0, q.shape[2], method.q_block)
    out = torch.zeros(*q.shape[:2], len(starts), -(-k.shape[2] // method.kv_block), dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])):
        whole = similar(q[b, h], method.q_block, method.simthreshd1)
        alike = similar(k[b, h], method.kv_block, method.simthreshd1)
        means = torch.stack([part.mean(0) for part in k[b, h].split(method.kv_block)])
        for row, part in enumerate(q[b, h].split(method.q_block)):
            last = offset + starts[row] + len(part) - 1
            visible = range(last // method.kv_block + 1)
            ranked = [j for j in visible if alike[j]]
            score = (means @ part.mean(0) * q.shape[-1] ** -0.5)[ranked].softmax(0) if ranked else torch.empty(0)
            order = score.argsort(descending=True)
            if method.topk is not None:
                count = int(method.topk * out.shape[-1] + 1e-6)
            else:
                count = int((score[order].cumsum(0) <= method.cdfthreshd).sum())
            kept = {ranked[i] for i in order[: max(count, 1)]} | {j for j in visible if not alike[j] or not whole[row]}
            out[b, h, row, list(kept)] = True
    return out


SHAPES = [(512, 512), (448, 448), (500, 500), (65, 65), (1, 1), (130, 390), (256, 512), (100, 333)]


@pytest.mark.parametrize("q_len, kv_len", SHAPES)
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128)])
@pytest.mark.parametrize("options", [{}, {"cdfthreshd": 0.5}, {"topk": 0.3}, {"cdfthreshd": 0.7, "smooth_k": False}])
def test_equals_the_definition(q_len, kv_len, blocks, options):
    q, k = tensors(q_len, kv_len)
    method = SpargeAttn(simthreshd1=0.5, q_block=blocks[0], kv_block=blocks[1], **options)
    mask = sparsebench.select(method, q, k)
    expected = definition(method, q, k)
    assert torch.equal(mask.dense(), expected)
    if kv_len >= 500 and options:
        assert 0.1 < mask.density().mean() < 0.95
    dataclasses.replace(mask, trusted=False).check()


def test_a_query_left_blind_gets_the_best_block_it_sees():
    q, k = torch.ones(1, 1, 384, 8), torch.ones(1, 1, 384, 8)
    height = torch.tensor([1.0, 3.0, 2.0, 5.0, 1.0, 1.0])  # of the six key blocks
    k = (k * height.repeat_interleave(64)[:, None]).contiguous()
    mask = sparsebench.select(SpargeAttn(cdfthreshd=0.0, smooth_k=False), q, k)
    # The authors' rule keeps the best visible block; in the first two rows that is the second one at the diagonal.
    assert mask.dense()[0, 0].int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    tokens = mask.tokens()[0, 0]
    read = [tokens[row].unflatten(0, (-1, 64)).all(-1).int().tolist() for row in (127, 255, 383)]
    assert read == [[1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert tokens.any(-1).all() and not tokens.triu(1).any()
    assert mask.density().item() == pytest.approx(tokens.sum().item() / (384 * 385 / 2), abs=1e-12)
    out, _ = sparsebench.attention(SpargeAttn(cdfthreshd=0.0, smooth_k=False), q, k, torch.randn(1, 1, 384, 8))
    assert out.isfinite().all()


@pytest.mark.parametrize("q_len, kv_len", SHAPES)
@pytest.mark.parametrize("limit", [{"topk": 1.0}, {"cdfthreshd": 1.0}, {"simthreshd1": 1.0}])
def test_limits_equal_dense(q_len, kv_len, limit):
    q, k = tensors(q_len, kv_len)
    v = torch.randn_like(k)
    out, mask = sparsebench.attention(SpargeAttn(**{"simthreshd1": -1.0, **limit}), q, k, v)
    assert (mask.density() == 1).all()
    assert torch.allclose(out, sparsebench.attention(METHODS["dense"](), q, k, v)[0], atol=1e-5)


@pytest.mark.parametrize("knob, values", [("cdfthreshd", (0.0, 0.2, 0.5, 0.8, 1.0)), ("topk", (0.01, 0.25, 0.4, 0.7, 1.0))])
@pytest.mark.parametrize("q_len, kv_len", [(512, 512), (450, 450), (200, 450)])
def test_masks_nest_as_the_knob_rises(knob, values, q_len, kv_len):
    q, k = tensors(q_len, kv_len)
    masks = [sparsebench.select(SpargeAttn(simthreshd1=-1, **{knob: value}), q, k) for value in values]
    assert all(not (fewer.tokens() & ~more.tokens()).any() for fewer, more in itertools.pairwise(masks))
    densities = [mask.density().mean() for mask in masks]
    assert densities[0] < densities[-2] < densities[-1] == 1
    assert SpargeAttn(**{knob: values[0]}).knob == knob


def test_topk_counts_in_fp32_over_all_blocks():
    q, k = (torch.randn(1, 1, 50 * 64, 4) for _ in range(2))
    assert int(0.58 * 50) == 28  # in doubles
    mask = sparsebench.select(SpargeAttn(simthreshd1=-1, topk=0.58, smooth_k=False), q, k)
    rows = torch.arange(1, 26)
    assert torch.equal(mask.dense()[0, 0].sum(-1), (2 * rows).clamp(max=29))


@pytest.mark.parametrize("start", [128, 256])
def test_aligned_chunks_equal_the_rows_of_the_whole(start):
    q, k = tensors(512, 512)
    method = SpargeAttn(simthreshd1=0.5, cdfthreshd=0.6, smooth_k=False)
    whole, chunk = (
        sparsebench.select(method, q[:, :, a:end], k[:, :, :end]).tokens() for a, end in ((0, 512), (start, start + 128))
    )
    assert torch.equal(chunk, whole[:, :, start : start + 128, : start + 128])
    assert not chunk.all(-1).all()


def test_no_similar_block_means_dense():
    q, k = tensors(512, 512)
    k[..., 0] += 30  # all keys point the same way until their mean is taken off
    k[..., 1:] = torch.randn_like(k[..., 1:])
    for value in (0.0, 0.98):
        assert (sparsebench.select(SpargeAttn(cdfthreshd=value), q, k).density() == 1).all()
    q[..., :] = 1
    assert (sparsebench.select(SpargeAttn(smooth_k=False), q, k).density() < 1).all()


def test_pieces_of_heads_change_nothing(monkeypatch):
    q, k = tensors(500, 500, batch=2)
    method = SpargeAttn(simthreshd1=0.5, cdfthreshd=0.6)
    whole = sparsebench.select(method, q, k).tokens()
    monkeypatch.setattr(spargeattn, "SCRATCH_ELEMENTS", 3 * 4 * 8)  # three of the four heads
    assert torch.equal(whole, sparsebench.select(method, q, k).tokens())


def test_threshold_of_skipped_products_is_in_powers_of_two():
    q, k = tensors(256, 256)
    method = SpargeAttn(simthreshd1=-1, pvthreshd=50)
    masks = [sparsebench.select(m, q, k) for m in (method, dataclasses.replace(method, pvthreshd=None))]
    assert masks[0].pv_threshold == pytest.approx(50 * math.log(2)) and masks[1].pv_threshold is None
    assert torch.equal(masks[0].tokens(), masks[1].tokens())
    outs = [sparsebench.attention(m, q, k, k)[0] for m in (method, dataclasses.replace(method, pvthreshd=None))]
    assert torch.allclose(*outs, atol=1e-6)


def test_random_tensors_of_the_speed_suite_are_not_dense():
    q, k = torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    method = SpargeAttn(topk=0.25)
    assert (sparsebench.select(method, q, k).density() == 1).all() and "similar" not in method.note
    random = method.synthetic(None, 0)
    assert (sparsebench.select(random, q, k).density() < 0.6).all() and "similar" in random.note


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"simthreshd1": 1.5}, r"simthreshd1=1.5 is out of range \[-1, 1\]"),
        ({"cdfthreshd": -0.1}, r"cdfthreshd=-0.1 is out of range \[0, 1\]"),
        ({"topk": 0}, "topk=0 is out of range, it must be positive"),
        ({"topk": 1.01}, "topk=1.01 is out of range"),
        ({"pvthreshd": 0.0}, "pvthreshd=0 is out of range, it must be positive"),
        ({"pvthreshd": -1.0}, "pvthreshd=-1.0 is out of range"),
        ({"q_block": 32}, "q_block=32 is neither 64 nor 128"),
        ({"kv_block": 256}, "kv_block=256 is neither 64 nor 128"),
    ],
)
def test_refuses_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SpargeAttn(**fields)
