"""The seer method against the authors' own logits and masks, and its limits, errors and loading."""

import json
import math
import os
import pickle
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

import sparsebench
from sparsebench.methods.base import LayerContext, ModelSpec, plain_rope
from sparsebench.methods.seer import AttnGate, LayerGates, Seer, save_gates
from sparsebench.methods.seer import method as seer_method
from sparsebench.methods.seer import weights as seer_weights
from sparsebench.methods.seer.gate import parse_gate_type

torch.set_num_threads(2)
THETA = {"A": 100_000.0, "D": 10_000.0}
CASE = re.compile(r"(?P<type>Q\w+_K\w+)/b(?P<block>\d+)/h(?P<hidden>\d+)/rope(?P<rope>\d+)/logits")


def inputs(conformance, case):
    tensors = conformance(f"{case}_inputs")
    names = ("q_pre", "k_pre") if "q_pre" in tensors.keys() else ("q", "k")  # noqa: SIM118
    return tuple(tensors[name][None].float() for name in names)


def authors_gate(conformance, match, q, k):
    weights = conformance("seerattention_weights")
    sizes = (int(match["block"]), q.shape[3], int(match["hidden"]), q.shape[1], k.shape[1])
    gate = AttnGate(match["type"], *sizes, gate_rope_dim=int(match["rope"]))
    prefix = f"hd{q.shape[3]}/{match['type']}/h{match['hidden']}"
    state = {"mask_linear_k.weight": weights[f"{prefix}/wk"].float()}
    if f"{prefix}/wq" in weights.keys():  # noqa: SIM118
        state["mask_linear_q.weight"] = weights[f"{prefix}/wq"].float()
    gate.load_state_dict(state)
    return gate


def cases(conformance, case):
    file = conformance(f"{case}_seerattention")
    found = [m for m in map(CASE.fullmatch, file.keys()) if m]
    assert found
    return file, found


@pytest.mark.parametrize("case", ["A", "D"])
def test_logits_equal_the_authors(conformance, case):
    file, found = cases(conformance, case)
    q, k = inputs(conformance, case)
    for match in found:
        tag = match.string.removesuffix("/logits")
        gate = authors_gate(conformance, match, q, k)
        tables = (file[f"rope/b{match['block']}/d{match['rope']}/{name}"] for name in ("cos", "sin"))
        logits = gate(q, k, *tables)[0]
        causal = torch.ones_like(logits[0], dtype=torch.bool).tril()
        torch.testing.assert_close(logits[:, causal], file[f"{tag}/logits"][:, causal], rtol=1e-5, atol=2e-5, msg=tag)
        softmax = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        torch.testing.assert_close(softmax, file[f"{tag}/softmax"], rtol=1e-4, atol=1e-6, msg=tag)


@pytest.mark.parametrize("case", ["A", "D"])
def test_masks_equal_the_authors(conformance, check_conforms, case, monkeypatch):
    file, found = cases(conformance, case)
    q, k = inputs(conformance, case)
    compared = 0
    for match in found:
        tag = match.string.removesuffix("/logits")
        gate = authors_gate(conformance, match, q, k)
        projected = None

        def project_once(*args, project=gate.project, **options):
            nonlocal projected
            projected = project(*args, **options) if projected is None else projected
            return projected

        monkeypatch.setattr(gate, "project", project_once)  # only the choice differs between the settings of one gate
        for key in (key for key in file.keys() if re.fullmatch(re.escape(tag) + r"/(nz|th)[^/]*/dl[01]\.bits", key)):  # noqa: SIM118
            kind, value, last = re.fullmatch(r".*/(nz|th)([\d.]+)/dl([01])\.bits", key).groups()
            knob = {"nz": "nz_ratio", "th": "threshold"}[kind]
            method = Seer(gate=gate, last_dense=2 * int(last), **{knob: float(value)})
            ours = sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=THETA[case]).dense()[0]
            theirs, softmax = file[key], file[f"{tag}/softmax"]
            never_empty = ~theirs.any(-1, keepdim=True) & torch.eye(len(softmax[0]), dtype=torch.bool)
            margin = softmax - float(value) if kind == "th" else None
            check_conforms("seer", case, key, ours, theirs | never_empty, margin)
            compared += 1
    assert compared


def plain(gate_type="Qavg_Kmaxminavg", heads=4, kv_heads=2, q_len=300, kv_len=None, dim=32, batch=1, block=32, gate_dim=32):
    kv_len = kv_len or q_len
    torch.manual_seed(1)
    gate = AttnGate(gate_type, block, dim, gate_dim, heads, kv_heads)
    with torch.no_grad():
        gate.mask_linear_k.weight.mul_(6)
    return gate, torch.randn(batch, heads, q_len, dim), torch.randn(batch, kv_heads, kv_len, dim)


def select(method, q, k):
    return sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=1e4)


def visible_of(mask):
    return sparsebench.kernels.causal_blocks(mask.q_len, mask.kv_len, mask.q_block, mask.kv_block)


SELECTIONS = [{"threshold": 0.05}, {"threshold": 1.0}, {"nz_ratio": 0.3}, {"budget": 3}, {"top_p": 0.6}]


@pytest.mark.parametrize("knob", SELECTIONS)
@pytest.mark.parametrize("share_gqa", [False, True])
@pytest.mark.parametrize("shape", [(300, 300), (1, 1), (33, 33), (96, 300), (50, 307)])
def test_every_row_sees_something_and_only_its_past(knob, share_gqa, shape):
    gate, q, k = plain(q_len=shape[0], kv_len=shape[1])
    mask = select(Seer(gate=gate, share_gqa=share_gqa, last_dense=0, **knob), q, k)
    replace(mask, trusted=False).check()
    assert mask.kv_num_blocks.shape[1] == (2 if share_gqa else 4)
    assert not (mask.dense() & ~visible_of(mask)).any()


@pytest.mark.parametrize("gate_type", ["Qavg_Kmaxminavg", "Qmaxminavg_Kmin", "Qmin_Kmaxavg"])
def test_batch_is_twice_the_single(gate_type):
    gate, q, k = plain(gate_type, batch=2)
    for knob in SELECTIONS:
        both = select(Seer(gate=gate, **knob), q, k).dense()
        for b in range(2):
            assert torch.equal(both[b : b + 1], select(Seer(gate=gate, **knob), q[b : b + 1], k[b : b + 1]).dense())


@pytest.mark.parametrize("knob", [{"threshold": -0.1}, {"nz_ratio": 1.0}, {"budget": 99}, {"top_p": 1.0}])
def test_dense_limits(knob):
    gate, q, k = plain()
    mask = select(Seer(gate=gate, last_dense=0, **knob), q, k)
    assert torch.equal(mask.dense(), visible_of(mask).expand(mask.dense().shape))
    assert mask.density().eq(1).all()


@pytest.mark.parametrize("name, values", [
    ("threshold", [1.0, 0.3, 0.1, 0.03]), ("nz_ratio", [0.0, 0.2, 0.9]), ("budget", [1, 3, 7]), ("top_p", [0.0, 0.3, 0.95]),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"diagonal": True}, {"share_gqa": True}])
def test_masks_nest_as_the_knob_rises(name, values, options):
    gate, q, k = plain()
    masks = [select(Seer(gate=gate, last_dense=1, **options, **{name: v}), q, k).dense() for v in values]
    for small, large in pairwise(masks):
        # the own block stands in for an empty row of the smaller mask only
        own = torch.eye(small.shape[-1], dtype=torch.bool)
        assert not (small & ~large & ~(own & (small.sum(-1, keepdim=True) == 1))).any()
    assert masks[0].sum() < masks[-1].sum()


def test_row_counts_follow_the_field():
    gate, q, k = plain()
    blocks = math.ceil(300 / 32)
    rows = torch.arange(1, blocks + 1)
    for knob, width in (({"budget": 3}, 3), ({"nz_ratio": 0.5}, int((1 - math.sqrt(0.5)) * blocks)), ({"nz_ratio": 0.0}, 1)):
        num = select(Seer(gate=gate, last_dense=0, **knob), q, k).kv_num_blocks
        assert torch.equal(num[0, 0], rows.clamp(max=width).int())
        num = select(Seer(gate=gate, last_dense=2, **knob), q, k).kv_num_blocks
        assert torch.equal(num[0, 0, -2:], rows[-2:].int()) and num[0, 0, -3] == min(width, blocks - 2)
    diagonal = select(Seer(gate=gate, last_dense=0, diagonal=True, budget=2), q, k).dense()
    assert diagonal.diagonal(dim1=-2, dim2=-1).all() and diagonal.sum(-1).max() == 2
    best = select(Seer(gate=gate, last_dense=0, budget=3), q, k).dense()
    above = select(Seer(gate=gate, last_dense=0, threshold=0.1), q, k).dense()
    many = above.sum(-1, keepdim=True) > 3
    assert many.any() and not many.all()
    both = select(Seer(gate=gate, last_dense=0, threshold=0.1, min_blocks=3), q, k).dense()
    assert torch.equal(both, above.where(many, best))
    assert torch.equal(select(Seer(gate=gate, last_dense=0, threshold=1.0, min_blocks=3), q, k).dense(), best)
    with pytest.raises(ValueError, match="min_blocks goes with threshold, got budget"):
        Seer(gate=gate, budget=3, min_blocks=3)


def test_top_p_keeps_the_fewest_blocks():
    gate, q, k = plain()
    starts = torch.arange(0, 300, 32)
    logits = gate(q, k, *plain_rope(1e4)(starts, gate.rope_dim))
    mask = select(Seer(gate=gate, top_p=0.5, last_dense=0), q, k).dense()
    p = logits.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    kept = p.where(mask, 0).sum(-1)
    weakest = p.where(mask, 2).amin(-1)
    assert (kept >= 0.5 - 1e-6).all() and (kept - weakest < 0.5 + 1e-6).all()


def test_chunked_prefill_equals_the_rows_of_the_whole():
    gate, q, k = plain(q_len=320)
    for knob in SELECTIONS[:1] + SELECTIONS[3:]:
        method = Seer(gate=gate, last_dense=0, **knob)
        whole, chunk = select(method, q, k).dense(), select(method, q[:, :, 192:], k).dense()
        assert torch.equal(whole[:, :, 6:], chunk)


def test_gate_needs_query_tables_between_blocks():
    gate, q, k = plain(q_len=50, kv_len=307)
    cos, sin = plain_rope(1e4)(torch.arange(0, 307, 32), gate.rope_dim)
    with pytest.raises(ValueError, match="start at 257"):
        gate(q, k, cos, sin)
    logits = gate(q, k, cos, sin, *plain_rope(1e4)(torch.arange(257, 307, 32), gate.rope_dim))
    assert logits.shape == (1, 4, 2, 10)


@pytest.mark.parametrize("knob", SELECTIONS)
def test_head_chunks_change_nothing(knob, monkeypatch):
    gate, q, k = plain()
    for share_gqa in (False, True):
        method = Seer(gate=gate, share_gqa=share_gqa, **knob)
        whole = select(method, q, k).dense()
        monkeypatch.setattr(seer_method, "SCRATCH_BYTES", 1)
        assert torch.equal(whole, select(method, q, k).dense())
        monkeypatch.undo()


def test_shared_selection_is_of_the_mean_logits_of_the_group():
    gate, q, k = plain()
    logits = gate(q, k, *plain_rope(1e4)(torch.arange(0, 300, 32), gate.rope_dim)).unflatten(1, (2, 2)).mean(2)
    p = logits.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    mask = select(Seer(gate=gate, share_gqa=True, threshold=0.1, last_dense=0), q, k).dense()
    assert torch.equal(mask, (p > 0.1) | (~(p > 0.1).any(-1, keepdim=True) & torch.eye(10, dtype=torch.bool)))


def test_q_pre_is_undone_from_q_when_not_given():
    gate, q_pre, k_pre = plain()
    cos, sin = plain_rope(1e4)(torch.arange(300), 32)

    def turn(x):
        return x * cos + torch.cat((-x[..., 16:], x[..., :16]), -1) * sin

    method = Seer(gate=gate, budget=3)
    ours = sparsebench.select(method, turn(q_pre), turn(k_pre), rope_theta=1e4).dense()
    assert torch.equal(ours, select(method, q_pre, k_pre).dense())


def test_gate_types():
    assert parse_gate_type("Qavg_Kmaxminavg") == (["avg"], ["max", "min", "avg"])
    for bad in ("Q_Kavg", "Qavg", "Kavg_Qavg", "Qavgmax_Kavg", "Qavg_Ksum"):
        with pytest.raises(ValueError, match="gate type"):
            parse_gate_type(bad)


def test_single_linear_rule():
    single = AttnGate("Qavg_Kmaxmin", 64, 64, 64, 6, 2)
    assert {n: tuple(p.shape) for n, p in single.named_parameters()} == {"mask_linear_k.weight": (6, 128, 64)}
    both = {"mask_linear_q.weight": (6, 64, 64), "mask_linear_k.weight": (2, 128, 64)}
    double = AttnGate("Qavg_Kmaxmin", 64, 64, 64, 6, 2, force_double=True)
    assert {n: tuple(p.shape) for n, p in double.named_parameters()} == both
    assert "mask_linear_q.weight" in AttnGate("Qmaxavg_Kavg", 64, 64, 64, 6, 2).state_dict()
    assert AttnGate("Qavg_Kavg", 64, 64, 128, 6, 2).rope_dim == 64 and AttnGate("Qavg_Kavg", 64, 128, 64, 6, 2).rope_dim == 64


def test_knob_follows_the_field_in_use():
    assert Seer().knob == "threshold" and Seer(nz_ratio=0.1).knob == "nz_ratio" and Seer.knob == "threshold"
    assert Seer().knob_log and not Seer(top_p=0.5).knob_log
    assert replace(Seer(budget=4), budget=9).knob_range[0] == 1
    for bad in ({"threshold": 0.1, "budget": 3}, {"nz_ratio": 1.5}, {"budget": 0}, {"last_dense": -1}):
        with pytest.raises(ValueError, match="seer"):
            Seer(**bad)


SPEC = ModelSpec("tiny", layers=2, heads=4, kv_heads=2, head_dim=32)


def two_gates():
    return [AttnGate("Qavg_Kmaxminavg", 32, 32, 64, 4, 2) for _ in range(2)]


def rounded(gate):
    return {name: weight.bfloat16().float() for name, weight in gate.state_dict().items()}


@pytest.mark.parametrize("layout", ["folder", "safetensors", "pth"])
def test_saved_gates_load_back(tmp_path, layout):
    gates = two_gates()
    save_gates(tmp_path, gates, SPEC, {"data": "x.txt", "tokens": 5, "ctx_len": 1})
    path = tmp_path / "gate.safetensors" if layout == "safetensors" else tmp_path
    if layout == "pth":
        state = {f"model.layers.{i}.self_attn.attn_gate.{n}": w for i, g in enumerate(gates) for n, w in rounded(g).items()}
        torch.save(state, tmp_path / "attn_gate_weights.pth")
        (tmp_path / "gate.safetensors").unlink()
    method = Seer(gate=str(path), budget=3).prepare(SPEC)
    _, q, k = plain()
    for layer, gate in enumerate(gates):
        loaded = method.gate.at(layer, torch.device("cpu"))
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in rounded(gate).items())
        assert method.gate.at(layer, torch.device("cpu")) is loaded
        unprepared = sparsebench.select(Seer(gate=path, budget=3), q, k, q_pre=q, k_pre=k, rope_theta=1e4, layer=layer)
        prepared = sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=1e4, layer=layer)
        assert torch.equal(unprepared.dense(), prepared.dense())
    assert replace(method, budget=5).gate is method.gate
    assert "x.txt" in method.note


def test_params_name_the_weights(tmp_path):
    gates = two_gates()
    save_gates(tmp_path / "a", gates, SPEC, {})
    with torch.no_grad():
        gates[1].mask_linear_k.weight[0, 0, 0] += 1
    save_gates(tmp_path / "b", gates, SPEC, {})
    a, b = (Seer(gate=str(tmp_path / name)).prepare(SPEC).params() for name in "ab")
    assert a["gate_sha256"] != b["gate_sha256"] and a["gate"] == str(tmp_path / "a")
    assert json.loads(json.dumps(a)) == a
    assert Seer(gate=str(tmp_path / "a")).prepare(SPEC).params() == a
    in_memory = AttnGate("Qavg_Kavg", 32, 32, 64, 4, 2)
    assert Seer(gate=in_memory).params()["gate_sha256"] == Seer(gate=in_memory).prepare(SPEC).params()["gate_sha256"]


def test_files_are_what_prepare_reads(tmp_path):
    (shipped,) = Seer().files("smollm2-135m")
    assert (shipped / "gate.safetensors").is_file()
    save_gates(tmp_path, two_gates(), SPEC, {})
    assert Seer(gate=str(tmp_path)).files("smollm2-135m") == [tmp_path]


def test_shipped_gate_is_found_by_the_model_name(tmp_path, monkeypatch):
    monkeypatch.setattr(seer_weights, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"no trained gate ships for tiny.*seer:gate=PATH.*distill --model"):
        Seer().prepare(SPEC)
    save_gates(tmp_path / "tiny", two_gates(), SPEC, {})
    assert Seer().prepare(SPEC).params()["gate"] is None
    named = ModelSpec("org/tiny", 2, 4, 2, 32)
    save_gates(tmp_path / "org--tiny", two_gates(), named, {})
    assert Seer().prepare(named).params()["gate_sha256"]


@pytest.mark.parametrize("change, message", [
    ({"layers": 3}, "layers 0 to 1, big has 3"), ({"heads": 8}, r"\(4, 32, 64\).*needs.*\(8, 32, 64\)"),
    ({"kv_heads": 1}, "needs"), ({"head_dim": 64}, "does not fit big"),
])  # fmt: skip
def test_wrong_model(tmp_path, change, message):
    save_gates(tmp_path, two_gates(), SPEC, {})
    other = replace(SPEC, name="big", **change)
    with pytest.raises(ValueError, match=message):
        Seer(gate=str(tmp_path)).prepare(other)
    with pytest.raises(ValueError, match="does not fit big"):
        Seer(gate=str(tmp_path)).prepare(SPEC).prepare(other)


def test_missing_gates_and_files(tmp_path):
    _, q, k = plain()
    with pytest.raises(ValueError, match="no trained gate"):
        select(Seer(), q, k)
    with pytest.raises(ValueError, match="no gate weights at"):
        Seer(gate=str(tmp_path / "none"))
    save_file({"x": torch.zeros(1)}, tmp_path / "gate.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json"):
        Seer(gate=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="seerattn_gate_type"):
        Seer(gate=str(tmp_path)).prepare(SPEC)
    save_gates(tmp_path, two_gates(), SPEC, {})
    save_file({"x": torch.zeros(1)}, tmp_path / "gate.safetensors")
    with pytest.raises(ValueError, match="holds no tensor named"):
        Seer(gate=str(tmp_path)).prepare(SPEC)
    with pytest.raises(ValueError, match="rope_theta"):
        sparsebench.select(Seer(gate=two_gates()[0]), q, k, q_pre=q, k_pre=k)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_pickle_with_code_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    save_gates(tmp_path, two_gates(), SPEC, {})
    (tmp_path / "gate.safetensors").unlink()
    write({"model.layers.0.self_attn.attn_gate.mask_linear_k.weight": Evil()}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match="was not loaded"):
        Seer(gate=str(tmp_path)).prepare(SPEC)
    assert not (tmp_path / "pwned").exists()


def test_rows_say_how_much_the_dense_last_rows_take():
    assert "dense last" not in Seer(gate=two_gates()[0], last_dense=0).prepare(SPEC).note
    method = Seer(gate=two_gates()[0]).prepare(SPEC)
    block = method.gate.at(0, torch.device("cpu")).block
    rows, shares = torch.arange(1, 8193), []
    for length in (1024, 8192):
        seen = rows[:length]
        shares.append(f"{100 * seen[-2 * block :].sum() / seen.sum():.0f} %")
    said = f"its dense last {2 * block} queries are {shares[0]} of all pairs at 1k tokens and {shares[1]} at 8k"
    assert said in method.note and "seer:last_dense=0" in method.note


def test_synthetic_says_that_it_is_untrained():
    method = Seer().synthetic(SPEC, seed=3)
    assert "untrained" in method.note and method.nz_ratio == 0.1
    assert method.params()["gate_sha256"] == Seer().synthetic(SPEC, seed=3).params()["gate_sha256"]
    assert method.params()["gate_sha256"] != Seer().synthetic(SPEC, seed=4).params()["gate_sha256"]
    assert Seer(threshold=0.1).synthetic(SPEC, seed=3).nz_ratio is None
    state = torch.get_rng_state()
    Seer().synthetic(SPEC, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_layer_gates_refuse_a_layer_they_lack():
    with pytest.raises(ValueError, match="2 layers, layer 5"):
        LayerGates(two_gates()).at(5, torch.device("cpu"))


def test_select_does_not_build_a_graph_or_change_the_gate():
    gate, q, k = plain()
    before = {name: weight.clone() for name, weight in gate.state_dict().items()}
    ctx = LayerContext(0, "prefill", 1.0, k, torch.arange(300), rope=plain_rope(1e4), q=q, k=k, _q_pre=q, _k_pre=k)
    Seer(gate=gate).prepare(SPEC).select(q, k, ctx)
    assert all(torch.equal(weight, gate.state_dict()[name]) for name, weight in before.items())
    assert all(p.requires_grad and p.grad is None for p in gate.parameters())
