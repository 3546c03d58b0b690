"""Train SeerAttention's gates for a frozen model.

    python -m sparsebench.methods.seer.distill --model NAME --data file:PATH --out DIR

Source: Gao et al. 2024 (arXiv 2410.13276), section 3.2. In every layer the gate learns the block map of that layer's true
attention. Layers train side by side, each from its own inputs, in one forward pass of the model, with no graph across layers.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...kernels.attention_with_map import attention_with_map, has_kernel
from ...kernels.block_mass import block_mass
from ..base import LayerContext, Method, ModelSpec, dense_attention
from ..spec import parse_tokens
from .gate import AttnGate
from .weights import save_gates

LOSS_FACTOR = 10.0  # the authors'; it moves no optimum, and with AdamW hardly the path


@dataclass(frozen=True)
class Recipe:
    """How gates are trained. The paper: 64k-token sequences, batch 16, 500 steps, on RedPajama."""

    gate_type: str = "Qavg_Kmaxminavg"
    block: int = 64
    gate_dim: int = 128
    loss: str = "max"  # or "mass": what of a block's probabilities the gate learns
    drop: float = 0.25  # part of the rows, the first, left out of the loss: 0 for gates that also serve short contexts
    steps: int = 500
    batch: int = 1  # sequences a step
    lr: float = 1e-3
    warmup: int = 20
    seed: int = 0


def block_map(q: Tensor, k: Tensor, of: str = "max", block: int = 64, scale: float | None = None) -> Tensor:
    """The teacher: causal softmax probabilities pooled per block x block and normalised to sum 1 in every row, exact.

    Args: q [B, H, N, D], k [B, H_kv, N, D] after RoPE; of: "max" over a block's rows and keys (the paper), or their "mass".
    Returns: fp32 [B, H, NB, NB], NB = ceil(N / block).
    """
    pooled = block_mass(q, k, q.shape[-1] ** -0.5 if scale is None else scale, block, block, of)
    return pooled / pooled.sum(-1, keepdim=True)


def gate_loss(logits: Tensor, teacher: Tensor, drop: float = 0.25) -> Tensor:
    """KL(teacher || softmax of the block-causal logits), mean over all entries, without the first `drop` of rows, x 10."""
    blocks = logits.shape[-1]
    future = torch.ones(blocks, blocks, dtype=torch.bool, device=logits.device).triu(1)
    # Finite, because F.kl_div multiplies the log by the teacher's 0 there.
    student = logits.float().masked_fill(future, -1e30).log_softmax(-1)
    first = int(blocks * drop)
    return LOSS_FACTOR * F.kl_div(student[..., first:, :], teacher[..., first:, :], reduction="none").mean()


class GateTrainer(Method):
    """Dense attention that, in passing, adds to the gradient of its layer's gate; for attach(), never registered."""

    name = "seer_distill"

    def __init__(self, gates: list[AttnGate], recipe: Recipe):
        self.gates, self.recipe = gates, recipe
        self.losses: list[Tensor] = []  # one a layer and sequence, since last cleared

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        gate = self.gates[ctx.layer]
        if q.is_cuda and has_kernel(q, gate.block):
            out, _, teacher = attention_with_map(q, k, v, gate.block, self.recipe.loss, scale=ctx.scale)
        else:
            out, teacher = dense_attention(q, k, v, ctx.scale), block_map(q, k, self.recipe.loss, gate.block, ctx.scale)
        assert ctx.rope is not None
        tables = ctx.rope(ctx.positions[:: gate.block], gate.rope_dim)
        with torch.enable_grad():
            loss = gate_loss(gate(ctx.q_pre, ctx.k_pre, *tables), teacher, self.recipe.drop)
            (loss / self.recipe.batch).backward()
        self.losses.append(loss.detach())
        return out


def new_gates(model: ModelSpec, recipe: Recipe) -> list[AttnGate]:
    """Gates to train, fp32, the same for the same seed; they start near the dot product of the means (last pooling) of q and k.

    The authors start from random weights; from here the same training keeps more attention mass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sizes = (recipe.block, model.head_dim, recipe.gate_dim, model.heads, model.kv_heads)
        gates = [AttnGate(recipe.gate_type, *sizes) for _ in range(model.layers)]
    with torch.no_grad():
        for weight in (weight for gate in gates for weight in gate.parameters()):
            weight.mul_(0.1)
            weight[:, -model.head_dim :] += torch.eye(model.head_dim, recipe.gate_dim)
    return gates


def pack(texts: Iterable[str], tokenizer: Any, ctx_len: int) -> Tensor:
    """Documents tokenised, joined with the end-of-sequence token and cut: int64 [sequences, ctx_len]; the rest is dropped.

    Raises: ValueError when there is less than one sequence.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    count = len(tokens) // ctx_len
    if not count:
        raise ValueError(f"the training data has {len(tokens)} tokens, one sequence takes {ctx_len}")
    return torch.tensor(tokens[: count * ctx_len]).view(count, ctx_len)


def _batches(sequences: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """[batch, ctx_len] without end; every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            queue += torch.randperm(len(sequences), generator=generator).tolist()
        yield sequences[queue[:batch]]
        queue = queue[batch:]


def train(model: Any, spec: ModelSpec, sequences: Tensor, recipe: Recipe) -> tuple[list[AttnGate], list[dict[str, float]]]:
    """Gates for a transformers causal LM, which stays as it is, and a record (step, loss, lr) per step.

    A loss that is not finite ends the training: the gates are then those of the last finite one, and the record stops there.
    """
    from ...models.attach import attach

    device = next(model.parameters()).device
    model.requires_grad_(False).eval()
    gates = [gate.to(device) for gate in new_gates(spec, recipe)]
    trainer = GateTrainer(gates, recipe)
    weights = [weight for gate in gates for weight in gate.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    records: list[dict[str, float]] = []
    last_good = [weight.detach().clone() for weight in weights]
    steps = tqdm(range(recipe.steps), desc="distill", unit="step")
    with attach(model, trainer), torch.no_grad():
        for step, batch in zip(steps, _batches(sequences, recipe.batch, recipe.seed)):
            trainer.losses.clear()
            optimizer.zero_grad()
            for sequence in batch:
                model.base_model(input_ids=sequence[None].to(device), use_cache=False)
            loss = float(torch.stack(trainer.losses).mean())
            if not math.isfinite(loss):
                for weight, good in zip(weights, last_good):
                    weight.copy_(good)
                break
            for weight, good in zip(weights, last_good):
                good.copy_(weight)
            records.append({"step": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"]})
            optimizer.step()
            schedule.step()
            steps.set_postfix(loss=f"{loss:.4f}")
    return gates, records


def _lr_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)))


def save(out: Path, gates: list[AttnGate], records: list[dict[str, float]], model: ModelSpec, training: dict) -> None:
    """Weights in bf16, config.json, and loss.csv with the columns step, loss, lr."""
    save_gates(out, gates, model, training)
    with (out / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "lr"])
        writer.writeheader()
        writer.writerows(records)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sparsebench.methods.seer.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name, local folder or hub id, as in run_bench.py")
    parser.add_argument(
        "--data", required=True, help="corpora, comma-separated, of which the split 'train' is read: file:PATH,..."
    )
    parser.add_argument("--out", required=True, type=Path, help="new folder for the gates")
    parser.add_argument("--ctx", type=parse_tokens, default=8192, help="tokens per sequence, e.g. 8k")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the frozen model")
    for name, value in asdict(Recipe()).items():
        choices = ["max", "mass"] if name == "loss" else None
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(value), default=value, choices=choices, help=f"default {value}"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    from ...models import zoo
    from ...suites.corpora import read_documents

    args = _arguments(argv)
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    try:
        loaded = zoo.load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
        texts = [document.text for source in args.data.split(",") for document in read_documents(source, "train")]
        sequences = pack(texts, loaded.tokenizer, args.ctx)
        gates, records = train(loaded.model, loaded.spec, sequences, recipe)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sources = ",".join(source.rsplit("/", 1)[-1] for source in args.data.split(","))
    tokens = len(records) * recipe.batch * args.ctx
    training = {"data": sources, "ctx_len": args.ctx, "tokens": tokens, **asdict(recipe)}
    save(args.out, gates, records, loaded.spec, training)
    if len(records) < recipe.steps:
        print(f"error: the loss of step {len(records)} is not finite; the gates before it are in {args.out}", file=sys.stderr)
        return 1
    print(f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f} on {len(sequences)} sequences; gates in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
