"""The gate trainer: its teacher, its loss, and a real training of a tiny model's gates."""

import csv
import hashlib
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sparsebench.kernels.block_mass import REDUCTIONS
from sparsebench.methods.base import LayerContext, ModelSpec, plain_rope
from sparsebench.methods.seer import AttnGate, Seer, distill, gated_model, load_gates, save_gates
from sparsebench.methods.seer.distill import train
from sparsebench.methods.seer.gated_model import GateTrainer, Recipe, new_gates
from sparsebench.methods.seer.ground_truth import block_map, gate_loss, recall, resolve_teacher
from sparsebench.methods.seer.training import LossNotFiniteError, arguments, read_history
from sparsebench.models import zoo
from sparsebench.models.attach import attach
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


@pytest.mark.parametrize("of", REDUCTIONS)
def test_teacher_on_an_odd_length(of):
    q, k = torch.randn(2, 4, 75, 16), torch.randn(2, 2, 75, 16)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    p = logits.masked_fill(~torch.ones(75, 75, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    expected = torch.zeros(2, 4, 3, 3)
    for r in range(3):
        for c in range(3):
            part = p[:, :, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32]
            keys = part.amax(-1) if of == "max" else part.sum(-1)
            expected[:, :, r, c] = keys.sum(-1) if of == "mass" else keys.amax(-1)
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
    loss = gate_loss(logits, teacher, 0.25)
    torch.testing.assert_close(loss, 10 * total / (2 * 6 * 8))
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[:, :, :2].eq(0).all() and logits.grad.triu(1).eq(0).all()
    perfect = teacher.log().clamp(min=-1e9)
    assert gate_loss(perfect, teacher, 0.25).abs() < 1e-6


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
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def learn(model, tokens, out, recipe=RECIPE, spec=SPEC, save_steps=1000, log_every=20, **options):
    """The history of a training on the CPU."""
    args = arguments(
        out.with_name(out.name + ".training"), steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, warmup=recipe.warmup,
        seed=recipe.seed, save_steps=save_steps, log_every=log_every, cpu=True,
    )  # fmt: skip
    return train(model, spec, tokens, recipe, args, out, **options)


def test_recall_is_the_share_of_the_best_blocks():
    teacher = torch.rand(1, 2, 25, 25).tril()
    teacher /= teacher.sum(-1, keepdim=True)
    scores = torch.randn(1, 2, 25, 25)
    kept = []
    for h in range(2):
        for r in range(25):
            best = scores[0, h, r, : r + 1].topk(max(1, round(0.1 * (r + 1)))).indices
            kept.append(teacher[0, h, r, best].sum())
    torch.testing.assert_close(recall(scores, teacher), torch.stack(kept).mean())
    assert recall(scores, teacher) < recall(teacher, teacher) <= 1
    assert recall(torch.zeros_like(scores), torch.eye(25).expand(1, 2, 25, 25)) < 1  # ties say nothing of the diagonal


@pytest.mark.parametrize("loss", REDUCTIONS)
def test_training_lowers_the_divergence_and_raises_recall(tiny, loss, monkeypatch, tmp_path):
    model, tokens = tiny
    recipe = replace(RECIPE, loss=loss, steps=60)
    # From random weights: in a random model the trainer's own start is near the best already.
    start_gates = [AttnGate("Qavg_Kmaxminavg", 32, 32, 32, 4, 2) for _ in range(2)]
    monkeypatch.setattr(distill, "new_gates", lambda *_: deepcopy(start_gates))
    before = sha(model)
    history = learn(model, tokens, tmp_path / "gate", recipe)
    assert sha(model) == before and model.config._attn_implementation == "sdpa"
    start, end = (sum(row["loss"] for row in part) / 5 for part in (history[:5], history[-5:]))
    assert end < 0.8 * start, (start, end)
    first, last = history[0], history[-1]
    assert last[f"{loss}_recall"] > first[f"{loss}_recall"] + 0.05
    assert last[f"{loss}_recall_oracle"] > last[f"{loss}_recall"]
    rates = [row["lr"] for row in history]
    assert rates[5] == max(rates) == pytest.approx(recipe.lr) and rates[-1] < 0.01 * recipe.lr
    measured = [row["step"] for row in history if f"{loss}_recall" in row]
    assert measured == [0, 19, 39, 59] and len(history) == 60


def test_a_gate_gets_the_gradient_of_its_own_loss_alone(tiny):
    model, tokens = tiny
    module = gated_model.GatedModel(model.base_model, new_gates(SPEC, RECIPE), RECIPE, "torch").train()
    assert not model.base_model.training
    with attach(model.base_model, module.method):
        (3 * module(tokens[:1])["loss"]).backward()
    layers = capture_layers(model, tokens[0].tolist())
    losses = []
    for gate, (q, k, ctx) in zip(new_gates(SPEC, RECIPE), layers):
        tables = ctx.rope(torch.arange(0, 512, 32), 32)
        loss = gate_loss(gate(ctx.q_pre, ctx.k_pre, *tables), block_map(q, k, "mass", 32), 0)
        (3 * loss).backward()
        losses.append(loss.detach())
        trained = module.gates[ctx.layer]
        for ours, expected in zip(trained.parameters(), gate.parameters()):
            torch.testing.assert_close(ours.grad, expected.grad)
    torch.testing.assert_close(torch.stack(module.method.losses), torch.stack(losses))
    assert all(weight.grad is None for weight in model.parameters())


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_with_the_same_curve(tiny, tmp_path, monkeypatch, capsys):
    model, tokens = tiny
    recipe = replace(RECIPE, steps=6, batch=2, warmup=2)
    whole = learn(model, tokens, tmp_path / "whole", recipe, save_steps=2, log_every=3)
    calls, attend = [], GateTrainer.attend

    def dies(*args):
        calls.append(1)
        if len(calls) > 2 * 2 * 3:  # layers x sequences x steps
            raise Killed
        return attend(*args)

    monkeypatch.setattr(GateTrainer, "attend", dies)
    with pytest.raises(Killed):
        learn(model, tokens, tmp_path / "killed", recipe, save_steps=2, log_every=3)
    monkeypatch.setattr(GateTrainer, "attend", attend)
    assert not (tmp_path / "killed").exists()
    again = learn(model, tokens, tmp_path / "killed", recipe, save_steps=2, log_every=3)
    assert "goes on after step 2" in capsys.readouterr().out
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows] for rows in (whole, again)]
    assert timeless[0] == timeless[1] and len(again) == 6
    ours, theirs = (load_gates(tmp_path / name, SPEC) for name in ("whole", "killed"))
    assert ours.sha256 == theirs.sha256
    checkpoint = load_gates(tmp_path / "killed.training" / "checkpoint-4", SPEC).at(1, torch.device("cpu"))
    assert not torch.equal(checkpoint.mask_linear_k.weight, checkpoint.mask_linear_k.weight.bfloat16().float())
    with pytest.raises(ValueError, match="was begun with seed=0"):
        learn(model, tokens, tmp_path / "killed", replace(recipe, seed=1))


def test_training_goes_on_from_other_gates(tiny, tmp_path):
    model, tokens = tiny
    gates = new_gates(SPEC, replace(RECIPE, seed=5))
    save_gates(tmp_path / "start", gates, SPEC, {}, torch.float32)
    recipe = replace(RECIPE, steps=1, warmup=1)
    learn(model, tokens, tmp_path / "gate", recipe, init=str(tmp_path / "start"))  # whose only step has lr 0
    kept = load_gates(tmp_path / "gate", SPEC).at(0, torch.device("cpu")).mask_linear_k.weight
    assert torch.equal(kept, gates[0].mask_linear_k.weight.bfloat16().float())
    save_gates(tmp_path / "wide", new_gates(ModelSpec("wide", 2, 8, 2, 32), RECIPE), ModelSpec("wide", 2, 8, 2, 32), {})
    with pytest.raises(ValueError, match=r"wide \(of wide\) does not fit tiny: layer 0 has .*8, 96, 32.*needs .*4, 96, 32"):
        learn(model, tokens, tmp_path / "other", recipe, init=str(tmp_path / "wide"))


def test_who_computes_the_ground_truth():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_teacher("auto", cpu, torch.float32, 64, 64, "mass") == "torch"
    assert resolve_teacher("auto", gpu, torch.bfloat16, 64, 128, "mass") == "kernel"
    assert resolve_teacher("auto", gpu, torch.bfloat16, 64, 32, "mass") == "torch"
    assert resolve_teacher("auto", gpu, torch.bfloat16, 64, 64, "row_mass") == "kernel"
    assert resolve_teacher("auto", gpu, torch.bfloat16, 64, 128, "row_mass") == "torch"
    assert resolve_teacher("torch", gpu, torch.bfloat16, 64, 64, "mass") == "torch"
    with pytest.raises(ValueError, match=r"does not run on cpu.*use --teacher torch"):
        resolve_teacher("kernel", cpu, torch.float32, 64, 64, "mass")
    with pytest.raises(ValueError, match="teacher is auto, kernel or torch"):
        resolve_teacher("other", cpu, torch.float32, 64, 64, "mass")


@pytest.mark.parametrize(
    ("config", "model", "block"),
    [(LlamaConfig, LlamaForCausalLM, 128), (Qwen2Config, Qwen2ForCausalLM, 32), (Qwen3Config, Qwen3ForCausalLM, 64)],
)
def test_a_gate_for_every_kind_of_model(config, model, block, tmp_path):
    torch.manual_seed(0)
    model = model(config(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=512))  # fmt: skip
    spec = ModelSpec("one", layers=1, heads=4, kv_heads=2, head_dim=16)
    tokens = torch.randint(32, (2, 300))
    history = learn(model, tokens, tmp_path / "gate", Recipe(block=block, gate_dim=16, steps=3, warmup=1), spec)
    assert len(history) == 3 and all(row["loss"] > 0 for row in history)
    method = Seer(gate=str(tmp_path / "gate"), nz_ratio=0.5).prepare(spec)
    with attach(model, method) as trace, torch.no_grad():
        assert model(tokens[:1]).logits.isfinite().all()
    assert 0 < float(trace.density.mean()) <= 1


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


def test_the_trainer_returns_dense_attention():
    q, k, v = torch.randn(1, 4, 70, 32), torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 32)
    ctx = LayerContext(0, "prefill", 32**-0.5, v, torch.arange(70), rope=plain_rope(1e4), q=q, k=k, _q_pre=q, _k_pre=k)
    out = GateTrainer(new_gates(SPEC, RECIPE), RECIPE).attend(q, k, v, ctx)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(out, expected) and ctx.mask is None


@pytest.mark.gpu
@pytest.mark.parametrize("of", REDUCTIONS)
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
        teacher = resolve_teacher("auto", positions.device, q.dtype, 64, recipe.block, of)
        assert teacher == ("kernel" if device == "cuda" else "torch")
        trainer = GateTrainer([gate.to(device) for gate in new_gates(spec, recipe)], recipe, teacher)
        with torch.no_grad():
            results.append((trainer.attend(*moved, ctx).cpu(), trainer.losses[0].cpu()))
    for cpu, gpu in zip(*results):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_leaves_the_checkpoints(tiny, monkeypatch, tmp_path):
    model, tokens = tiny
    calls = []

    def breaks(logits, teacher, *args):
        calls.append(1)
        return gate_loss(logits, teacher, *args) * (float("nan") if len(calls) > 6 else 1)  # 2 layers: step 3 breaks

    good = learn(model, tokens[:2], tmp_path / "good", replace(RECIPE, steps=3, warmup=3))
    monkeypatch.setattr(gated_model, "gate_loss", breaks)
    with pytest.raises(LossNotFiniteError, match=r"loss of step 3 is not finite .*: lower --lr; .*stay in .*gate.training"):
        learn(model, tokens[:2], tmp_path / "gate", replace(RECIPE, warmup=3), save_steps=3)
    history = read_history(tmp_path / "gate.training" / "loss.csv")
    assert [row["loss"] for row in history] == [row["loss"] for row in good] and len(good) == 3
    assert not (tmp_path / "gate").exists()
    last, expected = (tmp_path / name / "checkpoint-3" for name in ("gate.training", "good.training"))
    assert load_gates(last, SPEC).sha256 == load_gates(expected, SPEC).sha256


class WordTokenizer:
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_command_writes_a_gate_that_seer_loads(tiny, tmp_path, monkeypatch, capsys):
    model, tokens = tiny
    lines = [{"id": str(i), "split": "train", "text": " ".join(map(str, row.tolist()))} for i, row in enumerate(tokens)]
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("\n".join(map(json.dumps, lines)))
    loaded = zoo.LoadedModel(model=model, tokenizer=WordTokenizer(), spec=SPEC, revision="", max_ctx=1024)
    monkeypatch.setattr(zoo, "load", lambda name, dtype, device: loaded)
    out = tmp_path / "gate"
    command = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--data", f"file:{corpus},file:{corpus}"]
    kind = ["--block", "32", "--gate-dim", "64"]
    short = ["--ctx", "256", "--steps", "3", "--batch", "2"]
    assert distill.main([*command, *kind, *short, "--out", str(out)]) == 0
    assert "by the torch teacher" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert list(rows[0]) == ["step", "loss", "lr", "tokens_per_second", "mass_recall", "mass_recall_oracle"]
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "gate.safetensors", "loss.csv"]
    config = json.loads((out / "config.json").read_text())
    assert (config["seerattn_gate_type"], config["seerattn_gate_block_size"]) == ("Qavg_Kmaxminavg", 32)
    assert config["training"]["tokens"] == 3 * 2 * 256 and config["training"]["teacher"] == "torch"
    assert set(load_file(out / "gate.safetensors")) == {
        f"model.layers.{layer}.self_attn.attn_gate.mask_linear_{side}.weight" for layer in range(2) for side in "qk"
    }
    method = Seer(gate=str(out)).prepare(SPEC)
    assert method.gate.at(1, torch.device("cpu")).gate_dim == 64 and "text.jsonl" in method.note

    def refused(*options):
        status = distill.main([*command, *options])
        error = capsys.readouterr().err
        return status == 2 and error.count("error: ") == 1 and error

    other = ["--out", str(tmp_path / "other")]
    assert "--ctx 8192: tiny is limited to 1024 tokens" in refused(*other, "--ctx", "8k")
    assert "--ctx 64 is one block of 64 tokens" in refused(*other, "--ctx", "64")
    few = ["--ctx", "1k", "--block", "32"]
    corpus.write_text(json.dumps({"id": "1", "split": "train", "text": "1 2 3"}))
    assert "one sequence takes 1024" in refused(*other, *few)
    assert "has block=32: leave that option out" in refused(*other, "--init", str(out), "--block", "64")
    assert "no gate weights at" in refused(*other, "--init", str(tmp_path / "nothing"))
    assert "steps 0, batch 1" in refused(*other, "--steps", "0")
    assert "--drop must be at least 0 and below 1, got 1" in refused(*other, "--drop", "1")
    monkeypatch.setattr(gated_model, "gate_loss", lambda logits, *_: logits.sum() * float("nan"))
    corpus.write_text("\n".join(map(json.dumps, lines)))
    assert distill.main([*command, *kind, *short, *other]) == 1
    assert "error: the loss of step 0 is not finite" in capsys.readouterr().err

    def stopped(name, dtype, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load", stopped)
    assert distill.main([*command, *other]) == 130
    assert "interrupted: the same command goes on from the newest checkpoint" in capsys.readouterr().err

    def full(name, dtype, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(zoo, "load", full)
    assert "error: the model does not fit this GPU: CUDA" in refused(*other)


def test_gates_of_smollm2_fit_ten_megabytes(tmp_path):
    spec = ModelSpec("smollm2-135m", layers=30, heads=9, kv_heads=3, head_dim=64)
    save_gates(tmp_path, new_gates(spec, Recipe()), spec, {})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10e6
    assert Seer(gate=str(tmp_path)).prepare(spec).gate.at(29, torch.device("cpu")).gate_dim == 128
