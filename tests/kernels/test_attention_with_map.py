"""attention_with_map: reference and Triton kernel against the definition in fp64 over the whole attention matrix."""

import pytest
import torch

from sparsebench.kernels import attention_with_map as module
from sparsebench.kernels.attention_with_map import attention_with_map
from sparsebench.kernels.block_mass import REDUCTIONS

HOPPER = pytest.param("hopper", marks=pytest.mark.gpu)
IMPLS = ("reference", "triton", HOPPER)
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), BF16)


def tensors(device, batch=1, heads=2, kv_heads=1, q_len=150, kv_len=150, dim=64, dtype=torch.float32, sharp=1.0):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    q, k, v = (torch.randn(batch, h, n, dim, device=device) for h, n in shapes)
    return (q * sharp).to(dtype), k.to(dtype), v.to(dtype)


REDUCED = {"max": lambda x: x.amax((-1, -2)), "mass": lambda x: x.sum((-1, -2)), "row_mass": lambda x: x.sum(-1).amax(-1)}


def definition(q, k, v, block, of, scale):
    """(out, lse, map), every step in the dtype of q."""
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    future = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - q_len + 1)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(future, float("-inf"))
    p = logits.softmax(-1)
    rows = []
    for rows_of in p.split(block, dim=2):
        parts = rows_of.split(block, dim=3)
        rows.append(torch.stack([REDUCED[of](x) for x in parts], dim=-1))
    blocks = torch.stack(rows, dim=2)
    return p @ v, logits.logsumexp(-1), blocks / blocks.sum(-1, keepdim=True)


def check(within_budget, impl, q, k, v, block=64, of="max", scale=None):
    if impl == "hopper" and not module.hopper_applies(q):
        with pytest.raises(ValueError, match="the Hopper kernel needs"):
            attention_with_map(q, k, v, block, of, impl=impl)
        return None
    got = attention_with_map(q, k, v, block, of, scale=scale, impl=impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = definition(q.double(), k.double(), v.double(), block, of, scale)
    plain = definition(q, k, v, block, of, scale)
    assert [x.dtype for x in got] == [q.dtype, torch.float32, torch.float32]
    for ours, true, low in zip(got, exact, plain):
        within_budget(ours, true, low)
    blocks = got[2]
    assert torch.equal(blocks == 0, exact[2] == 0)  # and so exactly the future is empty
    assert (blocks.sum(-1) - 1).abs().max() < 1e-5
    return got


SHAPES = {
    # batch, heads, kv_heads, q_len, kv_len, dim, block
    "odd length": (1, 2, 2, 201, 201, 64, 64),
    "gqa, batch": (2, 4, 2, 130, 130, 64, 64),
    "aligned": (1, 2, 1, 128, 128, 128, 64),
    "head_dim 96": (1, 2, 1, 150, 150, 96, 64),
    "head_dim 256": (1, 1, 1, 129, 129, 256, 64),
    "blocks of 128": (1, 2, 1, 300, 300, 64, 128),
    "blocks of 192": (1, 1, 1, 400, 400, 64, 192),
    "chunk": (1, 2, 1, 70, 333, 64, 64),
    "chunk, aligned": (1, 2, 1, 128, 256, 64, 64),
    "chunk that begins a tile's last row": (1, 2, 1, 70, 133, 64, 128),  # its other keys are hidden from that row
    "one query": (1, 2, 1, 1, 150, 64, 64),
    "one block": (1, 1, 1, 5, 5, 64, 64),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, impl, device, within_budget):
    *sizes, block = shape
    check(within_budget, impl, *tensors(device, *sizes, dtype=dtype), block)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("of", REDUCTIONS)
@pytest.mark.parametrize("sharp", [0.0, 8.0], ids=["uniform", "one key wins"])
def test_flat_and_sharp_rows(sharp, of, impl, device, within_budget):
    check(within_budget, impl, *tensors(device, q_len=200, kv_len=230, sharp=sharp), of=of)
    check(
        within_budget,
        impl,
        *tensors(device, q_len=200, kv_len=230, sharp=sharp, dtype=torch.float16),
        64 if of == "row_mass" else 128,
        of,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_strides(impl, device, within_budget):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(device, dtype=torch.float16))
    check(within_budget, impl, q, k, v, scale=0.3)
    wide = torch.randn(1, 2, 150, 67, device=device, dtype=torch.float16)  # rows at no multiple of 16 bytes
    check(within_budget, impl, wide[..., :64], k, v)


@pytest.mark.parametrize("impl", ["triton", HOPPER])
@pytest.mark.parametrize("of", REDUCTIONS)
@pytest.mark.parametrize("remembered", [1, 3])
def test_rows_longer_than_the_memory_of_a_program(remembered, of, impl, device, within_budget, monkeypatch):
    q, k, v = tensors(device, q_len=300, kv_len=333, dtype=torch.float16)
    if impl == "hopper" and not module.hopper_applies(q):
        pytest.skip("needs compute capability 9.0")
    whole = attention_with_map(q, k, v, of=of, impl=impl)
    monkeypatch.setattr(module, "SLOT_TILES", remembered)
    empty, guards = torch.empty, []

    def guarded(*shape, **kwargs):
        if shape[1:2] != (remembered,):
            return empty(*shape, **kwargs)
        slots, guard = empty(2, *shape, **kwargs)
        guards.append(guard)
        return slots

    monkeypatch.setattr(torch, "empty", guarded)
    parts = check(within_budget, impl, q, k, v, of=of)
    assert len(guards) == 1 and guards[0].isnan().all()  # nothing is written behind the memory
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    assert torch.equal(whole[2][..., :remembered] > 0, parts[2][..., :remembered] > 0)


def test_scratch_does_not_grow_with_the_sequence(device, monkeypatch):
    made, empty = [], torch.empty

    def counted(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        made.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(
        module, "_launch_options", lambda *_: dict(programs=1, BM=64, BN=64, together=1, num_warps=4, num_stages=2)
    )
    monkeypatch.setattr(module, "SLOT_TILES", 2)
    scratch = []
    for length in (128, 256):
        made.clear()
        q, k, v = tensors(device, heads=1, q_len=length, kv_len=length, dtype=torch.float16)
        attention_with_map(q, k, v, impl="triton")
        scratch.append(sum(made) - length * (q.shape[-1] + 1))  # beside the output and lse
    if device == "cpu":
        assert scratch == [2 * 64, 2 * 64]
    else:
        assert scratch[1] <= 2 * scratch[0]  # as many programs as row tiles, both fewer than the device runs


@pytest.mark.parametrize("impl", IMPLS)
def test_a_position_that_only_one_row_reads(impl, device):
    """Row 100 alone prefers key 3, by far: block (1, 0) holds its probability, no other block changes."""
    q, k, v = tensors(device, heads=1, q_len=190, kv_len=190, dtype=torch.float16)
    if impl == "hopper" and not module.hopper_applies(q):
        pytest.skip("needs compute capability 9.0")
    q[:], k[:] = 0, 0
    q[:, :, 100, 0] = 40
    k[:, :, 3, 0] = 40
    _, lse, blocks = attention_with_map(q, k, v, impl=impl)
    flat = 1 / torch.arange(1, 191, dtype=torch.float64)
    largest = torch.tensor([[flat[0], 0, 0], [1.0, flat[64], 0], [flat[128]] * 3], dtype=torch.float64)
    expected = (largest / largest.sum(-1, keepdim=True)).to(blocks)
    torch.testing.assert_close(blocks[0, 0], expected, rtol=1e-5, atol=1e-7)
    assert float(lse[0, 0, 100]) == pytest.approx(40 * 40 / 8)


def test_refuses(device):
    q, k, v = tensors(device)
    for arguments, message in [
        ((q[0], k, v), "need q"),
        ((q[:, :, :, :32], k, v), "need q"),
        ((q, k[:, :, :100], v[:, :, :100]), "q_len <= kv_len"),
        ((q, k.half(), v), "share a dtype"),
        ((q, k, v, 0), "block must be positive"),
        ((q, k, v, 64, "mean"), "one of mass, max, row_mass, got 64 and 'mean'"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_with_map(*arguments)
    for options, message in [
        ({"impl": "cuda"}, "'cuda'"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"impl": "hopper"}, "the Hopper kernel needs"),  # in fp32
    ]:
        with pytest.raises(ValueError, match=message):
            attention_with_map(q, k, v, **options)
    for arguments in [
        (q, k, v, 32),
        (q, k, v, 128, "row_mass"),
        (q.double(), k.double(), v.double()),
        (q[..., :32], k[..., :32], v[..., :32]),
    ]:
        with pytest.raises(ValueError, match="the Triton kernel supports"):
            attention_with_map(*arguments, impl="triton")
    with pytest.raises(ValueError, match="no backward"):
        attention_with_map(q.requires_grad_(), k, v)
