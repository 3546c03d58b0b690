"""What the command lines of both trainers share: options, checks before anything is loaded, data, one line for every error."""

from __future__ import annotations

import argparse
import collections
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..spec import parse_tokens
from .training import RECIPE_FILE, LossNotFiniteError


def new_parser(program: str, text: str, ctx: str) -> argparse.ArgumentParser:
    """With the options that both trainers have; `ctx` is --ctx's default."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=f"python -m sparsebench.methods.seer.{program}", description=text.splitlines()[0])
    parser.add_argument("--model", required=True, help="name, local folder or hub id, as in run_bench.py")
    parser.add_argument("--data", required=True, help="corpora, comma-separated, whose split 'train' is read: file:PATH,...")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the result; checkpoints go to OUT.training, "
                        "and the same command again goes on from the newest")  # fmt: skip
    parser.add_argument("--ctx", default=ctx, help=f"tokens per sequence, default {ctx}")
    parser.add_argument("--save-every", type=int, default=100, help="steps from checkpoint to checkpoint, default 100")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Also sets `checkpoints`, OUT.training.

    Raises: ValueError for a length or device that is none, a corpus file that cannot be read, and an --out that is a file or
        holds what no training put there.
    """
    from ...suites.corpora import read_documents

    args = parser.parse_args(argv)
    args.ctx = parse_tokens(args.ctx)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    for source in args.data.split(","):
        read_documents(source, "train")  # reads files, and nothing else yet: their faults show before a model is loaded
    out = args.out
    args.checkpoints = out.with_name(out.name + ".training")
    for path in (args.checkpoints, out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {out}: {path} is a file")
    if out.is_dir() and any(out.iterdir()) and not (args.checkpoints / RECIPE_FILE).is_file():
        raise ValueError(f"--out {out} holds other files, which would be overwritten: give a new folder")
    return args


def packed(data: str, tokenizer: Any, ctx_len: int, most: int) -> tuple[Tensor, str]:
    """Corpora, comma-separated, tokenised, documents joined with the end-of-sequence token and cut; the rest is dropped.

    Attention crosses the borders of documents. most: sequences that training takes; no corpus of the hub, whose texts are
    gigabytes, is read beyond them.
    Returns: int64 [sequences, ctx_len], and the corpora's names without their folders, "x2" behind one that is named twice.
    Raises: ValueError when a corpus cannot be read or there is less than one sequence.
    """
    from ...suites.corpora import corpus_file, read_documents

    @functools.cache  # a corpus may be named several times, to weigh it
    def read(source: str) -> list[int]:
        tokens: list[int] = []
        enough = math.inf if corpus_file(source) else most * ctx_len
        for document in read_documents(source, "train"):
            tokens += tokenizer(document.text, verbose=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                tokens.append(tokenizer.eos_token_id)
            if len(tokens) >= enough:
                break
        return tokens

    tokens = [token for source in data.split(",") for token in read(source)]
    count = len(tokens) // ctx_len
    if not count:
        raise ValueError(
            f"the training data has {len(tokens)} tokens, one sequence takes {ctx_len}: give more data or less --ctx"
        )
    counts = collections.Counter(source.rsplit("/", 1)[-1] for source in data.split(","))
    names = ",".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
    return torch.tensor(tokens[: count * ctx_len]).view(count, ctx_len), names


def answer(work: Callable[[], None]) -> int:
    """Exit status: 0, 1 where training stopped at a loss that is not finite, 130 where it was interrupted, else 2; an error is
    one line on stderr."""
    try:
        work()
    except torch.OutOfMemoryError as error:  # before the first step; from then on training.run() answers
        print(f"error: the model does not fit this GPU: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint (--save-every)", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, LossNotFiniteError) else 2
    return 0
