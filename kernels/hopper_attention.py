"""block_sparse_attention on Hopper: which masks it takes, how the Gluon kernels are launched."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_lists import edge_blocks
from .block_mask import BlockMask
from .hopper_kernels import attention_solo_kernel
from .hopper_team import attention_team_kernel
from .launch import LOG2E, aligned, in_cache, multiprocessors, planned

BLOCKS = ((64, 64), (128, 64), (128, 128))  # queries x keys
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
SHORT, MEDIUM = 8192, 32768  # tokens up to which a choice of launch_options was measured
LONG_LIST = 1536  # lists this many keys wide or more go to teams; at 8k 1408: 404 against 415, 1792: 486 against 468
TURNS = 4  # units of work for every multiprocessor: with fewer, teams leave some of them idle at the end


def on_hopper(q: Tensor) -> bool:
    """Whether q is on a GPU of compute capability 9.0."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)


def hopper_applies(q: Tensor, mask: BlockMask) -> bool:
    """Whether hopper_forward computes this: a GPU of compute capability 9.0, fp16 or bf16, D 64 or 128, and a mask of plain
    tiled blocks of BLOCKS."""
    return on_hopper(q) and not unsupported(q, mask)


def unsupported(q: Tensor, mask: BlockMask) -> str | None:
    """What of q's and the mask's form the kernels do not compute, or None."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: it takes fp16 and bf16"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}: it takes {HEAD_DIMS}"
    if (mask.q_block, mask.kv_block) not in BLOCKS:
        return f"blocks of {mask.q_block} x {mask.kv_block}: it takes {BLOCKS}"
    if mask.column_indices is not None or mask.step != mask.kv_block:
        return "single columns or blocks that do not tile the keys"
    if mask.window is not None or mask.pv_threshold is not None:
        return "a window or a pv_threshold"
    return None


def hopper_forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, store_lse: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T over the selected, causally visible keys) v.

    Source: Shah et al. 2024 (arXiv 2407.08608), sections 3.1 and 3.2, over the key blocks that `mask` lists.

    Args:
        q: [B, H, q_len, D] bf16/fp16, D 64 or 128.
        k, v: [B, H_kv, kv_len, D], same dtype, H % H_kv == 0.
        mask: checked; batch B or 1; heads H, H_kv or 1; q_block x kv_block of BLOCKS.
        scale: logits factor > 0.
        store_lse: whether the second result is computed.

    Returns: [B, H, q_len, D] in q's dtype, accumulated in fp32; lse [B, H, q_len] fp32, natural log, or [0].
    Raises: ValueError for a form that the kernels do not compute.
    """
    reason = unsupported(q, mask)
    if reason:
        raise ValueError(f"the Hopper kernel does not compute {reason}; impl='triton' does")
    q, k, v = (aligned(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3] if store_lse else 0, dtype=torch.float32, device=q.device)
    num, index = mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous()
    mask_batch, mask_heads, _, width = index.shape
    options = launch_options(q, k, mask)
    solo = "PACK" not in options
    q_block, kv_block = (64, 64) if solo else (mask.q_block, mask.kv_block)
    edge = edge_blocks(mask.kv_len - mask.q_len, q_block, kv_block)
    tiles = -(-mask.q_len // q_block)
    heads, together = q.shape[1], options.pop("together")
    sizes = (
        mask_heads if mask_batch > 1 else 0, heads, heads // k.shape[1], mask_heads, q.shape[2], k.shape[2],
        tiles, width, edge, together,
    )  # fmt: skip
    scale_log2, dim = scale * LOG2E, q.shape[3]
    if solo:
        boxes = [_box(x, 64, dim) for x in (q, k, v, out)]
        grid = (tiles * together, q.shape[0] * heads // together)
        launch = planned(
            attention_solo_kernel, grid, *sizes, scale_log2, D=dim, Q_BLOCK=mask.q_block, KV=mask.kv_block, STORE_LSE=store_lse,
            **options,
        )  # fmt: skip
        launch(*boxes, lse, num, index)
        return out, lse
    units = tiles * q.shape[0] * heads // options["PACK"]
    programs = min(options.pop("programs") or units, units)
    columns = dim if options["BN"] == mask.kv_block else 64
    boxes = [_box(q, 64, dim), _box(k, mask.kv_block, columns), _box(v, mask.kv_block, columns), _box(out, 64, dim)]
    launch = planned(
        attention_team_kernel, (programs,), *sizes, units, scale_log2, D=dim, KV=mask.kv_block, STORE_LSE=store_lse, **options
    )
    launch(*boxes, lse, num, index)
    return out, lse


def launch_options(q: Tensor, k: Tensor, mask: BlockMask) -> dict:
    """Kernel and shape of a launch; measured on an H100 (B 1, 32 query and 8 KV heads, D 128, bf16, random blocks; the numbers
    are TFLOP/s, docs/kernels.md has all).

    together: heads (packs of PACK heads) that take turns in launch order. programs: how many share the work, None for one each.
    Without PACK, attention_solo_kernel: maxnreg 168 lets three programs share a multiprocessor, 128 four.
    """
    heads, kv_heads, kv_len, mask_heads = q.shape[1], k.shape[1], k.shape[2], mask.kv_num_blocks.shape[1]
    group = heads // kv_heads
    shared = group % 2 == 0 and mask_heads in (1, kv_heads)  # neighbouring heads read the same keys of the same head
    pack = 2 if mask.q_block == 64 else 1
    units = q.shape[0] * heads // pack * mask.kv_num_blocks.shape[2]
    longest = mask.kv_indices.shape[3] * mask.kv_block  # keys of a row, at most
    if (mask.q_block == 128 or shared) and longest >= LONG_LIST and units >= TURNS * multiprocessors(q.device):
        # Three stages against two: 592 and 583 at 32k, 644 and 623 with half kept, 620 and 604 at 128k.
        options = dict(BN=128, STAGES_K=3, STAGES_V=3, PACK=pack, together=1, programs=None, num_warps=4, maxnreg=168)
        if kv_len <= MEDIUM:  # the next unit's loads run during the end of this one: 599 and 576 (128x64), 608 and 566 (shared)
            options |= dict(together=heads_in_cache(q, k) // pack, programs=multiprocessors(q.device))
        return options
    # Heads of a group read the same K and V: 552 against 535 at 32k, half kept; 487 against 509 at 128k, where one head's K
    # and V overflow the cache and the group's programs only drift apart.
    together = group if in_cache(k, 1) else 1
    if kv_len <= SHORT:  # four programs hide each other's starts and ends: 413 against 403 with three
        return dict(STAGES=1, Q_IN_REGS=False, together=together, num_warps=4, maxnreg=128)
    # Long rows wait for the cache instead: a second stage is worth as much as the fourth program, or a little more.
    return dict(STAGES=2, Q_IN_REGS=True, together=together, num_warps=4, maxnreg=168)


def heads_in_cache(q: Tensor, k: Tensor) -> int:
    """Query heads whose keys and values stay in the second-level cache together; one KV head's at least."""
    kv_heads = k.shape[1]
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and in_cache(k, n)]
    return q.shape[1] // kv_heads * max(fitting, default=1)


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of `rows` neighbouring tokens and `columns` channels of one head of x [B, H, L, D]."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns], LAYOUT)
