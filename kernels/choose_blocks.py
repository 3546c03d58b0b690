"""Every row's best blocks, from what stands for a block, without a score matrix: op, reference, Triton kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_lists import FULL_WIDTH_BYTES, block_lists, causal_blocks
from .block_mask import BlockMask
from .launch import HALF, Launch, multiprocessors, power_of_2, runs_triton

MOST_BLOCKS = 8192  # key blocks of a row that the kernel holds in registers; longer contexts take the reference
MOST_CHANNELS = 256
SCRATCH_BYTES = 1 << 28  # of the reference's fp32 scores at a time


def choose_blocks(
    q: Tensor, k: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, *, width: int | None = None,
    threshold: float = 0.0, least: int = 0, scale: float = 1.0, last_dense: int = 0, diagonal: bool = False,
    impl: str = "auto",
) -> BlockMask:  # fmt: skip
    """Every row of blocks keeps the `width` best of its causal blocks by scale * q . k, or, where width is None, those whose
    softmax over the row's causal blocks is above `threshold`, and in any case the `least` best.

    A row's own block is the one of its first query. A row of which that query would see nothing gets its own block on top.

    Args:
        q [B, H, NQ, G], k [B, H_k, NK, G]: what stands for each block, H % H_k == 0; all sums are fp32. Products are exact
            but for fp32 operands in the kernel, which errs by at most 3 * 2^-16 of sum |q_c k_c|. Both may come as halves().
        q_len, kv_len, q_block, kv_block: tokens; q's last row sits at k's last row.
        width: blocks, at least 1; a row with fewer causal blocks keeps them all. Equal scores: the earlier block.
        threshold: strict. One below 0 keeps all.  least: blocks, for a threshold alone.
        last_dense: query blocks at the end that keep all.
        diagonal: the own block is always among the chosen, and counts in `width`.
        impl: "auto" (Triton on CUDA up to MOST_BLOCKS key blocks) | "triton" | "reference".

    Returns: trusted BlockMask. On a GPU no size of it depends on the scores, but for a threshold whose full-width lists would
        take more than FULL_WIDTH_BYTES: learning the widest row syncs.
    Raises: ValueError for shapes that do not fit together, a width below 1, an unknown impl, or what the kernel cannot take.
    """
    rows, blocks = -(-q_len // q_block), -(-kv_len // kv_block)
    if q.shape[2] != rows or k.shape[2] != blocks or q.shape[3:] != k.shape[3:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q [B, H, {rows}, G] and k [B, H_k, {blocks}, G] expected, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.ndim == 5 and (q.shape[3] != 2 or q.dtype != HALF or k.dtype != HALF):
        raise ValueError(f"halves [.., 2, G] of {HALF} expected, got q {q.dtype} {tuple(q.shape)} and k {k.dtype}")
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 block, got {width}")
    if least and width is not None:
        raise ValueError("least goes with a threshold, width says by itself how many blocks a row keeps")
    width, least = None if width is None else min(width, blocks), min(least, blocks)
    sizes = (q_len, kv_len, q_block, kv_block)
    taken = q.dtype == k.dtype and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    taken = taken and blocks <= MOST_BLOCKS and q.shape[-1] <= MOST_CHANNELS
    if not runs_triton(impl, taken and q.is_cuda):
        if q.ndim == 5:
            q, k = q.float().sum(3), k.float().sum(3)
        num, index = choose_blocks_reference(q, k, *sizes, width, threshold, least, scale, last_dense, diagonal)
    elif taken:
        num, index = _choose_triton(q, k, *sizes, width, threshold, least, scale, last_dense, diagonal)
    else:
        raise ValueError(
            f"the Triton kernel takes fp16, bf16 or fp32, up to {MOST_BLOCKS} key blocks and {MOST_CHANNELS} channels; got "
            f"{q.dtype}, {k.dtype}, {blocks} blocks, {q.shape[-1]} channels"
        )
    return BlockMask(num, index, *sizes, trusted=True)


def halves(x: Tensor) -> Tensor:
    """fp32 x [..., G] as two bf16 numbers [..., 2, G] whose sum is x to within 2^-16 |x|: three products of theirs, one of the
    high halves and two of a high and a low one, are as good as one of fp32 and go to the matrix units.
    The low half of an infinite number is NaN."""
    high = x.bfloat16()
    return torch.stack((high, (x - high.float()).bfloat16()), dim=-2).to(HALF)


def choose_blocks_reference(
    q: Tensor, k: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, width: int | None, threshold: float,
    least: int, scale: float, last_dense: int, diagonal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in torch, a few heads at a time; products in q's dtype."""
    visible = causal_blocks(q_len, kv_len, q_block, kv_block, q.device)
    own = own_blocks(q_len, kv_len, q_block, kv_block, q.device)
    group = q.shape[1] // k.shape[1]
    step = max(SCRATCH_BYTES // (4 * q.shape[0] * visible.numel()), 1)
    chosen = torch.empty(*q.shape[:2], *visible.shape, dtype=torch.bool, device=q.device)
    for h in range(0, q.shape[1], step):
        part = slice(h, h + step)
        heads = torch.arange(h, min(h + step, q.shape[1]), device=q.device) // group
        logits = (q[:, part] @ k[:, heads].transpose(-1, -2) * scale).float().masked_fill_(~visible, float("-inf"))
        keep = logits.softmax(-1) > threshold if width is None else torch.zeros_like(chosen[:, part])
        if diagonal:
            keep |= own
            logits.masked_fill_(own, float("inf"))
        if count := width or least:
            keep.scatter_(-1, logits.sort(dim=-1, descending=True, stable=True).indices[..., :count], True)
        chosen[:, part] = keep
    return block_lists(complete_rows(chosen & visible, own, last_dense), q_len, kv_len, q_block, kv_block, impl="reference")


def own_blocks(q_len: int, kv_len: int, q_block: int, kv_block: int, device=None) -> Tensor:
    """bool [NQ, NK]: the block of each row's first query, which every query of the row sees at least in part."""
    own = torch.arange(kv_len - q_len, kv_len, q_block, device=device) // kv_block
    return own[:, None] == torch.arange(-(-kv_len // kv_block), device=device)


def complete_rows(chosen: Tensor, own: Tensor, last_dense: int) -> Tensor:
    """chosen [B, H, NQ, NK], its last rows dense, and the own block in rows whose first query would see nothing."""
    chosen[..., max(own.shape[0] - last_dense, 0) :, :] = True
    # Blocks after the own one, visible to a row's later queries only, do not count as seen by its first.
    reaches_first = own.flip(-1).cumsum(-1).flip(-1) > 0
    return chosen | (~(chosen & reaches_first).any(-1, keepdim=True) & own)


@triton.jit
def _order(x):
    """int32 whose order is that of fp32 x, NaN above all; its own inverse, but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(b_s, b_want, FLOAT_STEPS: tl.constexpr):
    """bool [R, N]: the b_want [R] best of every row of scores [R, N], equal ones from the left. -inf is never wanted.

    Halves the interval [lo, hi) of scores that holds the last one wanted: first by value, which closes in on scores of one
    magnitude within few steps, then by bits, which ends after 32 whatever they are.
    """
    b_key = _order(b_s)
    b_hi = tl.max(b_key, 1) + 1
    b_lo = tl.min(tl.where(b_s == float("-inf"), 0x7FFFFFFF, b_key), 1)
    b_count = tl.sum((b_key >= b_lo[:, None]).to(tl.int32), 1)  # at least lo
    b_above = tl.zeros_like(b_count)  # at least hi
    step = 0
    going = tl.max(((b_count > b_want) & (b_want > 0) & (b_lo + 1 < b_hi)).to(tl.int32), 0)
    while going > 0:
        b_by_bits = (b_lo & b_hi) + ((b_lo ^ b_hi) >> 1)
        b_low = (b_lo ^ ((b_lo >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        b_high = (b_hi ^ ((b_hi >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        b_mid = tl.where(step < FLOAT_STEPS, _order(0.5 * b_low + 0.5 * b_high), b_by_bits)
        b_mid = tl.maximum(tl.minimum(b_mid, b_hi - 1), b_lo + 1)
        b_n = tl.sum((b_key >= b_mid[:, None]).to(tl.int32), 1)
        b_more = b_n >= b_want
        b_lo = tl.where(b_more, b_mid, b_lo)
        b_count = tl.where(b_more, b_n, b_count)
        b_hi = tl.where(b_more, b_hi, b_mid)
        b_above = tl.where(b_more, b_above, b_n)
        step += 1
        going = tl.max(((b_count > b_want) & (b_want > 0) & (b_lo + 1 < b_hi)).to(tl.int32), 0)
    b_take = (b_key >= b_lo[:, None]) & (b_s != float("-inf"))
    if tl.max((b_count > b_want).to(tl.int32), 0) > 0:
        b_sure = b_key >= b_hi[:, None]
        b_tied = (b_take & (b_key < b_hi[:, None])).to(tl.int32)
        b_take = b_sure | ((b_tied > 0) & (tl.cumsum(b_tied, 1) <= (b_want - b_above)[:, None]))
    return b_take


@triton.jit
def _choose_rows(
    scores, num, index, i_bh, first, rows, columns, width, threshold, offset, kv_len, first_dense, q_block, kv_block,
    TOP: tl.constexpr, ABOVE: tl.constexpr, DIAGONAL: tl.constexpr, COMPLETE: tl.constexpr, LIST: tl.constexpr,
    NC: tl.constexpr, HELD: tl.constexpr, BR: tl.constexpr, FLOAT_STEPS: tl.constexpr,
):  # fmt: skip
    """BR rows of a head from `first` on, of whose scores, NC a row, the first HELD are held in registers."""
    o_r = tl.arange(0, BR)
    o_c = tl.arange(0, HELD)
    m_r = first + o_r < rows
    b_row = tl.minimum(first + o_r, rows - 1)
    b_first_query = offset + b_row * q_block
    b_own = (b_first_query // kv_block)[:, None] == o_c[None, :]
    b_seen = (tl.minimum(b_first_query + q_block, kv_len) - 1) // kv_block + 1
    m_c = o_c[None, :] < b_seen[:, None]
    # [BR, HELD]
    b_s = tl.load(scores + o_r[:, None] * NC + o_c[None, :], mask=m_c, other=float("-inf"))
    if ABOVE:
        b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * 1.4426950408889634)
        b_take = (b_p / tl.sum(b_p, 1)[:, None] > threshold) & m_c
    if TOP:
        b_s = tl.where(b_s == b_s, b_s, float("inf"))  # NaN is chosen, and never more of it than wanted
        b_want = tl.minimum(b_seen, width)
        if DIAGONAL:
            b_s = tl.where(b_own, float("-inf"), b_s)
            b_want -= 1
        b_best = _best(b_s, b_want, FLOAT_STEPS)
        b_take = b_take | b_best if ABOVE else b_best
    if DIAGONAL:
        b_take |= b_own
    b_take |= m_c & (b_row >= first_dense)[:, None]
    if COMPLETE:
        b_sees = b_take & (o_c[None, :] * kv_block <= b_first_query[:, None])
        b_take |= b_own & (tl.max(b_sees.to(tl.int32), 1) == 0)[:, None]
    i_row = i_bh.to(tl.int64) * rows + first
    tl.store(num + i_row + o_r, tl.sum(b_take.to(tl.int32), 1), mask=m_r)
    if LIST:
        b_slot = o_r[:, None] * columns + tl.cumsum(b_take.to(tl.int32), 1) - 1
        tl.store(index + i_row * columns + b_slot, tl.broadcast_to(o_c[None, :], [BR, HELD]), mask=b_take & m_r[:, None])


@triton.jit
def choose_blocks_fwd_kernel(
    q, k, scores, num, index, tiles, heads_all, heads, k_heads, rows, blocks, width, columns, threshold, scale, offset,
    kv_len, first_dense, q_block, kv_block,
    G: tl.constexpr, BG: tl.constexpr, TOP: tl.constexpr, ABOVE: tl.constexpr, DIAGONAL: tl.constexpr, COMPLETE: tl.constexpr,
    LIST: tl.constexpr, NC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SIZES: tl.constexpr,
    FLOAT_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: tiles of BM rows of one head, one after the other. The scores of a tile go to memory that is the program's
    own, since a row must be seen whole to choose; then BR rows of NC scores are held in registers, or, where the tile sees at
    most half of the blocks, twice as many rows of half the length, and so on for SIZES sizes."""
    scores += tl.program_id(0).to(tl.int64) * (BM * NC)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_g = tl.arange(0, BG)
    m_g = (o_g < G)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_bh = tile % heads_all
        first = (tiles - 1 - tile) // heads_all * BM  # long rows first
        i_k = i_bh // heads * k_heads + i_bh % heads // (heads // k_heads)
        end = tl.minimum(offset + tl.minimum(first + BM, rows) * q_block, kv_len)
        seen = (end - 1) // kv_block + 1
        # [BM, BG]
        p_q = q + (i_bh.to(tl.int64) * rows + first + o_m)[:, None] * (PARTS * G) + o_g[None, :]
        m_q = (first + o_m < rows)[:, None] & m_g
        b_q = tl.load(p_q, mask=m_q, other=0.0)
        if PARTS == 2:
            b_q_low = tl.load(p_q + G, mask=m_q, other=0.0)
        for n in range(0, seen, BN):
            p_k = k + (i_k.to(tl.int64) * blocks + n + o_n)[:, None] * (PARTS * G) + o_g[None, :]
            m_k = (n + o_n < blocks)[:, None] & m_g
            # [BN, BG]
            b_k = tl.load(p_k, mask=m_k, other=0.0)
            # [BM, BN]
            if PARTS == 2:
                b_k_low = tl.load(p_k + G, mask=m_k, other=0.0)
                b_s = tl.dot(b_q_low, b_k.T)
                b_s = tl.dot(b_q, b_k_low.T, b_s)
                b_s = tl.dot(b_q, b_k.T, b_s)
            else:
                b_s = tl.dot(b_q, b_k.T)
            tl.store(scores + o_m[:, None] * NC + n + o_n[None, :], b_s * scale)
        tl.debug_barrier()
        for size in tl.static_range(SIZES):
            if (seen <= NC >> size) & ((size == SIZES - 1) | (seen > NC >> size + 1)):
                at_once: tl.constexpr = min(BR << size, BM)
                for r in range(0, BM, at_once):
                    _choose_rows(
                        scores + r * NC, num, index, i_bh, first + r, rows, columns, width, threshold, offset, kv_len,
                        first_dense, q_block, kv_block, TOP, ABOVE, DIAGONAL, COMPLETE, LIST, NC, NC >> size, at_once,
                        FLOAT_STEPS,
                    )  # fmt: skip
        tl.debug_barrier()


def _launch_options(channels: int, columns: int) -> dict[str, Any]:
    """`programs` per multiprocessor, whose registers `maxnreg` divides among them; BR: rows of `columns` scores held at a time,
    SIZES of such rows.

    On an H100, best-n and threshold, ms: one warp takes 256, 512, 1024 columns in 0.040 0.041, 0.082 0.084, 0.276 0.331; two
    warps in 0.047 0.050, 0.092 0.099, 0.290 0.300, and 2048 in 1.11 1.30, where one takes 1.72 2.22 and four 1.24 1.22. Eight
    take 128 columns in 0.018 0.019, one in 0.026 0.028. Both kinds of selection share the rule. Twice the rows at a time,
    tiles of 64 keys, a third stage, and fewer registers for more programs lost 0 to 50 %.
    """
    warps = 8 if columns <= 128 else 1 if columns <= 512 else max(columns // 1024, 2)
    tile = dict(BM=16, BN=32 if warps <= 2 else 64, BR=16 if columns <= 128 else max(512 // columns, 1), FLOAT_STEPS=16)
    together, maxnreg = (8, 255) if warps == 1 or channels > 128 else (16, 128) if columns <= 2048 else (12, 168)
    programs = dict(programs=max(together // warps, 1), maxnreg=maxnreg, SIZES=1 if columns <= 512 else 2)
    return tile | programs | dict(num_warps=warps, num_stages=2)


@functools.lru_cache(256)
def _launch(
    q: tuple[int, ...], k: tuple[int, ...], device: torch.device, sizes: tuple[int, int, int, int],
    width: int | None, threshold: float, least: int, scale: float, first_dense: int, diagonal: bool, columns: int | None,
) -> tuple[Launch, tuple[int, int, int]]:  # fmt: skip
    """The launch for these shapes, which writes lists of `columns` blocks, or counts alone (None); the shape of its scratch."""
    (batch, heads, rows, *_, channels), (k_heads, blocks), (q_len, kv_len, q_block, kv_block) = q, k[1:3], sizes
    held = power_of_2(max(blocks, 64))
    options = _launch_options(channels, held)
    tiles = batch * heads * -(-rows // options["BM"])
    programs = min(options.pop("programs") * multiprocessors(device), tiles)
    launch = Launch(
        choose_blocks_fwd_kernel, (programs,), tiles, batch * heads, heads, k_heads, rows, blocks, width or least,
        columns or 0, threshold, scale, kv_len - q_len, kv_len, first_dense, q_block, kv_block,
        G=channels, BG=power_of_2(max(channels, 16)), TOP=bool(width or least), ABOVE=width is None,
        DIAGONAL=diagonal, COMPLETE=width is None or not _aligned(*sizes), LIST=columns is not None, NC=held,
        PARTS=len(q) - 3, **options,
    )  # fmt: skip
    return launch, (programs, options["BM"], held)


def _aligned(q_len: int, kv_len: int, q_block: int, kv_block: int) -> bool:
    """Whether all queries of a row see the same blocks, each at least in part."""
    return (kv_len - q_len) % kv_block == 0 and kv_block % q_block == 0


def _choose_triton(
    q: Tensor, k: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, width: int | None, threshold: float,
    least: int, scale: float, last_dense: int, diagonal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dtype == torch.float32 and q.ndim == 4:
        q, k = halves(q), halves(k)
    q, k = q.contiguous(), k.contiguous()
    rows, blocks, sizes = q.shape[2], k.shape[2], (q_len, kv_len, q_block, kv_block)
    first_dense = max(rows - last_dense, 0)
    num = torch.empty(q.shape[:3], dtype=torch.int32, device=q.device)

    def run(columns: int | None) -> Tensor:
        launch, scratch = _launch(
            q.shape, k.shape, q.device, sizes, width, float(threshold), least, float(scale), first_dense, diagonal,
            columns,
        )  # fmt: skip
        scores = torch.empty(scratch, dtype=torch.float32, device=q.device)
        index = num if columns is None else torch.empty((*q.shape[:3], columns), dtype=torch.int32, device=q.device)
        launch(q, k, scores, num, index)
        return index

    columns = blocks
    if width is not None and first_dense == rows:
        columns = min(width + (not _aligned(*sizes)), blocks)
    elif width is None and 4 * num.numel() * blocks > FULL_WIDTH_BYTES:
        run(None)
        columns = int(num.max())
    return num, run(columns)
