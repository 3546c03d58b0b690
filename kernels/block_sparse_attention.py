"""Attention over the blocks of a BlockMask: op, reference, portable Triton kernel (Hopper's is in hopper_attention.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block_lists import edge_blocks
from .block_mask import BlockMask
from .hopper_attention import hopper_applies, hopper_forward, unsupported
from .launch import LOG2E, aligned, in_cache, planned, power_of_2

HEAD_DIMS = (64, 96, 128, 256)
TILE_ROWS = 64  # queries that are computed together; masks with smaller query blocks run on the union of their lists


def resolve_impl(impl: str, q: Tensor, mask: BlockMask) -> str:
    """The implementation that `impl` means for q [B, H, q_len, D] and a mask: "auto" is "hopper" on a GPU of compute capability
    9.0 where that kernel computes this, else "triton" on CUDA where head_dim and dtype are supported, else "reference".

    Raises: ValueError for an unknown name, or "hopper" where it is not possible.
    """
    if impl not in ("auto", "hopper", "triton", "reference"):
        raise ValueError(f"impl is 'auto', 'hopper', 'triton' or 'reference', got {impl!r}")
    if impl == "hopper" and not hopper_applies(q, mask):
        raise ValueError(f"the Hopper kernel cannot run: {unsupported(q, mask) or f'no compute capability 9.0 on {q.device}'}")
    if impl != "auto":
        return impl
    return "hopper" if hopper_applies(q, mask) else "triton" if has_triton(q) else "reference"


def has_triton(q: Tensor) -> bool:
    """Whether the portable kernels take q's device, dtype and head_dim."""
    return q.is_cuda and q.shape[-1] in HEAD_DIMS and q.dtype != torch.float64


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T over the selected, causally visible keys) v.

    Source: Dao et al. 2022 (arXiv 2205.14135), Algorithm 1, over the key blocks that `mask` lists; no other block is read.

    Args:
        q: [B, H, q_len, D] bf16/fp16/fp32.
        k, v: [B, H_kv, kv_len, D], same dtype, H % H_kv == 0.
        mask: batch B or 1; heads H, H_kv or 1.
        scale: logits factor > 0, 1 / sqrt(D) by default.
        return_lse: also return the natural-log sum of exponentials.
        impl: "auto" | "hopper" | "triton" | "reference" (resolve_impl); a named one never falls back.

    Returns: [B, H, q_len, D] in q's dtype, accumulated in fp32; with return_lse also lse [B, H, q_len] fp32.
    Both are differentiable in q, k and v, through the kernels once and with the same bits every time.
    Raises: ValueError when a query row would see no key, shapes or dtypes disagree, D is unsupported, or a gradient is needed
        that Triton has no kernel for (block_sparse_attention_backward.py says which).
    """
    _check_mask(q, k, mask, check_tensors(q, k, v))
    mask = mask.check()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    impl = resolve_impl(impl, q, mask)
    forward = hopper_forward if impl == "hopper" else _triton_forward
    if impl == "reference":
        out, lse = block_sparse_attention_reference(q, k, v, mask, scale)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        from .block_sparse_attention_backward import differentiable  # which imports this module

        out, lse = differentiable(forward, q, k, v, mask, scale)
    else:
        out, lse = forward(q, k, v, mask, scale, return_lse)
    return (out, lse) if return_lse else out


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> str:
    """q's, k's and v's shapes as text for messages. Raises: ValueError when shapes or dtypes disagree."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"need q [B, H, q_len, D] and k, v [B, H_kv, kv_len, D], got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return shapes


def _check_mask(q: Tensor, k: Tensor, mask: BlockMask, shapes: str) -> None:
    if (mask.q_len, mask.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(f"mask is for {mask.q_len} x {mask.kv_len} tokens, got {shapes}")
    batch, heads = mask.kv_num_blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, k.shape[1], q.shape[1]):
        raise ValueError(f"mask for batch {batch} and {heads} heads does not fit {shapes}")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, q on {q.device}")


def block_sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """The definition in torch, one query block at a time; computes in fp32, or in fp64 for fp64 inputs."""
    batch, heads, q_len, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    member, own_rows = None, mask.q_block
    if mask.q_block < TILE_ROWS and mask.fits_tiles(TILE_ROWS):
        mask, member = mask.by_tile(TILE_ROWS)
    mask_group = heads // mask.kv_num_blocks.shape[1]
    given, q, k, v = q.dtype, q.to(dtype) * scale, k.to(dtype).reshape(-1, dim), v.to(dtype).reshape(-1, dim)
    kv_heads = k.shape[0] // (batch * mask.kv_len)
    kv_head = (
        torch.arange(heads, device=q.device) // (heads // kv_heads) + kv_heads * torch.arange(batch, device=q.device)[:, None]
    )
    token0 = kv_head[..., None] * mask.kv_len  # where a head's keys start among the rows of k and v, [B, H, 1]

    def per_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(mask_group, dim=1).expand(batch, *[-1] * (x.ndim - 1))

    num, index = per_head(mask.kv_num_blocks), per_head(mask.kv_indices)
    if member is not None:
        member = torch.nn.functional.pad(per_head(member), (0, 1))  # no row has chosen the block after the last
    if mask.column_indices is not None:
        assert mask.column_num is not None
        column_num, column_index = per_head(mask.column_num), per_head(mask.column_indices)
    in_block = torch.arange(mask.kv_block, device=q.device)
    out, lse = [], []
    for r, q0 in enumerate(range(0, q_len, mask.q_block)):
        i = torch.arange(q0, min(q0 + mask.q_block, q_len), device=q.device)[:, None] + mask.kv_len - q_len
        width = max(int(num[:, :, r].max()), 1)
        listed = torch.arange(width, device=q.device) < num[:, :, r, None]
        keys = (index[:, :, r, :width].long() * mask.step)[..., None] + in_block
        keys = keys.where(listed[..., None], mask.kv_len).flatten(-2)  # padding becomes a key after the last
        if mask.column_indices is not None:
            columns = int(column_num[:, :, r].max())
            listed = torch.arange(columns, device=q.device) < column_num[:, :, r, None]
            keys = torch.cat([keys, column_index[:, :, r, :columns].long().where(listed, mask.kv_len)], dim=-1)
        real = keys < mask.kv_len
        rows = (token0 + keys.where(real, keys.amin(-1, keepdim=True))).flatten()  # padding re-reads a listed key
        logits = q[:, :, q0 : q0 + len(i)] @ k.index_select(0, rows).view(batch, heads, -1, dim).transpose(-1, -2)
        # Most keys lie before every query of the row: only what comes from the first later one on needs a mask.
        every = mask.window is not None or member is not None
        masked_from = 0 if every else int((keys <= i[0]).all(0).all(0).cumprod(0).sum())
        j = keys[:, :, None, masked_from:]
        hidden = ~mask.sees(i, j)
        if member is not None:
            own = member[:, :, (i[:, 0] - mask.kv_len + q_len) // own_rows]
            block = (j // mask.kv_block).clamp(max=own.shape[-1] - 1)
            hidden |= ~own.gather(-1, block.expand(*hidden.shape))
        logits[..., masked_from:].masked_fill_(hidden, float("-inf"))
        top = logits.detach().amax(-1, keepdim=True)
        p = logits.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        out.append(p @ v.index_select(0, rows).view(batch, heads, -1, dim) / total)
        lse.append((top + total.log()).squeeze(-1))
    return torch.cat(out, dim=2).to(given), torch.cat(lse, dim=2)


@triton.jit
def _attend_tile(
    b_q, b_acc, b_m, b_l, b_k, b_v, o_key, m_key, o_row, scale_log2, kv_len, p_member, pv_log2,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, MEMBER: tl.constexpr,
    PV_SKIP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys o_key [BN]. Only MASKED tiles look at causality and at m_key [BN], and
    with MEMBER at p_member [BM]: whether each row has chosen the block."""
    # [BM, BN]
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if MASKED:
        seen = m_key[None, :] & (o_key[None, :] <= o_row[:, None])
        if WINDOW >= 0:
            near = (o_row[:, None] - o_key[None, :] < WINDOW) | (o_key < SINK)[None, :] | (o_row >= kv_len - LAST)[:, None]
            if STRIDE > 0:
                near = near | ((o_row[:, None] - o_key[None, :]) % STRIDE == 0)
            seen = seen & near
        if MEMBER:
            seen = seen & (tl.load(p_member, mask=o_row < kv_len, other=0) != 0)[:, None]
        b_s = tl.where(seen, b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new) * scale_log2
    else:
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_base = b_m_new * scale_log2
    # The running maximum stays unscaled so that the scale folds into one multiply-add per logit.
    b_p = tl.exp2(b_s * scale_log2 - b_base[:, None])
    b_alpha = tl.exp2(b_m * scale_log2 - b_base)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    if PV_SKIP:
        if tl.max(tl.max(b_s, 1) * scale_log2 - b_base, 0) >= -pv_log2:  # else no row's maximum has moved
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    else:
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_m_new, b_l


@triton.jit
def block_sparse_attention_fwd_kernel(
    q_box, k_box, v_box, o_box, k, v, lse, kv_num, kv_index, column_num, column_index, member,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mask_batch, heads, group, mask_heads, q_len, kv_len, rows, width, columns, edge_tiles, together, scale_log2, pv_log2,
    own_rows, blocks,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, KV_STEP: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, MEMBER: tl.constexpr,
    PV_SKIP: tl.constexpr, STORE_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM query rows of one head. The tiles that may cross the diagonal come before the pipelined loop.

    A masked tile after the loop would make ptxas serialise every wgmma of the loop (C7515), so the list is walked from
    its end: first the edge_tiles last tiles with masks, then the rest, which every row of the program sees whole.
    Their count is no constant: LLVM unrolls a loop of known length, and C7515 comes back.
    `together` neighbouring heads take turns, so that programs which run at the same time share their part of K and V.
    Blocks move through tensor descriptors (*_box: the copy engine on Hopper), single columns through pointers.
    """
    i_tile = tl.num_programs(0) // together - 1 - tl.program_id(0) // together  # long rows first
    i_bh = tl.program_id(1) * together + tl.program_id(0) % together
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_kv = i_h // group
    i_mask_head = (i_b * stride_mask_batch + i_h // (heads // mask_heads)).to(tl.int64)
    i_mask = i_mask_head * rows + i_tile * BM // Q_BLOCK
    kv_index += i_mask * width
    SPLIT: tl.constexpr = KV_BLOCK // BN
    listed_blocks = tl.load(kv_num + i_mask)
    tiles = listed_blocks * SPLIT
    i_next = tl.load(kv_index, mask=tiles > 0, other=0)
    if KV_BLOCK > 128:  # most of a large block at the diagonal lies in the future
        i_last = tl.load(kv_index + listed_blocks - 1, mask=tiles > 0, other=0) * KV_STEP
        end = tl.minimum((i_tile + 1) * BM + kv_len - q_len, kv_len)
        tiles -= tl.maximum(SPLIT - tl.cdiv(end - i_last, BN), 0)
        tiles = tl.maximum(tiles, 0)

    o_m = i_tile * BM + tl.arange(0, BM)
    o_row = o_m + kv_len - q_len
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    # [BM, BD]
    b_q = q_box.load([i_b, i_h, i_tile * BM, 0]).reshape(BM, BD)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    p_own = member + (i_mask_head * tl.cdiv(q_len, own_rows) + o_m // own_rows) * blocks

    if HAS_COLUMNS:
        listed = tl.load(column_num + i_mask)
        for c in range(0, listed, BN):
            m_key = c + o_n < listed
            o_key = tl.load(column_index + i_mask * columns + c + o_n, mask=m_key, other=0)
            m_tile = m_key[:, None] & (o_d < D)[None, :]
            o_token = o_key[:, None].to(tl.int64)
            p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + o_token * stride_kn + o_d[None, :]
            p_v = v + i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + o_token * stride_vn + o_d[None, :]
            # [BN, BD]
            b_k = tl.load(p_k, mask=m_tile, other=0.0)
            b_v = tl.load(p_v, mask=m_tile, other=0.0)
            b_acc, b_m, b_l = _attend_tile(
                b_q, b_acc, b_m, b_l, b_k, b_v, o_key, m_key, o_row, scale_log2, kv_len, p_own, pv_log2,
                WINDOW, SINK, LAST, STRIDE, False, PV_SKIP, True, PRECISION,
            )  # fmt: skip
    for i in range(0, tl.minimum(tiles, edge_tiles)):
        t = tiles - 1 - i
        i_block = tl.load(kv_index + t // SPLIT)
        first = i_block * KV_STEP + t % SPLIT * BN
        o_key = first + o_n
        b_k = k_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_v = v_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_acc, b_m, b_l = _attend_tile(
            b_q, b_acc, b_m, b_l, b_k, b_v, o_key, o_key < kv_len, o_row, scale_log2, kv_len, p_own + i_block, pv_log2,
            WINDOW, SINK, LAST, STRIDE, MEMBER, PV_SKIP, True, PRECISION,
        )  # fmt: skip
    for t in range(0, tiles - edge_tiles):
        i_block = i_next
        first = i_block * KV_STEP + t % SPLIT * BN
        # Read one step early: a load that depends on a load of its own step cannot be pipelined more than one step deep.
        i_next = tl.load(kv_index + (t + 1) // SPLIT)
        o_key = first + o_n
        b_k = k_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_v = v_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_acc, b_m, b_l = _attend_tile(
            b_q, b_acc, b_m, b_l, b_k, b_v, o_key, o_key < kv_len, o_row, scale_log2, kv_len, p_own + i_block, pv_log2,
            WINDOW, SINK, LAST, STRIDE, MEMBER, PV_SKIP, WINDOW >= 0 or MEMBER, PRECISION,
        )  # fmt: skip

    if MEMBER:  # rows after the last query have chosen nothing
        b_l = tl.where(o_m < q_len, b_l, 1.0)
    b_o = (b_acc / b_l[:, None]).to(b_q.dtype)
    o_box.store([i_b, i_h, i_tile * BM, 0], b_o.reshape(1, 1, BM, BD))
    if STORE_LSE:
        b_lse = b_m * (scale_log2 * 0.6931471805599453) + tl.log(b_l)
        tl.store(lse + i_bh.to(tl.int64) * q_len + o_m, b_lse, mask=o_m < q_len)


def _launch_options(q: Tensor, k: Tensor, kv_block: int) -> dict:
    """Tile shape, heads that take turns, warps and stages; measured on an H100 (docs/kernels.md)."""
    if q.dtype == torch.float32:  # exact fp32 products run on the ordinary cores; wider tiles spill registers
        return dict(BM=64, BN=16, together=1, num_warps=8, num_stages=1)
    together = heads_in_turn(q, k, kv_block)
    if k.shape[3] > 128:
        return dict(BM=64, BN=32, together=together, num_warps=4, num_stages=2)
    return dict(BM=64, BN=min(kv_block, 64), together=together, num_warps=4, num_stages=3)


def heads_in_turn(q: Tensor, k: Tensor, kv_block: int) -> int:
    """Neighbouring query heads that take turns in launch order."""
    heads, kv_len = k.shape[1:3]
    if in_cache(k, heads):
        return q.shape[1]
    return q.shape[1] // heads if kv_len > 8192 and kv_block == 64 else 1


def _box(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of `rows` neighbouring tokens of one head of x [B, H, L, D], its channels padded to a power of 2."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, power_of_2(x.shape[-1])])


def _edge_tiles(mask: BlockMask, BN: int) -> int:
    """How many tiles at the end of a row's list may hold a key later than the first row of a program."""
    offset = mask.kv_len - mask.q_len if mask.step == mask.kv_block else 1  # untiled blocks start anywhere
    return edge_blocks(offset, mask.q_block, mask.kv_block) * (mask.kv_block // BN)


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, store_lse: bool) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"the Triton kernel supports head_dim {HEAD_DIMS}, got {dim}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernel supports fp16, bf16 and fp32, got {q.dtype}")
    if (mask.q_block not in (64, 128) and TILE_ROWS % mask.q_block) or (mask.kv_block % 64 and mask.kv_block != 32):
        raise ValueError(
            f"the Triton kernel supports query blocks of 128, 64 and its divisors and key blocks of 32 or multiples of 64, got "
            f"{mask.q_block} x {mask.kv_block}"
        )
    q, k, v = (aligned(x) for x in (q, k, v))
    member, own_rows = None, mask.q_block
    if mask.q_block < TILE_ROWS:
        mask, member = mask.by_tile(TILE_ROWS)
    options = _launch_options(q, k, mask.kv_block)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3] if store_lse else 0, dtype=torch.float32, device=q.device)
    num, index = mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous()
    mask_batch, mask_heads, rows, width = index.shape
    columns = num if mask.column_indices is None else mask.column_indices.contiguous()
    column_num = num if mask.column_num is None else mask.column_num.contiguous()
    together = options.pop("together")
    grid = (-(-q_len // options["BM"]) * together, batch * heads // together)
    BM, BN = options["BM"], options["BN"]
    launch = planned(
        block_sparse_attention_fwd_kernel, grid, *k.stride()[:3], *v.stride()[:3],
        mask_heads if mask_batch > 1 else 0, heads, heads // k.shape[1], mask_heads, q_len, k.shape[2],
        rows, width, columns.shape[-1], _edge_tiles(mask, BN), together, scale * LOG2E,
        (mask.pv_threshold or 0.0) * LOG2E, own_rows, 0 if member is None else member.shape[-1],
        D=dim, BD=power_of_2(dim), Q_BLOCK=mask.q_block, KV_BLOCK=mask.kv_block, KV_STEP=mask.step,
        HAS_COLUMNS=mask.column_indices is not None, WINDOW=-1 if mask.window is None else mask.window, SINK=mask.sink,
        LAST=mask.last, STRIDE=mask.stride or 0, MEMBER=member is not None, PV_SKIP=mask.pv_threshold is not None,
        STORE_LSE=store_lse,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **options,
    )  # fmt: skip
    launch(
        _box(q, BM), _box(k, BN), _box(v, BN), _box(out, BM), k, v, lse, num, index, column_num, columns,
        num if member is None else member.contiguous().view(torch.uint8),
    )  # fmt: skip
    return out, lse
