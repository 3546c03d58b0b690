"""Fine-tune a model for longer contexts, with SeerAttention's sparse attention inside or, as the baseline, dense.

    python -m sparsebench.methods.seer.extend --model NAME --data file:PATH --rope yarn --factor 4 --ctx 32k --out DIR

Source: Gao et al. 2024 (arXiv 2410.13276), its long-context fine-tuning: RoPE is stretched by YaRN, attention runs over the
blocks that the gates choose, and the gates go on learning. The model learns from the loss of its tokens alone, the gates from
their own loss alone. Without --density attention is dense and everything else the same.

One GPU, or several by torchrun or accelerate launch (DDP).
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import ModelSpec
from . import command, training
from .extended_model import ROPES, Extension, recompute_layers, stretch, width_of
from .gate import AttnGate
from .method import TRAIN
from .weights import load_gates, save_gates, shipped_gate, trained_loss

CLIP = 1.0  # largest norm of a step's gradient
NUMBERS = {
    # option: (default, help)
    "steps": (200, "optimiser steps"),
    "batch": (1, "sequences a step"),
    "lr": (5e-5, "largest learning rate of the model"),
    "gate_lr": (3e-4, "largest learning rate of the gates"),
    "gate_weight": (0.1, "factor of the gates' loss; AdamW undoes it but for what clips the gradient"),
    "warmup": (20, "steps up to the largest learning rate"),
    "seed": (0, "of the order of the data"),
}


class ExtendTrainer(training.Trainer):
    """Records the parts of the loss and the density; the gates have a learning rate of their own."""

    less_memory = "--ctx, or turn on --gradient-checkpointing"

    def __init__(self, module: Extension, args: Any, sequences: Tensor, gate_lr: float):
        super().__init__(module, args, sequences)
        self.gate_lr = gate_lr

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name, value in outputs.items():
            if name != "loss":
                self.extras[name] = self.extras.get(name, 0) + value / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [{"params": list(self.model.model.parameters())}]
            if self.model.sparse is not None:
                groups.append({"params": list(self.model.gates.parameters()), "lr": self.gate_lr})
            self.optimizer = cls(groups, **options)
        return self.optimizer


def initial_gates(path: str | None, spec: ModelSpec) -> tuple[list[AttnGate], str]:
    """The gates at `path`, or those shipped for the model, and what of a block they learn.

    Raises: ValueError when there are none that fit.
    """
    folder = shipped_gate(spec.name) if path is None else Path(path)
    if path is None and not folder.is_dir():
        raise ValueError(f"no trained gate ships for {spec.name}: give one with --gate PATH, or train one: {TRAIN}")
    return load_gates(folder, spec).trainable(), trained_loss(folder)


def extend(args: argparse.Namespace) -> None:
    """Train as the command line says and save(). Raises: as training.run(); ValueError for what does not fit together."""
    from ...models import zoo
    from ...models.attach import attach
    from ...suites.perplexity import SCALED_LOGITS

    options = training.arguments(
        args.checkpoints, steps=args.steps, batch=args.batch, lr=args.lr, warmup=args.warmup, seed=args.seed,
        save_steps=args.save_every, max_grad_norm=CLIP, bf16=args.dtype == "bfloat16", cpu=args.device == "cpu",
    )  # fmt: skip
    loaded = zoo.load(args.model, device=options.device)
    model, spec = loaded.model, loaded.spec
    if scaled := [name for name in SCALED_LOGITS if getattr(model.config, name, None) is not None]:
        raise ValueError(f"{type(model).__name__} changes its logits after the output embedding ({scaled[0]}): not supported")
    stretch(model, args.rope, args.factor, args.ctx)
    gates, loss = ([], "") if args.density is None else initial_gates(args.gate, spec)
    gates = [gate.to(options.device) for gate in gates]
    width = width_of(args.density, args.ctx, gates[0].block) if gates else 0
    sequences, names = command.packed(args.data, loaded.tokenizer, args.ctx, args.steps * args.batch)
    if args.gradient_checkpointing:
        recompute_layers(model)
    module = Extension(model, gates, width, args.gate_weight, loss)
    trainer = ExtendTrainer(module, options, sequences, args.gate_lr)
    recipe = {name: getattr(args, name) for name in (*NUMBERS, "model", "rope", "factor", "ctx", "density", "gate", "dtype")}
    recipe |= {"data": names, "width": width, "loss": loss}
    with attach(model, module.sparse) if module.sparse is not None else nullcontext():
        training.run(trainer, recipe)
    if trainer.is_world_process_zero():
        save(args.out, module, loaded.tokenizer, spec, recipe, trainer.history)
        first, last = trainer.history[0], trainer.history[-1]
        print(f"token loss {first['token_loss']:.4f} -> {last['token_loss']:.4f}; model in {args.out}")


def save(
    out: Path, module: Extension, tokenizer: Any, spec: ModelSpec, recipe: dict[str, Any], history: list[dict[str, float]]
) -> None:
    """A folder that transformers and --models of run_bench.py load, with loss.csv, training.json, and gate/ for seer:gate=PATH.

    training.json: the recipe, tokens read, the history's last row, and as `method` the selection that training ran.
    """
    module.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {**recipe, "tokens": len(history) * recipe["batch"] * recipe["ctx"], "last": history[-1]}
    if module.sparse is not None:
        of_gates = {**record, "ctx_len": recipe["ctx"]}
        save_gates(out / "gate", module.sparse.gates, replace(spec, name=out.resolve().name), of_gates)
        record["method"] = f"seer:gate={out / 'gate'},budget={recipe['width']},diagonal=True,last_dense=0"
    training.write_history(out / "loss.csv", history)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.new_parser("extend", __doc__, "32k")
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--rope", default="yarn", help=f"how RoPE is stretched: {' or '.join(ROPES)}")
    add("--factor", type=float, default=4.0, help="of the model's length, above 1; default 4")
    add("--density", type=float, help="share of the causal pairs that attention computes; without it, dense attention")
    add("--gate", help="gates to begin with, a folder or file; default: those shipped for the model")
    for name, (value, text) in NUMBERS.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text}, default {value}")
    add("--gradient-checkpointing", action="store_true", help="layers run again in the backward pass: less memory, slower")
    add("--dtype", default="bfloat16" if cuda else "float32", choices=["bfloat16", "float32"], help="weights stay float32")
    return command.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    return command.answer(lambda: extend(_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
