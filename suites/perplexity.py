"""Perplexity of long documents: what a sparse method loses as a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .base import Cell, Score, register_suite
from .corpora import CorpusSuite, token_windows

CHUNK = 1024  # rows of logits held at once: 8k rows of a 128k vocabulary would be 4 GB
TAIL = 256  # positions of the "last" figure, which shows whether distant context is used
MOST_WINDOWS = 16  # of one document in sliding evaluation: a book has hundreds
# Heads that do more than one matrix product; their logits are taken from the model whole.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@register_suite
class Perplexity(CorpusSuite):
    """Perplexity of long documents under the attached method.

    Per document of at least ctx_len tokens, truncated to ctx_len: summed negative log-likelihood and predicted tokens;
    perplexity = exp(total nll / total tokens) is formed in results/tables.py. The cell's task is the corpus.

    With the option `stride` (tokens) longer documents are read in windows of ctx_len, see windows(), and cut where
    MOST_WINDOWS of them end; there is no figure of the last positions then.
    """

    name = "perplexity"
    options = ("stride",)

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        stride = cell.option("stride")
        span: tuple[int, ...] = ()  # left out where it says nothing new, so that suites share what is read
        if stride is not None:
            if not 1 <= stride <= cell.ctx_len:
                raise ValueError(f"stride must be from 1 to the context length, {cell.ctx_len} tokens, got {stride}")
            span = (cell.ctx_len + 1 + (MOST_WINDOWS - 1) * stride,)
        texts = token_windows(model.tokenizer, cell.task, "eval", cell.ctx_len, cell.limit, *span)
        self.notes |= texts.notes()
        if stride is not None:
            self.notes["windows"] = sum(len(list(windows(len(ids), cell.ctx_len, stride))) for _, ids in texts.ids)
        for document, ids in tqdm(texts.ids, desc=f"{cell.task} {cell.ctx_len}", leave=False):
            if document in self.finished:
                continue
            tokens = torch.tensor([ids], device=model.model.device)
            nll = token_nll(model.model, tokens) if stride is None else sliding_nll(model.model, tokens, cell.ctx_len, stride)
            yield Score(cell.task, document, "nll", float(nll.sum()), "nats")
            yield Score(cell.task, document, "tokens", len(nll), "tokens")
            if stride is None:
                yield Score(cell.task, document, "nll_last256", float(nll[-TAIL:].sum()), "nats")
                yield Score(cell.task, document, "tokens_last256", len(nll[-TAIL:]), "tokens")
            self.checkpoint()


def windows(length: int, ctx_len: int, stride: int) -> Iterator[tuple[int, int]]:
    """(start, first) of every window over `length` >= ctx_len tokens: the model reads ctx_len tokens from `start` on, and of
    those it predicts, up to the one behind them, the tokens from `first` on have not been predicted before.

    A window starts `stride` tokens after the one before it, the last one where the document leaves it ctx_len tokens. Every
    token but the document's first is predicted once, after the first window from at least ctx_len - stride + 1 tokens.
    """
    start, first = 0, 1
    while first < length:
        yield start, first
        first = start + ctx_len + 1
        start = min(start + stride, length - 1 - ctx_len)


def sliding_nll(model: Any, ids: Tensor, ctx_len: int, stride: int) -> Tensor:
    """-log p of every token but the first, fp64 [L - 1] in nats, over windows(L, ctx_len, stride). ids int64 [1, L]."""
    parts = [
        token_nll(model, ids[:, start : start + ctx_len + 1], first - start, ctx_len)
        for start, first in windows(ids.shape[1], ctx_len, stride)
    ]
    return torch.cat(parts)


@torch.no_grad()
def token_nll(model: Any, ids: Tensor, first: int = 1, read: int | None = None) -> Tensor:
    """-log p(token | tokens before it) of a causal LM, fp64 [L - first] in nats, log-softmax in fp32.

    ids int64 [1, L], of which the model is given the first `read` (all of them, or all but the last) and the tokens from
    number `first` on are predicted.
    """
    given = ids[:, :read]
    head = model.get_output_embeddings()
    if any(getattr(model.config, name, None) is not None for name in SCALED_LOGITS):
        rows, to_logits = model(given, use_cache=False).logits[0], lambda x: x
    else:
        rows, to_logits = model.base_model(given, use_cache=False).last_hidden_state[0], head
    nll = [
        torch.nn.functional.cross_entropy(to_logits(part).float(), target, reduction="none")
        for part, target in zip(rows[first - 1 : ids.shape[1] - 1].split(CHUNK), ids[0, first:].split(CHUNK))
    ]
    return torch.cat(nll).double()
