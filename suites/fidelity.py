"""Fidelity: how much of the dense attention a selection keeps, layer by layer and head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels import block_sparse_attention
from ..methods.base import LayerContext, Method, attended, blamed, dense_mask, selected
from ..methods.spec import build
from ..models.attach import attach
from .base import Cell, Score, register_suite
from .corpora import CorpusSuite, token_windows


@register_suite
class Fidelity(CorpusSuite):
    """What a selection keeps of the dense attention, layer by layer and head by head: recall and output error.

    recall = softmax mass on the selected keys, mean over queries; error = ||out - dense|| / ||dense||.
    Every layer sees the q, k, v of the dense model, so errors do not build up. The cell's task is the corpus; an example is
    "document/layer/head". Density is a score of its own here: what ran in that layer and head.
    """

    name = "fidelity"
    attached = False

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        method = build(cell.method, cell.settings).prepare(model.spec)
        windows = token_windows(model.tokenizer, cell.task, "eval", cell.ctx_len, cell.limit)
        self.notes |= windows.notes()
        for document, ids in tqdm(windows.ids, desc=f"{cell.task} {cell.ctx_len}", leave=False):
            scores: list[Score] = []

            def record(q: Tensor, k: Tensor, v: Tensor, dense: tuple[Tensor, Tensor], ctx: LayerContext):
                for metric, values in compare(method, q, k, v, dense, ctx).items():
                    for head, value in enumerate(values.tolist()):
                        scores.append(Score(cell.task, f"{document}/{ctx.layer}/{head}", metric, value, "ratio"))  # noqa: B023

            with torch.no_grad(), attach(model.model, Probe(record)):
                model.model.base_model(torch.tensor([ids], device=model.model.device), use_cache=False)
            yield from scores


@dataclass(frozen=True)
class Probe(Method):
    """Runs the model dense and hands every layer's q, k, v, (dense output, lse) and context to `see`."""

    see: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], LayerContext], None]
    name = "probe"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        everything = dense_mask(q.shape[2], k.shape[2], q.device)
        dense = block_sparse_attention(q, k, v, everything, scale=ctx.scale, return_lse=True)
        self.see(q, k, v, dense, ctx)
        return dense[0]


def compare(
    method: Method, q: Tensor, k: Tensor, v: Tensor, dense: tuple[Tensor, Tensor], ctx: LayerContext
) -> dict[str, Tensor]:
    """recall, error and density of `method` in one layer, each [H], for a batch of one and `dense` = (output, lse).

    The kept softmax mass of a query is exp(lse over the selected keys - lse over all keys).
    """
    out_dense, lse_dense = dense
    if type(method).attend is Method.attend:
        mask = selected(method, q, k, ctx)
        with blamed(method):
            out, lse = block_sparse_attention(q, k, v, mask, scale=ctx.scale, return_lse=True)
    else:
        out = attended(method, q, k, v, ctx)
        mask = ctx.mask if ctx.mask is not None else dense_mask(q.shape[2], k.shape[2], q.device)
        with blamed(method):
            lse = block_sparse_attention(q, k, v, mask, scale=ctx.scale, return_lse=True)[1]
    error = (out.double() - out_dense.double()).norm(dim=(-2, -1)) / out_dense.double().norm(dim=(-2, -1))
    density = mask.density()[0]
    return {
        "recall": (lse - lse_dense).double().exp().mean(-1)[0],
        "error": error[0],
        "density": density.repeat_interleave(q.shape[1] // len(density)),
    }
