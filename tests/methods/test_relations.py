"""What must hold for every registered method, or between methods.

A new method is picked up by itself; give it a line in SMALL when its defaults select everything at a few hundred tokens, and
in DENSE when some setting of it equals dense attention.
"""

import dataclasses
import itertools

import pytest
import torch

import sparsebench
from sparsebench.kernels.block_mass import block_mass
from sparsebench.methods import METHODS

SMALL = {  # settings sparse at 500 tokens
    "a_shape": dict(init=8, local=70),
    "bigbird": dict(window=1, globals=1, random=1),
    "block_topk": dict(topk=2),
    "flexprefill": dict(min_budget=None, block=64),
    "local": dict(window=100),
    "minference": dict(vertical=40, slash=60),
    "moba": dict(chunk=40, topk=3),
    "oracle": dict(density=0.3),
    "random": dict(density=0.3),
    "spargeattn": dict(simthreshd1=-1.0, cdfthreshd=0.5),
    "strided": dict(stride=17, window=40),
    "tri_shape": dict(init=8, local=70, last=20),
    "trianglemix": dict(starting_layer=0, init=8, local=70, last=20),
    "xattention": dict(threshold=0.5, block=64),
}
DENSE = {  # settings equal to dense attention at 500 tokens
    "a_shape": dict(init=0, local=500),
    "bigbird": dict(random=8),
    "block_topk": dict(topk=8),
    "dilated": dict(),
    "flexprefill": dict(gamma=1.0),
    "local": dict(window=500),
    "minference": dict(vertical=500, slash=500),
    "moba": dict(chunk=100, topk=5),
    "oracle": dict(density=1.0),
    "random": dict(density=1.0),
    "spargeattn": dict(topk=1.0),
    "strided": dict(window=500),
    "tri_shape": dict(init=0, local=500),
    "trianglemix": dict(starting_layer=1),
    "xattention": dict(threshold=1.0),
}
NESTED = {  # values of the knob, rising, whose masks must nest
    "a_shape": (1, 64, 100, 333),
    "bigbird": (0, 1, 2, 3, 8),
    "block_topk": (1, 2, 4, 8),
    "flexprefill": (0.05, 0.3, 0.6, 0.9, 0.99, 1.0),
    "local": (1, 64, 100, 333),
    "moba": (1, 2, 5, 13),
    "oracle": (0.02, 0.1, 0.11, 0.3, 0.31, 0.8, 1.0),
    "random": (0.02, 0.1, 0.11, 0.3, 0.31, 0.8, 1.0),
    "spargeattn": (0.0, 0.2, 0.5, 0.8, 0.95, 1.0),
    "strided": (1, 64, 100, 333),
    "tri_shape": (1, 64, 100, 333),
    "trianglemix": (0, 1),
    "xattention": (0.1, 0.3, 0.5, 0.9, 1.0),
}
# Frames whose rows share the pairs of a call, so that a chunk alone shares out differently.
ROWS_COMPETE = {"oracle", "random"}
LENGTHS = [(500, 500), (64, 64), (1, 1), (65, 65), (130, 500), (128, 448)]  # (q_len, kv_len); the last two are chunks

PREFILL = sorted(name for name, cls in METHODS.items() if "prefill" in cls.phases and cls.needs != "training")
SPARSE = sorted(set(PREFILL) - {"dense"})


def of(settings):
    return sorted(set(settings) & set(PREFILL))


def build(name, settings=SMALL):
    return METHODS[name](**settings.get(name, {}))


def in_chunks(name):
    """The method as it takes chunks."""
    return dataclasses.replace(build(name), tau=0.0) if name == "flexprefill" else build(name)


def tensors(q_len, kv_len, batch=1, heads=4, kv_heads=2):
    """q, k, v with a few keys that many queries look at and a preference for near keys, as in a trained model."""
    generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)
    q, k, v = (torch.randn(batch, n, length, 64, generator=generator) for n, length in
               ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)))  # fmt: skip
    q[..., 0] += 3
    k[:, :, torch.rand(kv_len, generator=generator) < 0.03, 0] += 8
    angle = torch.arange(kv_len) * 0.01
    near = torch.stack([angle.cos(), angle.sin()], dim=-1) * 5
    k[..., 1:3], q[..., 1:3] = near, near[kv_len - q_len :]
    return q, k, v


def run(method, q, k, v):
    return sparsebench.attention(method, q, k, v, rope_theta=10000.0)


def selected(method, q, k, v):
    """bool [B, H, q_len, kv_len], one map per query head and batch row."""
    tokens = run(method, q, k, v)[1].tokens()
    tokens = tokens.repeat_interleave(q.shape[1] // tokens.shape[1], dim=1)
    return tokens.expand(q.shape[0], -1, -1, -1)


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("name", SPARSE)
def test_output_is_attention_over_the_mask(name, q_len, kv_len):
    """The mask is valid (sorted, unique, causal, no query left blind) and the output is softmax over exactly its keys."""
    q, k, v = tensors(q_len, kv_len)
    if name == "flexprefill" and 1 < q_len < kv_len:
        with pytest.raises(ValueError, match="takes no chunk of a prompt"):
            run(build(name), q, k, v)
        return
    out, mask = run(build(name), q, k, v)
    # The check does not know that a window's cut leaves every query at least its own key; the tokens below show it.
    dataclasses.replace(mask, window=None, trusted=False).check()
    tokens = selected(build(name), q, k, v)
    assert tokens.any(-1).all()
    assert not tokens.triu(kv_len - q_len + 1).any()
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 64**-0.5
    expected = logits.masked_fill(~tokens, float("-inf")).softmax(-1) @ v.double().repeat_interleave(2, 1)
    assert torch.allclose(out.double(), expected, atol=1e-4)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len).sum()
    density = tokens.sum((-1, -2)).double() / visible
    assert torch.allclose(mask.density().mean(), density.mean(), atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(SMALL) & set(SPARSE)))
def test_small_settings_are_sparse(name):
    """Guards the other tests: on a dense mask they would say nothing."""
    q, k, v = tensors(500, 500)
    assert 0.02 < run(build(name), q, k, v)[1].density().mean() < 0.8


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("name", of(DENSE))
def test_full_setting_equals_dense(name, q_len, kv_len):
    q, k, v = tensors(q_len, kv_len)
    out, mask = run(build(name, DENSE), q, k, v)
    assert (mask.density() == 1).all()
    assert torch.allclose(out, run(METHODS["dense"](), q, k, v)[0], atol=1e-5)


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("name", of(NESTED))
def test_masks_nest_as_the_knob_rises(name, q_len, kv_len):
    q, k, v = tensors(q_len, kv_len)
    knob, method = METHODS[name].knob, in_chunks(name) if q_len < kv_len else build(name)
    masks = [selected(dataclasses.replace(method, **{knob: value}), q, k, v) for value in NESTED[name]]
    assert all(not (fewer & ~more).any() for fewer, more in itertools.pairwise(masks))


@pytest.mark.parametrize("name", [name for name in SPARSE if METHODS[name].knob])
def test_density_rises_along_the_knob(name):
    """From the sparsest to the densest value of knob_range, as the calibration's bisection takes for granted."""
    q, k, v = tensors(500, 500)
    method, (low, high) = build(name), METHODS[name].knob_range
    whole = type(low) is int
    if METHODS[name].knob_log:
        values = [max(low, 1e-9) * (max(high, 1e-9) / max(low, 1e-9)) ** (i / 12) for i in range(12)]
    else:
        values = [low + (high - low) * i / 12 for i in range(12)]
    densities = []
    for value in dict.fromkeys(round(value) if whole else value for value in [*values, high]):
        turned = dataclasses.replace(method, **{METHODS[name].knob: value})
        densities.append(float(run(turned, q, k, v)[1].density().mean()))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(densities)), densities
    assert densities[0] < 0.95 * densities[-1] and densities[-1] > 0.99, densities


@pytest.mark.parametrize("name", sorted(set(SPARSE) - ROWS_COMPETE))
def test_a_chunk_selects_what_the_end_of_the_whole_prompt_does(name):
    q, k, v = tensors(640, 640)
    whole = selected(in_chunks(name), q, k, v)
    assert torch.equal(selected(in_chunks(name), q[:, :, 256:], k, v), whole[:, :, 256:])


@pytest.mark.parametrize("name", SPARSE)
def test_the_same_inputs_give_the_same_mask_and_output(name):
    first, again = (run(build(name), *tensors(500, 500)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].tokens(), again[1].tokens())


@pytest.mark.parametrize("name", SPARSE)
def test_a_batch_of_two_equals_two_batches_of_one(name):
    q, k, v = tensors(333, 333, batch=2)
    both = selected(build(name), q, k, v)
    for b in range(2):
        assert torch.equal(both[b], selected(build(name), *(x[b : b + 1] for x in (q, k, v)))[0])


@pytest.mark.parametrize("name", SPARSE)
def test_grouped_kv_heads_equal_repeated_ones(name):
    q, k, v = tensors(333, 333)
    assert torch.equal(
        selected(build(name), q, k, v), selected(build(name), q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    )


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"oracle"}))
def test_oracle_recall_is_the_ceiling(name):
    """At a head's density no choice of 64-token blocks keeps more of its attention mass, up to one block. Finer ones (columns,
    windows, single queries) might; on these inputs none does."""
    q, k, v = tensors(640, 640)
    kept, mask = selected(build(name), q, k, v), run(build(name), q, k, v)[1]
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 64**-0.5
    p = logits.masked_fill(~torch.ones(640, 640, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    mass, density = (p * kept).sum((-1, -2)), kept.sum((-1, -2)).double() / mask.visible_pairs()
    one_block = block_mass(q, k, 64**-0.5, 64, 64).amax((-1, -2))
    for h in range(4):
        best = selected(METHODS["oracle"](density=float(density[0, h])), q, k, v)
        assert mass[0, h] <= (p * best)[0, h].sum() + one_block[0, h]
        if name == "random":
            assert mass[0, h] < 0.95 * (p * best)[0, h].sum()
