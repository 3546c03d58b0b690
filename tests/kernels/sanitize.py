"""Every GPU kernel once, on a small ragged case, for the memory checker of CUDA:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize.py

The variable makes every tensor an allocation of its own, so that a read past its end is seen. Results are not compared here.
Needs a GPU; run it once without the checker first, because kernels compile slowly under it.
"""

from __future__ import annotations

import torch

from sparsebench.kernels import BlockMask, block_sparse_attention, causal_blocks, hopper_attention
from sparsebench.kernels.attention_with_map import attention_with_map
from sparsebench.kernels.block_mass import REDUCTIONS
from sparsebench.kernels.choose_blocks import choose_blocks
from sparsebench.methods import METHODS
from sparsebench.methods.base import ModelSpec, attention
from sparsebench.methods.seer.method import Seer

TOKENS, HEADS, KV_HEADS = 395, 4, 2  # neither blocks of 32 nor of 128 divide it
BLOCKS = [(64, 64), (128, 64), (128, 128), (64, 32), (32, 32)]


def tensors(dim: int) -> list[torch.Tensor]:
    shapes = [(1, heads, TOKENS, dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def random_mask(q_block: int, kv_block: int, heads: int) -> BlockMask:
    """The diagonal and about half of the other blocks."""
    visible = causal_blocks(TOKENS, TOKENS, q_block, kv_block, "cuda")
    last = visible.sum(-1, keepdim=True)
    own = torch.arange(visible.shape[1], device="cuda") >= last - max(q_block // kv_block, 1)
    chosen = torch.rand(1, heads, *visible.shape, device="cuda") < 0.5
    return BlockMask.from_dense((chosen | own) & visible, TOKENS, TOKENS, q_block, kv_block)


def attend(dim: int) -> int:
    q, k, v = tensors(dim)
    runs = 0
    for blocks in BLOCKS:
        for heads in (HEADS, KV_HEADS):
            mask = random_mask(*blocks, heads)
            hopper = hopper_attention.hopper_applies(q, mask)
            for impl in ("hopper", "triton") if hopper else ("triton",):
                with torch.set_grad_enabled(blocks[1] >= 64):  # smaller ones have no backward kernel
                    out, _ = block_sparse_attention(q, k, v, mask, return_lse=True, impl=impl)
                if out.requires_grad:
                    out.backward(torch.randn_like(out))
                runs += 1
    return runs


def main() -> None:
    torch.manual_seed(0)
    runs, limits = 0, {name: getattr(hopper_attention, name) for name in ("SHORT", "LONG_LIST", "TURNS")}
    for dim in (64, 128):
        for limit in (dict.fromkeys(limits, 0), limits):  # 0: the kernels for long contexts, on short ones
            for name, value in limit.items():
                setattr(hopper_attention, name, value)
            runs += attend(dim)
        q, k, v = (x.detach() for x in tensors(dim))
        for of in REDUCTIONS:
            for impl in ("auto", "triton"):
                attention_with_map(q, k, v, 64, of, impl=impl)
                runs += 1
        model = ModelSpec("random", 1, HEADS, KV_HEADS, dim)
        for method in [*(cls() for cls in METHODS.values()), Seer(threshold=0.1, share_gqa=True)]:
            attention(method.synthetic(model, 0), q, k, v, rope_theta=1e4)
            runs += 1
            print(f"D {dim}: {method.name}", flush=True)
        for tokens in (16 * TOKENS, 40 * TOKENS):  # more key blocks: 395, held by one warp, and 988, held as halves
            few, many = (torch.randn(1, HEADS, -(-tokens // block), dim, device="cuda") for block in (128, 16))
            for rule in (dict(width=9), dict(threshold=1e-3, least=3)):
                choose_blocks(few, many, tokens, tokens, 128, 16, **rule)
                runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
