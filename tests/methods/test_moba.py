import pytest
import torch

import sparsebench
from sparsebench.methods import METHODS

MoBA = METHODS["moba"]


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    def test_chunks(self, conformance, check_conforms, case):
        inputs, theirs = conformance(f"{case}_inputs"), conformance(f"{case}_moba")
        q, k = (inputs[name][None].float() for name in "qk")
        mask = sparsebench.select(MoBA(chunk=256, topk=3), q, k)
        expected, gate = theirs["c256k3/selected.bits"], theirs["c256k3/gate"]
        visible = torch.arange(expected.shape[-1]) <= torch.arange(q.shape[2])[:, None] // 256
        # Early queries have fewer than 3 chunks; the authors' flags then also name future ones, without effect.
        cut = gate.masked_fill(~expected, float("inf")).amin(-1, keepdim=True)
        check_conforms("moba", case, "c256k3", mask.dense()[0], expected & visible, gate - cut)

    def test_outputs(self, conformance, case):
        inputs, theirs, rows = (
            conformance(f"{case}_inputs"),
            conformance(f"{case}_moba"),
            conformance(f"{case}_reference")["rows"],
        )
        q, k, v = (inputs[name][None].float() for name in "qkv")
        out, _ = sparsebench.attention(MoBA(chunk=256, topk=3), q, k, v)
        assert (out[0][:, rows.long()] - theirs["c256k3.O_rows"]).abs().max() < 1e-5


def by_loop(q, k, chunk, topk):
    """The definition, one query at a time: bool [B, H, q_len, kv_len]."""
    batch, heads, q_len, _ = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, q_len))).tolist():
        i = kv_len - q_len + r
        own = i // chunk
        scores = {c: float(q[b, h, r] @ k[b, h // group, c * chunk : (c + 1) * chunk].mean(0)) for c in range(own)}
        for c in [own, *sorted(scores, key=lambda c: -scores[c])[: topk - 1]]:
            out[b, h, r, c * chunk : min((c + 1) * chunk, i + 1)] = True
    return out


@pytest.mark.parametrize("q_len, kv_len", [(200, 200), (1, 1), (64, 64), (90, 203), (1, 150)])
@pytest.mark.parametrize("chunk, topk", [(32, 3), (50, 1), (64, 2), (300, 2)])
def test_equals_the_definition(q_len, kv_len, chunk, topk):
    q, k = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, kv_len, 16)
    mask = sparsebench.select(MoBA(chunk, topk), q, k)
    expected = by_loop(q, k, chunk, topk)
    assert torch.equal(mask.tokens().expand(expected.shape), expected)


@pytest.mark.parametrize("fields", [{"chunk": 0}, {"topk": 0}])
def test_refuses_values_out_of_range(fields):
    with pytest.raises(ValueError, match="out of range"):
        MoBA(**fields)
