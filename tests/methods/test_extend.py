"""Long-context fine-tuning: the arms agree where they must, gradients go where they belong, folders load again."""

import csv
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsebench.kernels.selection import block_pairs
from sparsebench.methods.base import METHODS, ModelSpec
from sparsebench.methods.seer import AttnGate, Seer, extend, extended_model, gated_model, save_gates
from sparsebench.methods.seer.extended_model import Extension, recompute_layers, stretch, token_loss, width_of
from sparsebench.methods.seer.ground_truth import block_map, gate_loss
from sparsebench.methods.seer.weights import trained_loss
from sparsebench.models import attach, zoo
from sparsebench.suites.perplexity import token_nll

SPEC = ModelSpec("tiny", layers=2, heads=4, kv_heads=2, head_dim=16)
BLOCK, CTX, WORDS = 16, 256, 32
pytestmark = pytest.mark.usefixtures("one_thread")


def new_model(head_dim=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # attention that prefers some keys
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
    return model


def new_gates(block=BLOCK, head_dim=16):
    torch.manual_seed(1)
    return [AttnGate("Qavg_Kmaxminavg", block, head_dim, 2 * head_dim, 4, 2) for _ in range(2)]


def tokens(sequences=1):
    return torch.randint(WORDS, (sequences, CTX), generator=torch.Generator().manual_seed(2))


def gradients(density=None, checkpointing=False, gate_weight=1.0):
    """Loss parts, and the gradients of model and gates by name, of one training step."""
    model = new_model().train()
    stretch(model, "yarn", 4.0, CTX)
    if checkpointing:
        recompute_layers(model)
    gates = [] if density is None else new_gates()
    module = Extension(model, gates, 0 if density is None else width_of(density, CTX, BLOCK), gate_weight)
    if density is None:
        parts = module(tokens())
        parts["loss"].backward()
    else:
        with attach(model, module.sparse):
            parts = module(tokens())
            parts["loss"].backward()
    found = {name: weight.grad for name, weight in module.named_parameters()}
    return {name: float(x.detach()) for name, x in parts.items()}, found


def test_full_density_is_dense_training():
    dense_parts, dense = gradients()
    parts, sparse = gradients(1.0)
    assert parts["density"] == 1.0 and parts["gate_loss"] > 0
    assert parts["token_loss"] == pytest.approx(dense_parts["loss"], rel=1e-5)
    for name, expected in dense.items():
        torch.testing.assert_close(sparse[name], expected, rtol=1e-3, atol=1e-6)


def test_sparse_attention_is_another_model_at_the_asked_density():
    dense, sparse = gradients()[0], gradients(0.3)[0]
    assert abs(sparse["token_loss"] - dense["token_loss"]) > 1e-4
    assert sparse["density"] == pytest.approx(0.3, abs=0.06)  # a block a row is a sixteenth of the rows


@pytest.mark.parametrize("density", [None, 0.3])
def test_gradient_checkpointing_changes_no_gradient(density, monkeypatch):
    calls = {"gate_loss": 0, "choose_blocks": 0, "block_sparse_attention": 0}

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in calls:
        counted(gated_model if name == "gate_loss" else extended_model, name)
    plain, expected = gradients(density)
    calls |= dict.fromkeys(calls, 0)
    parts, found = gradients(density, checkpointing=True)
    if density is not None:  # of 2 layers, attention runs again, the selection does not
        assert calls == {"gate_loss": 2, "choose_blocks": 2, "block_sparse_attention": 4}
    assert parts == pytest.approx(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)


def test_each_loss_reaches_its_own_weights():
    """The gates' gradient is that of gate_loss() alone, times the weight; the model's does not know the gates' loss."""
    _, light = gradients(0.3, gate_weight=0.5)
    _, heavy = gradients(0.3, gate_weight=4.0)
    model = new_model()
    stretch(model, "yarn", 4.0, CTX)
    gates = new_gates()
    module = Extension(model, gates, width_of(0.3, CTX, BLOCK))
    with torch.no_grad(), attach(model, module.sparse):
        layers = capture(model, module.sparse)
    for gate, (q, k, ctx) in zip(gates, layers):
        cos, sin = ctx.rope(torch.arange(0, CTX, BLOCK), gate.rope_dim)
        teacher = block_map(q, k, "mass", BLOCK, ctx.scale)
        gate_loss(gate(ctx.q_pre, ctx.k_pre, cos, sin), teacher, drop=0.0).backward()
    for name in light:
        if name.startswith("gates"):
            expected = dict(module.named_parameters())[name].grad
            assert expected.abs().max() > 0
            torch.testing.assert_close(light[name], 0.5 * expected, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(heavy[name], 4 * expected, rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(light[name], heavy[name])


def capture(model, method):
    """q, k and the context of every layer as `method` was given them."""
    found, real = [], method.attend

    def attend(q, k, v, ctx):
        found.append((q, k, ctx))
        return real(q, k, v, ctx)

    method.attend = attend
    model.base_model(tokens(), use_cache=False)
    method.attend = real
    return found


def test_under_autocast_attention_runs_in_bf16_and_gates_in_fp32(monkeypatch):
    model = new_model().train()
    stretch(model, "yarn", 4.0, CTX)
    module = Extension(model, new_gates(), width_of(0.3, CTX, BLOCK))
    seen = []
    real = extended_model.block_sparse_attention
    monkeypatch.setattr(
        extended_model, "block_sparse_attention", lambda *args, **kwargs: (seen.extend(args[:3]), real(*args, **kwargs))[1]
    )
    with attach(model, module.sparse):
        with torch.autocast("cpu", torch.bfloat16):
            parts = module(tokens())
        parts["loss"].backward()
    assert len(seen) == 6 and {x.dtype for x in seen} == {torch.bfloat16}
    assert {grad.dtype for layer in module.sparse.grads for grad in layer} == {torch.float32}
    assert float(parts["token_loss"]) == pytest.approx(gradients(0.3)[0]["token_loss"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(("density", "alike"), [(1.0, 0.99), (0.5, 0.9)])  # in bf16 other blocks may be the best ones
def test_the_kernels_of_a_gpu_train_like_the_cpu(density, alike):
    found = []
    for device in ("cpu", "cuda"):
        model = new_model(64).to(device).train()
        stretch(model, "yarn", 4.0, 512)
        module = Extension(model, new_gates(64, 64), width_of(density, 512, 64)).to(device)
        ids = torch.randint(WORDS, (1, 512), generator=torch.Generator().manual_seed(2)).to(device)
        with attach(model, module.sparse):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                parts = module(ids)
            parts["loss"].backward()
        gradient = {part: [weight.grad for weight in getattr(module, part).parameters()] for part in ("model", "gates")}
        found.append(({name: float(x.detach()) for name, x in parts.items()}, gradient))
    (cpu, expected), (gpu, ours) = found
    assert gpu["token_loss"] == pytest.approx(cpu["token_loss"], rel=0.02)
    assert gpu["gate_loss"] == pytest.approx(cpu["gate_loss"], rel=0.05)
    assert gpu["density"] == pytest.approx(cpu["density"])
    for part in expected:
        flat = [torch.cat([x.flatten().cpu() for x in grads[part]]) for grads in (ours, expected)]
        assert torch.cosine_similarity(*flat, dim=0) > alike


def test_gates_turn_with_the_stretched_positions():
    model = new_model()
    stretch(model, "yarn", 4.0, CTX)
    module = Extension(model, new_gates(), 2)
    with torch.no_grad(), attach(model, module.sparse):
        ctx = capture(model, module.sparse)[0][2]
    cos, sin = ctx.rope(torch.arange(0, CTX, BLOCK), 16)
    expected = model.model.rotary_emb(torch.zeros(1), torch.arange(0, CTX, BLOCK)[None])
    torch.testing.assert_close((cos, sin), (expected[0][0], expected[1][0]))
    plain = LlamaForCausalLM(LlamaConfig(head_dim=16, num_hidden_layers=0, vocab_size=4)).model.rotary_emb
    assert (plain(torch.zeros(1), torch.arange(0, CTX, BLOCK)[None])[0][0] - cos).abs().max() > 0.1


@pytest.mark.parametrize("length", [4 * BLOCK, 250])
def test_token_loss_is_the_perplexity_suites_and_takes_chunks(length, monkeypatch):
    model, ids = new_model(), tokens()[:, :length]
    hidden = model.base_model(ids).last_hidden_state
    monkeypatch.setattr(extended_model, "CHUNK", 60)
    loss = token_loss(model.get_output_embeddings(), hidden, ids)
    torch.testing.assert_close(loss.double(), token_nll(model, ids).mean())
    ours = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
    logits = model.lm_head(hidden)[0, :-1]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 1:]), model.lm_head.weight)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("density", "length"), [(1.0, 256), (0.5, 256), (0.1, 1000), (0.25, 1003)])
def test_width_comes_nearest_to_the_density(density, length):
    pairs = block_pairs(length, length, 64, 64).double()
    rows = torch.arange(len(pairs))

    def share(width):  # the own block and those before it, which hold as many pairs as any other choice
        kept = (rows[None, :] <= rows[:, None]) & (rows[None, :] > rows[:, None] - width)
        return float(pairs[kept].sum() / pairs.sum())

    best = min(range(1, len(pairs) + 1), key=lambda width: abs(share(width) - density))
    assert width_of(density, length, 64) == best


@pytest.fixture
def folder(tmp_path):
    """A tiny model for 128 tokens with its tokenizer, gates for it, and a corpus of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    new_model().save_pretrained(tmp_path / "tiny")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0").save_pretrained(tmp_path / "tiny")
    save_gates(tmp_path / "gates", new_gates(), SPEC, {})
    lines = [{"split": "train", "text": " ".join(map(str, row.tolist()))} for row in tokens(3)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def command(folder, out, *options):
    given = ["--model", folder / "tiny", "--data", f"file:{folder / 'text.jsonl'}", "--gate", folder / "gates", "--ctx", CTX]
    given += ["--out", folder / out, "--steps", 3, "--warmup", 1, "--lr", 1e-3, "--device", "cpu", "--dtype", "float32"]
    return extend.main(list(map(str, [*given, *options])))


def rows(file):
    return list(csv.DictReader(file.open()))


def test_both_arms_save_folders_that_load_again(folder, capsys):
    assert command(folder, "dense") == 0 and command(folder, "sparse", "--density", 0.3, "--batch", 2) == 0
    assert "model in" in capsys.readouterr().out
    before = zoo.load(str(folder / "tiny"))
    for name in ("dense", "sparse"):
        loaded = zoo.load(str(folder / name))
        assert loaded.max_ctx == zoo.describe(str(folder / name))[0] == 4 * before.max_ctx
        assert loaded.model.config.rope_parameters["rope_type"] == "yarn"
        again = new_model()
        stretch(again, "yarn", 4.0, CTX)
        again.load_state_dict(loaded.model.state_dict())
        assert torch.equal(again.eval()(tokens()).logits, loaded.model(tokens()).logits)
        moved = loaded.model.lm_head.weight - before.model.lm_head.weight
        assert 1e-4 < moved.abs().max() < 1e-2
    dense, sparse = rows(folder / "dense" / "loss.csv"), rows(folder / "sparse" / "loss.csv")
    assert [row["step"] for row in dense] == ["0", "1", "2"] and not (folder / "dense" / "gate").exists()
    assert {"token_loss", "tokens_per_second"} < set(dense[0]) and {"gate_loss", "density"} < set(sparse[0])
    record = json.loads((folder / "sparse" / "training.json").read_text())
    assert record["tokens"] == 3 * 2 * CTX and record["density"] == 0.3
    assert extended_model.SparseTrainer.name not in METHODS


def test_what_is_saved_is_what_the_trainer_held(folder, monkeypatch):
    """Logits of the saved folder, run by seer as training.json says, equal those of the trained module's own selection."""
    held = []
    real = extend.save
    monkeypatch.setattr(extend, "save", lambda out, module, *rest: (held.append(module), real(out, module, *rest)))
    assert command(folder, "sparse", "--density", 0.3) == 0
    module = held[0]
    module.eval()
    with torch.no_grad(), attach(module.model, module.sparse):
        expected = module(tokens())
    loaded = zoo.load(str(folder / "sparse"))
    method = json.loads((folder / "sparse" / "training.json").read_text())["method"]
    assert method == f"seer:gate={folder / 'sparse' / 'gate'},budget={module.sparse.width},diagonal=True,last_dense=0"
    seer = Seer(gate=str(folder / "sparse" / "gate"), budget=module.sparse.width, diagonal=True, last_dense=0)
    with torch.no_grad(), attach(loaded.model, seer.prepare(loaded.spec)) as trace:
        nll = token_nll(loaded.model, tokens()).mean()
    assert trace.mean_density == pytest.approx(float(expected["density"]))
    assert float(nll) == pytest.approx(float(expected["token_loss"]), abs=2e-3)  # gates are saved in bf16


def test_gates_go_on_learning_what_they_learnt_before(folder):
    """The first gate loss is that of the recorded ground truth; the paper's where nothing is recorded."""
    found = {}
    for loss in ("max", "mass", "row_mass", None):
        save_gates(folder / "gates", new_gates(), SPEC, {"loss": loss} if loss else {})
        assert command(folder, f"sparse-{loss}", "--density", 0.3, "--steps", 1) == 0
        found[loss] = rows(folder / f"sparse-{loss}" / "loss.csv")[0]["gate_loss"]
        assert trained_loss(folder / f"sparse-{loss}" / "gate") == (loss or "max")
    assert len(set(found.values())) == 3 and found[None] == found["max"]


def test_training_goes_on_where_it_was_killed(folder, monkeypatch):
    whole = ("--density", 0.3, "--save-every", 2)
    assert command(folder, "whole", *whole) == 0
    shutil.copytree(folder / "whole.training", folder / "again.training")
    shutil.rmtree(folder / "again.training" / "checkpoint-3")
    loss = folder / "again.training" / "loss.csv"
    loss.write_text("".join(loss.read_text().splitlines(keepends=True)[:3]))
    assert command(folder, "again", *whole, "--gradient-checkpointing") == 0  # may be turned on where memory ran out
    first, second = rows(folder / "whole" / "loss.csv"), rows(folder / "again" / "loss.csv")
    for one, other in zip(first, second, strict=True):
        for name in ("step", "loss", "token_loss", "gate_loss", "lr"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-6)
    one, other = (zoo.load(str(folder / name)).model.state_dict() for name in ("whole", "again"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    assert command(folder, "again", *whole) == 0  # finished: trains no further
    assert rows(folder / "again" / "loss.csv") == second


def test_a_loss_that_is_not_finite_stops_training(folder, monkeypatch, capsys):
    real, calls = extended_model.token_loss, []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(extended_model, "token_loss", breaks)
    assert command(folder, "broken", "--density", 0.3) == 1
    assert "\nerror: the loss of step 1 is not finite" in capsys.readouterr().err
    assert len(rows(folder / "broken.training" / "loss.csv")) == 1 and not (folder / "broken").exists()


def test_out_of_memory_says_what_to_lower(folder, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(extended_model, "token_loss", full)
    assert command(folder, "full") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "--ctx, or turn on --gradient-checkpointing; CUDA out of memory." in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--density", 0), "--density must be above 0 and at most 1, got 0"),
        (("--density", 1.5), "at most 1, got 1.5"),
        (("--factor", 1), "--factor must be above 1 and finite, got 1"),
        (("--factor", 1.5), "--ctx 256 is beyond 1.5 x the model's 128 tokens"),
        (("--rope", "ntk"), "unknown --rope 'ntk': one of yarn, linear"),
        (("--ctx", 512, "--data", "file:{}/short.jsonl"), "has 3 tokens, one sequence takes 512"),
        (("--steps", 0), "steps 0"),
        (("--gate", "{}/other"), "does not fit tiny"),
        (("--data", "file:{}/none.jsonl"), "no such corpus file"),
        (("--gate", "{}/none"), "no gate weights at"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder, capsys, options, message):
    (folder / "short.jsonl").write_text('{"text": "1 2"}')
    save_gates(folder / "other", [AttnGate("Qavg_Kavg", BLOCK, 16, 32, 2, 2) for _ in range(2)], SPEC, {})
    assert command(folder, "out", "--density", 0.3, *(str(option).format(folder) for option in options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_model_is_stretched_once(folder):
    model = new_model()
    stretch(model, "linear", 2.0, CTX)
    assert model.config.max_position_embeddings == 256
    with pytest.raises(ValueError, match="type 'linear': only 'default' is stretched"):
        stretch(model, "yarn", 2.0, CTX)
