import dataclasses
import itertools
import re

import pytest
import torch

import sparsebench
from sparsebench.methods import METHODS, LayerContext

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [(300, 300), (1, 1), (64, 64), (300, 1000), (256, 1024), (77, 500), (129, 192)]  # (q_len, kv_len)


def select(method, q_len, kv_len=None, layer=0, heads=2):
    kv_len = kv_len or q_len
    return sparsebench.select(method, torch.zeros(1, heads, q_len, 64), torch.zeros(1, 1, kv_len, 64), layer=layer)


def positions(q_len, kv_len):
    return torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)


def ideal(method, i, j):
    """The definition of the patterns that are exact in tokens."""
    if method.name == "local":
        seen = i - j < method.window
    elif method.name == "strided":
        seen = (i - j < method.window) | ((i - j) % method.stride == 0)
    else:
        seen = (i - j < method.local) | (j < method.init) | (i > i.max() - method.last)
    return seen & (j <= i)


def touched(tokens, q_len, kv_len):
    """bool [NQ, NK]: the 64-token blocks that hold a True."""
    rows, blocks = -(-q_len // 64), -(-kv_len // 64)
    padded = torch.zeros(rows * 64, blocks * 64, dtype=torch.bool)
    padded[:q_len, :kv_len] = tokens
    return padded.view(rows, 64, blocks, 64).any(3).any(1)


EXACT = [
    ("tri_shape", dict(init=0, local=1, last=0)),
    ("tri_shape", dict(init=8, local=100, last=10)),
    ("tri_shape", dict(init=70, local=64, last=65)),
    ("tri_shape", dict(init=0, local=65, last=128)),
    ("tri_shape", dict(init=500, local=3, last=1)),
    ("tri_shape", dict()),
    ("trianglemix", dict(starting_layer=0, init=5, local=30, last=70)),
    ("local", dict(window=1)),
    ("local", dict(window=65)),
    ("local", dict(window=128)),
    ("local", dict()),
    ("strided", dict()),
    ("strided", dict(stride=1, window=1)),
    ("strided", dict(stride=63, window=1)),
    ("strided", dict(stride=65, window=64)),
    ("strided", dict(stride=127, window=100)),
    ("strided", dict(stride=300, window=20)),
    ("strided", dict(stride=5000, window=70)),
]


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("name, fields", EXACT)
def test_tokens_density_and_blocks_are_exact(name, fields, q_len, kv_len):
    method = METHODS[name](**fields)
    mask, expected = select(method, q_len, kv_len), ideal(method, *positions(q_len, kv_len))
    assert torch.equal(mask.tokens()[0, 0], expected)
    assert mask.density().item() == pytest.approx(expected.sum().item() / mask.visible_pairs(), abs=1e-12)
    assert torch.equal(mask.dense()[0, 0], touched(expected, q_len, kv_len))  # no block is read in vain
    dataclasses.replace(mask, window=None, stride=None, trusted=False).check()


@pytest.mark.parametrize("name, fields", [("local", dict(window=70)), ("strided", dict(stride=100, window=70))])
@pytest.mark.parametrize("end, length", [(300, 100), (256, 128), (300, 1)])
def test_chunks_select_what_the_whole_prompt_does(name, fields, end, length):
    whole, chunk = select(METHODS[name](**fields), 500).tokens(), select(METHODS[name](**fields), length, end).tokens()
    assert torch.equal(chunk, whole[:, :, end - length : end, :end])


def test_last_rows_of_every_chunk_are_dense():
    tokens = select(METHODS["tri_shape"](0, 10, 5), 100, 300).tokens()[0, 0]
    assert (tokens.sum(-1) == torch.where(torch.arange(200, 300) >= 295, torch.arange(201, 301), 10)).all()


def test_tri_shape_equals_the_masks_read_out_of_the_authors_kernel(conformance, check_conforms):
    masks = conformance("small_masks")
    names = [name for name in sorted(masks.keys()) if name.startswith("tri_shape/")]
    assert names
    for name in names:
        length, init, local, last = map(int, re.findall(r"\d+", name.split("/")[1]))
        mask = select(METHODS["tri_shape"](init, local, last), length)
        check_conforms("tri_shape", "small", name, mask.tokens()[0, 0], masks[name].bool())


@pytest.mark.parametrize("case", ["A", "D"])
@pytest.mark.parametrize("name, last", [("default", 100), ("nlast128", 128)])
def test_tri_shape_outputs_of_the_authors_kernel(conformance, case, name, last):
    inputs, theirs, reference = (conformance(f"{case}_{part}") for part in ("inputs", "minference", "reference"))
    q, k, v = (inputs[part][None].float() for part in ("q", "k", "v"))
    first = k.shape[2] - 512  # the chunk's last rows are the prompt's
    out = sparsebench.attention(METHODS["tri_shape"](8, 512, last), q[:, :, first:], k, v)[0][0]
    row, name = torch.arange(512), f"tri_shape/i8_l512_{name}"
    # The manifest's largest distance from fp32 is 0.02, and 0.08 for the dense rows, whose logits they compute in bf16.
    tolerance = torch.where(row < 512 - last, 0.02, 0.08)[:, None]
    rows = reference["rows"].long() - first
    late, expected = rows[rows >= 0], theirs[f"{name}.O_rows"].float()[:, rows >= 0]
    assert ((out[:, late] - expected).abs() < tolerance[late]).all()
    assert ((expected - reference["dense.O_rows"].float()[:, rows >= 0]).abs() > 0.1)[:, late < 512 - last].any()
    if f"{name}.O_proj" in set(theirs.keys()):  # all rows, in the full folder only
        assert ((out @ reference["proj"].float() - theirs[f"{name}.O_proj"][:, first:]).abs() < tolerance).all()


def test_last_rows_of_tri_shape_equal_dense():
    q, k, v = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
    ours, dense = (
        sparsebench.attention(method, q, k, v)[0] for method in (METHODS["tri_shape"](4, 20, 70), METHODS["dense"]())
    )
    assert torch.allclose(ours[:, :, 230:], dense[:, :, 230:], atol=1e-5)
    assert (ours[:, :, :230] - dense[:, :, :230]).abs().max() > 0.1


@pytest.mark.parametrize("start, num_layers, first_sparse", [(None, 32, 16), (None, 31, 15), (5, 31, 5), (0, 2, 0), (9, 4, 9)])
def test_trianglemix_is_dense_before_its_starting_layer_and_tri_shape_from_there(start, num_layers, first_sparse):
    q = torch.zeros(1, 2, 900, 64)
    tri_shape = select(METHODS["tri_shape"](8, 512, 100), 900).tokens()
    for layer in {0, max(first_sparse - 1, 0), first_sparse, num_layers - 1} & set(range(num_layers)):
        ctx = LayerContext(layer, "prefill", 0.125, q, torch.arange(900), num_layers=num_layers)
        mask = METHODS["trianglemix"](start).select(q, q, ctx)
        if layer < first_sparse:
            assert mask.density().item() == 1.0
        else:
            assert torch.equal(mask.tokens(), tri_shape)


def bigbird(q_len, kv_len=None, layer=0, heads=2, **fields):
    return select(METHODS["bigbird"](**fields), q_len, kv_len, layer, heads).dense()[0]


@pytest.mark.parametrize("length, block", [(1000, 64), (1, 64), (64, 64), (640, 32), (500, 100)])
@pytest.mark.parametrize("window, globals_, random", [(3, 2, 3), (1, 0, 0), (1, 1, 2), (2, 5, 1), (50, 50, 50), (1, 0, 4096)])
def test_bigbird_has_window_globals_and_as_many_random_blocks_as_there_are(length, block, window, globals_, random):
    dense = bigbird(length, window=window, globals=globals_, random=random, block=block)
    i, j = torch.arange(dense.shape[1])[:, None], torch.arange(dense.shape[2])
    fixed = (j <= i) & ((i - j < window) | (j < globals_))
    assert (dense | ~fixed).all() and not (dense & (j > i)).any()
    free = (j <= i).sum(-1) - fixed.sum(-1)
    assert torch.equal((dense & ~fixed).sum(-1), free.clamp(max=random).expand(2, -1))


def test_bigbird_draws_uniformly_and_independently():
    draws = torch.cat([bigbird(2048, layer=layer, heads=32, random=5, seed=seed) for layer in range(5) for seed in range(5)])
    row = draws[:, 31, 2:29].float()  # what is neither global nor in the window
    assert (row.sum(-1) == 5).all()
    expected = 5 / 27
    assert ((row.mean(0) - expected).abs() < 5 * (expected * (1 - expected) / len(row)) ** 0.5).all()
    together = (row.T @ row / len(row)).fill_diagonal_(expected * 4 / 26)
    assert (together - expected * 4 / 26).abs().max() < 0.03


def test_bigbird_depends_on_seed_layer_and_head_alone():
    one = bigbird(1280, seed=1)
    assert torch.equal(one, sparsebench.select(METHODS["bigbird"](seed=1), *torch.randn(2, 3, 2, 1280, 8)).dense()[0])
    assert not torch.equal(one, bigbird(1280, seed=2)) and not torch.equal(one, bigbird(1280, seed=1, layer=1))
    assert not torch.equal(one[0], one[1])


def test_bigbird_masks_nest_and_end_dense():
    masks = [bigbird(2000, random=random) for random in (0, 1, 2, 5, 20, 31, 32)]
    assert all((more | ~fewer).all() for fewer, more in itertools.pairwise(masks))
    assert torch.equal(masks[-1][0], torch.ones(32, 32, dtype=torch.bool).tril())


def test_bigbird_draws_in_pieces(monkeypatch):
    whole = bigbird(1000)
    monkeypatch.setattr("sparsebench.methods.bigbird.SCRATCH_ELEMENTS", 70)
    assert torch.equal(bigbird(1000), whole)


@pytest.mark.parametrize("end, length", [(640, 128), (1280, 640), (700, 124), (640, 64), (630, 50)])
def test_bigbird_in_chunks_within_whole_blocks_is_exact(end, length):
    whole = select(METHODS["bigbird"](), 1280).tokens()
    chunk = select(METHODS["bigbird"](), length, end).tokens()
    assert torch.equal(chunk, whole[:, :, end - length : end, :end])


@pytest.mark.parametrize("q_len, kv_len", [(300, 1000), (10, 70), (65, 100)])
def test_bigbird_chunk_that_starts_inside_a_block(q_len, kv_len):
    mask = select(METHODS["bigbird"](window=1, globals=0, random=2), q_len, kv_len)
    dataclasses.replace(mask, trusted=False).check()  # no query is blind
    start = torch.arange(kv_len - q_len, kv_len, 64)
    for row, first, last in zip(mask.dense()[0, 0], start, (start + 64).clamp(max=kv_len) - 1):
        assert row[first // 64 : last // 64 + 1].all()
        assert row[: first // 64].sum() == min(2, first // 64)


def distances(variant, length):
    """As the authors' code lists them: counted from the farthest diagonal of the window."""
    farthest_first = range(length - 1, -1, -1)
    if variant == 1:
        return set(farthest_first[-8192:][::2])
    near = farthest_first[-2048:]
    return set(near) | set(farthest_first[max(length - 6144, 0) : max(length - 2048, 0)][::2])


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("q_len, kv_len", [(192, 9024), (200, 9000), (200, 9001), (130, 8250)])
def test_dilated_runs_the_first_keys_and_a_window(variant, q_len, kv_len):
    q_len += (kv_len - q_len) % 64  # whole blocks: the rows of the whole prompt
    mask = select(METHODS["dilated"](variant), q_len, kv_len)
    dataclasses.replace(mask, trusted=False).check()
    assert mask.kv_num_blocks.shape[:2] == (1, 1)
    tokens = mask.tokens()[0, 0]
    i, j = positions(q_len, kv_len)
    chosen = torch.zeros(kv_len, dtype=torch.bool)
    chosen[sorted(distances(variant, kv_len))] = True
    assert chosen[0] == (variant == 2) and chosen[1]
    lines = ((j < 1024) | chosen[(i - j).clamp(min=0)]) & (j <= i)
    assert not (lines & ~tokens).any()
    # The blocks of a row start 64 keys before the key that its farthest diagonal reaches at the row's end, and leave no gap.
    start = (i // 64 + 1) * 64 - {1: 8191, 2: 6143}[variant] - 64
    assert torch.equal(tokens, ((j < 1024) | (j >= start)) & (j <= i))
    assert mask.density().item() == pytest.approx(tokens.double().sum().item() / mask.visible_pairs(), abs=1e-12)


@pytest.mark.parametrize("variant, length", [(1, 8192), (2, 6144), (1, 2001), (2, 3001), (2, 300), (1, 1), (2, 2)])
def test_dilated_is_dense_up_to_its_window(variant, length):
    assert select(METHODS["dilated"](variant), length).density().item() == 1.0


@pytest.mark.parametrize(
    "name, fields",
    [
        ("tri_shape", {"local": 0}),
        ("tri_shape", {"init": -1}),
        ("tri_shape", {"last": -1}),
        ("trianglemix", {"starting_layer": -1}),
        ("trianglemix", {"local": 0}),
        ("trianglemix", {"last": -1}),
        ("local", {"window": 0}),
        ("strided", {"stride": 0}),
        ("strided", {"window": 0}),
        ("dilated", {"variant": 3}),
        ("dilated", {"variant": 1.5}),
        ("bigbird", {"window": 0}),
        ("bigbird", {"globals": -1}),
        ("bigbird", {"random": -1}),
        ("bigbird", {"block": 0}),
        ("bigbird", {"seed": -1}),
    ],
)
def test_refuses_values_out_of_range(name, fields):
    with pytest.raises(ValueError, match=f"{name}:{next(iter(fields))}=.* is out of range"):
        METHODS[name](**fields)
