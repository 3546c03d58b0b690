import dataclasses
import itertools
import json

import pytest
import torch

import sparsebench
from sparsebench.kernels.antidiagonal import antidiagonal_mass
from sparsebench.kernels.block_mass import block_mass
from sparsebench.methods import METHODS
from sparsebench.methods.base import ModelSpec
from sparsebench.methods.xattention import code_chunk
from sparsebench.methods.xattention import search as threshold_search
from sparsebench.methods.xattention.search import best_choice, measure

XAttention = METHODS["xattention"]
SETTINGS = list(itertools.product((8, 16), (0.8, 0.9)))
SHORT = {"A": 2000, "D": 4000}  # tokens of the cases with several chunks


def load(conformance, case, length=None):
    inputs, theirs = conformance(f"{case}_inputs"), conformance(f"{case}_xattention")
    q, k = (inputs[name][None, :, :length].float() for name in "qk")
    return q, k, theirs


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    @pytest.mark.parametrize("stride", [8, 16])
    def test_sums(self, conformance, case, stride):
        q, k, theirs = load(conformance, case)
        got = antidiagonal_mass(q, k, q.shape[-1] ** -0.5, stride, 128)[0]
        assert (got - theirs[f"torch_fp32/s{stride}/attn_sums"]).abs().max() < 1e-4
        assert torch.allclose(got.sum(-1), torch.tensor(128.0 / stride), atol=1e-4)

    @pytest.mark.parametrize("stride", [8, 16])
    def test_sums_of_ragged_prompts(self, conformance, case, stride):
        q, k, theirs = load(conformance, case, SHORT[case])
        got = antidiagonal_mass(q, k, q.shape[-1] ** -0.5, stride, 128)[0]
        assert (got - theirs[f"torch_fp32_multichunk/n{SHORT[case]}_c1024/s{stride}/attn_sums"]).abs().max() < 1e-4

    @pytest.mark.parametrize("stride, threshold", SETTINGS)
    def test_masks(self, conformance, check_conforms, case, stride, threshold):
        q, k, theirs = load(conformance, case)
        ours = sparsebench.select(XAttention(stride, threshold), q, k).dense()[0]
        setting = f"s{stride}/th{threshold}"
        check_conforms("xattention", case, setting, ours, theirs[f"torch_fp32/{setting}/mask.bits"])

    @pytest.mark.parametrize("stride, threshold", SETTINGS)
    def test_masks_of_several_chunks(self, conformance, check_conforms, case, stride, threshold):
        q, k, theirs = load(conformance, case, SHORT[case])
        ours = sparsebench.select(XAttention(stride, threshold, chunk=1024), q, k).dense()[0]
        setting = f"torch_fp32_multichunk/n{SHORT[case]}_c1024/s{stride}/th{threshold}"
        check_conforms("xattention", case, setting, ours, theirs[f"{setting}/mask.bits"])

    @pytest.mark.parametrize("path", ["triton_bf16", "torch_bf16", "triton_fp32"])
    def test_their_gpu_paths_round(self, conformance, case, path):
        """Their GPU paths round logits or probabilities; the manifest counts at most 7 blocks that fp32 chooses otherwise."""
        if (case, path) == ("D", "triton_fp32"):
            pytest.skip("their fp32 kernel did not fit the GPU's shared memory in case D: there is no output")
        q, k, theirs = load(conformance, case)
        for stride, threshold in SETTINGS:
            ours = sparsebench.select(XAttention(stride, threshold), q, k).dense()[0]
            assert (ours != theirs[f"xattn/{path}/s{stride}/th{threshold}/mask.bits"]).sum() <= 7


@pytest.mark.parametrize("stride", [8, 16])
def test_later_chunks_see_the_first_one(conformance, stride):
    """A prompt of whole chunks, where a slip in their torch path leaves later chunks no mass on earlier ones."""
    q, k, theirs = load(conformance, "D")
    witness = theirs[f"bug_witness/torch_fp32_chunk2048/s{stride}/attn_sums"]
    assert (witness[:, 16:, :16] == 0).all()
    mass = antidiagonal_mass(q, k, q.shape[-1] ** -0.5, stride, 128)[0]
    assert (mass[:, 16:, :16].sum(-1) > 0).all()
    blocks = sparsebench.select(XAttention(stride, chunk=2048), q, k).dense()[0, :, 16:, 1:16]
    assert blocks.any(-1).float().mean() > 0.25


def tensors(q_len, kv_len=None, batch=1, heads=4, kv_heads=2):
    """q and k with a few keys that many queries look at and a preference for near keys, as in a trained model."""
    kv_len = kv_len or q_len
    q, k = torch.randn(batch, heads, q_len, 64), torch.randn(batch, kv_heads, kv_len, 64)
    q[..., 0] += 3
    k[:, :, torch.rand(kv_len) < 0.03, 0] += 8
    angle = torch.arange(kv_len) * 0.01
    near = torch.stack([angle.cos(), angle.sin()], dim=-1) * 5
    k[..., 1:3], q[..., 1:3] = near, near[kv_len - q_len :]
    return q, k


def by_hand(mass, threshold, rule, chunk_blocks):
    """The choice of one head's rows from mass [NQ, NK], a block at a time."""
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    for row, values in enumerate(mass.double().tolist()):
        later = rule == "paper" or row >= chunk_blocks
        forced = {0, row} if later else {row}
        order = sorted((c for c in range(row + 1) if c not in forced), key=lambda c: -values[c])
        total = sum(values[c] for c in forced)
        taken = 0
        while taken < len(order) and total < threshold * sum(values):
            total += values[order[taken]]
            taken += 1
        taken += not later  # one block more than needed
        kept[row, [0, *forced, *order[:taken]]] = True
    return kept


@pytest.mark.parametrize("rule, chunk", [("code", None), ("code", 256), ("paper", None)])
@pytest.mark.parametrize("length", [1000, 1024, 777])
def test_rule_by_hand(rule, chunk, length):
    q, k = tensors(length)
    method = XAttention(threshold=0.7, rule=rule, chunk=chunk)
    mask = sparsebench.select(method, q, k)
    assert 0.2 < mask.density().mean() < 0.95
    mass = antidiagonal_mass(q, k, 0.125, 8, 128)
    chunk_blocks = (chunk or code_chunk(length)) // 128
    for head in range(4):
        assert torch.equal(mask.dense()[0, head], by_hand(mass[0, head], 0.7, rule, chunk_blocks))


def test_code_chunk():
    """The prompt's power of 2 while that is at most 2^28 over it, and never less than 2048."""
    lengths = {1: 2048, 2049: 4096, 16384: 16384, 16385: 8192, 32768: 8192, 65536: 4096, 131072: 2048, 1 << 20: 2048}
    assert {length: code_chunk(length) for length in lengths} == lengths


@pytest.mark.parametrize("length", [990, 1, 5, 100, 128, 129])
def test_threshold_1_is_dense(length):
    """Also where most blocks' mass vanishes next to the largest."""
    q, k = tensors(length)
    for rule in ("code", "paper"):
        assert (sparsebench.select(XAttention(threshold=1.0, rule=rule), q * 40, k).density() == 1).all()


@pytest.mark.parametrize("fields", [{}, {"rule": "paper"}, {"chunk": 384}])
def test_masks_nest_and_density_rises_with_the_threshold(fields):
    q, k = tensors(990)
    masks = [sparsebench.select(XAttention(threshold=t, **fields), q, k) for t in (0.1, 0.5, 0.8, 0.9, 0.97, 1.0)]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer.dense() & ~more.dense()).any()
    densities = [float(mask.density().mean()) for mask in masks]
    assert densities == sorted(densities) and densities[0] < 0.6 and densities[-1] == 1


@pytest.mark.parametrize("stride", [1, 4, 128])
@pytest.mark.parametrize("length", [3, 100, 128, 131, 300])
def test_short_prompts_and_groups_that_mix(stride, length):
    """A prompt shorter than a block or a stride; its last group counts with zeros for what it lacks."""
    q, k = tensors(length)
    mask = dataclasses.replace(sparsebench.select(XAttention(stride), q, k), trusted=False).check()
    if length <= 128:
        assert (mask.density() == 1).all()
    zeros = -length % 128
    longer = [torch.nn.functional.pad(x, (0, 0, 0, zeros)) for x in (q, k)]
    mass, padded = (antidiagonal_mass(*x, 0.125, stride, 128) for x in ((q, k), longer))
    assert torch.allclose(mass[:, :, :-1], padded[:, :, :-1], atol=1e-5)
    groups = (length - 1) % 128 // stride + 1
    assert torch.allclose(mass[:, :, -1].sum(-1), torch.tensor(float(groups)), atol=1e-4)


def test_batches_and_groups_of_heads():
    q, k = tensors(1100, batch=2)
    k[1] *= 2
    both = sparsebench.select(XAttention(threshold=0.6), q, k).dense()
    assert not torch.equal(both[0], both[1])
    for b in range(2):
        alone = sparsebench.select(XAttention(threshold=0.6), q[b : b + 1], k[b : b + 1].repeat_interleave(2, 1))
        assert torch.equal(alone.dense()[0], both[b])


@pytest.mark.parametrize("fields", [{}, {"rule": "paper"}, {"chunk": 256}])
def test_chunked_prefill_equals_the_whole_prompt(fields):
    q, k = tensors(900)
    method = XAttention(threshold=0.7, **fields)
    whole = sparsebench.select(method, q, k).dense()
    for start, end in ((0, 256), (256, 640), (640, 900)):
        mask = sparsebench.select(method, q[:, :, start:end], k[:, :, :end])
        expected = whole[:, :, start // 128 : -(-end // 128), : -(-end // 128)]
        assert torch.equal(mask.dense(), expected)


@pytest.mark.parametrize("q_len", [1, 7, 130, 300])
def test_chunks_that_start_inside_a_block(q_len):
    """Every query sees at least its own block, wherever the chunk starts."""
    q, k = tensors(q_len, 500)
    mask = sparsebench.select(XAttention(threshold=0.3, rule="paper"), q, k)
    own = torch.arange(500 - q_len, 500)
    tokens = mask.tokens()[0]
    assert tokens[:, torch.arange(q_len), own].all()
    assert tokens[:, torch.arange(q_len), own // 128 * 128].all()
    assert tokens[:, :, 0].all()


def write(tmp_path, layers, **more):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"model": "tiny", "layers": layers, **more}))
    return str(path)


def test_heads_of_a_file_run_with_their_own_thresholds(tmp_path):
    path = write(tmp_path, [None, [0.5, 0.95, None, 1]])
    q, k = tensors(700)
    mixed = sparsebench.select(XAttention(threshold=0.7, thresholds=path), q, k, layer=1).dense()
    for head, threshold in enumerate([0.5, 0.95, 0.7, 1.0]):
        assert torch.equal(mixed[:, head], sparsebench.select(XAttention(threshold=threshold), q, k).dense()[:, head])
    default = sparsebench.select(XAttention(threshold=0.7, thresholds=path), q, k, layer=0)
    assert torch.equal(default.dense(), sparsebench.select(XAttention(threshold=0.7), q, k).dense())


def test_a_file_is_checked_against_the_model(tmp_path):
    path = write(tmp_path, [[0.5, 0.9]])
    method = XAttention(thresholds=path)
    assert method.prepare(ModelSpec("tiny", 1, 2, 1, 64)) == method
    for other in (ModelSpec("other", 3, 2, 1, 64), ModelSpec("other", 1, 2, 1, 64)):
        with pytest.raises(ValueError, match=r"searched for tiny with 1 layers of 2 heads, but other .*--model other$"):
            method.prepare(other)
    with pytest.raises(ValueError, match="2 heads in layer 0, the model has 4"):
        sparsebench.select(method, *tensors(64))
    with pytest.raises(ValueError, match="1 layers, the model has a layer 5"):
        sparsebench.select(method, *tensors(64), layer=5)
    with pytest.raises(ValueError, match=r"xattention:thresholds=.*none\.json cannot be read"):
        XAttention(thresholds=str(tmp_path / "none.json")).prepare(ModelSpec("tiny", 1, 2, 1, 64))


@pytest.mark.parametrize("layers", [[[0.0]], [[1.5]], [["a"]], [[True]], [[[0.5]]], 5, [[0.5], [0.5, 0.5]]])
def test_malformed_files_are_refused(tmp_path, layers):
    with pytest.raises(ValueError, match=r'heads\.json is no file of \{"model": name, "layers": \[\[threshold'):
        XAttention(thresholds=write(tmp_path, layers)).params()


def test_what_a_row_says_of_the_thresholds(tmp_path):
    assert XAttention(threshold=0.85).note == "every head has threshold 0.85 (no per-head search)"
    assert "thresholds_sha256" not in XAttention().params()
    method = XAttention(thresholds=write(tmp_path, [[0.5]], stride=8))
    assert method.note == "" and method.knob is None and XAttention().knob == "threshold"
    assert dataclasses.replace(method, stride=16).note == "the thresholds were searched at stride 8, not 16"
    before = method.params()
    write(tmp_path, [[0.625]], stride=8)
    assert method.params()["thresholds_sha256"] != before["thresholds_sha256"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": 0.0}, r"threshold=0.0 is out of range \(0, 1\]"),
        ({"threshold": 1.1}, "threshold=1.1 is out of range"),
        ({"threshold": float("nan")}, "out of range"),
        ({"stride": 0}, "stride=0 is no power of 2"),
        ({"stride": 12}, "stride=12 is no power of 2 up to block=128"),
        ({"stride": 256}, "stride=256"),
        ({"stride": -8}, "stride=-8"),
        ({"block": 100}, "block=100 is neither"),
        ({"rule": "theirs"}, "rule=theirs is neither code nor paper"),
        ({"chunk": 1000}, "chunk=1000 is no multiple of block=128"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 1024, "rule": "paper"}, "chunk is for rule=code"),
    ],
)
def test_refuses_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        XAttention(**fields)


def test_what_a_search_measures():
    q, k = tensors(700)
    method = XAttention(threshold=0.4, rule="paper")
    kept, density = measure(q, k, 0.125, method, (0.9, 0.4))
    attention = block_mass(q, k, 0.125, 128, 128)[0]
    for found, threshold in enumerate((0.9, 0.4)):
        mask = sparsebench.select(dataclasses.replace(method, threshold=threshold), q, k)
        assert torch.allclose(density[found].double(), mask.density()[0], atol=1e-6)
        assert torch.allclose(kept[found], (attention * mask.dense()[0]).sum((-1, -2)) / 700, atol=1e-6)
    assert (kept[0] > kept[1]).any()
    with pytest.raises(ValueError, match="whole prompt, got 10 queries"):
        measure(q[:, :, :10], k, 0.125, method, (0.9,))


@pytest.mark.parametrize("budget", [6, 9, 14, 30])
def test_no_other_choice_within_the_budget_keeps_more(budget):
    kept, cost = torch.rand(4, 3).sort(dim=0).values, torch.randint(1, 9, (4, 3)).sort(dim=0).values
    cost[0] = 2
    taken = best_choice(kept, cost, budget)

    def total(values, choice):
        return sum(values[option, head].item() for head, option in enumerate(choice))

    affordable = [choice for choice in itertools.product(range(4), repeat=3) if total(cost, choice) <= budget]
    assert total(cost, taken) <= budget
    assert total(kept, taken) == pytest.approx(max(total(kept, choice) for choice in affordable))


def test_search_command(tmp_path, model_folder, one_thread, capsys):
    """The command on the tiny model: its file fits the model, and several documents count."""
    path, out = tmp_path / "text.jsonl", tmp_path / "new" / "heads.json"
    texts = [" ".join(f"{word} sees a {word}" for word in words) for words in (["bee", "cat"] * 40, ["elk"] * 80)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = []
    for documents, threshold in ((1, "0.6"), (2, "0.63")):
        arguments = ["--model", str(model_folder), "--data", f"file:{path}", "--device", "cpu", "--out", str(out)]
        options = ["--ctx", "640", "--limit", str(documents), "--stride", "16", "--threshold", threshold]
        assert threshold_search.main([*arguments, *options]) == 0
        found.append(json.loads(out.read_text()))
    first, both = (torch.tensor(file["layers"]) for file in found)
    assert first.shape == both.shape == (2, 4) and (first > 0).all() and (first <= 1).all()
    assert not torch.equal(first, both)
    assert found[0]["stride"] == 16 and "8 heads of" in capsys.readouterr().out
    spec = ModelSpec(found[0]["model"], 2, 4, 2, 16)
    assert XAttention(stride=16, thresholds=str(out)).prepare(spec).note == ""
    for options, message in ((["--ctx", "100"], "more than 128 tokens"),
                             (["--ctx", "8k"], "is limited to 1024 tokens"), (["--ctx", "0"], "lengths are 2 tokens or more"),
                             (["--out", str(tmp_path)], "is a folder: name the file"),
                             (["--ctx", "400", "--stride", "3"], "stride=3 is no power of 2"),
                             (["--ctx", "400", "--threshold", "2"], "threshold=2.0 is out of range")):  # fmt: skip
        assert threshold_search.main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
