"""The speed suite: its tasks, opponents, masks and files on any machine, its times on a GPU."""

from __future__ import annotations

import functools
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsebench import run_bench
from sparsebench.kernels import block_sparse_attention
from sparsebench.kernels.attention_with_map import attention_with_map
from sparsebench.kernels.block_mass import block_mass
from sparsebench.kernels.selection import keep_top
from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import select
from sparsebench.methods.minference import MInference
from sparsebench.methods.oracle import Oracle
from sparsebench.methods.random_blocks import RandomBlocks
from sparsebench.models import zoo
from sparsebench.models.calibrate import capture_layers
from sparsebench.suites import baselines, capture, inputs, speed
from sparsebench.suites.base import Cell, NotApplicable
from sparsebench.suites.baselines import Kernel, dense_baselines, edge_and_whole, time_all
from sparsebench.suites.checks import MOST_ERROR, Case
from sparsebench.suites.inputs import SHAPE, RandomMask, RealMask, Source, saved_facts
from sparsebench.suites.speed import Speed

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 0.25
TEXT = "the quick brown fox jumps over the lazy dog "


def tensors(q_len, kv_len):
    return torch.randn(1, 4, q_len, 16), torch.randn(1, 2, kv_len, 16), torch.randn(1, 2, kv_len, 16)


def random_case(length=256):
    q, k, v = tensors(length, length)
    return Case(q, k, v, select(RandomBlocks(density=0.3), q, k), SCALE)


def test_no_cpu_time_is_ever_a_result():
    assert Speed.needs_gpu and not Speed.needs_model


@pytest.fixture
def on_cpu(monkeypatch):
    """Cells run here, every time is 2 ms. Returns the calls that were timed."""
    timed = []

    def event_times(*runs):
        timed.extend(runs)
        for run in runs:
            run()
        return [torch.tensor([1.0, 2.0, 3.0]) for _ in runs]

    monkeypatch.setattr(baselines, "event_times", event_times)
    monkeypatch.setattr(speed, "host_time", lambda run: run() is not None and 0.5)
    monkeypatch.setattr(speed, "peak_memory", lambda run: (run(), 5.0))
    monkeypatch.setattr(speed, "product_tflops", lambda dtype: 800.0)
    monkeypatch.setattr(speed, "Source", functools.partial(Source, device="cpu"))
    monkeypatch.setattr(baselines, "_flex", no_kernel)
    monkeypatch.setattr(inputs, "SHAPE", (small := inputs.ModelSpec("small", 1, heads=4, kv_heads=2, head_dim=16)))
    monkeypatch.setattr(speed, "SHAPE", small)
    dense_baselines.cache_clear()
    yield timed
    dense_baselines.cache_clear()


def no_kernel(case):
    raise RuntimeError("no such mask\nat all")


def run_cell(method="random", params=None, task="attention", density=None, ctx_len=256, **options):
    cell = Cell(
        SHAPE.name, "", method, params or {}, "speed", task, ctx_len, density, None, 0, "float32", "cpu", options=options
    )
    suite = Speed()
    scores = list(suite.run(None, cell))
    assert len({score.metric for score in scores}) == len(scores)
    return {score.metric: score.value for score in scores}, suite.notes


def times_of(*names):
    return {f"{name}{tail}_ms" for name in names for tail in ("", "_p20", "_p80")}


def test_a_baseline_that_cannot_run_is_a_blank_with_its_reason(on_cpu):
    scores, notes = run_cell()
    assert {name for name in scores if name.endswith("_ms")} == times_of("total", "select", "attend", "fa2") | {"host_ms"}
    assert scores["fa2_ms"] == 2 and scores["fa2_p80_ms"] > 2 and scores["matmul_tflops"] == 800
    assert notes["flex"] == "not timed: RuntimeError: no such mask"
    assert notes["cudnn"].startswith("not timed: RuntimeError")  # on a CPU there is none
    for name in ("fa3", "fa4", "fa4_sparse"):
        assert notes[name].startswith("not timed: ModuleNotFoundError")
    assert notes["kernel"] == "reference"  # what really ran


def test_rates_count_the_selected_pairs_of_all_heads(on_cpu):
    scores, _ = run_cell(density=0.5)
    pairs = scores["density"] * 256 * 257 / 2 * 4
    assert scores["tflops"] == scores["attend_tflops"] == pytest.approx(4 * 16 * pairs / 2 / 1e9)


def test_dense_kernels_are_timed_once_for_all_methods(on_cpu):
    first, _ = run_cell("random")
    before = len(on_cpu)
    second, notes = run_cell("a_shape")
    assert len(on_cpu) - before == 3  # total, select, attend
    assert second["fa2_ms"] == first["fa2_ms"] and "once in this run" in notes["baselines"]
    run_cell("a_shape", ctx_len=128)
    assert len(on_cpu) - before == 7  # another context: its own fa2


def test_dense_has_neither_halves_nor_sparse_opponents(on_cpu):
    scores, notes = run_cell("dense")
    assert (times_of("total", "fa2") | {"host_ms"}) == {name for name in scores if name.endswith("_ms")}
    assert notes["kernel"] == "sdpa" and "flex" not in notes and scores["density"] == 1


@pytest.mark.parametrize(
    "task, blocks", [("kernel_64x64", (64, 64)), ("kernel_128x64", (128, 64)), ("kernel_128x128", (128, 128))]
)
def test_kernel_alone(on_cpu, monkeypatch, task, blocks):
    seen = []
    monkeypatch.setattr(baselines, "_flex", lambda case: seen.append(case.mask) or no_kernel(case))
    scores, _ = run_cell("random_mask", {"density": 0.1}, task, density=0.4, ctx_len=1000)
    assert {name for name in scores if name.endswith("_ms")} == times_of("total", "fa2") | {"host_ms"}
    assert scores["density"] == pytest.approx(0.4, abs=0.03) and scores["error_vs_reference"] < 1e-5
    assert (seen[0].q_block, seen[0].kv_block) == blocks  # opponents get the same mask
    assert run_cell("random_mask", {"density": 0.1}, task, ctx_len=1000)[0]["density"] < 0.25


def test_a_selection_shared_by_the_heads_of_a_group(on_cpu, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "_flex", lambda case: seen.append(case.mask) or no_kernel(case))
    scores, _ = run_cell("random_mask", {"density": 0.4}, "kernel_64x64_shared", ctx_len=1000)
    assert seen[0].kv_num_blocks.shape[1] == 2 and scores["density"] == pytest.approx(0.4, abs=0.03)
    pairs = scores["density"] * 1000 * 1001 / 2 * 4  # of all query heads
    assert scores["tflops"] == pytest.approx(4 * 16 * pairs / 2 / 1e9)


def test_the_block_map_beside_our_own_dense_attention(on_cpu, monkeypatch):
    scores, notes = run_cell("dense", task="block_map", backward=True)
    assert {name for name in scores if name.endswith("_ms")} == times_of("total", "own_dense", "fa2", "fa2_backward") | {
        "host_ms"
    }
    assert scores["density"] == 1 and scores["map_error_vs_reference"] < 1e-5 and notes["kernel"] == "reference"
    assert "no backward" in notes["backward"] and "flex" not in notes

    def wrong(*args, **options):
        out, lse, blocks = attention_with_map(*args, **options)
        return out, lse, blocks.roll(1, dims=-1)

    monkeypatch.setattr(speed, "attention_with_map", wrong)
    with pytest.raises(ArithmeticError, match="the map differs"):
        run_cell("dense", task="block_map")


def test_own_kernels_and_others_take_turns(on_cpu):
    """One call of event_times() for all that is compared on a mask."""
    case, names = random_case(), []
    kernel = speed.ours(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "event_times", lambda *runs: names.append(len(runs)) or [torch.ones(1) for _ in runs])
        figures, _ = time_all({"total": kernel, "select": kernel}, {"a": lambda: kernel, "b": lambda: kernel}, case, False)
    assert names == [4] and {name for name, *_ in figures} == times_of("a", "b", "total", "select")


def test_backward_beside_the_forward(on_cpu):
    scores, notes = run_cell("random", backward=True)
    wanted = times_of("total", "select", "attend", "fa2", "backward", "fa2_backward") | {"host_ms"}
    assert {name for name in scores if name.endswith("_ms")} == wanted, notes
    assert scores["backward_tflops"] == pytest.approx(2.5 * scores["attend_tflops"])


def test_masks_without_a_backward_keep_their_forward(on_cpu):
    scores, notes = run_cell("minference", {"vertical": 40, "slash": 60}, backward=True)
    assert scores["total_ms"] == 2 and "backward_ms" not in scores
    assert notes["backward"].startswith("not timed: ") and "columns" in notes["backward"]


def test_our_own_wrong_output_or_gradient_fails_the_cell(on_cpu, monkeypatch):
    right, slope = block_sparse_attention, 1.1

    def slanted(q, k, v, mask, **options):
        out = right(q, k, v, mask, **options)
        return out.detach() + slope * (out - out.detach())

    monkeypatch.setattr(speed, "block_sparse_attention", slanted)
    run_cell("random_mask", {"density": 0.4}, "kernel_64x64")
    with pytest.raises(ArithmeticError, match="gradients differ"):
        run_cell("random_mask", {"density": 0.4}, "kernel_64x64", backward=True)
    monkeypatch.setattr(speed, "block_sparse_attention", lambda *args, **options: 1.02 * right(*args, **options))
    with pytest.raises(ArithmeticError, match="output differs"):
        run_cell("random_mask", {"density": 0.4}, "kernel_64x64")


def test_the_gradient_comes_in_the_layout_of_the_output():
    case, seen = random_case(), []

    def run(q, k, v):
        out = block_sparse_attention(q, k, v, case.mask, scale=SCALE).transpose(1, 2).contiguous().transpose(1, 2)
        out.register_hook(lambda grad: seen.append(grad.stride() == out.stride()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "event_times", lambda *runs: [torch.ones(1) for _ in runs])
        baselines.time_backward(Kernel(run, (case.q, case.k, case.v)), case, "transposed")
    assert seen == [True]


def test_wrong_kernels_get_no_number(on_cpu):
    case = random_case()

    def kernel(factor, slope=1.0):
        def run(q, k, v):
            out = factor * block_sparse_attention(q, k, v, case.mask, scale=SCALE)
            return out.detach() + slope * (out - out.detach())

        return lambda: Kernel(run, (case.q, case.k, case.v))

    made = {"right": kernel(1.0), "wrong": kernel(1.02), "slanted": kernel(1.0, 1.1)}
    figures, reasons = time_all({}, made, case, backward=True)
    assert {name for name, *_ in figures} == times_of("right", "right_backward", "slanted")
    assert reasons.keys() == {"wrong", "slanted_backward"} and "output differs" in reasons["wrong"]
    assert "gradients differ" in reasons["slanted_backward"]


def test_other_layouts_are_checked_as_what_they_are(on_cpu):
    case = random_case()

    def attention(q, k, v, softmax_scale):
        out = block_sparse_attention(*(x.transpose(1, 2) for x in (q, k, v)), case.mask, scale=softmax_scale)
        return out.transpose(1, 2), None

    kernel = baselines._flash(case, attention)
    assert all(x.is_contiguous() and x.shape[1] == 256 for x in kernel.inputs)
    figures, reasons = time_all({}, {"fa": lambda: kernel}, case, backward=True)
    assert {name for name, *_ in figures} == times_of("fa", "fa_backward") and not reasons


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("length", [1024, 1000])
def test_block_lists_for_flash_attention_4(blocks, length):
    mask = inputs.random_mask(torch.arange(2), length, length, *blocks, 0.3, 0)
    edge_num, edge, whole_num, whole = edge_and_whole(mask, 4)
    assert edge.shape[:2] == (1, 4) and edge.dtype == edge_num.dtype == whole.dtype == whole_num.dtype == torch.int32
    row = torch.arange(edge.shape[2])[:, None]
    chosen = mask.dense().repeat_interleave(2, dim=1)
    column = torch.arange(chosen.shape[-1])
    before = (column + 1) * blocks[1] - 1 <= row * blocks[0]
    for num, index, expected in ((edge_num, edge, chosen & ~before), (whole_num, whole, chosen & before)):
        found = torch.zeros(*chosen.shape[:-1], len(column) + 1, dtype=torch.bool)
        listed = torch.arange(index.shape[-1]) < num[..., None]
        found.scatter_(-1, index.long().where(listed, len(column)), True)
        assert torch.equal(found[..., :-1], expected)


@pytest.mark.parametrize("method", [AShape(init=5, local=70), MInference(vertical=40, slash=60)])
def test_block_lists_refuse_what_they_cannot_say(method):
    with pytest.raises(ValueError, match="no form as block lists"):
        edge_and_whole(select(method, *tensors(413, 413)), 4)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64)])
def test_how_flash_attention_4_is_called(on_cpu, monkeypatch, blocks):
    """A stand-in that takes the interface's arguments at their word."""

    def flash_attn_func(q, k, v, softmax_scale, mask_mod, block_sparse_tensors):
        edge_num, edge, whole_num, whole, (q_block, kv_block) = block_sparse_tensors
        length = q.shape[1]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = torch.zeros(q.shape[2], length, length, dtype=torch.bool)
        for num, index, rule in ((edge_num, edge, mask_mod(0, 0, i, j, None, None)), (whole_num, whole, True)):
            for head, row in torch.cartesian_prod(torch.arange(q.shape[2]), torch.arange(num.shape[2])).tolist():
                listed = torch.isin(j // kv_block, index[0, head, row, : num[0, head, row]])
                seen[head] |= (i // q_block == row) & listed & rule
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        logits = (q @ k.mT * softmax_scale).masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    def lists(*lists, block_size):
        return (*lists, block_size)

    for name, module in {
        "cutlass": {}, "cutlass.cute": {"jit": lambda function: function}, "flash_attn": {}, "flash_attn.cute": {},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": lists},
        "flash_attn.cute.interface": {"flash_attn_func": flash_attn_func},
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[], **module))
    monkeypatch.setattr(sys.modules["cutlass"], "cute", sys.modules["cutlass.cute"], raising=False)
    q, k, v = tensors(500, 500)
    case = Case(q, k, v, inputs.random_mask(torch.arange(4), 500, 500, *blocks, 0.4, 0), SCALE)
    figures, reasons = time_all({}, baselines.sparse_kernels(case), case, backward=True)  # forward only
    assert {name for name, *_ in figures} == times_of("fa4_sparse"), reasons


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)])
def test_random_masks_keep_the_diagonal(blocks):
    mask = RandomMask.make(Source(4000, 1, "float32", "cpu"), blocks, 0.2, SHAPE.heads)
    assert mask.kv_num_blocks.shape[1] == SHAPE.heads and mask.density().mean() == pytest.approx(0.2, rel=0.02)
    own = torch.arange(2000, 4000)
    assert mask.dense()[:, :, own // blocks[0], own // blocks[1]].all()
    assert not torch.equal(mask.dense()[:, 0], mask.dense()[:, 1])
    other = RandomMask.make(Source(4000, 2, "float32", "cpu"), blocks, 0.2, SHAPE.heads)
    assert not torch.equal(mask.kv_num_blocks, other.kv_num_blocks) or not torch.equal(mask.kv_indices, other.kv_indices)


@pytest.fixture(scope="module")
def layer_file(tmp_path_factory, model_folder):
    """Layer 1 of the tiny model on 300 tokens, written by the command."""
    folder = tmp_path_factory.mktemp("qkv")
    (folder / "text.txt").write_text(TEXT * 20)
    words = f"--model {model_folder} --data file:{folder / 'text.txt'} --ctx 300 --layer 1 --device cpu"
    assert capture.main([*words.split(), "--out", str(folder / "new" / "layer.safetensors")]) == 0
    return folder / "new" / "layer.safetensors"


def test_a_saved_layer_is_the_models(layer_file, model_folder):
    loaded = zoo.load(str(model_folder))
    ids = loaded.tokenizer((TEXT * 20)[:300])["input_ids"]
    q, k, ctx = capture_layers(loaded.model, ids)[1]
    source = Source(300, 0, "bfloat16", "cpu", str(layer_file))
    found = source.load()
    for mine, theirs in ((found.q, q), (found.k, k), (found.v, ctx.v)):
        assert torch.equal(mine, theirs.to(torch.bfloat16))
    assert (found.layer, found.num_layers, found.scale) == (1, 2, ctx.scale)
    torch.testing.assert_close(found.q_pre.float(), ctx.q_pre, atol=2e-2, rtol=2e-2)
    assert source.spec == loaded.spec and source.example == f"{model_folder.name} layer 1"
    facts = saved_facts(str(layer_file))
    assert (facts["revision"], facts["document"], facts["tokens"]) == (loaded.revision, "text", 300)
    short = Source(200, 0, "float32", "cpu", str(layer_file)).load()
    assert torch.equal(short.q, found.q[:, :, :200].float()) and short.v.shape[2] == 200
    with pytest.raises(ValueError, match="tables of 16 channels, this method asks for 8"):
        short.rope(short.positions, 8)
    with pytest.raises(NotApplicable, match="holds 300 tokens"):
        Source(301, 0, "float32", "cpu", str(layer_file)).load()


def test_real_masks_are_the_oracles(layer_file):
    source = Source(300, 0, "float32", "cpu", str(layer_file))
    ctx = source.load()
    mask = RealMask.make(source, (64, 64), 0.5, 32)
    oracle = select(Oracle(density=0.5), ctx.q, ctx.k).dense()
    assert mask.kv_num_blocks.shape[1] == SHAPE.heads == 32
    assert mask.kv_indices.shape[3] == mask.kv_num_blocks.max()
    heads = torch.arange(32)
    expected = heads // 4 % 2 * 2 + heads % 4 % 2  # groups of 2 in the file, of 4 in the shape
    assert torch.equal(mask.dense(), oracle[:, expected])
    shared = RealMask.make(source, (64, 64), 0.5, SHAPE.kv_heads).dense()
    mass = block_mass(ctx.q, ctx.k, ctx.scale, 64, 64).unflatten(1, (2, 2)).sum(2)
    assert torch.equal(shared[:, :2], keep_top(mass, 300, 300, 64, 64, 0.5, across_rows=True).dense())
    assert torch.equal(shared, shared[:, torch.arange(8) % 2])
    assert RealMask.make(source, (128, 64), 0.5, 32).density().mean() == pytest.approx(0.5, abs=0.15)


def test_methods_on_a_saved_layer(on_cpu, layer_file):
    dense, _ = run_cell("dense", qkv=str(layer_file))
    scores, notes = run_cell("random", density=0.5, qkv=str(layer_file))
    assert dense["density"] == 1 and scores["density"] == pytest.approx(0.5, rel=0.05) and notes["knob"]
    kernel, _ = run_cell("real_mask", {"density": 0.5}, "kernel_64x64", qkv=str(layer_file))
    assert kernel["density"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        (("--layer", "7"), "--layer 7: .* has the layers 0 to 1"),
        (("--ctx", "2k"), "--ctx 2048: .* is limited to 1024 tokens"),
        (("--data", "file:missing.txt"), "no such corpus file"),
        (("--ctx", "1000"), "no document .* has 1000 tokens"),
        (("--out", "."), "--out . is a folder"),
        (("--model", "smolm2-135m"), "did you mean smollm2-135m"),
    ],
)
def test_capture_refuses_bad_input_in_one_line(tmp_path, model_folder, capsys, change, message):
    (tmp_path / "text.txt").write_text(TEXT)
    given = {"--model": str(model_folder), "--data": f"file:{tmp_path / 'text.txt'}", "--ctx": "32", "--layer": "0"}
    given |= {"--device": "cpu", "--out": str(tmp_path / "out.safetensors")} | dict([change])
    assert capture.main([word for pair in given.items() for word in pair]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert re.search(message, error[-1]) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is None:
        inputs.save_file({"q": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no layer's q, k and v; python -m"):
        saved_facts(str(path))


def planned(words, device="cpu"):
    jobs = run_bench.plan(run_bench.parse(["--suites", "speed", "--device", device, *words.split()]))
    return [(job.cell.task, job.cell.method, job.cell.density, job.cell.model) for job in jobs], jobs


def test_what_the_tasks_run(layer_file, model_folder):
    shape = "llama-3.1-8b-shape"
    assert planned("--methods seer --ctx 1k")[0] == [("attention", "seer", None, shape)]
    cells, jobs = planned("--methods seer,dense --ctx 256 --tasks kernel_64x64,kernel_128x128 --density 0.5,0.02")
    assert cells == [(f"kernel_{b}x{b}", "random_mask", d, shape) for b in (64, 128) for d in (0.5, 0.02)]
    assert planned("--methods seer --ctx 256 --tasks block_map --density 0.5,0.02")[0] == [("block_map", "dense", None, shape)]
    assert all("needs a CUDA device" in job.skip for job in jobs)
    cells, jobs = planned(f"--methods dense --ctx 256 --tasks attention,kernel_64x64 --qkv {layer_file}")
    assert cells == [("attention", "dense", None, model_folder.name), ("kernel_64x64", "real_mask", None, shape)]
    assert jobs[0].cell.revision.startswith("local-") and jobs[0].cell.inputs == jobs[1].cell.inputs != ""
    plain, backward = (planned(f"--methods dense --ctx 256 {words}")[1][0].cell for words in ("", "--backward"))
    assert plain.key != backward.key and plain.options == "{}" and backward.option("backward") is True


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method, density", [("dense", None), ("seer", None), ("minference", None), ("a_shape", 0.3), ("random", 0.25)]
)
def test_times_on_a_gpu(method, density):
    params = {"vertical": 64, "slash": 128} if method == "minference" else {}
    cell = Cell(SHAPE.name, "", method, params, "speed", "attention", 1024, density, None, 0, "bfloat16", "gpu")
    suite = Speed()
    scores = {score.metric: score for score in suite.run(None, cell)}
    times = {"total_ms", "fa2_ms", "cudnn_ms"} | (set() if method == "dense" else {"select_ms", "attend_ms"})
    assert times <= set(scores) and all(scores[name].unit == "ms" and scores[name].value > 0 for name in times)
    for name in times:
        low, high = (scores[name.replace("_ms", f"_{p}_ms")].value for p in ("p20", "p80"))
        assert low <= scores[name].value <= high
    measured = scores["density"].value
    assert scores["error_vs_reference"].value < MOST_ERROR
    flops = 4 * SHAPE.head_dim * SHAPE.heads * measured * 1024 * 1025 / 2
    assert scores["tflops"].value == pytest.approx(flops / scores["total_ms"].value / 1e9, rel=1e-3)
    if density is not None:
        assert measured == pytest.approx(density, rel=0.05) and suite.notes["knob"]
    assert 0 < scores["matmul_tflops"].value < 5000 and (suite.notes["kernel"] == "sdpa") == (method == "dense")
    assert ("untrained gate" in suite.notes.get("note", "")) == (method == "seer")
    assert method in ("dense", "minference") or "flex_ms" in scores or "not timed" in suite.notes["flex"]


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["kernel_64x64", "kernel_128x64", "kernel_128x128", "kernel_64x64_shared"])
def test_kernels_on_a_gpu(task):
    options = {"backward": True}
    cell = Cell(
        SHAPE.name, "", "random_mask", {"density": 0.2}, "speed", task, 2048, None, None, 0, "bfloat16", "gpu", options=options
    )
    suite = Speed()
    scores = {score.metric: score.value for score in suite.run(None, cell)}
    assert {"total_ms", "backward_ms", "fa2_ms", "fa2_backward_ms", "cudnn_ms"} <= set(scores), suite.notes
    for name in ("flex", "fa4", "fa4_sparse"):
        assert f"{name}_ms" in scores or suite.notes[name].startswith("not timed: ModuleNotFoundError"), suite.notes


@pytest.mark.gpu
def test_the_block_map_on_a_gpu():
    cell = Cell(SHAPE.name, "", "dense", {}, "speed", "block_map", 2048, None, None, 0, "bfloat16", "gpu")
    suite = Speed()
    scores = {score.metric: score.value for score in suite.run(None, cell)}
    assert {"total_ms", "own_dense_ms", "fa2_ms", "cudnn_ms"} <= set(scores), suite.notes
    assert scores["map_error_vs_reference"] < MOST_ERROR and scores["peak_mb"] > 0 and suite.notes["kernel"] != "reference"
