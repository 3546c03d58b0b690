"""BlockMask: which key blocks every block of queries attends to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .block_lists import SCRATCH_ELEMENTS, block_lists, numbers, row_bounds, visible_pairs
from .pair_counts import add_pairs


@dataclass(frozen=True)
class BlockMask:
    """The selection of one attention layer, in FlexAttention's terms and compact.

    kv_num_blocks   [B, H, NQ] int32: how many key blocks each query block reads
    kv_indices      [B, H, NQ, K] int32: which, ascending in the first kv_num_blocks; the rest is ignored
    q_len, kv_len   tokens; q's last row sits at k's last row
    q_block, kv_block   tokens
    column_indices  [B, H, NQ, C] int32: single key columns outside the chosen blocks, ascending (MInference's verticals)
    column_num      [B, H, NQ] int32: how many of them count
    kv_step         tokens between block i and block i + 1: kv_block (None) when blocks tile the keys, 1 when index i means
                    the block whose first key is i (MInference's slashes)
    window          if set, inside the chosen blocks query i sees key j only if i - j < window, or j < sink, or i - j is a
                    multiple of `stride`, or i is one of the `last` rows (static patterns are exact in tokens)
    pv_threshold    if set, the product of probabilities and values may be left out for a tile whose logits all lie more than
                    this (natural log) below the largest of their row so far; saves time, does not count for density
    trusted         set by builders whose rows are valid by construction; spares the check, which syncs with the GPU

    H is the number of query heads, of KV heads (one selection for a GQA group) or 1. Key visibility is always causal.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    column_indices: Tensor | None = None
    column_num: Tensor | None = None
    kv_step: int | None = None
    window: int | None = None
    sink: int = 0
    last: int = 0
    stride: int | None = None
    pv_threshold: float | None = None
    trusted: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self):
        if not 0 < self.q_len <= self.kv_len:
            raise ValueError(f"BlockMask needs 0 < q_len <= kv_len, got q_len={self.q_len}, kv_len={self.kv_len}")
        rows = -(-self.q_len // self.q_block)
        if self.kv_num_blocks.shape[2:] != (rows,) or self.kv_indices.shape[:3] != self.kv_num_blocks.shape:
            raise ValueError(
                f"BlockMask of {rows} query blocks needs kv_num_blocks [B, H, {rows}] and kv_indices [B, H, {rows}, K], got "
                f"{tuple(self.kv_num_blocks.shape)} and {tuple(self.kv_indices.shape)}"
            )
        if self.column_indices is None and self.column_num is None:
            return
        if self.column_indices is None or self.column_num is None:
            raise ValueError("BlockMask takes column_indices and column_num together or neither")
        if not self.column_indices.shape[:-1] == self.column_num.shape == self.kv_num_blocks.shape:
            raise ValueError(
                f"BlockMask needs column_num of kv_num_blocks' shape {tuple(self.kv_num_blocks.shape)} and column_indices "
                f"[B, H, {rows}, C], got {tuple(self.column_num.shape)} and {tuple(self.column_indices.shape)}"
            )

    @classmethod
    def from_dense(cls, dense: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, *, trusted=False) -> BlockMask:
        """From a bool block map [B, H, NQ, NK]; blocks no row can see are dropped. Syncs where that keeps a large list compact.

        Raises: ValueError for another dtype or shape.
        """
        num, index = block_lists(dense, q_len, kv_len, q_block, kv_block)
        return cls(num, index, q_len, kv_len, q_block, kv_block, trusted=trusted)

    @property
    def step(self) -> int:
        return self.kv_block if self.kv_step is None else self.kv_step

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    def row_bounds(self) -> tuple[Tensor, Tensor]:
        """Absolute position of each query block's first row and of the row after its last, int64 [NQ]."""
        return row_bounds(self.q_len, self.kv_len, self.q_block, self.device)

    def _valid(self) -> Tensor:
        return torch.arange(self.kv_indices.shape[-1], device=self.device) < self.kv_num_blocks[..., None]

    def _column_valid(self) -> Tensor:
        assert self.column_indices is not None and self.column_num is not None
        return torch.arange(self.column_indices.shape[-1], device=self.device) < self.column_num[..., None]

    def dense(self) -> Tensor:
        """bool [B, H, NQ, NK] of the chosen blocks (columns not included). Raises: ValueError for untiled blocks."""
        if self.step != self.kv_block:
            raise ValueError("blocks of this mask do not tile the keys; use tokens()")
        blocks = -(-self.kv_len // self.kv_block)
        batch, heads, rows, width = self.kv_indices.shape
        out = torch.zeros(batch, heads, rows, blocks + 1, dtype=torch.bool, device=self.device)
        step = max(8 * SCRATCH_ELEMENTS // (batch * rows * width), 1)
        for h in range(0, heads, step):
            part = slice(h, h + step)
            listed = torch.arange(width, device=self.device) < self.kv_num_blocks[:, part, :, None]
            out[:, part].scatter_(-1, self.kv_indices[:, part].long().where(listed, blocks), True)
        return out[..., :blocks]

    def tokens(self) -> Tensor:
        """bool [B, H, q_len, kv_len]: the (query, key) pairs that count. For tests: q_len x kv_len bytes a head."""
        b, h, rows, _ = self.kv_indices.shape
        hits = torch.zeros(b, h, rows, self.kv_len + self.kv_block + 1, dtype=torch.int32, device=self.device)
        first = self.kv_indices.long() * self.step
        one = self._valid().to(torch.int32)
        first = first.where(one > 0, 0)
        hits.scatter_add_(-1, first, one).scatter_add_(-1, first + self.kv_block, -one)
        keys = (hits.cumsum(-1) > 0)[..., : self.kv_len]
        if self.column_indices is not None:
            index = self.column_indices.long().where(self._column_valid(), self.kv_len)
            columns = torch.zeros(b, h, rows, self.kv_len + 1, dtype=torch.bool, device=self.device)
            keys = keys | columns.scatter_(-1, index, True)[..., : self.kv_len]
        keys = keys.repeat_interleave(self.q_block, dim=2)[:, :, : self.q_len]
        i = torch.arange(self.kv_len - self.q_len, self.kv_len, device=self.device)[:, None]
        j = torch.arange(self.kv_len, device=self.device)[None, :]
        return keys & self.sees(i, j)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i may see key j when its block is chosen: causality and the cut in tokens."""
        visible = j <= i
        if self.window is None:
            return visible
        near = (i - j < self.window) | (j < self.sink) | (i >= self.kv_len - self.last)
        return visible & (near if self.stride is None else near | ((i - j) % self.stride == 0))

    def pairs(self) -> Tensor:
        """Selected (query, key) pairs, int64 [B, H], on the mask's device."""
        batch, heads = self.kv_num_blocks.shape[:2]
        counts = torch.zeros(2, batch * heads, dtype=torch.int64, device=self.device)
        add_pairs(self, counts)
        return counts[0].view(batch, heads)

    def rows(self, first: int, stop: int) -> BlockMask:
        """The selection of the query blocks first <= block < stop alone, as if the keys ended with the last of them."""
        q0, q1 = first * self.q_block, min(stop * self.q_block, self.q_len)
        kv_len, part = self.kv_len - self.q_len + q1, slice(first, stop)
        return replace(
            self, kv_num_blocks=self.kv_num_blocks[:, :, part], kv_indices=self.kv_indices[:, :, part], q_len=q1 - q0,
            kv_len=kv_len, last=max(0, self.last - (self.kv_len - kv_len)),
            column_indices=None if self.column_indices is None else self.column_indices[:, :, part],
            column_num=None if self.column_num is None else self.column_num[:, :, part],
        )  # fmt: skip

    def visible_pairs(self) -> int:
        """Causally visible (query, key) pairs of one head."""
        return visible_pairs(self.q_len, self.kv_len)

    def density(self) -> Tensor:
        """Selected pairs / causally visible pairs, float64 [B, H]."""
        return self.pairs().double() / self.visible_pairs()

    def _blind_rows(self) -> Tensor:
        """bool [B, H, NQ, q_block]: query rows that see none of the listed keys. Needs ascending lists."""
        q0, q1 = self.row_bounds()
        i = (q0[:, None] + torch.arange(self.q_block, device=self.device)).minimum(q1[:, None] - 1)
        i = i.expand(*self.kv_num_blocks.shape, -1).contiguous()
        lists = [(self.kv_indices.long() * self.step, self._valid(), self.kv_block)]
        if self.column_indices is not None:
            lists.append((self.column_indices.long(), self._column_valid(), 1))
        newest, oldest = torch.full_like(i, -1), torch.full_like(i, self.kv_len)  # of the listed keys up to i
        for start, valid, size in lists:
            start = torch.nn.functional.pad(start.where(valid, self.kv_len), (0, 1), value=self.kv_len)
            at = torch.searchsorted(start, i, right=True) - 1
            reach = (start.gather(-1, at.clamp(min=0)) + size - 1).minimum(i)
            newest = torch.where(at >= 0, newest.maximum(reach), newest)
            oldest = oldest.minimum(start[..., :1])
        if self.window is None:
            return newest < 0
        near = (newest > i - self.window) | (i >= self.kv_len - self.last)
        return ~((newest >= 0) & near | (oldest < self.sink) & (oldest <= i))

    def check(self) -> BlockMask:
        """This mask, marked trusted. Syncs with the GPU.

        Raises: ValueError when a query row would see no key, indices are unsorted, repeated, out of range or of a block in
        the future of its whole row, or a column lies inside a chosen block (it would count twice).
        """
        if self.trusted:
            return self
        valid, first = self._valid(), self.kv_indices.long() * self.step
        q1 = self.row_bounds()[1]
        if bool(((self.kv_num_blocks > self.kv_indices.shape[-1]) | (self.kv_num_blocks < 0)).any()):
            raise ValueError("kv_num_blocks is negative or larger than the rows of kv_indices")
        if bool((valid & ((first < 0) | (first >= q1[:, None]))).any()):
            raise ValueError("a query block lists a key block that none of its rows may see (negative or after its causal end)")
        gap_too_small = first[..., 1:] - first[..., :-1] < self.kv_block
        if bool((valid[..., 1:] & gap_too_small).any()):
            raise ValueError("kv_indices must be ascending without overlap in the first kv_num_blocks of each row")
        if self.column_indices is not None and self.column_num is not None:
            if bool(((self.column_num > self.column_indices.shape[-1]) | (self.column_num < 0)).any()):
                raise ValueError("column_num is negative or larger than the rows of column_indices")
            column, column_valid = self.column_indices.long(), self._column_valid()
            if bool((column_valid & ((column < 0) | (column >= self.kv_len))).any()):
                raise ValueError("column_indices are out of range")
            if bool((column_valid[..., 1:] & (column[..., 1:] <= column[..., :-1])).any()):
                raise ValueError("column_indices must be ascending in the first column_num of each row")
            start = torch.nn.functional.pad(first.where(valid, 2 * self.kv_len), (1, 0), value=-self.kv_block)
            block = start.gather(-1, torch.searchsorted(start, column.contiguous(), right=True).sub(1).clamp(min=0))
            if bool((column_valid & (column < block + self.kv_block)).any()):
                raise ValueError("a column lies inside a chosen block of its row and would count twice")
        blind = self._blind_rows()
        if bool(blind.any()):
            b, h, r, _ = blind.nonzero()[0].tolist()
            raise ValueError(f"a query row would see no key: batch {b}, head {h}, query block {r}")
        return replace(self, trusted=True)

    def fits_tiles(self, rows: int) -> bool:
        """Whether by_tile() can express this mask."""
        return rows % self.q_block == 0 and self.column_indices is None and self.step == self.kv_block

    def by_tile(self, rows: int) -> tuple[BlockMask, Tensor]:
        """For kernels that take at least `rows` queries at a time: the union of the blocks of every `rows` neighbouring
        queries, and which of them each own query block has chosen, bool [B, H, NQ, NK].

        Raises: ValueError when rows is no multiple of q_block, or for single columns or untiled blocks.
        """
        if not self.fits_tiles(rows):
            raise ValueError(f"query blocks of {self.q_block} do not make up tiles of {rows}, or blocks do not tile the keys")
        member = self.dense()
        group = rows // self.q_block
        padded = torch.nn.functional.pad(member, (0, 0, 0, -member.shape[2] % group))
        union = padded.unflatten(2, (-1, group)).any(3)
        num, index = union.sum(-1, dtype=torch.int32), numbers(union, union.shape[-1])
        return replace(self, kv_num_blocks=num, kv_indices=index, q_block=rows), member

    def to_flex(self, heads: int | None = None, compiled: bool = False):
        """The same selection as torch.nn.attention.flex_attention.BlockMask.

        Args:
            heads: query heads, needed when H is the number of KV heads: FlexAttention takes a mask of 1 or of all heads.
            compiled: for torch.compile(flex_attention) alone, which reads the block lists; without torch.compile they are
                ignored, so by default mask_mod looks every pair's block up as well, at some cost.
        Raises: ValueError when the mask has columns or untiled blocks, which FlexAttention cannot express, or does not fit.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if self.column_indices is not None or self.step != self.kv_block or self.q_block < 16:
            raise ValueError("FlexAttention has no form for single columns or queries, or for blocks that do not tile the keys")
        dense = self.dense()
        batch, own = dense.shape[:2]
        if heads is not None and own > 1:
            if heads % own:
                raise ValueError(f"a mask of {own} heads does not fit {heads} query heads")
            dense, own = dense.repeat_interleave(heads // own, dim=1), heads
        q0 = self.row_bounds()[0]
        q_block, kv_block, offset = self.q_block, self.kv_block, self.kv_len - self.q_len

        def mask_mod(b, h, q_idx, kv_idx):
            visible = self.sees(q_idx + offset, kv_idx)
            if compiled:
                return visible
            return visible & dense[b if batch > 1 else 0, h if own > 1 else 0, q_idx // q_block, kv_idx // kv_block]

        last_key = torch.arange(1, dense.shape[-1] + 1, device=self.device) * self.kv_block - 1
        full = dense & (last_key <= q0[:, None]) & (self.window is None)

        def rows(part: Tensor) -> tuple[Tensor, Tensor]:
            return part.sum(-1, dtype=torch.int32), numbers(part, part.shape[-1])

        return FlexBlockMask.from_kv_blocks(
            *rows(dense & ~full), *rows(full), BLOCK_SIZE=(self.q_block, self.kv_block), mask_mod=mask_mod,
            seq_lengths=(self.q_len, self.kv_len),
        )  # fmt: skip
