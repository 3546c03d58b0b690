"""block_sparse_attention: reference and Triton kernel against the dense definition in fp64 over mask.tokens().

On a CPU the Triton kernel runs in the interpreter; on a CUDA device the same tests run it compiled, in bf16 too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsebench.kernels import BlockMask, block_sparse_attention, causal_blocks, resolve_impl

IMPLS = ("reference", "triton")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = (pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), BF16)


def tensors(device, batch=1, heads=2, kv_heads=1, q_len=100, kv_len=100, dim=64, dtype=torch.float32):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return tuple(torch.randn(batch, h, n, dim, device=device).to(dtype) for h, n in shapes)


def random_mask(device, batch, heads, q_len, kv_len, q_block, kv_block, density=0.5):
    visible = causal_blocks(q_len, kv_len, q_block, kv_block)
    dense = torch.rand(batch, heads, *visible.shape) < density
    dense[..., 0] = True
    return BlockMask.from_dense(dense.to(device), q_len, kv_len, q_block, kv_block)


def run(impl, q, k, v, mask, **kwargs):
    return block_sparse_attention(q, k, v, mask, return_lse=True, impl=impl, **kwargs)


SHAPES = {
    # batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask batch, mask heads
    "odd length": (1, 2, 2, 201, 201, 64, 64, 64, 1, 2),
    "gqa, batch, one mask": (2, 4, 2, 130, 130, 64, 64, 64, 1, 1),
    "gqa, mask of kv heads": (2, 4, 2, 130, 130, 64, 64, 64, 2, 2),
    "gqa, mask of heads": (2, 4, 1, 130, 130, 64, 64, 64, 2, 4),
    "head_dim 96": (1, 2, 1, 150, 150, 96, 64, 64, 1, 2),
    "head_dim 128": (1, 2, 1, 190, 190, 128, 128, 128, 1, 2),
    "head_dim 256": (1, 1, 1, 129, 129, 256, 64, 64, 1, 1),
    "blocks 128x64": (1, 2, 1, 257, 257, 64, 128, 64, 1, 2),
    "blocks 64x128": (1, 2, 1, 257, 257, 64, 64, 128, 1, 2),
    "blocks 128x128": (1, 2, 1, 300, 300, 64, 128, 128, 1, 2),
    "blocks 32x32": (1, 2, 1, 201, 201, 64, 32, 32, 1, 2),
    "blocks 32x32, chunked": (1, 4, 2, 70, 173, 128, 32, 32, 1, 2),
    "chunked prefill": (1, 2, 1, 70, 333, 64, 64, 64, 1, 2),
    "chunked, aligned": (1, 2, 1, 128, 256, 64, 64, 64, 1, 2),
    "chunked 128x64": (1, 2, 1, 150, 333, 64, 128, 64, 1, 2),
    "chunked 64x128": (1, 2, 1, 150, 350, 64, 64, 128, 1, 2),
    "one query": (1, 2, 1, 1, 150, 64, 64, 64, 1, 2),
    "large key blocks": (1, 2, 1, 400, 400, 64, 64, 256, 1, 2),
    "large key blocks, chunked": (1, 2, 1, 150, 461, 64, 128, 192, 1, 2),
    "blocks of single queries": (2, 4, 2, 150, 150, 64, 1, 64, 2, 4),
    "single queries, large key blocks, chunked": (1, 2, 1, 150, 600, 64, 1, 256, 1, 1),
    "16 queries": (1, 2, 1, 201, 201, 64, 16, 128, 1, 2),
    "one block": (1, 1, 1, 5, 5, 64, 64, 64, 1, 1),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, impl, device, check_attention):
    batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask_batch, mask_heads = shape
    q, k, v = tensors(device, batch, heads, kv_heads, q_len, kv_len, dim, dtype)
    mask = random_mask(device, mask_batch, mask_heads, q_len, kv_len, q_block, kv_block)
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pattern", ["diagonal", "full", "ragged rows", "first block"])
def test_patterns(pattern, impl, device, check_attention):
    q, k, v = tensors(device, q_len=300, kv_len=300)
    dense = torch.zeros(1, 2, 5, 5, dtype=torch.bool, device=device)
    if pattern == "diagonal":
        dense |= torch.eye(5, dtype=torch.bool, device=device)
    elif pattern == "full":
        dense[:] = True
    else:
        dense[..., 0] = True
    if pattern == "ragged rows":
        dense[:, 0, 2, :2] = dense[:, 1, 4, 1:] = True
    mask = BlockMask.from_dense(dense, 300, 300, 64, 64)
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


def untiled(device, starts, columns=None, length=300, block=64, q_len=None):
    """kv_step=1 masks of one head from lists of first keys (and of single columns) per query block."""
    q_len = length if q_len is None else q_len

    def rows(lists):
        num = torch.tensor([[[len(x) for x in lists]]], dtype=torch.int32, device=device)
        width = max(1, *(len(x) for x in lists))
        return num, torch.tensor([[[x + [10**6] * (width - len(x)) for x in lists]]], dtype=torch.int32, device=device)

    num, index = rows(starts)
    column_num, column_index = rows(columns) if columns else (None, None)
    return BlockMask(num, index, q_len, length, block, block, column_index, column_num, kv_step=1)


UNTILED = {
    "blocks": ([[0], [3, 70], [0, 64, 130], [17, 100, 199], [256]], None),
    "blocks and columns": ([[0], [40, 110], [128], [60, 190], [200, 264]], [[], [0, 5], [1, 64, 127], [0], list(range(190))]),
    "columns only": ([[], [], [], [], []], [[0], [0, 1], [2, 130], [0, 200], list(range(0, 300, 3))]),
    "past the end": ([[0], [64], [128], [192], [250]], None),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lists", UNTILED.values(), ids=UNTILED.keys())
def test_untiled_blocks_and_columns(lists, impl, device, check_attention):
    mask = untiled(device, *lists)
    q, k, v = tensors(device, q_len=300, kv_len=300)
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("q_len", [300, 90])
def test_columns_beside_tiles(q_len, impl, device, check_attention):
    q, k, v = tensors(device, q_len=q_len, kv_len=300)
    rows = -(-q_len // 64)
    column = torch.tensor([0, 7, 63, 64, 150], dtype=torch.int32, device=device).expand(1, 1, rows, 5).contiguous()
    listed = torch.tensor([0, 3, 4, 5, 5] if q_len == 300 else [1, 5], dtype=torch.int32, device=device)[None, None]
    diagonal = torch.arange(300 - q_len, 300, 64, dtype=torch.int32, device=device)[None, None, :, None]
    mask = BlockMask(
        torch.ones_like(listed), diagonal, q_len, 300, 64, 64, column, listed, kv_step=1,
    )  # fmt: skip
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "window, sink, last, stride", [(100, 0, 0, None), (100, 5, 0, None), (70, 64, 33, None), (1, 1, 300, None), (9, 3, 5, 50)]
)
@pytest.mark.parametrize("q_len", [300, 90])
def test_window(window, sink, last, stride, q_len, impl, device, check_attention):
    q, k, v = tensors(device, q_len=q_len, kv_len=300)
    full = causal_blocks(q_len, 300, 64, 64, device)[None, None]
    mask = BlockMask.from_dense(full, q_len, 300, 64, 64)
    mask = replace(mask, window=window, sink=sink, last=last, stride=stride)
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("threshold", [1e-3, 50.0])
def test_values_of_far_smaller_probability_may_be_left_out(threshold, device, check_attention):
    q, k, v = tensors(device, q_len=300, kv_len=300)
    q[..., 0], k[..., 0] = 5.0, 0.0
    k[:, :, :64, 0] = 8.0  # every query's largest logits by far
    k[:, :, 128:192, 0] = -100.0  # no share that fp32 could hold
    full = causal_blocks(300, 300, 64, 64, device)[None, None]
    mask = BlockMask.from_dense(full, 300, 300, 64, 64)
    out, lse = run("triton", q, k, v, replace(mask, pv_threshold=threshold))
    exact, exact_lse = run("reference", q, k, v, mask)
    assert torch.allclose(lse, exact_lse, atol=1e-5)  # the sum of probabilities is complete
    if threshold == 50.0:
        check_attention(out, lse, q, k, v, mask)
    else:
        assert (out - exact).abs().max() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["tiles", "blocks and columns", "chunked"])
def test_blocks_left_out_are_never_read(case, impl, device, check_attention):
    q, k, v = tensors(device, q_len=90 if case == "chunked" else 300, kv_len=300)
    if case == "blocks and columns":
        mask = untiled(device, [[0], [3], [10], [99], [200]], [[], [0], [80, 81], [5], [3, 80]])
    else:
        dense = causal_blocks(q.shape[2], 300, 64, 64)[None, None].repeat(1, 2, 1, 1)
        dense[..., 1] = dense[..., 3] = False
        mask = BlockMask.from_dense(dense.to(device), q.shape[2], 300, 64, 64)
    out, lse = run(impl, q, k, v, mask)
    check_attention(out, lse, q, k, v, mask)
    read = listed_keys(mask)
    assert not read.all()
    poison = ~read[None, None, :, None]
    again, lse_again = run(impl, q, k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("nan")), mask)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def listed_keys(mask):
    """bool [kv_len]: keys of any listed block or column, causal or not."""
    read = torch.zeros(mask.kv_len, dtype=torch.bool, device=mask.device)
    for row in range(mask.kv_num_blocks[0].numel()):
        num, index = (x[0].flatten(0, 1)[row] for x in (mask.kv_num_blocks, mask.kv_indices))
        for first in (index[: int(num)] * mask.step).tolist():
            read[first : first + mask.kv_block] = True
        if mask.column_num is not None:
            num, index = (x[0].flatten(0, 1)[row] for x in (mask.column_num, mask.column_indices))
            read[index[: int(num)].long()] = True
    return read


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_layout(impl, device, check_attention):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(device, 2, 4, 2, 100, 100))
    mask = random_mask(device, 2, 2, 100, 100, 64, 64)
    check_attention(*run(impl, q, k, v, mask, scale=0.7), q, k, v, mask, scale=0.7)
    last_not_contiguous = k.transpose(2, 3).contiguous().transpose(2, 3)
    check_attention(*run(impl, q, last_not_contiguous, v, mask), q, k, v, mask)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_stay_finite(impl, device, check_attention):
    q, k, v = tensors(device, q_len=150, kv_len=150)
    mask = random_mask(device, 1, 2, 150, 150, 64, 64)
    q = q * 1e3
    check_attention(*run(impl, q, k, v, mask), q, k, v, mask)


def test_double_inputs_compute_in_double(device, within_budget):
    q, k, v = tensors(device, dtype=torch.float64)
    mask = random_mask(device, 1, 2, 100, 100, 64, 64)
    out = block_sparse_attention(q, k, v, mask)
    from_single = block_sparse_attention(q.float(), k.float(), v.float(), mask, impl="reference")
    assert out.dtype == torch.float64 and 0 < (out - from_single).abs().max() < 1e-5


def test_the_tolerance_can_fail(device, check_attention, within_budget):
    q, k, v = tensors(device, dtype=torch.float16)
    mask = random_mask(device, 1, 2, 100, 100, 64, 64)
    out, lse = run("reference", q, k, v, mask)
    check_attention(out, lse, q, k, v, mask)
    for spoil in (
        lambda x: x * 1.01,
        lambda x: x.index_fill(2, torch.tensor([3], device=device), float("nan")),
        lambda x: x.flip(1),
    ):
        with pytest.raises(AssertionError):
            check_attention(spoil(out), lse, q, k, v, mask)
        with pytest.raises(AssertionError):
            check_attention(out, spoil(lse), q, k, v, mask)


def test_bad_input_raises(device):
    q, k, v = tensors(device, batch=2, heads=4, kv_heads=2)
    mask = random_mask(device, 1, 4, 100, 100, 64, 64)
    wrong = {
        "multiple of KV heads": (q[:, :3], k, v, mask, {}),
        "share a dtype": (q, k.half(), v, mask, {}),
        "need q": (q, k[..., :32], v, mask, {}),
        "mask is for": (q[:, :, :50], k, v, mask, {}),
        "does not fit": (q, k, v, random_mask(device, 1, 3, 100, 100, 64, 64), {}),
        "scale must be positive": (q, k, v, mask, {"scale": 0.0}),
        "impl is": (q, k, v, mask, {"impl": "cuda"}),
        "supports head_dim": (q[..., :32], k[..., :32], v[..., :32], mask, {"impl": "triton"}),
        "supports fp16, bf16 and fp32": (q.double(), k.double(), v.double(), mask, {"impl": "triton"}),
        "supports query blocks": (q, k, v, random_mask(device, 1, 4, 100, 100, 48, 48), {"impl": "triton"}),
    }
    for message, (q_, k_, v_, mask_, kwargs) in wrong.items():
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q_, k_, v_, mask_, **kwargs)
    empty = BlockMask.from_dense(torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=device), 100, 100, 64, 64)
    for impl in IMPLS:
        with pytest.raises(ValueError, match="would see no key"):
            block_sparse_attention(q, k, v, empty, impl=impl)


def test_auto_takes_the_fastest_kernel_that_computes_it(device):
    mask = random_mask(device, 1, 1, 100, 100, 64, 64)
    q = torch.empty(1, 1, 100, 64, device=device)
    portable = "triton" if device == "cuda" else "reference"
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    assert resolve_impl("auto", q, mask) == portable
    assert resolve_impl("auto", q.half(), mask) == ("hopper" if hopper else portable)
    assert resolve_impl("auto", q.half(), replace(mask, window=8)) == portable
    assert resolve_impl("auto", torch.empty(1, 1, 100, 80, device=device), mask) == "reference"
    for named in ("reference", "triton"):
        assert resolve_impl(named, q.half(), mask) == named
    with pytest.raises(ValueError, match=r"cannot run: dtype torch\.float32"):
        resolve_impl("hopper", q, mask)
    with pytest.raises(ValueError, match="'auto', 'hopper', 'triton' or 'reference', got 'cuda'"):
        resolve_impl("cuda", q, mask)


def test_gradients_of_the_reference():
    leaves = [x.requires_grad_() for x in tensors("cpu", 2, 2, 1, 6, 9, 2, torch.float64)]
    tiled = random_mask("cpu", 2, 2, 6, 9, 4, 4)
    num, first, columns = torch.tensor([[[1, 1]]]), torch.tensor([[[[1], [5]]]]), torch.tensor([[[[0, 0], [0, 3]]]])
    mixed = BlockMask(num.int(), first.int(), 6, 9, 4, 4, columns.int(), torch.tensor([[[1, 2]]]).int(), kv_step=1)
    for mask in (tiled, replace(tiled, window=3, sink=1, last=1), mixed):
        assert torch.autograd.gradcheck(lambda *qkv, mask=mask: run("reference", *qkv, mask), leaves)


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_reference_holds_one_query_block_at_a_time():
    # The last of 128 query blocks over 8k tokens and 9 heads is the largest step of such a run: a step holds a handful of
    # tensors, so 64 MiB for the largest keeps 8k tokens far below 4 GiB.
    q, k, v = tensors("cpu", 1, 9, 3, 64, 8192)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 128, dtype=torch.bool), 64, 8192, 64, 64)
    with LargestTensor() as largest:
        block_sparse_attention(q, k, v, mask, impl="reference")
    assert 0 < largest.bytes <= 64 * 2**20


@pytest.mark.gpu
def test_offsets_beyond_32_bits(within_budget):
    """136 heads x 128k tokens x 128: element offsets of the last heads exceed 2^31 in q, k, v and out."""
    shape, tail = (1, 136, 131072, 128), 256
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    rows = torch.arange(2048, dtype=torch.int32, device="cuda")
    mask = BlockMask(
        torch.ones(1, 1, 2048, dtype=torch.int32, device="cuda"), rows[None, None, :, None], 131072, 131072, 64, 64
    )
    out, lse = run("triton", q, k, v, mask)
    assert out.isfinite().all() and lse.isfinite().all()
    last = [x[:, -1:, -tail:].contiguous() for x in (q, k, v)]
    local = BlockMask(mask.kv_num_blocks[..., :4], mask.kv_indices[:, :, :4], tail, tail, 64, 64)
    expected, expected_lse = run("reference", *last, local)
    assert torch.allclose(out[:, -1:, -tail:].float(), expected.float(), atol=2e-2, rtol=2e-2)
    assert torch.allclose(lse[:, -1:, -tail:], expected_lse, atol=1e-3)
