"""attach(): dense is exactly the model's own attention, padding is exact, everything is restored, the rest is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)  # fmt: skip

from sparsebench.kernels import BlockMask, causal_blocks
from sparsebench.methods.base import LayerContext, Method
from sparsebench.methods.dense import Dense
from sparsebench.models import attach

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)


pytestmark = pytest.mark.usefixtures("one_thread")


def build(family: str = "llama", **changes):
    torch.manual_seed(1)
    config, cls = FAMILIES[family] if isinstance(family, str) else family
    model = cls(config(**SIZES | changes)).eval()
    with torch.no_grad():  # initial norms of 1 and tiny logits would hide mistakes
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15)
    return model


@dataclass(frozen=True)
class All(Method):
    """Every causal block, selected: the sparse path must equal dense."""

    name = "all"
    phases = frozenset({"prefill", "decode"})

    def select(self, q, k, ctx):
        size = (q.shape[2], k.shape[2], 16, 16)
        return BlockMask.from_dense(causal_blocks(*size).expand(q.shape[0], q.shape[1], -1, -1), *size)


@dataclass(frozen=True)
class Diagonal(Method):
    """Each row's own block of 16 keys and the first one: drops blocks in every layer."""

    name = "diagonal"
    seen: list = field(default_factory=list)

    def select(self, q, k, ctx):
        self.seen.append((ctx.layer, ctx.phase, ctx.positions.tolist(), dict(ctx.state)))
        ctx.state["calls"] = ctx.state.get("calls", 0) + 1
        size = (q.shape[2], k.shape[2], 16, 16)
        visible = causal_blocks(*size)
        keep = visible & ~visible.roll(-1, 1)
        keep[:, -1] = visible[:, -1]
        keep[:, 0] = True
        # Rows that straddle two blocks need the earlier one: keep it too.
        keep |= visible & keep.roll(-1, 1)
        return BlockMask.from_dense(keep[None, None], *size)


@dataclass(frozen=True)
class PreRope(Method):
    """Records q and k before RoPE and the tables for another width."""

    name = "pre_rope"
    phases = frozenset({"prefill", "decode"})
    seen: dict = field(default_factory=dict)
    dim: int | None = None

    def attend(self, q, k, v, ctx: LayerContext):
        if self.dim:
            assert ctx.rope is not None
            self.seen["tables"] = ctx.rope(torch.arange(40), self.dim)
        self.seen.setdefault(ctx.layer, []).append((ctx.q_pre.detach(), ctx.k_pre.detach()))
        return Dense().attend(q, k, v, ctx)


def tokens(batch: int = 2, length: int = 70):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def padded(side: str, lengths=(70, 41, 5), width: int = 70):
    """Token ids and mask of a batch padded on one side."""
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1 if side == "left" else 0
        mask[row, :n] = 1 if side == "right" else mask[row, :n]
    return ids * mask, mask


def assert_same(a, b, real=None, atol=1e-4):
    if real is not None:
        a, b = a[real.bool()], b[real.bool()]
    assert a.abs().max() > 0.1
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("method", [Dense(), All()], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_equals_sdpa(family, method):
    model = build(family)
    expected = model(tokens()).logits
    with attach(model, method) as trace:
        assert_same(model(tokens()).logits, expected)
    assert trace.impl == ("sdpa" if method.name == "dense" else "reference")
    assert trace.mean_density == 1.0 and trace.density.shape == (2, 4) and trace.density.dtype == torch.float64


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Dense(), All()], ids=lambda m: m.name)
@torch.no_grad()
def test_padded_batch_equals_sdpa(side, method):
    model = build()
    ids, mask = padded(side)
    expected = model(ids, attention_mask=mask).logits
    with attach(model, method):
        assert_same(model(ids, attention_mask=mask).logits, expected, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Dense(), All()], ids=lambda m: m.name)
@torch.no_grad()
def test_chunked_prefill_with_padding_equals_sdpa(side, method):
    model = build("qwen3")
    ids, mask = padded(side)
    expected = model(ids, attention_mask=mask).logits
    with attach(model, method) as trace:
        cache, parts = DynamicCache(), []
        for start, stop in ((0, 32), (32, 69), (69, 70)):
            step = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            parts.append(step.logits)
        assert_same(torch.cat(parts, 1), expected, mask)
    assert trace.mean_density == 1.0


@pytest.mark.parametrize("method", [Dense(), All(), Diagonal()], ids=lambda m: m.name)
@torch.no_grad()
def test_greedy_generation_with_left_padding_gives_the_same_tokens(method):
    model = build()
    ids, mask = padded("left", lengths=(16, 9, 12), width=16)  # within what Diagonal keeps
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    expected = model.generate(ids, **options)
    with attach(model, method) as trace:
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(set(expected[:, 16:].flatten().tolist())) > 4
    assert trace.dense_phases == ({"decode"} if method.name == "diagonal" else set())


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_single_rows_under_a_method_that_drops_blocks(side):
    model, method, lengths = build(), Diagonal(), (70, 41, 5, 41, 41, 70)
    ids, mask = padded(side, lengths)
    with attach(model, method) as trace:
        batch = model(ids, attention_mask=mask).logits
        assert len(method.seen) == 3 * model.config.num_hidden_layers  # rows of one length go together
        selected = trace.density * sum(n * (n + 1) // 2 for n in lengths)
        trace.reset()
        single_selected = 0
        for row, n in enumerate(lengths):
            real = mask[row].bool()
            trace.reset()
            single = model(ids[row][real][None]).logits[0]
            assert_same(single, batch[row][real])
            single_selected += trace.density * (n * (n + 1) // 2)
        dense = model(ids[:1]).logits
    torch.testing.assert_close(selected, single_selected)
    assert (dense - build()(ids[:1]).logits).abs().max() > 1e-2  # it does drop blocks
    assert batch[1][~mask[1].bool()].isfinite().all()


@torch.no_grad()
def test_context_of_chunks_rows_and_decoding():
    model, method = build(), Diagonal()
    with attach(model, method) as trace:
        cache = DynamicCache()
        for start, stop in ((0, 32), (32, 64), (64, 65)):
            model(tokens()[:, start:stop], past_key_values=cache)
        model(tokens()[:, :1])
    calls = [call for call in method.seen if call[0] == 0]
    assert [call[1] for call in calls] == ["prefill"] * 3  # the single token of a warm cache is decoding, a lone one is not
    assert [call[2] for call in calls] == [list(range(32)), list(range(32, 64)), [0]]
    assert [call[3] for call in calls] == [{}, {"calls": 1}, {}]  # kept from chunk to chunk, cleared by a new prefill
    assert trace.dense_phases == {"decode"}


@torch.no_grad()
def test_rows_of_a_padded_batch_have_their_own_state():
    model, method = build(), Diagonal()
    ids, mask = padded("left", (70, 60), 70)
    with attach(model, method):
        cache = DynamicCache()
        for start, stop in ((0, 40), (40, 70)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    calls = [(positions[0], state) for layer, _, positions, state in method.seen if layer == 1]
    assert calls == [(0, {}), (0, {}), (40, {"calls": 1}), (30, {"calls": 1})]


@torch.no_grad()
def test_trace_density_is_the_share_of_visible_pairs():
    model, method = build(), Diagonal()
    n = 70
    with attach(model, method) as trace:
        model(tokens(3, n))
        model(tokens(1, n))
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        # Row block r keeps blocks 0, r - 1 and r.
        kept = (j <= i) & ((j // 16 == 0) | (i // 16 - j // 16 <= 1))
        expected = kept.sum() / (n * (n + 1) / 2)
        assert 0.3 < expected < 0.9
        torch.testing.assert_close(trace.density, torch.full((2, 4), float(expected), dtype=torch.float64))
        assert trace.mean_density == pytest.approx(float(expected)) and trace.impl == "reference"
        trace.reset()
        with pytest.raises(ValueError, match="no prefill ran"):
            _ = trace.density


def before_rope(model, ids, **kwargs):
    """Per layer, q and k [B, heads, n, D] before RoPE, from hooks on the projections (and their norms)."""
    found, handles = {}, []
    for layer, block in enumerate(model.model.layers):
        for key in "qk":
            module = getattr(block.self_attn, f"{key}_norm", None) or getattr(block.self_attn, f"{key}_proj")

            def hook(_module, _args, out, layer=layer, key=key):
                found[layer, key] = out.reshape(*out.shape[:2], -1, 64).transpose(1, 2)

            handles.append(module.register_forward_hook(hook))
    model(ids, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_q_and_k_before_rope(family, rope):
    model, method = build(family, **({"rope_parameters": rope} if rope else {})), PreRope()
    with attach(model, method):
        expected = before_rope(model, tokens())
    for layer in range(2):
        (q_pre, k_pre), = method.seen[layer]  # fmt: skip
        torch.testing.assert_close(q_pre, expected[layer, "q"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(k_pre, expected[layer, "k"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "arange"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@torch.no_grad()
def test_before_rope_uses_the_positions_the_model_used(side, explicit):
    """In chunks, with padding, whether positions come from the mask (as generate() does) or count the padding."""
    model, method = build(), PreRope()
    ids, mask = padded("right" if side == "middle" else side)
    if side == "middle":  # right-padded rows that go on after their padding, as when prompts are answered from a cache
        mask[:, 68:] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) if explicit else torch.arange(70)[None]
    expected = before_rope(model, ids, attention_mask=mask, position_ids=positions)
    with attach(model, method):
        cache = DynamicCache()
        for start, stop in ((0, 68), (68, 70)):
            given = dict(position_ids=positions[:, start:stop]) if explicit else {}
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **given)
    rows = [0] if side == "right" else [0, 1, 2]  # right-padded rows have no real token in the second chunk
    for row, (q_pre, k_pre) in zip(rows, method.seen[0][3:], strict=True):
        real = mask[row].bool()
        torch.testing.assert_close(k_pre[0], expected[0, "k"][row][:, real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(q_pre[0], expected[0, "q"][row][:, 68:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_filled_before_attach_has_consecutive_positions():
    model, method, cache = build(), PreRope(), DynamicCache()
    expected = before_rope(model, tokens())[0, "k"]
    model(tokens()[:, :60], past_key_values=cache)
    with attach(model, method):
        model(tokens()[:, 60:], past_key_values=cache)
    torch.testing.assert_close(method.seen[0][0][1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rope_tables_for_another_width_follow_the_models_scaling():
    method = PreRope(dim=32)
    model = build(rope_parameters=YARN)
    with attach(model, method):
        model(tokens())
    cos, sin = method.seen["tables"]
    reference = build(head_dim=32, rope_parameters=YARN).model.rotary_emb
    expected = reference(torch.zeros(1), torch.arange(40)[None])
    torch.testing.assert_close((cos, sin), (expected[0][0], expected[1][0]))
    assert float((cos**2 + sin**2).mean()) > 1.1  # YaRN's attention factor is in them


@torch.no_grad()
def test_everything_is_restored_also_after_an_error():
    model = build()
    model.set_attn_implementation("eager")
    before, hooks = copy.deepcopy(model.config.__dict__), len(model.model.rotary_emb._forward_pre_hooks)
    expected = model(tokens()).logits
    with pytest.raises(RuntimeError, match="boom"), attach(model, Dense()):
        raise RuntimeError("boom")
    assert model.config.__dict__ == before and len(model.model.rotary_emb._forward_pre_hooks) == hooks
    assert torch.equal(model(tokens()).logits, expected)
    with attach(model, Dense()), pytest.raises(ValueError, match="attached already"), attach(model, Dense()):
        pass
    with attach(model, Dense()):  # the refused one left nothing behind
        assert_same(model(tokens()).logits, expected)


@torch.no_grad()
def test_two_models_at_once():
    first, second = build(), build("qwen3")
    expected = second(tokens()).logits
    with attach(first, Diagonal()) as one, attach(second, All()) as two:
        assert_same(second(tokens()).logits, expected)
        first(tokens())
    assert one.mean_density < 0.9 and two.mean_density == 1.0


def test_gradients_pass_through():
    model = build()
    for part in (Dense(), All()):
        model.zero_grad()
        model(tokens()).logits.square().mean().backward()
        expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        with attach(model, part):
            model(tokens()).logits.square().mean().backward()
        torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ((MistralConfig, MistralForCausalLM), dict(sliding_window=32), "sliding_window=32"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding_attention"),
        ((GptOssConfig, GptOssForCausalLM), dict(num_local_experts=2, num_experts_per_tok=1), "s_aux"),
        ("llama", dict(attn_logit_softcapping=30.0), "soft-capped"),
        ("llama", dict(is_causal=False), "not causal"),
    ],
    ids=["mistral", "qwen2", "gpt-oss", "softcap", "bidirectional"],
)
def test_refused_models(family, changes, match):
    model = build(family, **changes)
    with pytest.raises(ValueError, match=match), attach(model, Dense()):
        pass


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (dict(attention_mask=torch.ones(2, 1, 70, 70, dtype=torch.bool)), "4-D"),
        (dict(position_ids=torch.arange(35).repeat(2)[None], use_cache=False), "packed"),
        (dict(sliding_window=16), "sliding"),
        (dict(softcap=30.0), "softcap"),
        (dict(s_aux=torch.zeros(4)), "s_aux"),
        (dict(is_causal=False), "not plain causal"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(attention_mask=torch.ones(2, 90)), "columns|made for"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
@torch.no_grad()
def test_refused_calls(call, match):
    model = build()
    with attach(model, Dense()), pytest.raises(ValueError, match=match):
        model(tokens(), **call)


@torch.no_grad()
def test_refused_caches_dropout_and_what_is_no_model():
    model = build(attention_dropout=0.1)
    with attach(model, Dense()), pytest.raises(ValueError, match="static"):
        model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=128))
    with attach(model.train(), Dense()), pytest.raises(ValueError, match="dropout"):
        model(tokens())
    with pytest.raises(ValueError, match="transformers model"), attach(torch.nn.Linear(2, 2), Dense()):
        pass


@torch.no_grad()
def test_partial_rotary_runs_but_has_no_pre_rope():
    model = build((PhiConfig, PhiForCausalLM), partial_rotary_factor=0.5, hidden_size=256)
    expected = model(tokens()).logits
    with attach(model, Dense()):
        assert_same(model(tokens()).logits, expected)
    with attach(model, PreRope()), pytest.raises(ValueError, match="partial rotary"):
        model(tokens())
