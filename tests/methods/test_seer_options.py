"""Every kind of gate, trained here, and every way to select with it, down to the attention over the selected blocks."""

import functools
from itertools import combinations, product

import pytest
import torch

import sparsebench
from sparsebench.kernels import block_sparse_attention
from sparsebench.methods.base import plain_rope
from sparsebench.methods.seer import AttnGate, LayerGates, Seer, distill
from sparsebench.methods.seer import gate as seer_gate
from sparsebench.methods.seer import method as seer_method
from sparsebench.methods.seer.gated_model import GatedModel, Recipe, new_gates
from sparsebench.models import zoo
from sparsebench.models.attach import attach
from sparsebench.models.calibrate import capture_layers

pytestmark = pytest.mark.usefixtures("one_thread")
POOLS = ["".join(chosen) for n in (1, 2, 3) for chosen in combinations(("max", "min", "avg"), n)]
KNOBS = [{"threshold": 0.2}, {"nz_ratio": 0.5}, {"budget": 2}, {"top_p": 0.7}]
OPTIONS = [{"share_gqa": shared, "last_dense": last} for shared in (False, True) for last in (0, 2)]
LENGTH = 500  # tokens, a ragged last block for every size


@pytest.fixture(scope="module")
def loaded(model_folder):
    return zoo.load(str(model_folder))


@pytest.fixture(scope="module")
def layers(loaded):
    return capture_layers(loaded.model, torch.randint(28, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist())


def over_selected_tokens(q, k, v, mask, scale):
    """The attention output by the definition, from which tokens each query may see."""
    seen = mask.tokens().repeat_interleave(q.shape[1] // mask.kv_num_blocks.shape[1], 1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((q @ k.transpose(-1, -2)) * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v


def check_selection(method, q, k, ctx, block):
    """Runs `method` in one layer. Returns the mask, whose shape and density are as its fields say."""
    ctx.state.clear()
    out = method.attend(q, k, ctx.v, ctx)
    mask = ctx.mask
    assert (mask.q_block, mask.kv_block) == (block, block)
    assert mask.kv_num_blocks.shape[1] == (k if method.share_gqa else q).shape[1]
    rows = torch.arange(1, -(-LENGTH // block) + 1)
    num = mask.kv_num_blocks[0]
    assert (num >= 1).all() and (num <= rows).all()
    assert torch.equal(
        num[:, len(rows) - method.last_dense :], rows[len(rows) - method.last_dense :].expand(len(num), -1).int()
    )
    if method.budget is not None:
        assert torch.equal(num[0, : len(rows) - 2], rows[:-2].clamp(max=method.budget).int())
    torch.testing.assert_close(out, over_selected_tokens(q, k, ctx.v, mask, ctx.scale), rtol=1e-4, atol=1e-5)
    return mask


@pytest.mark.parametrize("block, gate_dim, gate_type", [
    (32, 16, "Qavg_Kmaxminavg"), (64, 128, "Qmaxavg_Kmin"), (128, 8, "Qmaxminavg_Kmaxavg"),
])  # fmt: skip
def test_a_gate_from_the_command_selects_in_every_way(tmp_path, model_folder, loaded, layers, block, gate_dim, gate_type):
    letters = torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(bytes(letters).decode())
    sizes = ["--block", str(block), "--gate-dim", str(gate_dim), "--gate-type", gate_type]
    run = ["--ctx", "512", "--steps", "2", "--warmup", "1", "--device", "cpu", "--dtype", "float32"]
    data = ["--model", str(model_folder), "--data", f"file:{tmp_path / 'text.txt'}", "--out", str(tmp_path / "gate")]
    assert distill.main([*data, *sizes, *run]) == 0
    (q, k, ctx), tokens = layers[1], torch.randint(28, (1, LENGTH))
    for knob, options in product(KNOBS, OPTIONS):
        method = Seer(gate=str(tmp_path / "gate"), **knob, **options).prepare(loaded.spec)
        mask = check_selection(method, q, k, ctx, block)
        if options["last_dense"] == 0:
            assert (mask.density() < 1).any(), knob
        with torch.no_grad(), attach(loaded.model, method) as trace:
            assert loaded.model(tokens).logits.isfinite().all()
        assert 0 < trace.mean_density <= 1


@pytest.mark.parametrize("q_pools", POOLS)
def test_every_gate_type_learns_and_selects(loaded, layers, q_pools):
    tokens = torch.randint(28, (1, 160))
    for k_pools in POOLS:
        recipe = Recipe(gate_type=f"Q{q_pools}_K{k_pools}", block=32, gate_dim=16)
        gates = new_gates(loaded.spec, recipe)
        module = GatedModel(loaded.model.base_model, gates, recipe, "torch")
        with attach(loaded.model.base_model, module.method):
            before = module(tokens)["loss"]
            before.backward()
            for weight in module.gates.parameters():
                assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, k_pools
            with torch.no_grad():
                for weight in module.gates.parameters():
                    weight -= 1e-3 * weight.grad
            assert module(tokens)["loss"] < before, k_pools
        q, k, ctx = layers[0]
        check_selection(Seer(gate=LayerGates(gates), nz_ratio=0.4, last_dense=1), q, k, ctx, 32)


def plain(gate_type, block, gate_dim, dim=64, length=300, device="cpu"):
    torch.manual_seed(2)
    gate = AttnGate(gate_type, block, dim, gate_dim, 4, 2)
    q, k, v = (torch.randn(1, heads, length, dim) for heads in (4, 2, 2))
    with torch.no_grad():
        gate.mask_linear_k.weight.mul_(6)
    return gate.to(device), *(x.to(device) for x in (q, k, v))


@pytest.mark.parametrize("gate_dim", [32, 64])  # with a map of q and k per KV head, and with k's per query head alone
def test_shared_logits_are_the_mean_over_the_group(gate_dim):
    gate, q, k, _ = plain("Qavg_Kmaxminavg", 32, gate_dim)
    projected = gate.project(q, k, *plain_rope(1e4)(torch.arange(0, 300, 32), gate.rope_dim))
    shared_q, shared_k = seer_method.mean_of_group(*projected, 2)
    expected = gate.logits(*projected).unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(shared_q @ shared_k.transpose(-1, -2) * gate_dim**-0.5, expected)


def test_only_top_p_makes_a_matrix_of_scores(monkeypatch):
    gate, q, k, _ = plain("Qavg_Kmaxminavg", 32, 32)
    calls = []
    monkeypatch.setattr(gate, "logits", lambda *args: calls.append(args) or AttnGate.logits(gate, *args))
    for knob, options in product(KNOBS, OPTIONS):
        sparsebench.select(Seer(gate=gate, **knob, **options), q, k, q_pre=q, k_pre=k, rope_theta=1e4)
        assert bool(calls) == ("top_p" in knob)
        calls.clear()


@pytest.mark.parametrize("block, gate_dim, shared", [(32, 64, True), (64, 32, True), (64, 128, False), (128, 64, False)])
def test_the_gpu_kernels_choose_what_the_definition_chooses(monkeypatch, block, gate_dim, shared):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, q, k, v = plain("Qavg_Kmaxminavg", block, gate_dim, length=200, device=device)
    method = Seer(gate=gate, nz_ratio=0.6, last_dense=1, share_gqa=shared)
    masks = {}
    for impl in ("reference", "triton"):
        with monkeypatch.context() as patch:
            for module, name in ((seer_method, "choose_blocks"), (seer_gate, "block_pool_pair"), (seer_gate, "gate_project")):
                patch.setattr(module, name, functools.partial(getattr(module, name), impl=impl))
            masks[impl] = sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=1e4)
    mask = masks["triton"]
    assert torch.equal(mask.dense(), masks["reference"].dense())
    out = block_sparse_attention(q, k, v, mask, impl="triton")
    torch.testing.assert_close(out, over_selected_tokens(q, k, v, mask, 64**-0.5), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("block, gate_dim", [(32, 64), (64, 32), (64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_a_cpu(block, gate_dim, dtype):
    gate, *qkv = plain("Qavg_Kmaxminavg", block, gate_dim, length=1500)
    q, k, v = (x.to(dtype) for x in qkv)
    for knob, options in product(KNOBS, OPTIONS):
        method = Seer(gate=gate, **knob, **options)
        expected = sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=1e4)
        on_gpu = [x.cuda() for x in (q, k, v)]
        out, mask = sparsebench.attention(method, *on_gpu, q_pre=on_gpu[0], k_pre=on_gpu[1], rope_theta=1e4)
        assert (mask.dense().cpu() != expected.dense()).float().mean() < 2e-3, (knob, options)  # scores next to the cut
        reference = block_sparse_attention(*on_gpu, mask, impl="reference")
        torch.testing.assert_close(out, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [dict(nz_ratio=0.3), dict(threshold=0.1, min_blocks=2)], ids=["nz_ratio", "threshold"])
def test_the_whole_operation_replays_as_a_cuda_graph(options):
    gate, *qkv = plain("Qavg_Kmaxminavg", 64, 64, length=1500)
    first, second = ([x.cuda().bfloat16() for x in pair] for pair in (qkv, (x.flip(2) for x in qkv)))
    call = functools.partial(sparsebench.attention, Seer(gate=gate.cuda(), **options), rope_theta=1e4)
    expected = [call(*x, q_pre=x[0], k_pre=x[1])[0] for x in (second, first)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(*first, q_pre=first[0], k_pre=first[1])
    graph.replay()
    assert torch.equal(out, expected[1])
    for x, other in zip(first, second):
        x.copy_(other)
    graph.replay()
    assert torch.equal(out, expected[0])
