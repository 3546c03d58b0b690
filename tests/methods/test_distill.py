"""The gate trainer: its teacher, its loss, and a real training of a tiny model's gates."""

import csv
import hashlib
import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.methods.base import METHODS, LayerContext, ModelSpec, plain_rope
from sparsebench.methods.seer import AttnGate, Seer, distill
from sparsebench.methods.seer.distill import GateTrainer, Recipe, block_map, gate_loss, new_gates, pack, train
from sparsebench.models import zoo
from sparsebench.models.calibrate import capture_layers

SPEC = ModelSpec("tiny", layers=2, heads=4, kv_heads=2, head_dim=32)
pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(block=32, gate_dim=32, steps=40, warmup=5, lr=3e-3)


@pytest.mark.parametrize("case", ["A", "D"])
def test_teacher_equals_the_authors_formula(conformance, case):
    expected = conformance(f"{case}_seerattention")["seer_gt/b64/pool_fp32_formula"]
    tensors = conformance(f"{case}_inputs")
    ours = block_map(tensors["q"][None].float(), tensors["k"][None].float())[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    kernel = conformance(f"{case}_seerattention")["seer_gt/b64/pool_bf16"].float()
    assert (ours - kernel).abs().max() < 0.02  # bf16 rounding of the authors' kernel


@pytest.mark.parametrize("of", ["max", "mass"])
def test_teacher_on_an_odd_length(of):
    q, k = torch.randn(2, 4, 75, 16), torch.randn(2, 2, 75, 16)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    p = logits.masked_fill(~torch.ones(75, 75, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    expected = torch.zeros(2, 4, 3, 3)
    for r in range(3):
        for c in range(3):
            part = p[:, :, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32]
            expected[:, :, r, c] = part.amax((-1, -2)) if of == "max" else part.sum((-1, -2))
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(block_map(q, k, of, block=32), expected)


def test_loss_is_the_mean_divergence_of_the_late_rows():
    logits = torch.randn(1, 2, 8, 8, requires_grad=True)
    teacher = torch.rand(1, 2, 8, 8).tril() + torch.eye(8)
    teacher = teacher / teacher.sum(-1, keepdim=True)
    total = torch.zeros(())
    for h in range(2):
        for r in range(2, 8):
            student = logits[0, h, r, : r + 1].log_softmax(-1)
            t = teacher[0, h, r, : r + 1]
            total = total + (t * (t.log() - student)).sum()
    loss = gate_loss(logits, teacher)
    torch.testing.assert_close(loss, 10 * total / (2 * 6 * 8))
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[:, :, :2].eq(0).all() and logits.grad.triu(1).eq(0).all()
    perfect = teacher.log().clamp(min=-1e9)
    assert gate_loss(perfect, teacher).abs() < 1e-6


@pytest.fixture(scope="module")
def tiny():
    """A random Llama whose attention prefers some keys, and tokens for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(7)
            layer.self_attn.k_proj.weight.mul_(7)
    # Runs of one token, so that blocks differ.
    tokens = torch.randint(64, (6, 32)).repeat_interleave(16, dim=1)
    return model, tokens


def sha(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def recall(gates, model, tokens):
    """Teacher mass of the best quarter of blocks by the gate, over layers and the rows after the first quarter."""
    kept = []
    for gate, (q, k, ctx) in zip(gates, capture_layers(model, tokens.tolist())):
        teacher = block_map(q, k, "mass", gate.block)
        logits = gate(ctx.q_pre, ctx.k_pre, *ctx.rope(torch.arange(0, len(tokens), gate.block), gate.rope_dim))
        best = logits.masked_fill(teacher == 0, float("-inf")).topk(4).indices
        kept.append(teacher.gather(-1, best).sum(-1)[..., 4:].mean())
    return float(torch.stack(kept).mean())


@pytest.mark.parametrize("loss", ["max", "mass"])
def test_training_lowers_the_divergence_and_raises_recall(tiny, loss, monkeypatch):
    model, tokens = tiny
    recipe = replace(RECIPE, loss=loss, steps=60)
    # From random weights: in a random model the trainer's own start is near the best already.
    start_gates = [AttnGate("Qavg_Kmaxminavg", 32, 32, 32, 4, 2) for _ in range(2)]
    monkeypatch.setattr(distill, "new_gates", lambda *_: deepcopy(start_gates))
    before, rng = sha(model), torch.get_rng_state()
    gates, records = train(model, SPEC, tokens[:5], recipe)
    assert sha(model) == before and model.config._attn_implementation == "sdpa"
    assert torch.equal(rng, torch.get_rng_state())
    start, end = (sum(r["loss"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert end < 0.8 * start, (start, end)
    assert recall(gates, model, tokens[5]) > recall(start_gates, model, tokens[5]) + 0.05
    rates = [r["lr"] for r in records]
    assert rates[4] == max(rates) == pytest.approx(recipe.lr) and rates[-1] < 0.01 * recipe.lr
    _, again = train(model, SPEC, tokens[:5], recipe)
    assert again[-1]["loss"] == pytest.approx(records[-1]["loss"], rel=1e-3)


def test_gates_start_near_the_dot_product_of_the_means(tiny):
    model, tokens = tiny
    ctx = capture_layers(model, tokens[0].tolist())[0][2]
    for recipe in (RECIPE, replace(RECIPE, gate_dim=64)):
        gate = new_gates(SPEC, recipe)[0]
        cos, sin = ctx.rope(torch.arange(0, 512, 32), 32)
        means = [x.unflatten(2, (-1, 32)).mean(3) for x in (ctx.q_pre, ctx.k_pre.repeat_interleave(2, 1))]
        turned = [x * cos + torch.cat((-x[..., 16:], x[..., :16]), -1) * sin for x in means]
        expected = (turned[0] @ turned[1].transpose(-1, -2)).flatten()
        ours = gate(ctx.q_pre, ctx.k_pre, cos, sin).flatten()
        assert torch.corrcoef(torch.stack((expected, ours)))[0, 1] > 0.8


def test_layers_train_apart(tiny):
    """One layer's loss reaches no other gate and no model weight."""
    model, tokens = tiny
    gates = new_gates(SPEC, RECIPE)
    q, k, ctx = capture_layers(model, tokens[0].tolist())[1]
    trainer = GateTrainer(gates, RECIPE)
    trainer.attend(q, k, ctx.v, ctx)
    assert all(p.grad is None for p in gates[0].parameters())
    assert all(p.grad.abs().sum() > 0 for p in gates[1].parameters())
    assert len(trainer.losses) == 1 and not trainer.losses[0].requires_grad
    assert GateTrainer.name not in METHODS


def test_the_trainer_returns_dense_attention():
    q, k, v = torch.randn(1, 4, 70, 32), torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 32)
    ctx = LayerContext(0, "prefill", 32**-0.5, v, torch.arange(70), rope=plain_rope(1e4), q=q, k=k, _q_pre=q, _k_pre=k)
    out = GateTrainer(new_gates(SPEC, RECIPE), RECIPE).attend(q, k, v, ctx)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(out, expected) and ctx.mask is None


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["max", "mass"])
def test_the_trainer_on_a_gpu_agrees_with_the_cpu(of):
    q, k, v = torch.randn(1, 4, 200, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    spec, recipe = ModelSpec("tiny", layers=1, heads=4, kv_heads=2, head_dim=64), Recipe(loss=of, drop=0)
    results = []
    for device in ("cpu", "cuda"):
        moved = [x.to(device) for x in (q, k, v)]
        positions = torch.arange(200, device=device)
        ctx = LayerContext(
            0, "prefill", 64**-0.5, moved[2], positions, rope=plain_rope(1e4), q=moved[0], k=moved[1],
            _q_pre=moved[0], _k_pre=moved[1],
        )  # fmt: skip
        trainer = GateTrainer([gate.to(device) for gate in new_gates(spec, recipe)], recipe)
        with torch.no_grad():
            results.append((trainer.attend(*moved, ctx).cpu(), trainer.losses[0].cpu()))
    for cpu, gpu in zip(*results):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_gates(tiny, monkeypatch):
    model, tokens = tiny
    calls = []

    def breaks(logits, teacher, *args):
        calls.append(1)
        return gate_loss(logits, teacher, *args) * (float("nan") if len(calls) > 6 else 1)  # 2 layers: step 3 breaks

    monkeypatch.setattr(distill, "gate_loss", breaks)
    gates, records = train(model, SPEC, tokens[:2], RECIPE)
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(p.isfinite().all() for gate in gates for p in gate.parameters())


class WordTokenizer:
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_packing():
    packed = pack(["1 2 3", "4 5"], WordTokenizer(), 3)
    assert packed.tolist() == [[1, 2, 3], [0, 4, 5]]
    with pytest.raises(ValueError, match="has 7 tokens, one sequence takes 8"):
        pack(["1 2 3", "4 5"], WordTokenizer(), 8)


def test_every_sequence_is_used_before_any_repeats():
    stream = distill._batches(torch.arange(5)[:, None], 2, seed=3)
    seen = torch.cat([next(stream) for _ in range(5)]).flatten().tolist()
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    again = distill._batches(torch.arange(5)[:, None], 2, seed=3)
    assert torch.cat([next(again) for _ in range(5)]).flatten().tolist() == seen


def test_command_writes_a_gate_that_seer_loads(tiny, tmp_path, monkeypatch, capsys):
    model, tokens = tiny
    lines = [{"id": str(i), "split": "train", "text": " ".join(map(str, row.tolist()))} for i, row in enumerate(tokens)]
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("\n".join(map(json.dumps, lines)))
    loaded = SimpleNamespace(model=model, tokenizer=WordTokenizer(), spec=SPEC)
    monkeypatch.setattr(zoo, "load", lambda name, dtype, device: loaded)
    out = tmp_path / "gate"
    common = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--block", "32", "--gate-dim", "64"]
    command = [*common, "--data", f"file:{corpus},file:{corpus}", "--out", str(out)]
    assert distill.main([*command, "--ctx", "256", "--steps", "3", "--batch", "2"]) == 0
    rows = list(csv.DictReader((out / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"] and set(rows[0]) == {"step", "loss", "lr"}
    config = json.loads((out / "config.json").read_text())
    assert config["seerattn_gate_type"] == "Qavg_Kmaxminavg" and config["training"]["tokens"] == 3 * 2 * 256
    method = Seer(gate=str(out)).prepare(SPEC)
    assert method.gate.at(1, torch.device("cpu")).gate_dim == 64 and "text.jsonl" in method.note
    assert distill.main([*command, "--ctx", "8k"]) == 2
    assert "one sequence takes 8192" in capsys.readouterr().err


def test_gates_of_smollm2_fit_ten_megabytes(tmp_path):
    spec = ModelSpec("smollm2-135m", layers=30, heads=9, kv_heads=3, head_dim=64)
    distill.save(tmp_path, new_gates(spec, Recipe()), [], spec, {})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10e6
    assert Seer(gate=str(tmp_path)).prepare(spec).gate.at(29, torch.device("cpu")).gate_dim == 128
