"""Perplexity of long documents: what a sparse method loses as a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .base import Cell, Score, Suite, register_suite
from .corpora import token_windows

CHUNK = 1024  # rows of logits held at once: 8k rows of a 128k vocabulary would be 4 GB
TAIL = 256  # positions of the "last" figure, which shows whether distant context is used
# Heads that do more than one matrix product; their logits are taken from the model whole.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@register_suite
class Perplexity(Suite):
    """Perplexity of long documents under the attached method.

    Per document of at least ctx_len tokens, truncated to ctx_len: summed negative log-likelihood and predicted tokens;
    perplexity = exp(total nll / total tokens) is formed in results/tables.py. The cell's task is the corpus.
    """

    name = "perplexity"

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        windows = token_windows(model.tokenizer, cell.task, "eval", cell.ctx_len, cell.limit)
        self.notes |= windows.notes()
        for document, ids in tqdm(windows.ids, desc=f"{cell.task} {cell.ctx_len}", leave=False):
            nll = token_nll(model.model, torch.tensor([ids], device=model.model.device))
            yield Score(cell.task, document, "nll", float(nll.sum()), "nats")
            yield Score(cell.task, document, "tokens", len(nll), "tokens")
            yield Score(cell.task, document, "nll_last256", float(nll[-TAIL:].sum()), "nats")
            yield Score(cell.task, document, "tokens_last256", len(nll[-TAIL:]), "tokens")


@torch.no_grad()
def token_nll(model: Any, ids: Tensor) -> Tensor:
    """-log p(token | tokens before it) of a causal LM, fp64 [L - 1] in nats, log-softmax in fp32. ids int64 [1, L]."""
    head = model.get_output_embeddings()
    if any(getattr(model.config, name, None) is not None for name in SCALED_LOGITS):
        rows, to_logits = model(ids, use_cache=False).logits[0], lambda x: x
    else:
        rows, to_logits = model.base_model(ids, use_cache=False).last_hidden_state[0], head
    nll = [
        torch.nn.functional.cross_entropy(to_logits(part).float(), target, reduction="none")
        for part, target in zip(rows[:-1].split(CHUNK), ids[0, 1:].split(CHUNK))
    ]
    return torch.cat(nll).double()
