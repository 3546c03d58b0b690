"""hopper_forward against the dense definition in fp64 over mask.tokens(), on a GPU of compute capability 9.0.

Gluon has no interpreter: without such a GPU the kernels are compiled for it, and what needs no kernel is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsebench.kernels import BlockMask, causal_blocks, hopper_attention, hopper_kernels
from sparsebench.kernels.block_lists import edge_blocks
from sparsebench.kernels.block_sparse_attention import block_sparse_attention_reference
from sparsebench.kernels.hopper_attention import hopper_applies, hopper_forward, launch_options

DTYPES = (torch.bfloat16, torch.float16)


LAUNCHES = {"short": {}, "medium": dict(SHORT=0, LONG_LIST=0, TURNS=0), "long": dict(SHORT=0, MEDIUM=0, LONG_LIST=0, TURNS=0)}


@pytest.fixture(params=list(LAUNCHES.values()), ids=list(LAUNCHES))
def hopper(request, monkeypatch):
    """The device; every length is launched as short, medium and long ones are."""
    for name, value in request.param.items():
        monkeypatch.setattr(hopper_attention, name, value)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return "cuda"


def tensors(device, batch=1, heads=2, kv_heads=1, q_len=300, kv_len=300, dim=128, dtype=torch.bfloat16):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return tuple(torch.randn(batch, h, n, dim, device=device).to(dtype) for h, n in shapes)


def random_mask(device, batch, heads, q_len, kv_len, q_block, kv_block, density=0.5):
    """Random blocks; every row keeps the block of its last query, not the first one."""
    visible = causal_blocks(q_len, kv_len, q_block, kv_block)
    dense = torch.rand(batch, heads, *visible.shape) < density
    q0 = torch.arange(visible.shape[0]) * q_block + kv_len - q_len
    for r, first in enumerate(q0.tolist()):
        last = min(first + q_block, kv_len) - 1
        dense[:, :, r, first // kv_block : last // kv_block + 1] = True
    return BlockMask.from_dense((dense & visible).to(device), q_len, kv_len, q_block, kv_block)


SHAPES = {
    # batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask batch, mask heads
    "odd length": (1, 2, 2, 1001, 1001, 128, 64, 64, 1, 2),
    "a multiple of the block": (1, 2, 2, 1024, 1024, 128, 64, 64, 1, 2),
    "gqa, batch, one mask": (2, 8, 2, 330, 330, 128, 64, 64, 1, 1),
    "gqa, mask of kv heads": (2, 8, 2, 330, 330, 128, 64, 64, 2, 2),
    "gqa of 3, mask of kv heads": (2, 6, 2, 330, 330, 128, 64, 64, 2, 2),
    "gqa, mask of heads": (2, 8, 2, 330, 330, 128, 64, 64, 2, 8),
    "head_dim 64": (1, 4, 2, 530, 530, 64, 64, 64, 1, 4),
    "head_dim 64, kv heads": (1, 4, 2, 530, 530, 64, 64, 64, 1, 2),
    "blocks 128x64": (1, 4, 2, 901, 901, 128, 128, 64, 1, 4),
    "blocks 128x64, head_dim 64": (1, 2, 1, 901, 901, 64, 128, 64, 1, 2),
    "blocks 128x128": (2, 4, 2, 1100, 1100, 128, 128, 128, 2, 4),
    "blocks 128x128, head_dim 64": (1, 2, 1, 700, 700, 64, 128, 128, 1, 1),
    "second half row beyond the end": (1, 2, 1, 300, 300, 128, 128, 128, 1, 2),
    "chunked prefill": (1, 2, 1, 170, 1033, 128, 64, 64, 1, 2),
    "chunked, aligned": (1, 2, 1, 256, 1024, 128, 64, 64, 1, 2),
    "chunked, kv heads": (1, 4, 2, 170, 1033, 128, 64, 64, 1, 2),
    "chunked 128x64": (1, 2, 1, 350, 1033, 128, 128, 64, 1, 2),
    "chunked 128x128": (1, 2, 1, 350, 1033, 128, 128, 128, 1, 2),
    "one query": (1, 2, 1, 1, 150, 128, 64, 64, 1, 2),
    "one token": (1, 2, 1, 1, 1, 128, 128, 128, 1, 2),
    "one block": (1, 4, 1, 64, 64, 128, 64, 64, 1, 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, hopper, check_attention):
    batch, heads, kv_heads, q_len, kv_len, dim, q_block, kv_block, mask_batch, mask_heads = shape
    q, k, v = tensors(hopper, batch, heads, kv_heads, q_len, kv_len, dim, dtype)
    mask = random_mask(hopper, mask_batch, mask_heads, q_len, kv_len, q_block, kv_block).check()
    assert hopper_applies(q, mask)
    check_attention(*hopper_forward(q, k, v, mask, 0.1, True), q, k, v, mask, scale=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("pattern", ["diagonal", "full", "first block", "lists of every length"])
def test_patterns(pattern, blocks, hopper, check_attention):
    q_len, scale = 1090, 128**-0.5
    q, k, v = tensors(hopper, 1, 4, 2, q_len, q_len)
    visible = causal_blocks(q_len, q_len, *blocks, device=hopper)
    dense = visible[None, None].repeat(1, 4, 1, 1)
    if pattern == "diagonal":
        last_key = (torch.arange(visible.shape[1], device=hopper) + 1) * blocks[1] - 1
        dense &= last_key >= torch.arange(visible.shape[0], device=hopper)[:, None] * blocks[0]
    elif pattern == "first block":
        dense[..., 1:] = False
    elif pattern == "lists of every length":
        for h in range(4):
            dense[:, h, :, 1 + h : 3 + h] = False
    for heads in (4, 2):  # of neighbours that do not share and of neighbours that share a selection
        mask = BlockMask.from_dense(dense[:, :heads].contiguous(), q_len, q_len, *blocks).check()
        check_attention(*hopper_forward(q, k, v, mask, scale, True), q, k, v, mask)


TEAM = dict(BN=128, STAGES_K=2, STAGES_V=2, PACK=1, maxnreg=168)
KERNELS = {
    "one stage": ((64, 64), dict(STAGES=1, Q_IN_REGS=False, maxnreg=128)),
    "64-row programs, blocks 128x64": ((128, 64), dict(STAGES=1, Q_IN_REGS=False, maxnreg=128)),
    "two stages, blocks 128x64": ((128, 64), dict(STAGES=2, Q_IN_REGS=True, maxnreg=168)),
    "64-row programs, blocks 128x128": ((128, 128), dict(STAGES=2, Q_IN_REGS=True, maxnreg=168)),
    "a program for several units": ((128, 128), TEAM | dict(programs=3)),
    "a program for several units, blocks 128x64": ((128, 64), TEAM | dict(programs=3)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("q_len, kv_len", [(1001, 1001), (1024, 1024), (300, 1033), (256, 1024)])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_every_kernel(kernel, q_len, kv_len, together, dim, hopper, check_attention, monkeypatch):
    blocks, options = kernel
    monkeypatch.setattr(hopper_attention, "launch_options", lambda *_: options | dict(together=together, num_warps=4))
    q, k, v = tensors(hopper, 2, 4, 2, q_len, kv_len, dim)
    for density in (0.0, 0.2, 1.0):
        mask = random_mask(hopper, 2, 4, q_len, kv_len, *blocks, density).check()
        check_attention(*hopper_forward(q, k, v, mask, 0.1, True), q, k, v, mask, scale=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "own"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("q_len", [300, 1001])
def test_blocks_left_out_are_never_read(q_len, blocks, heads, hopper, check_attention):
    q, k, v = tensors(hopper, 1, 2, 1, q_len, 1001)
    dense = causal_blocks(q_len, 1001, *blocks)[None, None].repeat(1, heads, 1, 1)
    dense[..., 1] = dense[..., 3] = False
    mask = BlockMask.from_dense(dense.to(hopper), q_len, 1001, *blocks).check()
    out, lse = hopper_forward(q, k, v, mask, 0.1, True)
    check_attention(out, lse, q, k, v, mask, scale=0.1)
    left_out = torch.zeros(1001, dtype=torch.bool, device=hopper)
    for block in (1, 3):
        left_out[block * blocks[1] : (block + 1) * blocks[1]] = True
    left_out = left_out[None, None, :, None]
    again = hopper_forward(q, k.masked_fill(left_out, float("nan")), v.masked_fill(left_out, float("nan")), mask, 0.1, True)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128)], ids=str)
def test_layout_values_after_the_end_and_no_lse(blocks, hopper, check_attention):
    """Tokens next to each other per head or per position; NaN right behind the last key and query."""
    padded = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(hopper, 2, 4, 2, 520, 520)]
    for x in padded:
        x[:, :, 500:] = float("nan")
    q, k, v = (x[:, :, :500] for x in padded)
    mask = random_mask(hopper, 2, 4, 500, 500, *blocks).check()
    out, lse = hopper_forward(q, k, v, mask, 0.1, True)
    check_attention(out, lse, q, k, v, mask, scale=0.1)
    alone, none = hopper_forward(q, k, v, mask, 0.1, False)
    assert torch.equal(out, alone) and none.numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_large_logits_stay_finite(block, hopper):
    q, k, v = tensors(hopper, 1, 2, 1, 600, 600)
    mask = random_mask(hopper, 1, 2, 600, 600, block, block).check()
    out, lse = hopper_forward(q * 1e3, k, v, mask, 1.0, True)
    expected, expected_lse = block_sparse_attention_reference(q * 1e3, k, v, mask, 1.0)
    assert torch.allclose(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
    assert torch.allclose(lse, expected_lse, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mask_heads", [1, 136])
@pytest.mark.parametrize("block", [64, 128])
def test_offsets_beyond_32_bits(block, mask_heads, hopper):
    """136 heads x 128k tokens x 128: element offsets of the last heads exceed 2^31 in q, k, v and out (9 GiB as q, k and v are
    one tensor)."""
    shape, tail, length, scale = (1, 136, 131072, 128), 256, 131072, 0.02
    x = torch.randn(shape, dtype=torch.bfloat16, device=hopper)
    rows = torch.arange(length // block, dtype=torch.int32, device=hopper).expand(1, mask_heads, -1)
    mask = BlockMask(torch.ones_like(rows), rows[..., None], length, length, block, block)
    out, lse = hopper_forward(x, x, x, mask, scale, True)
    last = x[:, -1:, -tail:].clone()
    del x  # isfinite() takes memory of its own
    assert out.isfinite().all() and lse.isfinite().all()
    few = torch.arange(tail // block, dtype=torch.int32, device=hopper)[None, None]
    local = BlockMask(torch.ones_like(few), few[..., None], tail, tail, block, block)
    expected, expected_lse = block_sparse_attention_reference(last, last, last, local, scale)
    assert torch.allclose(out[:, -1:, -tail:].float(), expected.float(), atol=2e-2, rtol=2e-2)
    assert torch.allclose(lse[:, -1:, -tail:], expected_lse, atol=1e-3)
    del out
    torch.cuda.empty_cache()  # for tests that run beside this one


def test_what_it_refuses():
    q, k, v = tensors("cpu")
    mask = random_mask("cpu", 1, 2, 300, 300, 64, 64)
    one = torch.ones(1, 2, 5, dtype=torch.int32)
    wrong = {
        "dtype": (q.float(), k.float(), v.float(), mask),
        "head_dim 32": (q[..., :32], k[..., :32], v[..., :32], mask),
        "blocks of 64 x 128": (q, k, v, random_mask("cpu", 1, 2, 300, 300, 64, 128)),
        "blocks of 16 x 64": (q, k, v, random_mask("cpu", 1, 2, 300, 300, 16, 64)),
        "single columns": (q, k, v, replace(mask, column_indices=one[..., None], column_num=one)),
        "do not tile": (q, k, v, replace(mask, kv_step=1)),
        "a window": (q, k, v, replace(mask, window=100)),
        "pv_threshold": (q, k, v, replace(mask, pv_threshold=5.0)),
    }
    for message, inputs in wrong.items():
        with pytest.raises(ValueError, match=message):
            hopper_forward(*inputs, 0.1, False)
    assert not hopper_applies(q, mask)  # on a CPU


def test_neighbouring_heads_are_packed_only_where_they_share_a_selection(monkeypatch):
    for name in ("LONG_LIST", "TURNS"):
        monkeypatch.setattr(hopper_attention, name, 0)
    for heads, kv_heads, mask_heads, packed in ((8, 2, 2, 2), (8, 2, 1, 2), (8, 2, 8, None), (6, 2, 2, None), (2, 2, 2, None)):
        q, k, _ = tensors("cpu", 1, heads, kv_heads)
        assert launch_options(q, k, random_mask("cpu", 1, mask_heads, 300, 300, 64, 64)).get("PACK") == packed
        assert launch_options(q, k, random_mask("cpu", 1, mask_heads, 300, 300, 128, 128))["PACK"] == 1


def test_teams_take_long_lists_and_enough_work(monkeypatch):
    monkeypatch.setattr(hopper_attention, "multiprocessors", lambda device: 4)

    def team(length, width, heads=4, block=128):
        q = torch.empty(1, heads, length, 128, dtype=torch.bfloat16)
        rows = torch.ones(1, heads, length // block, dtype=torch.int32)
        index = torch.zeros(*rows.shape, width, dtype=torch.int32)
        options = launch_options(q, q[:, : heads // 2], BlockMask(rows, index, length, length, block, block, trusted=True))
        return options.get("PACK"), options["together"]

    assert team(2048, 12) == (1, 4) and team(2048, 11) == (None, 2)
    assert team(512, 12) == (1, 4) and team(256, 12) == (None, 2)
    assert team(2048, 24, block=64) == (None, 2)  # every head has lists of its own
    assert team(24576, 12) == (1, 2) and team(65536, 12) == (1, 1)


@pytest.mark.parametrize("together", [1, 4, 16, 32])
@pytest.mark.parametrize("tiles", [61, 64, 128, 256])
@pytest.mark.parametrize("programs", [132, 10**6])
def test_units_are_shared_out_once_and_evenly(programs, tiles, together, monkeypatch):
    """The kernels' own functions, run as Python. A unit is as long as its row is late."""
    place, heads = SimpleNamespace(), 32
    language = SimpleNamespace(
        where=lambda condition, a, b: a if condition else b, num_programs=lambda _: programs, program_id=lambda _: place.program
    )
    monkeypatch.setattr(hopper_kernels, "gl", language)
    units, work = tiles * heads, []
    taken = []
    for place.program in range(min(programs, units)):
        mine, turn = [], 0
        while (unit := hopper_kernels._unit.fn(turn)) < units:
            mine.append(hopper_kernels._tile.fn(unit, units, tiles, together))
            turn += 1
        taken += mine
        work.append(sum(tile + 2 for tile, _ in mine))
    assert sorted(taken) == [(tile, head) for tile in range(tiles) for head in range(heads)]
    if programs >= units:
        assert all(tile == tiles - 1 for tile, _ in taken[:together])  # long rows start first
    elif tiles * together > 2 * programs:
        assert max(work) < 1.04 * sum(work) / len(work)


@pytest.mark.parametrize("q_block, kv_block", hopper_attention.BLOCKS)
def test_every_block_after_a_first_query_is_masked_and_no_other(q_block, kv_block):
    most = {False: 0, True: 0}
    for offset in range(256):
        aligned = offset % max(q_block, kv_block) == 0
        first = offset + torch.arange(8) * q_block
        needed = (first + q_block - 1) // kv_block - (first + 1) // kv_block + 1
        most[aligned] = max(most[aligned], int(needed.max()))
    assert edge_blocks(0, q_block, kv_block) == most[True]
    assert edge_blocks(1, q_block, kv_block) == most[False]


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from sparsebench.kernels import BlockMask, hopper_attention
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
class Compiled:
    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.pre_run_hooks = [None]  # Launch then leaves every call to the kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *values, **options):
        names, signature, constants = self.kernel.arg_names, {}, {}
        for name, x in zip(names, values):
            if isinstance(x, torch.Tensor):
                signature[name] = "*" + NAMES[x.dtype]
            elif isinstance(x, (int, float)):
                signature[name] = "i32" if isinstance(x, int) else "fp32"
            else:
                box = ",".join(map(str, x.block_shape))
                signature[name] = f"tensordesc<{NAMES[x.base.dtype]}[{box}],{x.layout!r}>"
        for i, name in enumerate(names):
            if name in options:
                signature[name], constants[(i,)] = "constexpr", options.pop(name)
        source = GluonASTSource(self.kernel, {name: signature[name] for name in names}, constants, {})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(self.kernel.__name__, built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"), len(built.asm["cubin"]))
for name in ("attention_solo_kernel", "attention_team_kernel"):
    setattr(hopper_attention, name, Compiled(getattr(hopper_attention, name)))
hopper_attention.SHORT = hopper_attention.LONG_LIST = hopper_attention.TURNS = 0
for block, dim in ((64, 128), (128, 64)):
    q = torch.zeros(1, 2, 256, dim, dtype=torch.bfloat16)
    lists = torch.arange(256 // block, dtype=torch.int32).expand(1, 2, -1)
    mask = BlockMask(torch.ones_like(lists), lists[..., None], 256, 256, block, block)
    hopper_attention.hopper_forward(q, q, q, mask, 0.1, True)
"""


def test_kernels_compile_for_hopper(tmp_path):
    """Up to machine code, as hopper_forward launches them; in a process that does not interpret Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("attention_")]
    assert [line[0] for line in lines] == ["attention_solo_kernel", "attention_team_kernel"]
    for _, shared, products, size in lines:
        assert int(shared) <= 227 * 1024 and int(products) > 0 and int(size) > 0
