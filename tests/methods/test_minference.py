import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsebench
from sparsebench.kernels.line_scores import line_scores
from sparsebench.kernels.vertical_slash import vertical_slash_mask
from sparsebench.methods import METHODS
from sparsebench.methods.base import ModelSpec
from sparsebench.methods.minference import search as head_search
from sparsebench.methods.minference import top_lines
from sparsebench.methods.minference.search import Candidate, kept_mass
from sparsebench.models import zoo

MInference = METHODS["minference"]
BUDGETS = [(100, 200), (30, 200), (500, 100)]


def listed(num, index):
    """The entries of index that count, as (head, row, value) triples."""
    counts = torch.arange(index.shape[-1]) < num[..., None]
    return torch.cat([counts.nonzero()[:, :-1], index[counts][:, None]], dim=-1).long()


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    def load(self, conformance, case):
        inputs, theirs = conformance(f"{case}_inputs"), conformance(f"{case}_minference")
        q, k = inputs["q"][None].float(), inputs["k"][None].float()
        return q, k, theirs

    def test_scores(self, conformance, case):
        q, k, theirs = self.load(conformance, case)
        vertical, slash = line_scores(q, k, q.shape[-1] ** -0.5, 64)
        expected_vertical, expected_slash = theirs["vs/vertical_score"], theirs["vs/slash_score"].flip(-1)
        assert (vertical[0, :, 30:] - expected_vertical[:, 30:]).abs().max() < 1e-5
        assert (slash[0, :, 100:] - expected_slash[:, 100:]).abs().max() < 1e-5
        assert expected_vertical[:, :30].isinf().all() and expected_slash[:, :100].isinf().all()

    @pytest.mark.parametrize("budget", BUDGETS)
    def test_lines(self, conformance, check_conforms, case, budget):
        q, k, theirs = self.load(conformance, case)
        scores = line_scores(q, k, q.shape[-1] ** -0.5, 64)
        names = (f"vs/{budget[0]}_{budget[1]}/{line}_idx" for line in "vs")
        for score, forced, size, name in zip(scores, (30, 100), budget, names):
            score[..., :forced] = float("inf")
            chosen = top_lines(score, (size,) * q.shape[1])[0]
            expected = torch.zeros_like(chosen).scatter_(1, theirs[name].long(), True)
            check_conforms("minference", case, name, chosen, expected)

    @pytest.mark.parametrize("budget", BUDGETS)
    def test_blocks_and_columns(self, conformance, case, budget):
        q, k, theirs = self.load(conformance, case)
        name = f"vs/{budget[0]}_{budget[1]}"
        mask = sparsebench.select(MInference(*budget), q, k)
        blocks = listed(theirs[f"{name}/block_count"], theirs[f"{name}/block_offset"])
        columns = listed(theirs[f"{name}/column_count"], theirs[f"{name}/column_index"])
        assert len(blocks) > 100 and len(columns) > 100
        assert torch.equal(listed(mask.kv_num_blocks[0], mask.kv_indices[0]), blocks)
        assert torch.equal(listed(mask.column_num[0], mask.column_indices[0]), columns)
        keys = mask.tokens()[0].sum(-1)
        assert torch.equal(keys, theirs[f"{name}/keys_per_query"].long())
        pairs = mask.visible_pairs()
        assert torch.allclose(mask.density()[0], keys.sum(-1).double() / pairs, atol=1e-12)

    def test_outputs(self, conformance, case):
        q, k, theirs = self.load(conformance, case)
        v, rows = conformance(f"{case}_inputs")["v"][None].float(), conformance(f"{case}_reference")["rows"].long()
        out, _ = sparsebench.attention(MInference(100, 200), q[:, :, -512:], k, v)  # the last 512 rows of the same selection
        later = rows >= k.shape[2] - 512
        expected = theirs["vs/100_200.O_rows"].float()[:, later]
        # Their kernel rounds the scaled q to bf16; the manifest gives 0.08 as its largest distance from fp32.
        assert (out[0][:, rows[later] - k.shape[2] + 512] - expected).abs().max() < 0.08


def random_lines(kv_len, slashes=0.02):
    vertical, slash = torch.rand(2, 3, kv_len) < 0.1, torch.rand(2, 3, kv_len) < slashes
    slash[..., : min(kv_len, 70)] = True
    return vertical, slash, max(int(vertical.sum(-1).max()), 1), int(slash.sum(-1).max())


LENGTHS = [(300, 300), (1, 1), (30, 30), (64, 64), (100, 777), (70, 640), (129, 640)]


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("slashes", [0.0, 0.02, 0.5])
def test_conversion_covers_the_lines(q_len, kv_len, slashes):
    vertical, slash, *bounds = random_lines(kv_len, slashes)
    mask = vertical_slash_mask(vertical, slash, *bounds, q_len, impl="reference")
    dataclasses.replace(mask, trusted=False).check()
    i, j = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    lines = (vertical[:, :, None] | slash[:, :, (i - j).clamp(min=0)]) & (j <= i)
    tokens = mask.tokens()
    assert not (lines & ~tokens).any()
    assert torch.equal(mask.pairs(), tokens.sum((-1, -2)))
    # No column repeats a key of a block: the kernel would count it twice.
    blocks_only = dataclasses.replace(mask, column_indices=None, column_num=None).pairs()
    columns_only = dataclasses.replace(mask, kv_num_blocks=torch.zeros_like(mask.kv_num_blocks)).pairs()
    assert torch.equal(blocks_only + columns_only, tokens.sum((-1, -2)))


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
def test_triton_conversion_equals_the_reference(q_len, kv_len):
    vertical, slash, *bounds = random_lines(kv_len)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = vertical_slash_mask(vertical, slash, *bounds, q_len, impl="reference")
    got = vertical_slash_mask(vertical.to(device), slash.to(device), *bounds, q_len, impl="triton")
    for num, index in (("kv_num_blocks", "kv_indices"), ("column_num", "column_indices")):
        ours = listed(getattr(got, num).cpu(), getattr(got, index).cpu())
        assert torch.equal(ours, listed(getattr(expected, num), getattr(expected, index)))


def test_conversion_refuses_an_unknown_implementation():
    vertical, slash, *bounds = random_lines(100)
    with pytest.raises(ValueError, match="'cuda'"):
        vertical_slash_mask(vertical, slash, *bounds, 100, impl="cuda")


def test_scores_of_short_prompts_and_chunks():
    q, k = torch.randn(1, 4, 40, 32), torch.randn(1, 2, 300, 32)
    vertical, slash = line_scores(q, k, 0.2, 64)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.2
    p = logits.masked_fill(~torch.ones(40, 300, dtype=torch.bool).tril(260), float("-inf")).softmax(-1)
    assert torch.allclose(vertical, p.sum(2), atol=1e-5)
    expected = torch.stack([torch.diagonal(p, 260 - d, 2, 3).sum(-1) for d in range(300)], dim=-1)
    assert torch.allclose(slash, expected, atol=1e-5)


def config_file(tmp_path, layers):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"model": "tiny", "layers": layers}))
    return str(path)


def test_budgets_scale_with_floors_and_the_length_as_ceiling():
    method = MInference(vertical=100, slash=200)
    assert method.budgets(0, 2, 4096) == [(100, 200)] * 2
    assert dataclasses.replace(method, scale=2.0).budgets(0, 1, 4096) == [(200, 400)]
    assert dataclasses.replace(method, scale=0.01).budgets(0, 1, 4096) == [(30, 50)]
    assert method.budgets(0, 1, 150) == [(100, 150)]


def test_heads_of_a_config_run_with_their_own_budgets(tmp_path):
    path = config_file(tmp_path, [None, [[100, 60], [40, 200], None]])
    q, k = torch.randn(1, 3, 512, 64), torch.randn(1, 1, 512, 64)
    mixed = sparsebench.select(MInference(300, 300, config=path), q, k, layer=1)
    for head, budget in enumerate([(100, 60), (40, 200), (300, 300)]):
        alone = sparsebench.select(MInference(*budget), q[:, head : head + 1], k)
        assert torch.equal(mixed.tokens()[:, head], alone.tokens()[:, 0])
    default = sparsebench.select(MInference(300, 300, config=path), q, k, layer=0)
    assert torch.equal(default.tokens(), sparsebench.select(MInference(300, 300), q, k).tokens())


def test_config_is_checked_against_the_model(tmp_path):
    method = MInference(config=config_file(tmp_path, [[[100, 60], [40, 200]]]))
    assert method.prepare(ModelSpec("tiny", 1, 2, 1, 64)) == method
    with pytest.raises(ValueError, match=r"searched for tiny with 1 layers of 2 heads, but other has 3 of 2.*--model other"):
        method.prepare(ModelSpec("other", 3, 2, 1, 64))
    with pytest.raises(ValueError, match="2 heads in layer 0, the model has 5"):
        sparsebench.select(method, torch.randn(1, 5, 64, 64), torch.randn(1, 5, 64, 64))
    with pytest.raises(ValueError, match="cannot be read"):
        MInference(config=str(tmp_path / "none.json")).prepare(ModelSpec("tiny", 1, 2, 1, 64))


@pytest.mark.parametrize("layers", [[[[100, -1]]], [[[100]]], [[["a", 3]]], 5, [[[1, 2]], [[1, 2], [3, 4]]]])
def test_malformed_configs_are_refused(tmp_path, layers):
    with pytest.raises(ValueError, match=r"heads\.json is no file of"):
        MInference(config=config_file(tmp_path, layers)).params()


def test_a_changed_config_is_another_result(tmp_path):
    first = MInference(config=config_file(tmp_path, [[[100, 60]]])).params()
    second = MInference(config=config_file(tmp_path, [[[100, 70]]])).params()
    assert first["config"] == second["config"] and first["config_sha256"] != second["config_sha256"]
    assert "config_sha256" not in MInference().params()


def test_kept_mass_by_definition():
    q, k, length = torch.randn(1, 4, 333, 32), torch.randn(1, 2, 333, 32), 333
    logits = (q[0] @ k[0].repeat_interleave(2, 0).transpose(-1, -2)) * 0.3
    p = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    vertical, slash = (scores[0] for scores in line_scores(q, k, 0.3, 64))
    vertical[:, :30], slash[:, :30] = float("inf"), float("inf")
    distance = torch.arange(length)[:, None] - torch.arange(length)
    candidates = [Candidate(40, 60), Candidate(10, 50, static=True)]
    got = kept_mass(q, k, 0.3, candidates)
    for head in range(4):
        columns = torch.zeros(length, dtype=torch.bool)
        columns[vertical[head].topk(40).indices] = True
        near = torch.isin(distance, slash[head].topk(60).indices)
        a_shape = (distance < 50) | (torch.arange(length) < 10)
        expected = [(p[head] * kept)[166:].sum() / 167 for kept in (near | columns, a_shape)]
        assert torch.allclose(got[:, head], torch.stack(expected), atol=1e-5)


def test_search_finds_the_pattern_of_every_head():
    """Head 0 looks at a few heavy keys, head 1 at one diagonal, head 2 at everything near."""
    length, dim = 640, 64
    position = torch.arange(length)
    far, near = torch.zeros(3, length, dim), torch.zeros(3, length, dim)
    far[0, :, 0], near[0, position % 80 == 40, 0] = 8.0, 8.0
    code = torch.nn.functional.one_hot((position * 7) % 61, dim).float() * 20  # repeats every 61 tokens
    far[1], near[1] = code, code.roll(20, 0)
    angle = position * (0.7 / 100)
    far[2, :, :2] = near[2, :, :2] = torch.stack([angle.cos(), angle.sin()], dim=-1) * 9
    candidates = [Candidate(40, 31), Candidate(30, 60), Candidate(1, 220, static=True)]
    assert kept_mass(far[None], near[None], 1.0, candidates).argmax(0).tolist() == [0, 1, 2]


def test_head_search_command(tmp_path, monkeypatch, capsys):
    """The command on a random two-layer Llama and a small grid: its file fits the model and its budgets are the grid's."""
    grid = [(30, 80), (60, 50), (10, 70)]
    monkeypatch.setattr(head_search, "GRID", [Candidate(*grid[0]), Candidate(*grid[1]), Candidate(*grid[2], static=True)])
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
    )
    spec = ModelSpec("tiny", 2, 4, 2, 16)
    loaded = zoo.LoadedModel(
        model=LlamaForCausalLM(config).eval(), tokenizer=WordNumbers(), spec=spec, revision="", max_ctx=2048
    )
    monkeypatch.setattr(zoo, "load", lambda name, **options: loaded)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n % 97) for n in range(300)))
    out = tmp_path / "new" / "heads.json"
    arguments = ["--model", "tiny", "--data", f"file:{text}", "--device", "cpu", "--out", str(out)]
    assert head_search.main([*arguments, "--ctx", "256"]) == 0
    written = [tuple(budget) for layer in json.loads(out.read_text())["layers"] for budget in layer]
    assert len(written) == 8 and set(written) <= set(grid)
    assert MInference(config=str(out)).prepare(spec).note == ""
    assert "8 heads of tiny" in capsys.readouterr().out
    for ctx, message in (("1k", "no document of"), ("8k", "is limited to 2048 tokens"), ("100", "at least 120 tokens")):
        assert head_search.main([*arguments, "--ctx", ctx]) == 2
        assert message in capsys.readouterr().err


class WordNumbers:
    """A tokenizer of numbers: every word is its own token id."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("fields", [{"vertical": 0}, {"slash": 0}, {"scale": -1.0}])
def test_refuses_values_out_of_range(fields):
    with pytest.raises(ValueError, match="out of range"):
        MInference(**fields)


def test_lines_of_a_larger_budget_hold_those_of_a_smaller_one():
    scores = torch.randn(2, 3, 200).round(decimals=1)  # with ties
    fewer, more = top_lines(scores, (20, 50, 80)), top_lines(scores, (21, 90, 80))
    assert not (fewer & ~more).any() and (more.sum(-1) == torch.tensor([21, 90, 80])).all()
