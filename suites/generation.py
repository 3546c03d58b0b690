"""What the suites that let a model answer share: prompts, batches, generation by lm-evaluation-harness's model class."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .base import Cell, NotApplicable, Score, Suite
from .corpora import token_windows

CACHE_PART = 16  # of a GPU's memory that the key-value cache of a batch may take
CPU_CACHE_BYTES = 2**30
CALIBRATION_TEXT = "pydoc"  # where a task leaves no example over


@dataclass(frozen=True)
class Example:
    """One question: the prompt as text, before any chat template, and what its scorer needs."""

    id: str
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""  # the start of the answer, given to the model behind the prompt
    chat: bool = True  # whether a chat template may be put around the prompt
    about: dict[str, Any] = field(default_factory=dict)


class GenerationSuite(Suite):
    """Base of the suites that score generated answers: a subclass gives the examples and scores an answer.

    Greedy decoding by lm-evaluation-harness's HFLM on the attached model, in batches of prompts of similar length. The prompt
    and the generated tokens together have at most cell.ctx_len tokens. A prompt that is longer is cut in its middle where the
    suite says so, otherwise the cell fails.

    Most methods leave decoding dense: every generated token then sees the whole prompt. With the option answer_in_prefill a
    second metric, score_in_prefill, has the one reference of an example behind its prompt in one prefill: 100 when every token
    of it is the most likely one there, else 0.
    """

    options: ClassVar[tuple[str, ...]] = ("chat_template", "answer_in_prefill")
    default_limit = (2, 100)
    cut_middle: ClassVar[bool] = False

    def examples(self, model: Any, cell: Cell) -> list[Example]:
        """All examples of the cell's task, those that are evaluated first, in an order that does not depend on cell.limit.

        Raises: ValueError when they cannot be had, with what is missing and the offline alternative.
        """
        raise NotImplementedError

    def score(self, example: Example, answer: str) -> Iterator[Score]:
        """The scores of one answer, 0 for an empty one."""
        raise NotImplementedError

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        chosen = self.examples(model, cell)[: cell.limit]
        prompts = {example.id: self.prompt(model, cell, example) for example in chosen}
        digest = hashlib.sha256(repr(sorted(prompts.items())).encode()).hexdigest()[:16]
        self.notes |= {"examples": len(chosen), "text_sha256": digest, "chat_template": bool(cell.option("chat_template"))}
        with tqdm(total=len(chosen), desc=f"{cell.task} {cell.ctx_len}", leave=False) as bar:
            for whole in _batches(model, chosen, prompts):
                bar.update(len(whole))
                # An interrupted run had the same batches, but for one on a GPU of another size.
                batch = [example for example in whole if example.id not in self.finished]
                if not batch:
                    continue
                answers = generate(model, cell.ctx_len, [prompts[e.id] for e in batch], batch[0].max_new_tokens)
                for example, answer in zip(batch, answers):
                    self.answers[example.id] = answer
                    yield from self.score(example, answer)
                single = [example for example in batch if len(example.references) == 1]
                if cell.option("answer_in_prefill") and single:
                    hits = read_answers(model, [prompts[e.id] for e in single], [e.references[0] for e in single])
                    for example, hit in zip(single, hits):
                        yield Score(cell.task, example.id, "score_in_prefill", 100.0 * hit, "%")
                self.checkpoint()
        self.notes |= {"empty_answers": sum(not answer.strip() for answer in self.answers.values())}

    def prompt(self, model: Any, cell: Cell, example: Example) -> str:
        """What the model is given: chat template (on request), the answer's start, cut to the context.

        Raises: ValueError for a tokenizer without a chat template when one is asked for, or a prompt that is too long.
        """
        room, text = cell.ctx_len - example.max_new_tokens, example.prompt
        chat = bool(cell.option("chat_template")) and example.chat
        if room < 1:
            raise NotApplicable(f"{cell.ctx_len} tokens leave no room for the {example.max_new_tokens} that are generated")
        if self.cut_middle:
            text = cut_middle(model.tokenizer, text, room - self._around(model.tokenizer, example, chat))
        whole = wrap(model.tokenizer, text, example.answer_prefix, chat)
        length = len(encode(model.tokenizer, whole))
        if length > room:
            raise ValueError(
                f"the prompt of example {example.id} has {length} tokens and {example.max_new_tokens} are generated: "
                f"too long for {cell.ctx_len}"
            )
        return whole

    @staticmethod
    def _around(tokenizer: Any, example: Example, chat: bool) -> int:
        return len(encode(tokenizer, wrap(tokenizer, "", example.answer_prefix, chat))) + 1  # words may be cut otherwise

    def calibration(self, model: Any, cell: Cell, documents: int) -> tuple[str, list[list[int]]]:
        """The last examples of the task that are not evaluated; where there are none, ordinary text of the context's length."""
        spare = self.examples(model, cell)[cell.limit :] if cell.limit else []
        texts = [self.prompt(model, cell, example) for example in spare[-documents:]]
        if texts:
            return f"{cell.task} (other examples)", [encode(model.tokenizer, text).tolist() for text in texts]
        windows = token_windows(model.tokenizer, CALIBRATION_TEXT, "train", cell.ctx_len, documents)
        return f"{CALIBRATION_TEXT} (train)", [ids for _, ids in windows.ids]


def wrap(tokenizer: Any, prompt: str, answer_prefix: str, chat: bool) -> str:
    """The prompt, as a user's turn of the tokenizer's chat template on request, with the start of the answer behind it."""
    if not chat:
        return f"{prompt} {answer_prefix}" if answer_prefix else prompt
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: leave out --chat-template")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + answer_prefix


def cut_middle(tokenizer: Any, text: str, tokens: int) -> str:
    """`text` without its middle when it has more than `tokens` tokens: the first and the last half of them, as text again."""
    ids, kept = encode(tokenizer, text), tokens
    if len(ids) <= tokens:
        return text
    while kept > 0:
        parts = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
        cut = "".join(tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts)
        length = len(encode(tokenizer, cut))  # a character or word cut in two may become more tokens than before
        if length <= tokens:
            return cut
        kept = kept * tokens // length
    return ""


@functools.lru_cache(maxsize=2048)  # every method of a plan is asked the same questions
def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids int32 [n] with the special tokens that the tokenizer adds itself, none twice."""
    begins = tokenizer.bos_token and text.startswith(tokenizer.bos_token)  # a chat template has written it already
    return np.array(tokenizer(text, add_special_tokens=not begins, verbose=False)["input_ids"], dtype=np.int32)


def _batches(model: Any, examples: list[Example], prompts: dict[str, str]) -> Iterator[list[Example]]:
    """Longest first, so that lengths within a batch are near and a batch that does not fit fails at once."""
    spec, device = model.spec, model.model.device
    memory = torch.cuda.get_device_properties(device).total_memory // CACHE_PART if device.type == "cuda" else CPU_CACHE_BYTES
    per_token = 2 * spec.layers * spec.kv_heads * spec.head_dim * model.model.dtype.itemsize

    def tokens(example: Example) -> int:
        return len(encode(model.tokenizer, prompts[example.id])) + example.max_new_tokens

    batch: list[Example] = []
    for example in sorted(examples, key=lambda e: (-e.max_new_tokens, -tokens(e), e.id)):
        full = batch and (len(batch) + 1) * tokens(batch[0]) * per_token > memory
        if full or (batch and batch[0].max_new_tokens != example.max_new_tokens):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def generate(model: Any, ctx_len: int, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to one batch of prompts, without what follows the end-of-text token."""
    from lm_eval.api.instance import Instance

    # Checkpoints may bring a repetition penalty (Qwen2.5 does), which the prompt's words, needles among them, would bear too.
    settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False, "repetition_penalty": 1.0}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, settings), idx=number)
        for number, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        return _harness()(model, ctx_len, len(prompts)).generate_until(requests, disable_tqdm=True)


@torch.no_grad()
def read_answers(model: Any, prompts: list[str], answers: list[str]) -> list[bool]:
    """Whether every token of an answer, written behind its prompt, is the model's most likely one, by one prefill."""
    tokenizer = model.tokenizer
    wholes = [prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}" for prompt, answer in zip(prompts, answers)]
    ids, real = pad(tokenizer, wholes)
    lengths = []  # of the answers: the tokens from the first that differs from the prompt's on
    for prompt, whole in zip(prompts, wholes):
        before, all_ids = encode(tokenizer, prompt), encode(tokenizer, whole)
        shared = min(len(before), len(all_ids))
        same = before[:shared] == all_ids[:shared]
        lengths.append(len(all_ids) - (shared if same.all() else int(same.argmin())))
    device, most = model.model.device, max(lengths)
    logits = model.model(ids.to(device), attention_mask=real.to(device), use_cache=False, logits_to_keep=most + 1).logits
    right = logits[:, :-1].argmax(-1).cpu() == ids[:, -most:]
    return [bool(row[most - n :].all()) for row, n in zip(right, lengths)]


def pad(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of the real ones, int64 [B, longest], padded on the left."""
    ids = [torch.from_numpy(encode(tokenizer, text)).long() for text in texts]
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], True, 0, "left")
    return torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_token_id, "left"), real


@functools.cache
def _harness() -> Any:
    """lm-evaluation-harness's model class with prompts tokenised once; imported on first use, it takes seconds."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError('generated answers need lm-evaluation-harness: pip install "lm-eval[ruler,longbench]"') from error

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is given as an object

    class CachedHFLM(HFLM):
        def __init__(self, model: Any, ctx_len: int, batch_size: int):
            super().__init__(model.model, tokenizer=model.tokenizer, max_length=ctx_len, batch_size=batch_size)

        def tok_encode(self, string: str, *args, **kwargs) -> list[int]:
            return encode(self.tokenizer, string).tolist()

        def tok_batch_encode(self, strings: list[str], *args, **kwargs) -> tuple[Tensor, Tensor]:
            return pad(self.tokenizer, strings)

    return CachedHFLM
