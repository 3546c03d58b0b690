"""Dense causal attention and its map per block, the ground truth of gate training: op, reference, Triton kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .block_lists import causal_blocks
from .block_mask import BlockMask
from .block_mass import REDUCTIONS, block_mass
from .block_sparse_attention import HEAD_DIMS, _box, block_sparse_attention_reference, check_tensors
from .block_sparse_attention import _launch_options as attention_options
from .hopper_attention_with_map import TEAM_ROWS, hopper_applies
from .hopper_attention_with_map import launch as hopper_launch
from .launch import LOG2E, aligned, multiprocessors, power_of_2, runs_triton

CELL = 64  # tokens: the kernel's map is this fine
SLOT_TILES = 2048  # key tiles that a program remembers, 128k tokens; what lies behind is multiplied again
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def has_kernel(q: Tensor, block: int, of: str) -> bool:
    """Whether a kernel computes such maps for q."""
    cells = block % CELL == 0 if of != "row_mass" else block == CELL  # a row's mass in larger blocks is not in cells any more
    return q.shape[-1] in HEAD_DIMS and q.dtype in DTYPES and cells


def resolve_map_impl(impl: str, q: Tensor, block: int, of: str) -> str:
    """The implementation that `impl` means: "auto" is on CUDA the fastest that applies, else the reference.

    Raises: ValueError for an unknown name, or a kernel that does not compute this.
    """
    hopper = has_kernel(q, block, of) and hopper_applies(q)
    if impl == "hopper":
        if not hopper:
            raise ValueError(
                f"the Hopper kernel needs compute capability 9.0, fp16 or bf16, head_dim 64 or 128 and blocks of multiples of "
                f"{CELL} ({CELL} for row_mass), got {q.device}, {q.dtype}, head_dim {q.shape[-1]}, blocks of {block}, "
                f"of {of!r}: use impl='auto'"
            )
        return impl
    if not runs_triton(impl, q.is_cuda and has_kernel(q, block, of)):
        return "reference"
    if not has_kernel(q, block, of):
        raise ValueError(
            f"the Triton kernel supports head_dim {HEAD_DIMS}, fp16, bf16 and fp32, and blocks of multiples of {CELL} "
            f"({CELL} for row_mass), got head_dim {q.shape[-1]}, {q.dtype}, blocks of {block}, of {of!r}: use impl='reference'"
        )
    return "hopper" if hopper and impl == "auto" else "triton"


def attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, block: int = 64, of: str = "max", *, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale q k^T, causal) v, and what the softmax holds per block x block, normalised in every row of blocks.

    Source: the teacher of SeerAttention's distillation (Gao et al. 2024, arXiv 2410.13276, section 3.2).

    Args:
        q: [B, H, q_len, D] bf16/fp16/fp32.
        k, v: [B, H_kv, kv_len, D], same dtype, H % H_kv == 0, q_len <= kv_len; q's last row sits at k's last row.
        block: tokens; multiples of 64 in the kernels, for "row_mass" 64.
        of: block_mass()'s `reduce`: "max", "mass" or "row_mass".
        scale: logits factor > 0, 1 / sqrt(D) by default.
        impl: "auto" | "hopper" | "triton" | "reference" (resolve_map_impl); a named one never falls back.

    Returns: out [B, H, q_len, D] in q's dtype; lse [B, H, q_len] fp32, natural log; the map fp32 [B, H, NQ, NK], blocks after
        the causal end 0, every row of sum 1. Beside them the kernel uses a fixed amount of memory, however long the
        sequence (up to 64-token blocks; larger ones are pooled from the map of 64-token blocks). No gradients.
    Raises: ValueError when shapes, dtypes or options do not fit, or a gradient would be lost.
    """
    _check(q, k, v, block, of)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    impl = resolve_map_impl(impl, q, block, of)
    if impl == "reference":
        return attention_with_map_reference(q, k, v, block, of, scale)
    return _forward(q, k, v, block, of, scale, impl == "hopper")


def _check(q: Tensor, k: Tensor, v: Tensor, block: int, of: str) -> None:
    shapes = check_tensors(q, k, v)
    if not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(f"need 0 < q_len <= kv_len, got {shapes}")
    if block < 1 or of not in REDUCTIONS:
        raise ValueError(f"block must be positive and of one of {', '.join(REDUCTIONS)}, got {block} and {of!r}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("the map's attention has no backward: run it under torch.no_grad()")


def attention_with_map_reference(
    q: Tensor, k: Tensor, v: Tensor, block: int, of: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the references of attention and of the block map, each with its own softmax."""
    lengths = q.shape[2], k.shape[2], CELL, CELL
    mask = BlockMask.from_dense(causal_blocks(*lengths, q.device)[None, None], *lengths, trusted=True)
    out, lse = block_sparse_attention_reference(q, k, v, mask, scale)
    blocks = block_mass(q, k, scale, block, block, of)
    return out, lse, blocks / blocks.sum(-1, keepdim=True)


@triton.jit
def _attend_tile(
    b_q, b_acc, b_m, b_l, b_k, b_v, o_key, o_row, kv_len, scale_log2,
    OF: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys o_key [BN]; also, of every row, the binary log of the largest of the tile's
    exponentials (OF "max") or of their sum."""
    # [BM, BN]
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if MASKED:
        b_s = tl.where((o_key < kv_len)[None, :] & (o_key[None, :] <= o_row[:, None]), b_s, float("-inf"))
    b_top = tl.max(b_s, 1)
    b_m_new = tl.maximum(b_m, b_top)
    b_base = b_m_new * scale_log2
    if MASKED:
        b_base = tl.where(b_m_new == float("-inf"), 0.0, b_base)
    b_p = tl.exp2(b_s * scale_log2 - b_base[:, None])
    b_alpha = tl.exp2(b_m * scale_log2 - b_base)
    b_sum = tl.sum(b_p, 1)
    b_l = b_l * b_alpha + b_sum
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    b_seen = b_top * scale_log2 if OF == "max" else b_base + tl.log2(b_sum)
    return b_acc, b_m_new, b_l, b_seen


@triton.jit(do_not_specialize=["q_len", "kv_len", "width", "total", "slot_tiles"])
def attention_with_map_fwd_kernel(
    q_box, k_box, v_box, o_box, lse, cells, slots, counter,
    heads, group, q_len, kv_len, width, total, slot_tiles, together, scale_log2,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CELL: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes tiles of BM query rows, the long ones of a group of heads first, until none is left.

    What a probability is of a row's total is known only after its last key. So the loop writes one number per row and key
    tile into the program's slot [slot_tiles, BM], and the slot becomes a row of the map when lse is known.
    Edge tiles come before the pipelined loop, for the reason that block_sparse_attention_fwd_kernel gives.
    """
    SPLIT: tl.constexpr = CELL // BN
    BC: tl.constexpr = 32 // SPLIT
    tiles = tl.cdiv(q_len, BM)
    rows = tl.cdiv(q_len, CELL)
    slots += tl.program_id(0).to(tl.int64) * slot_tiles * BM
    o_bm = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    i = tl.atomic_add(counter, 1)
    while i < total:
        i_turn = i % (tiles * together)
        i_tile = tiles - 1 - i_turn // together
        i_bh = i // (tiles * together) * together + i_turn % together
        i_b = i_bh // heads
        i_h = i_bh % heads
        i_kv = i_h // group
        first_row = i_tile * BM + kv_len - q_len
        whole = (first_row + 1) // BN
        end = tl.cdiv(tl.minimum(first_row + BM, kv_len), BN)
        o_m = i_tile * BM + o_bm
        o_row = first_row + o_bm
        # [BM, BD]
        b_q = q_box.load([i_b, i_h, i_tile * BM, 0]).reshape(BM, BD)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, BD], tl.float32)
        for t in range(whole, end):
            b_k = k_box.load([i_b, i_kv, t * BN, 0]).reshape(BN, BD)
            b_v = v_box.load([i_b, i_kv, t * BN, 0]).reshape(BN, BD)
            b_acc, b_m, b_l, b_seen = _attend_tile(
                b_q, b_acc, b_m, b_l, b_k, b_v, t * BN + o_n, o_row, kv_len, scale_log2, OF, True, PRECISION
            )
            tl.store(slots + t * BM + o_bm, b_seen, mask=o_bm < (slot_tiles - t) * BM)
        for t in range(0, whole):
            b_k = k_box.load([i_b, i_kv, t * BN, 0]).reshape(BN, BD)
            b_v = v_box.load([i_b, i_kv, t * BN, 0]).reshape(BN, BD)
            b_acc, b_m, b_l, b_seen = _attend_tile(
                b_q, b_acc, b_m, b_l, b_k, b_v, t * BN + o_n, o_row, kv_len, scale_log2, OF, False, PRECISION
            )
            tl.store(slots + t * BM + o_bm, b_seen, mask=o_bm < (slot_tiles - t) * BM)
        o_box.store([i_b, i_h, i_tile * BM, 0], (b_acc / b_l[:, None]).to(b_q.dtype).reshape(1, 1, BM, BD))
        b_lse = b_m * scale_log2 + tl.log2(b_l)
        tl.store(lse + i_bh.to(tl.int64) * q_len + o_m, b_lse * 0.6931471805599453, mask=o_m < q_len)
        b_lse = tl.where(o_m < q_len, b_lse, float("inf"))  # rows after the last query hold no probability
        tl.debug_barrier()  # other threads of this program wrote what is read next
        remembered = tl.minimum(end, slot_tiles)
        o_r = i_tile * (BM // CELL) + tl.arange(0, BM // CELL)
        p_row = cells + (i_bh.to(tl.int64) * rows + o_r) * width
        for c in range(0, tl.cdiv(remembered, SPLIT), BC):
            o_t = c * SPLIT + tl.arange(0, BC * SPLIT)
            o_c = c + tl.arange(0, BC)
            # [BC * SPLIT, BM]
            b_seen = tl.load(slots + o_t[:, None] * BM + o_bm[None, :], mask=(o_t < remembered)[:, None], other=float("-inf"))
            b_p = tl.exp2(b_seen - b_lse[None, :]).reshape(BC, SPLIT, BM // CELL, CELL)
            if OF == "mass":
                b_cell = tl.sum(tl.sum(b_p, 3), 1)
            elif OF == "row_mass":
                b_cell = tl.max(tl.sum(b_p, 1), 2)
            else:
                b_cell = tl.max(tl.max(b_p, 3), 1)
            m_cell = (o_c < tl.cdiv(remembered, SPLIT))[:, None] & (o_r < rows)[None, :]
            tl.store(p_row[None, :] + o_c[:, None], b_cell, mask=m_cell)
        tl.debug_barrier()  # the next tile writes into the slot
        i = tl.atomic_add(counter, 1)


@triton.jit(do_not_specialize=["q_len", "kv_len", "width", "first"])
def map_of_lse_fwd_kernel(
    q_box, k_box, lse, cells, heads, group, q_len, kv_len, width, first, scale_log2,
    BD: tl.constexpr, CELL: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one row of the map, from column `first` on, by multiplying q and k again."""
    i_row = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    i_bh = tl.program_id(1)
    i_b = i_bh // heads
    i_h = i_bh % heads
    first_row = i_row * CELL + kv_len - q_len
    o_m = i_row * CELL + tl.arange(0, CELL)
    o_row = first_row + tl.arange(0, CELL)
    # [CELL, BD]
    b_q = q_box.load([i_b, i_h, i_row * CELL, 0]).reshape(CELL, BD)
    b_lse = tl.load(lse + i_bh.to(tl.int64) * q_len + o_m, mask=o_m < q_len, other=float("inf")) * 1.4426950408889634
    cells += (i_bh.to(tl.int64) * tl.num_programs(0) + i_row) * width
    for c in range(first, tl.cdiv(tl.minimum(first_row + CELL, kv_len), CELL)):
        o_key = c * CELL + tl.arange(0, CELL)
        b_k = k_box.load([i_b, i_h // group, c * CELL, 0]).reshape(CELL, BD)
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_s = tl.where((o_key < kv_len)[None, :] & (o_key[None, :] <= o_row[:, None]), b_s, float("-inf"))
        if OF == "max":
            b_cell = tl.max(tl.exp2(tl.max(b_s, 1) * scale_log2 - b_lse), 0)
        else:
            b_rows = tl.sum(tl.exp2(b_s * scale_log2 - b_lse[:, None]), 1)
            b_cell = tl.sum(b_rows, 0) if OF == "mass" else tl.max(b_rows, 0)
        tl.store(cells + c, b_cell)


def _launch_options(q: Tensor, k: Tensor) -> dict:
    """Those of attention (the rows of a tile are a multiple of CELL), and how many programs run on a multiprocessor."""
    options = attention_options(q, k, CELL)
    return dict(programs=3 if q.shape[-1] <= 64 else 2, **options)


def _forward(q: Tensor, k: Tensor, v: Tensor, block: int, of: str, scale: float, hopper: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (aligned(x) for x in (q, k, v))
    batch, heads, q_len = q.shape[:3]
    options = {} if hopper else _launch_options(q, k)
    programs, rows, keys = (1, TEAM_ROWS, CELL) if hopper else (options.pop("programs"), options["BM"], options["BN"])
    programs = min(programs * multiprocessors(q.device), batch * heads * triton.cdiv(q_len, rows))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    shape = batch, heads, triton.cdiv(q_len, CELL), triton.cdiv(k.shape[2], CELL)
    cells = torch.zeros(shape, dtype=torch.float32, device=q.device)
    slots = torch.empty(programs, SLOT_TILES, rows, dtype=torch.float32, device=q.device)
    if hopper:
        hopper_launch(q, k, v, out, lse, cells, slots, scale, of)
    else:
        _triton_launch(q, k, v, out, lse, cells, slots, scale, of, options)
    remembered = SLOT_TILES * keys // CELL
    if shape[3] > remembered:
        exact = q.dtype == torch.float32
        map_of_lse_fwd_kernel[(shape[2], batch * heads)](
            _box(q, CELL), _box(k, CELL), lse, cells, heads, heads // k.shape[1], q_len, k.shape[2], shape[3], remembered,
            scale * LOG2E, BD=power_of_2(q.shape[3]), CELL=CELL, OF=of,
            PRECISION="ieee" if exact else "tf32", num_warps=8 if exact else 4, num_stages=1 if exact else 2,
        )  # fmt: skip
    cells = _pool(cells, block // CELL, of)
    return out, lse, cells.div_(cells.sum(-1, keepdim=True))


def _triton_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cells: Tensor, slots: Tensor, scale: float, of: str,
    options: dict,
) -> None:  # fmt: skip
    """Fills out, lse and the map of the first slots.shape[1] key tiles; slots: fp32 [programs, key tiles, BM] of scratch."""
    batch, heads, q_len, dim = q.shape
    BM, BN, together = options["BM"], options["BN"], options.pop("together")
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    attention_with_map_fwd_kernel[(slots.shape[0],)](
        _box(q, BM), _box(k, BN), _box(v, BN), _box(out, BM), lse, cells, slots, counter, heads, heads // k.shape[1], q_len,
        k.shape[2], cells.shape[3], batch * heads * triton.cdiv(q_len, BM), slots.shape[1], together, scale * LOG2E,
        BD=power_of_2(dim), CELL=CELL, OF=of, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **options,
    )  # fmt: skip


def _pool(cells: Tensor, factor: int, of: str) -> Tensor:
    """Squares of factor x factor cells become one."""
    if factor == 1:
        return cells
    rows, columns = cells.shape[2:]
    squares = F.pad(cells, (0, -columns % factor, 0, -rows % factor)).unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    return squares.amax((3, 5)) if of == "max" else squares.sum((3, 5))
