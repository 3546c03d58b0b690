"""Gradients of block_sparse_attention through Triton against autograd through the dense definition in fp64 over mask.tokens().

On a CPU the kernels run in the interpreter; on a CUDA device the same tests run them compiled, in bf16 too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsebench.kernels import BlockMask, block_sparse_attention, causal_blocks
from sparsebench.kernels import block_sparse_attention_backward as backward

HALF = (pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"))


def tensors(device, batch=1, heads=2, kv_heads=1, q_len=150, kv_len=150, dim=64, dtype=torch.float16):
    """q, k, v, the gradient of out, the gradient of lse."""
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim), (heads, q_len, dim), (heads, q_len))
    *qkvg, dlse = (torch.randn(batch, *shape, device=device) for shape in shapes)
    return *(x.to(dtype) for x in qkvg), dlse


def random_mask(device, batch, heads, q_len, kv_len, q_block=64, kv_block=64, density=0.5):
    visible = causal_blocks(q_len, kv_len, q_block, kv_block)
    dense = torch.rand(batch, heads, *visible.shape) < density
    dense[..., 0] = True
    return BlockMask.from_dense(dense.to(device), q_len, kv_len, q_block, kv_block)


def dense_gradients(q, k, v, dout, dlse, mask, scale=None):
    """dq, dk, dv of the definition, every step in the dtype of q."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    group, tokens = q.shape[1] // k.shape[1], mask.tokens()
    tokens = tokens.repeat_interleave(q.shape[1] // tokens.shape[1], dim=1)
    logits = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~tokens, float("-inf"))
    out = logits.softmax(-1) @ v.repeat_interleave(group, dim=1)
    return torch.autograd.grad([out, logits.logsumexp(-1)], [q, k, v], [dout.to(q.dtype), dlse.to(q.dtype)])


def triton_gradients(q, k, v, dout, dlse, mask, scale=None):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True, impl="triton")
    return torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])


@pytest.fixture
def check_gradients(within_budget):
    def check(found, q, k, v, dout, dlse, mask, scale=None):
        exact = dense_gradients(*(x.double() for x in (q, k, v, dout, dlse)), mask, scale)
        plain = dense_gradients(q, k, v, dout, dlse, mask, scale)
        for mine, right, low in zip(found, exact, plain, strict=True):
            assert mine.dtype == q.dtype
            within_budget(mine, right, low)

    return check


@pytest.fixture
def several_parts(monkeypatch):
    """Short lists of query blocks are divided among several programs too."""
    monkeypatch.setattr(backward, "LEAST_TILES", 2)


SHAPES = {
    # batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask batch, mask heads
    "gqa, batch, one mask": (2, 4, 2, 50, 50, 64, 64, 64, 1, 1),
    "gqa, mask of kv heads": (1, 4, 2, 70, 70, 64, 64, 64, 1, 2),
    "gqa, batch, mask of heads": (2, 4, 2, 50, 70, 64, 64, 64, 2, 4),
    "group of 3": (1, 3, 1, 70, 70, 64, 64, 64, 1, 3),
    "head_dim 96, odd length": (1, 1, 1, 131, 131, 96, 64, 64, 1, 1),
    "head_dim 128": (1, 1, 1, 140, 140, 128, 128, 128, 1, 1),
    "head_dim 256": (1, 1, 1, 70, 70, 256, 64, 64, 1, 1),
    "blocks 64x128": (1, 1, 1, 140, 140, 64, 64, 128, 1, 1),
    "blocks 128x128, one list": (1, 2, 1, 70, 140, 64, 128, 128, 1, 1),
    "chunked prefill": (1, 2, 1, 70, 140, 64, 64, 64, 1, 2),
    "chunked 128x64": (1, 1, 1, 150, 200, 64, 128, 64, 1, 1),
    "one query": (1, 2, 1, 1, 150, 64, 64, 64, 1, 2),
    "large key blocks, chunked": (1, 1, 1, 140, 330, 64, 128, 192, 1, 1),
    "one block": (1, 1, 1, 5, 5, 64, 64, 64, 1, 1),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, device, check_gradients, several_parts):
    batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask_batch, mask_heads = shape
    inputs = tensors(device, batch, heads, kv_heads, q_len, kv_len, dim, dtype)
    mask = random_mask(device, mask_batch, mask_heads, q_len, kv_len, q_block, kv_block)
    check_gradients(triton_gradients(*inputs, mask), *inputs, mask)


# Not with one query: torch sums its products over the channels in a tree, three times as exact as any chain of additions.
@pytest.mark.parametrize("dim, q_len", [(64, 20), pytest.param(128, 300, marks=pytest.mark.gpu)])
def test_single_precision(dim, q_len, device, check_gradients):
    inputs = tensors(device, q_len=q_len, kv_len=q_len + 13, dim=dim, dtype=torch.float32)
    mask = random_mask(device, 1, 2, q_len, q_len + 13)
    check_gradients(triton_gradients(*inputs, mask), *inputs, mask)


@pytest.mark.parametrize("pattern", ["diagonal", "full", "first block", "one row reads all"])
def test_patterns(pattern, device, check_gradients, several_parts):
    inputs = tensors(device, heads=1)
    dense = torch.eye(3, dtype=torch.bool, device=device)[None, None]
    if pattern == "full":
        dense[:] = True
    elif pattern == "first block":
        dense[:] = False
        dense[..., 0] = True
    elif pattern == "one row reads all":
        dense[:, :, 2] = True
    mask = BlockMask.from_dense(dense, 150, 150, 64, 64)
    check_gradients(triton_gradients(*inputs, mask), *inputs, mask)


@pytest.mark.parametrize(
    "window, sink, last, stride, q_len",
    [(100, 5, 0, None, 150), (70, 64, 33, None, 90), (9, 3, 5, 50, 150)],
)
def test_window(window, sink, last, stride, q_len, device, check_gradients):
    inputs = tensors(device, heads=1, q_len=q_len)
    full = causal_blocks(q_len, 150, 64, 64, device)[None, None]
    mask = replace(BlockMask.from_dense(full, q_len, 150, 64, 64), window=window, sink=sink, last=last, stride=stride)
    check_gradients(triton_gradients(*inputs, mask), *inputs, mask)


def test_parts_of_a_list_add_up(device, check_gradients, several_parts, monkeypatch):
    launched, kernel = [], backward.block_sparse_attention_bwd_dkdv_kernel

    class Spy:
        def __getitem__(self, grid):
            launched.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(backward, "block_sparse_attention_bwd_dkdv_kernel", Spy())
    inputs = tensors(device)
    mask = random_mask(device, 1, 2, 150, 150, density=0.7)
    found = triton_gradients(*inputs, mask)
    assert launched == [3 * 3]  # key tiles, and parts of the 3 * 2 entries a list may have, 2 each
    check_gradients(found, *inputs, mask)


def test_scale_and_layout(device, check_gradients):
    q, k, v, dout, dlse = tensors(device, 1, 2, 1, 40, 40)
    q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    mask = random_mask(device, 1, 1, 40, 40)
    expanded = dout[:, :1].expand(-1, 2, -1, -1), dout[..., :1].expand(-1, -1, -1, 64)
    for gradient, scale in ((dout, 0.7), *((x, None) for x in expanded)):
        found = triton_gradients(q, k, v, gradient, dlse, mask, scale)
        check_gradients(found, q, k, v, gradient, dlse, mask, scale)


def test_either_output_alone(device, check_gradients):
    q, k, v, dout, dlse = tensors(device, q_len=60, kv_len=60)
    mask = random_mask(device, 1, 2, 60, 60)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, mask, impl="triton")
    check_gradients(torch.autograd.grad(out, leaves, dout), q, k, v, dout, torch.zeros_like(dlse), mask)
    lse = block_sparse_attention(*leaves, mask, impl="triton", return_lse=True)[1]
    check_gradients(torch.autograd.grad(lse, leaves, dlse), q, k, v, torch.zeros_like(dout), dlse, mask)


def test_each_input_alone(device):
    *qkv, dout, dlse = tensors(device, q_len=60, kv_len=60)
    mask = random_mask(device, 1, 2, 60, 60)
    together = triton_gradients(*qkv, dout, torch.zeros_like(dlse), mask)
    for n, expected in enumerate(together):
        leaves = [x.detach().requires_grad_(i == n) for i, x in enumerate(qkv)]
        block_sparse_attention(*leaves, mask, impl="triton").backward(dout)
        assert torch.equal(leaves[n].grad, expected)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != n)


def test_blocks_left_out_are_never_read(device):
    inputs = tensors(device)
    dense = causal_blocks(150, 150, 64, 64)[None, None].repeat(1, 2, 1, 1)
    dense[..., 1] = False
    mask = BlockMask.from_dense(dense.to(device), 150, 150, 64, 64)
    unread = torch.zeros(150, dtype=torch.bool, device=device)
    unread[64:128] = True
    q, k, v, dout, dlse = inputs
    poisoned = [x.masked_fill(unread[:, None], float("nan")) for x in (k, v)]
    for clean, found in zip(triton_gradients(*inputs, mask), triton_gradients(q, *poisoned, dout, dlse, mask), strict=True):
        assert torch.equal(clean, found)
        assert found.shape[1] == 2 or not found[:, :, unread].any()


def test_large_logits_stay_finite(device):
    q, k, v, dout, dlse = tensors(device, heads=1, q_len=70, kv_len=70)
    mask = random_mask(device, 1, 1, 70, 70)
    for found in triton_gradients(q * 100, k, v, dout, dlse, mask):
        assert found.isfinite().all()


def test_the_tolerance_can_fail(device, check_gradients):
    inputs = tensors(device, heads=1, q_len=70, kv_len=70)
    mask = random_mask(device, 1, 1, 70, 70)
    found = triton_gradients(*inputs, mask)
    check_gradients(found, *inputs, mask)
    for n in range(3):
        for spoil in (lambda x: x * 1.02, lambda x: x.index_fill(2, torch.tensor([50], device=device), 0.0)):
            with pytest.raises(AssertionError):
                check_gradients([spoil(x) if i == n else x for i, x in enumerate(found)], *inputs, mask)


def test_refuses_masks_without_a_backward(device):
    q, k, v, *_ = tensors(device, q_len=128, kv_len=128)
    mask = random_mask(device, 1, 2, 128, 128)
    column = torch.full((1, 1, 2, 1), 127, dtype=torch.int32, device=device)
    first = torch.zeros(1, 1, 2, 1, dtype=torch.int32, device=device)
    one = torch.ones(1, 1, 2, dtype=torch.int32, device=device)
    refused = {
        "single key columns": BlockMask(one, first, 128, 128, 64, 64, column, one),
        "do not tile": BlockMask(one, first, 128, 128, 64, 64, kv_step=1),
        "query blocks of 16": random_mask(device, 1, 2, 128, 128, 16),
        "key blocks of 32": random_mask(device, 1, 2, 128, 128, 64, 32),
        "pv_threshold": replace(mask, pv_threshold=50.0),
    }
    for n in range(3):
        leaves = [x.detach().requires_grad_(i == n) for i, x in enumerate((q, k, v))]
        for message, unfit in refused.items():
            with pytest.raises(ValueError, match=f"{message}.*impl='reference'"):
                block_sparse_attention(*leaves, unfit, impl="triton")
    with torch.no_grad():
        assert block_sparse_attention(*leaves, refused["pv_threshold"], impl="triton").isfinite().all()


@pytest.mark.gpu
def test_long_rows_give_the_same_bits_every_time(check_gradients):
    inputs = tensors("cuda", heads=8, kv_heads=2, q_len=4096, kv_len=4096, dim=128, dtype=torch.bfloat16)
    dense = causal_blocks(4096, 4096, 64, 64, "cuda") & (torch.rand(1, 8, 64, 64, device="cuda") < 0.3)
    dense[..., 0] = True  # a list of every query block, divided among programs
    mask = BlockMask.from_dense(dense, 4096, 4096, 64, 64)
    found = triton_gradients(*inputs, mask)
    check_gradients(found, *inputs, mask)
    for _ in range(5):
        assert all(torch.equal(one, two) for one, two in zip(found, triton_gradients(*inputs, mask), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """136 heads x 128k tokens x 128: element offsets of the last heads exceed 2^31 in q, out and their gradients."""
    heads, length, tail, group = 136, 131072, 256, 34
    q, dout = (torch.randn(1, heads, length, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    k, v = (torch.randn(1, heads // group, length, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows = torch.arange(length // 64, dtype=torch.int32, device="cuda")[None, None, :, None]
    mask = BlockMask(torch.ones_like(rows[..., 0]), rows, length, length, 64, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    block_sparse_attention(*leaves, mask, impl="triton").backward(dout)
    local = BlockMask(mask.kv_num_blocks[..., :4], mask.kv_indices[:, :, :4], tail, tail, 64, 64)
    last = [x[:, -n:, -tail:].detach().float().requires_grad_() for x, n in zip(leaves, (group, 1, 1))]
    block_sparse_attention(*last, local, impl="reference").backward(dout[:, -group:, -tail:].float())
    for leaf, expected in zip(leaves, last, strict=True):
        found = leaf.grad[:, -expected.shape[1] :, -tail:].float()
        assert leaf.grad.isfinite().all() and (found - expected.grad).norm() < 0.01 * expected.grad.norm()
