"""What runs on the GPU. Imports torch and triton only."""

from .block_lists import causal_blocks, visible_pairs
from .block_mask import BlockMask
from .block_sparse_attention import block_sparse_attention, resolve_impl

__all__ = ["BlockMask", "block_sparse_attention", "causal_blocks", "resolve_impl", "visible_pairs"]
