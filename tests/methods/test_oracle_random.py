import dataclasses

import pytest
import torch

import sparsebench
from sparsebench.kernels.block_mass import SCRATCH_ELEMENTS, block_mass
from sparsebench.kernels.selection import block_pairs, keep_top
from sparsebench.methods import METHODS


def attention_probabilities(q, k, scale):
    group = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return logits.masked_fill(~visible, float("-inf")).softmax(-1)


def blocks_of(tokens, q_block, kv_block):
    q_len, kv_len = tokens.shape[-2:]
    padded = torch.nn.functional.pad(tokens, (0, -kv_len % kv_block, 0, -q_len % q_block))
    return padded.unflatten(-1, (-1, kv_block)).unflatten(-3, (-1, q_block))


@pytest.mark.parametrize("case", ["A", "D"])
@pytest.mark.parametrize("reduce", ["mass", "max"])
def test_block_mass_against_fp64(conformance, case, reduce):
    inputs, reference = conformance(f"{case}_inputs"), conformance(f"{case}_reference")
    q, k = inputs["q"][None], inputs["k"][None]
    got = block_mass(q, k, q.shape[-1] ** -0.5, 64, 64, reduce)[0]
    assert (got - reference[f"oracle.block_{reduce}64"]).abs().max() < (1e-4 if reduce == "mass" else 1e-5)
    if reduce == "mass":
        assert torch.allclose(got.sum(-1), torch.full(got.shape[:2], 64.0), atol=1e-4)


@pytest.mark.parametrize("q_len, kv_len", [(200, 200), (1, 1), (70, 333), (130, 200)])
@pytest.mark.parametrize("q_block, kv_block", [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("scratch", [1, 1 << 21])
def test_block_mass_of_odd_shapes(monkeypatch, q_len, kv_len, q_block, kv_block, scratch):
    monkeypatch.setitem(SCRATCH_ELEMENTS, "cpu", scratch)
    q, k = torch.randn(2, 4, q_len, 32), torch.randn(2, 2, kv_len, 32)
    p = blocks_of(attention_probabilities(q, k, 0.3), q_block, kv_block)
    assert torch.allclose(block_mass(q, k, 0.3, q_block, kv_block).double(), p.sum((-1, -3)), atol=1e-4)
    assert torch.allclose(block_mass(q, k, 0.3, q_block, kv_block, "max").double(), p.amax((-1, -3)), atol=1e-5)
    rows = block_mass(q, k, 0.3, q_block, kv_block, "row_mass").double()
    assert torch.allclose(rows, p.sum(-1).amax(-2), atol=1e-5)


def test_block_mass_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="'mean'"):
        block_mass(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8), 1.0, 64, 64, "mean")


SHAPES = [(1024, 1024, 64, 64), (1000, 1000, 64, 64), (777, 777, 128, 128), (300, 1000, 64, 64), (256, 768, 64, 64),
          (500, 500, 128, 64), (500, 500, 64, 128), (65, 65, 64, 64), (1, 1, 64, 64)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_block_pairs(shape):
    q_len, kv_len, q_block, kv_block = shape
    visible = torch.ones(q_len, kv_len, dtype=torch.int64).tril(kv_len - q_len)
    assert torch.equal(block_pairs(*shape), blocks_of(visible, q_block, kv_block).sum((-1, -3)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [0.0, 100.0, -100.0])
def test_keep_top_is_exact_about_density_and_nests(shape, diagonal):
    q_len, kv_len, q_block, kv_block = shape
    pairs = block_pairs(*shape)
    scores = torch.randn(2, 3, *pairs.shape)
    last = (torch.arange(kv_len - q_len, kv_len, q_block) + q_block).clamp(max=kv_len) - 1
    scores += diagonal * (torch.arange(pairs.shape[1]) == (last // kv_block)[:, None])
    smaller = torch.zeros(2, 3, *pairs.shape, dtype=torch.bool)
    for density in (0.001, 0.05, 0.1, 0.1001, 0.2, 0.3, 0.31, 0.5, 0.75, 0.9, 1.0):
        mask = keep_top(scores, *shape, density)
        dataclasses.replace(mask, trusted=False).check()
        kept = mask.dense()
        assert not (smaller & ~kept).any()
        smaller = kept
        excess = (mask.density() - density) * mask.visible_pairs()
        least = (mask.kv_num_blocks == 1).all(-1)
        half = q_block * kv_block / 2 + 1e-3
        assert (excess >= -half).all() and (least | (excess <= half)).all()
    assert torch.equal(kept[0, 0], pairs > 0)


def test_keep_top_keeps_the_best_of_every_row():
    scores = torch.randn(1, 2, 16, 16)
    mask = keep_top(scores, 1024, 1024, 64, 64, 0.4)
    visible = torch.ones(16, 16, dtype=torch.bool).tril()
    worst_kept = scores.masked_fill(~mask.dense(), float("inf")).amin(-1)
    best_dropped = scores.masked_fill(mask.dense() | ~visible, float("-inf")).amax(-1)
    assert (worst_kept >= best_dropped).all()
    assert mask.kv_num_blocks[..., 8:].min() > 1


def test_keep_top_refuses_another_shape():
    with pytest.raises(ValueError, match="must return"):
        keep_top(torch.randn(1, 1, 3, 4), 256, 256, 64, 64, 0.5)


@pytest.mark.parametrize("by", ["mass", "max", "row_mass"])
def test_oracle_keeps_the_top_blocks(by):
    q, k = torch.randn(1, 4, 500, 64), torch.randn(1, 2, 500, 64)
    score = blocks_of(attention_probabilities(q, k, 64**-0.5), 64, 64)
    keys = score.amax(-1) if by == "max" else score.sum(-1)
    score = keys.sum(-2) if by == "mass" else keys.amax(-2)
    kept = sparsebench.select(METHODS["oracle"](0.4, by), q, k).dense()
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    worst_kept = score.masked_fill(~kept, float("inf")).amin(-1)
    assert (worst_kept > score.masked_fill(kept | ~visible, 0.0).amax(-1) - 1e-4).all()


@pytest.mark.parametrize("name", ["oracle", "random"])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.7])
def test_density_is_exact_to_a_block(name, density):
    q, k = torch.randn(1, 4, 1500, 64), torch.randn(1, 2, 1500, 64)
    mask = sparsebench.select(METHODS[name](density), q, k)
    assert ((mask.density() - density).abs() * mask.visible_pairs() <= 64 * 64).all()


def test_random_has_the_diagonal_and_is_uniform_besides():
    q = torch.randn(1, 32, 1, 8).expand(1, 32, 2048, 8)
    methods = [METHODS["random"](0.3, seed=seed) for seed in range(8)]
    masks = [sparsebench.select(method, q, q, layer=layer) for method in methods for layer in range(8)]
    draws = torch.cat([mask.dense()[0] for mask in masks]).float()
    assert (draws.diagonal(dim1=1, dim2=2) == 1).all()
    row = draws[:, 31, :31]  # every draw keeps the same number of this row's blocks
    expected = row.mean()
    standard_error = (expected * (1 - expected) / len(row)).sqrt()
    assert ((row.mean(0) - expected).abs() < 5 * standard_error).all()
    together = (row.T @ row / len(row)).fill_diagonal_(expected**2)
    assert (together - expected**2).abs().max() < 0.05


def test_random_depends_on_seed_layer_and_head_alone():
    x = torch.randn(1, 2, 640, 64)

    def draw(seed, layer, batch=x):
        return sparsebench.select(METHODS["random"](0.4, seed=seed), batch, batch, layer=layer).dense()

    one = draw(0, 0)
    assert torch.equal(one, draw(0, 0, torch.randn(3, 2, 640, 64)))
    assert not torch.equal(one, draw(1, 0)) and not torch.equal(one, draw(0, 1)) and not torch.equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("name, fields", [("oracle", {"by": "sum"}), ("oracle", {"density": 1.5}), ("random", {"seed": -1})])
def test_refuses_values_out_of_range(name, fields):
    with pytest.raises(ValueError, match=f"{name}:"):
        METHODS[name](**fields)


@pytest.mark.parametrize("fields", [{"threshold": 0.5}, {"density": 0.1}])
def test_no_query_is_blind_when_a_chunk_starts_inside_a_block(fields):
    q, k = torch.randn(1, 4, 90, 64), torch.randn(1, 2, 300, 64)
    q[..., 0] += 5
    k[:, :, 256:, 0] += 20  # the first row's best block begins after its first query
    mask = sparsebench.select(METHODS["oracle"](**fields), q, k)
    assert mask.tokens().any(-1).all()


def test_threshold_is_the_ceiling_over_all_heads():
    """With as many pairs in all heads together, no fixed density a head keeps more mass than one threshold for all."""
    q, k = torch.randn(1, 4, 640, 16), torch.randn(1, 2, 640, 16)
    k[:, 0, :64, 0] += 6  # one head needs a single block, the others need many
    q[:, 1, :, 0] += 6
    by_threshold = sparsebench.select(METHODS["oracle"](threshold=0.003), q, k)
    density = float(by_threshold.density().mean())
    by_density = sparsebench.select(METHODS["oracle"](density=density), q, k)
    assert 0.1 < density < 0.9
    mass = block_mass(q, k, 16**-0.5, 64, 64)
    assert abs(float(by_density.density().mean()) - density) < 0.01
    assert mass[by_threshold.dense()].sum() > 1.005 * mass[by_density.dense()].sum()
    assert METHODS["oracle"](threshold=0.003).knob == "threshold"
