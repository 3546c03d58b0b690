"""block_sparse_attention on Hopper: which masks it takes, how the Gluon kernels are launched."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_mask import BlockMask
from .hopper_kernels import attention_solo_kernel
from .hopper_team import attention_team_kernel
from .launch import LOG2E, aligned

BLOCKS = ((64, 64), (128, 64), (128, 128))  # queries x keys
HEAD_DIMS = (64, 128)


def hopper_applies(q: Tensor, mask: BlockMask) -> bool:
    """Whether hopper_forward computes this: a GPU of compute capability 9.0, fp16 or bf16, D 64 or 128, and a mask of plain
    tiled blocks of BLOCKS."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0) and not unsupported(q, mask)


def unsupported(q: Tensor, mask: BlockMask) -> str | None:
    """What of q's and the mask's form the kernels do not compute, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
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
    mask_batch, mask_heads, tiles, width = index.shape
    options = launch_options(q, k, mask)
    # Whole blocks at the end of a row's list that may hold a key later than the block's first query.
    edge = (mask.q_block + mask.kv_block - 3) // mask.kv_block + 1
    if (mask.kv_len - mask.q_len) % max(mask.q_block, mask.kv_block) == 0:
        edge = max(mask.q_block // mask.kv_block, 1)
    heads, together = q.shape[1], options.pop("together")
    tables = (
        lse, num, index, mask_heads if mask_batch > 1 else 0, heads, heads // k.shape[1], mask_heads, q.shape[2], k.shape[2],
        tiles, width, edge, together,
    )  # fmt: skip
    scale_log2, dim = scale * LOG2E, q.shape[3]
    if "TEAM" not in options:
        boxes = [_box(x, 64, dim) for x in (q, k, v, out)]
        grid = (tiles * together, q.shape[0] * heads // together)
        attention_solo_kernel[grid](*boxes, *tables, scale_log2, D=dim, BN=mask.kv_block, STORE_LSE=store_lse, **options)
        return out, lse
    units = tiles * q.shape[0] * heads // options["PACK"]
    programs = min(options.pop("programs") or units, units)
    columns = dim if options["BN"] == mask.kv_block else 64
    boxes = [_box(q, 64, dim), _box(k, mask.kv_block, columns), _box(v, mask.kv_block, columns), _box(out, 64, dim)]
    attention_team_kernel[(programs,)](
        *boxes, *tables, units, scale_log2, D=dim, KV=mask.kv_block, STORE_LSE=store_lse, **options
    )
    return out, lse


def launch_options(q: Tensor, k: Tensor, mask: BlockMask) -> dict:
    """Kernel and shape of a launch.

    together: heads (packs of PACK heads) that take turns in launch order. programs: how many share the work, None for one each.
    Without TEAM, attention_solo_kernel: maxnreg 168 lets three programs share a multiprocessor.
    """
    group, mask_heads = q.shape[1] // k.shape[1], mask.kv_num_blocks.shape[1]
    shared = group % 2 == 0 and mask_heads in (1, k.shape[1])  # neighbouring heads read the same keys of the same head
    if mask.q_block == 64 and not shared:
        return dict(STAGES=2, Q_IN_REGS=True, together=1, num_warps=4, maxnreg=168)
    pack = 2 if mask.q_block == 64 else 1
    return dict(
        BN=128, STAGES_K=3, STAGES_V=3, TEAM=2, PACK=pack, OVERLAP=True, PINGPONG=False, Q_IN_REGS=False, together=1,
        programs=None, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of `rows` neighbouring tokens and `columns` channels of one head of x [B, H, L, D]."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns], layout)
