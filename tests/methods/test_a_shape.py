import dataclasses
import re

import pytest
import torch

import sparsebench
from sparsebench.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def ideal(q_len, kv_len, init, local):
    i = torch.arange(kv_len - q_len, kv_len)[:, None]
    j = torch.arange(kv_len)
    return (j <= i) & ((i - j < local) | (j < init))


def selected(q_len, kv_len, **fields):
    q, k = torch.randn(1, 2, q_len, 64), torch.randn(1, 1, kv_len, 64)
    return sparsebench.select(METHODS["a_shape"](**fields), q, k)


def test_equals_the_masks_read_out_of_the_authors_kernel(conformance, check_conforms):
    masks = conformance("small_masks")
    names = [name for name in sorted(masks.keys()) if name.startswith("a_shape/")]
    assert names
    for name in names:
        length, init, local = map(int, re.findall(r"\d+", name.split("/")[1]))
        expected = masks[name].bool()
        mask = selected(length, length, init=init, local=local)
        check_conforms("a_shape", "small", name, mask.tokens()[0, 0], expected)
        assert mask.density().item() == pytest.approx(expected.sum().item() / (length * (length + 1) / 2), abs=1e-12)


@pytest.mark.parametrize("q_len, kv_len", [(300, 300), (1, 1), (64, 64), (300, 1000), (256, 1024), (77, 500), (129, 192)])
@pytest.mark.parametrize("init, local", [(0, 1), (8, 100), (70, 64), (0, 65), (128, 3968), (500, 200)])
def test_tokens_density_and_blocks_are_exact(q_len, kv_len, init, local):
    mask, expected = selected(q_len, kv_len, init=init, local=local), ideal(q_len, kv_len, init, local)
    assert torch.equal(mask.tokens()[0, 0], expected)
    assert mask.density().item() == pytest.approx(expected.sum().item() / mask.visible_pairs(), abs=1e-12)
    # Every listed block holds a visible token, so none is read in vain.
    rows, blocks = mask.dense().shape[2:]
    padded = torch.zeros(rows * 64, blocks * 64, dtype=torch.bool)
    padded[:q_len, :kv_len] = expected
    assert torch.equal(mask.dense()[0, 0], padded.view(rows, 64, blocks, 64).any(3).any(1))
    dataclasses.replace(mask, window=None, trusted=False).check()


@pytest.mark.parametrize("case", ["A", "D"])
@pytest.mark.parametrize("init, local", [(8, 512), (128, 512), (100, 200)])
def test_outputs_of_the_authors_kernel(conformance, case, init, local):
    inputs, theirs, reference = (conformance(f"{case}_{name}") for name in ("inputs", "minference", "reference"))
    q, k, v = (inputs[name][None].float() for name in ("q", "k", "v"))
    first = k.shape[2] - 512  # chunks are exact: the last 512 rows see what they see in the whole prompt
    rows, name = reference["rows"].long(), f"a_shape/i{init}_l{local}"
    late = rows >= first
    out = sparsebench.attention(METHODS["a_shape"](init, local), q[:, :, first:], k, v)[0][0]
    expected = theirs[f"{name}.O_rows"].float()[:, late]
    # Their kernel computed in bf16; the manifest gives 0.02 as its largest distance from fp32.
    assert (out[:, rows[late] - first] - expected).abs().max() < 0.02
    assert (expected - reference["dense.O_rows"].float()[:, late]).abs().max() > 0.1
    if f"{name}.O_proj" in set(theirs.keys()):  # all rows, in the full folder only
        assert (out @ reference["proj"].float() - theirs[f"{name}.O_proj"][:, first:]).abs().max() < 0.02


@pytest.mark.parametrize("fields", [{"local": 0}, {"init": -1}])
def test_refuses_values_out_of_range(fields):
    with pytest.raises(ValueError, match="out of range"):
        METHODS["a_shape"](**fields)
