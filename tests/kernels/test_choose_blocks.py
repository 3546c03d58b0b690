"""choose_blocks: reference and Triton kernel against the rule, row by row.

On a CPU the Triton kernel runs in the interpreter; on a CUDA device the same tests run it compiled, in bf16 too.
"""

import dataclasses

import pytest
import torch

import sparsebench
from sparsebench.kernels import choose_blocks as module
from sparsebench.kernels.choose_blocks import choose_blocks
from sparsebench.methods.seer import AttnGate, Seer

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), BF16)
SHAPES = {  # batch, heads, k_heads, q_len, kv_len, q_block, kv_block, channels
    "whole blocks": (2, 1, 1, 320, 320, 32, 32, 16),
    "ragged, gqa": (1, 2, 1, 300, 300, 32, 32, 32),
    "one token": (1, 2, 1, 1, 1, 64, 64, 16),
    "chunk": (1, 2, 1, 96, 320, 32, 32, 16),
    "chunk inside a block": (1, 2, 2, 50, 307, 32, 32, 16),
    "one query": (1, 2, 1, 1, 200, 32, 32, 16),
    "several tiles": (1, 1, 1, 1050, 1050, 16, 16, 48),
    "a query a row": (1, 1, 1, 33, 60, 1, 16, 16),
    "rows of two blocks": (1, 1, 1, 200, 230, 32, 16, 16),
    "tiles of two lengths": (1, 1, 1, 2400, 2400, 64, 4, 16),
}
RULES = {
    "width": dict(width=3),
    "one": dict(width=1),
    "one, diagonal": dict(width=1, diagonal=True),
    "diagonal": dict(width=4, diagonal=True),
    "more than there are": dict(width=999),
    "last dense": dict(width=2, last_dense=2),
    "all dense": dict(width=2, last_dense=999),
    "threshold": dict(threshold=0.1, scale=0.3),
    "threshold, diagonal": dict(threshold=0.2, diagonal=True, last_dense=1),
    "threshold, least": dict(threshold=0.3, least=2),
    "least": dict(threshold=1.0, least=3, diagonal=True, last_dense=1),
    "nothing": dict(threshold=1.0),
    "everything": dict(threshold=-0.1),
}


def scores(q, k, scale=1.0):
    return q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale


def rule(s, q_len, kv_len, q_block, kv_block, width=None, threshold=0.0, least=0, scale=1.0, last_dense=0, diagonal=False):
    """bool [B, H, NQ, NK] from scores, and how far every score is from its row's cut."""
    chosen, margin = torch.zeros_like(s, dtype=torch.bool), torch.full_like(s, float("inf"))
    rows = s.shape[2]
    for b, h, r in ((b, h, r) for b in range(s.shape[0]) for h in range(s.shape[1]) for r in range(rows)):
        first = kv_len - q_len + r * q_block
        own, seen = first // kv_block, (min(first + q_block, kv_len) - 1) // kv_block + 1
        row = s[b, h, r, :seen].clone()
        if r >= rows - last_dense:
            chosen[b, h, r, :seen] = True
            continue
        take, far = torch.zeros(seen, dtype=torch.bool, device=s.device), torch.full_like(row, float("inf"))
        if width is None:
            p = row.softmax(0)
            take, far = p > threshold, (p - threshold).abs()
        if count := width or least:
            if diagonal:
                row[own] = float("inf")
            order = row.sort(descending=True, stable=True)
            take[order.indices[:count]] = True
            if count < seen:
                cut = order.values[count - 1 : count + 1]
                far = torch.minimum(far, torch.minimum((row - cut[0]).abs(), (row - cut[1]).abs()))
        if diagonal:
            take[own] = True
        if not take[: own + 1].any():
            take[own] = True
        chosen[b, h, r, :seen], margin[b, h, r, :seen] = take, far
    return chosen, margin


def check(impl, q, k, sizes, options, within):
    mask = choose_blocks(q, k, *sizes, **options, impl=impl)
    dataclasses.replace(mask, trusted=False).check()
    expected, margin = rule(scores(q, k, options.get("scale", 1.0)), *sizes, **options)
    wrong = mask.dense() != expected
    assert not (wrong & (margin > within)).any()
    assert wrong.sum() <= 0.01 * wrong.numel()  # what the margin excuses is rare
    return mask


def tensors(device, dtype, batch, heads, k_heads, q_len, kv_len, q_block, kv_block, channels):
    q = torch.randn(batch, heads, -(-q_len // q_block), channels, device=device).to(dtype)
    k = torch.randn(batch, k_heads, -(-kv_len // kv_block), channels, device=device).to(dtype)
    return q, k, (q_len, kv_len, q_block, kv_block)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_follows_the_rule(device, impl, options, shape):
    q, k, sizes = tensors(device, torch.float32, *shape)
    # The kernel errs, in the score and in that at the row's cut, by 3 * 2^-16 of a single term, by less than 2^-16 of sums.
    within = 2**-15 * scores(q.abs(), k.abs(), options.get("scale", 1.0)).amax(-1, keepdim=True)
    check(impl, q, k, sizes, options, within if impl == "triton" else 1e-4)


@pytest.mark.parametrize("blocks", [200, 500, 2000, 4000, 8000])
@pytest.mark.parametrize("name", ["width", "threshold, least"])
def test_long_rows(device, blocks, name):
    q, k, sizes = tensors(device, torch.float32, 1, 2, 1, 40, 8 * blocks, 32, 8, 16)
    within = 2**-15 * scores(q.abs(), k.abs(), RULES[name].get("scale", 1.0)).amax(-1, keepdim=True)
    check("triton", q, k, sizes, RULES[name], within)


def test_halves_are_chosen_from_as_what_they_stand_for(device):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["chunk inside a block"])
    parts = [module.halves(x) for x in (q, k)]
    for x, both in zip((q, k), parts):
        assert ((both.float().sum(3) - x).abs() <= 2**-16 * x.abs()).all()
    for name in ("width", "diagonal", "threshold, least"):
        whole = choose_blocks(q, k, *sizes, **RULES[name], impl="triton")
        assert torch.equal(choose_blocks(*parts, *sizes, **RULES[name], impl="triton").dense(), whole.dense())
        sums = [both.float().sum(3) for both in parts]
        reference = choose_blocks(*sums, *sizes, **RULES[name], impl="reference")
        assert torch.equal(choose_blocks(*parts, *sizes, **RULES[name], impl="reference").dense(), reference.dense())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_low_precision_are_exact(device, dtype):
    q, k, sizes = tensors(device, dtype, *SHAPES["ragged, gqa"])
    for name in ("width", "diagonal", "threshold, least"):
        check("triton", q, k, sizes, RULES[name], within=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "options", [dict(width=3), dict(width=1), dict(width=4, diagonal=True), dict(width=9), dict(threshold=1.0, least=3)]
)
def test_ties_go_to_the_earlier_block(device, impl, options):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["chunk"])
    for q_rows, k_rows in ((q * 0, k), (q.sign(), k.sign()), (q.sign(), (k > 1.2).float())):
        mask = choose_blocks(q_rows, k_rows, *sizes, **options, impl=impl)
        assert torch.equal(mask.dense(), rule(scores(q_rows, k_rows), *sizes, **options)[0])


def test_any_magnitude_and_both_signs(device):
    """Rows whose scores lie many magnitudes apart take the search past its steps by value."""
    q, k, sizes = tensors(device, torch.float32, *SHAPES["several tiles"])
    q = q.sign() * (torch.arange(q.shape[3], device=device) == 3)  # a score is one channel of k, or its negative
    exponent = torch.rand(k.shape[2], device=device, dtype=torch.float64)
    k = (k.sign() * 1e-30 ** exponent[:, None]).float()
    for width in (1, 20):
        mask = choose_blocks(q, k, *sizes, width=width, impl="triton")
        assert torch.equal(mask.dense(), rule(scores(q, k), *sizes, width=width)[0])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_broken_scores_stay_inside_the_lists(device):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["whole blocks"])
    k[:, :, 4:7], q[:, :, 8] = float("nan"), float("inf")
    for options in (dict(width=2), dict(width=2, diagonal=True), dict(threshold=0.1), dict(threshold=0.1, least=2)):
        mask = choose_blocks(q, k, *sizes, **options, impl="triton")
        assert (mask.kv_num_blocks <= options.get("width", 10)).all()
        dataclasses.replace(mask, trusted=False).check()


def test_lists_are_as_wide_as_the_width(device):
    for shape, wide in (("whole blocks", 3), ("chunk inside a block", 4)):
        q, k, sizes = tensors(device, torch.float32, *SHAPES[shape])
        assert choose_blocks(q, k, *sizes, width=3, impl="triton").kv_indices.shape[-1] == wide
        assert choose_blocks(q, k, *sizes, width=3, last_dense=1, impl="triton").kv_indices.shape[-1] == 10


def test_large_lists_are_as_wide_as_the_widest_row(device, monkeypatch):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["ragged, gqa"])
    wide = choose_blocks(q, k, *sizes, threshold=0.2, impl="triton")
    monkeypatch.setattr(module, "FULL_WIDTH_BYTES", 1)
    narrow = choose_blocks(q, k, *sizes, threshold=0.2, impl="triton")
    assert torch.equal(narrow.dense(), wide.dense())
    assert narrow.kv_indices.shape[-1] == narrow.kv_num_blocks.max() < wide.kv_indices.shape[-1] == 10


def test_pieces_give_the_same_lists(device, monkeypatch):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["ragged, gqa"])
    whole = choose_blocks(q, k, *sizes, width=3, impl="reference")
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)
    assert torch.equal(choose_blocks(q, k, *sizes, width=3, impl="reference").dense(), whole.dense())


def test_refuses_what_does_not_fit(device, monkeypatch):
    q, k, sizes = tensors(device, torch.float32, *SHAPES["whole blocks"])
    with pytest.raises(ValueError, match="expected"):
        choose_blocks(q[:, :, 1:], k, *sizes, width=3)
    with pytest.raises(ValueError, match="at least 1"):
        choose_blocks(q, k, *sizes, width=0)
    with pytest.raises(ValueError, match="'cuda'"):
        choose_blocks(q, k, *sizes, width=3, impl="cuda")
    with pytest.raises(ValueError, match="float64"):
        choose_blocks(q.double(), k.double(), *sizes, width=3, impl="triton")
    for parts, dtype in ((1, module.HALF), (3, module.HALF), (2, torch.float16)):
        x, y = (x[..., None, :].expand(*x.shape[:3], parts, -1).to(dtype) for x in (q, k))
        with pytest.raises(ValueError, match="halves"):
            choose_blocks(x, y, *sizes, width=3)
    monkeypatch.setattr(module, "MOST_BLOCKS", 9)
    with pytest.raises(ValueError, match="up to 9 key blocks"):
        choose_blocks(q, k, *sizes, width=3, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("length, chunk", [(2000, 2000), (2048, 512), (2000, 333)])
def test_a_gate_selects_the_same_on_both_devices(length, chunk):
    gate = AttnGate("Qavg_Kmaxminavg", 64, 64, 128, 4, 2)  # with a W_q, and channels that RoPE leaves alone
    q, k = torch.randn(1, 4, chunk, 64), torch.randn(1, 2, length, 64)
    for options in (dict(nz_ratio=0.3), dict(budget=5, last_dense=0), dict(threshold=0.03), dict(top_p=0.5)):
        method = Seer(gate=gate, **options)
        here = sparsebench.select(method, q, k, q_pre=q, k_pre=k, rope_theta=1e4).dense()
        there = sparsebench.select(method, q.cuda(), k.cuda(), q_pre=q.cuda(), k_pre=k.cuda(), rope_theta=1e4).dense()
        assert (here != there.cpu()).float().mean() < 2e-3
