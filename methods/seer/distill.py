"""Train SeerAttention's gates for a frozen model.

    python -m sparsebench.methods.seer.distill --model NAME --data file:PATH --ctx 8k --out DIR
    torchrun --nproc-per-node 8 -m sparsebench.methods.seer.distill ... --batch 8        (or: accelerate launch -m ...)

Source: Gao et al. 2024 (arXiv 2410.13276), section 3.2. In every layer the gate learns the block map of that layer's true
attention. Layers train side by side, each from its own inputs, in one forward pass of the model, with no graph across layers:
memory holds one layer's attention at a time, and there are no activations that gradient checkpointing could spare.

The default learns the mass of a block, from all rows. The paper's recipe is `--loss max --drop 0.25`: the largest probability
in a block, without the first quarter of the rows. Gates of the mass keep more of the attention at equal density, the others
lose less perplexity: docs/seer.md has the numbers.

Of the parallel configurations, DDP, FSDP (version 2, TRANSFORMER_BASED_WRAP, without mixed precision, which would train the
gates in bf16) and DeepSpeed up to ZeRO-2 fit a gate that is fed inside another module's forward.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.block_mass import REDUCTIONS
from ..base import ModelSpec
from . import command
from .gated_model import GatedModel, Recipe, new_gates
from .ground_truth import resolve_teacher
from .training import Trainer, arguments, run, write_history
from .weights import gate_options, load_gates, save_gates


class DistillTrainer(Trainer):
    """Trainer of a GatedModel: checkpoints hold the gates alone, in fp32, as a folder that load_gates() reads.

    Every logging step, the first and the last also record the recall at density .1 on each process's first sequence of the
    step, before the update, and the oracle's, which chooses by the teacher: mass_recall and mass_recall_oracle, or
    max_recall and max_recall_oracle where the teacher is the block maximum.
    """

    less_memory = "--ctx, then shard the model over more GPUs (accelerate launch with FSDP)"  # no activations are kept

    def __init__(self, module: GatedModel, args, sequences: Tensor, spec: ModelSpec):
        super().__init__(module, args, sequences)
        self.gated, self.spec = module, spec

    def training_step(self, model, inputs, num_items_in_batch=None):
        step, method = self.state.global_step, self.gated.method
        logs = step == 0 or (step + 1) % self.args.logging_steps == 0 or step + 1 == self.args.max_steps
        method.measure = logs and not self.extras
        loss = super().training_step(model, inputs, num_items_in_batch)
        if method.measure:
            name = f"{method.recipe.loss}_recall"
            self.extras[name], self.extras[name + "_oracle"] = torch.stack(method.recalls).mean(0).unbind()
        return loss

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            gates = self.gated.trained_gates(state_dict or self.gated.state_dict())
            save_gates(Path(output_dir or self.args.output_dir), gates, self.spec, {}, torch.float32)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:  # whose checkpoints Accelerate writes and reads itself
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        for gate, saved in zip(self.gated.gates, load_gates(resume_from_checkpoint, self.spec).trainable(), strict=True):
            gate.load_state_dict(saved.state_dict())


def train(
    model: Any, spec: ModelSpec, sequences: Tensor, recipe: Recipe, args: Any, out: Path, *,
    teacher: str = "auto", init: str | None = None, data: str = "",
) -> list[dict[str, float]]:  # fmt: skip
    """Train gates for a transformers causal LM, which stays as it is, and write them to `out`: bf16, config.json, loss.csv.

    Args:
        sequences: int64 [n, ctx_len].  args: training.arguments(), whose output_dir gets the checkpoints.
        teacher: resolve_teacher.  init: gates to start from.  data: what config.json calls the training data.

    Returns: the history (training.Trainer).
    Raises: as training.run(), and then writes nothing to `out`.
    """
    from ...models.attach import attach

    base = model.base_model
    gates = new_gates(spec, recipe) if init is None else load_gates(init, spec).trainable()
    gates = [gate.to(args.device) for gate in gates]
    teacher = resolve_teacher(teacher, args.device, base.dtype, spec.head_dim, gates[0].block, recipe.loss)
    module = GatedModel(base, gates, recipe, teacher)
    trainer = DistillTrainer(module, args, sequences, spec)
    record = {
        "data": data,
        "ctx_len": sequences.shape[1],
        "init": init and Path(init).name,
        "teacher": teacher,
        **asdict(recipe),
    }
    if trainer.is_world_process_zero():
        print(f"{len(sequences)} sequences of {sequences.shape[1]} tokens, ground truth by the {teacher} teacher")
    with attach(base, module.method):
        run(trainer, {"model": spec.name, **record})
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        tokens = len(trainer.history) * trainer.tokens_per_step
        save_gates(out, module.trained_gates(state), spec, {**record, "tokens": tokens})
        write_history(out / "loss.csv", trainer.history)
    return trainer.history


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    """Raises: ValueError also where gates to start from are of another kind than the options ask for."""
    parser = command.new_parser("distill", __doc__, "8k")
    parser.add_argument("--init", help="gates to start from, whose kind, block and gate_dim are kept")
    parser.add_argument("--teacher", default="auto", choices=["auto", "kernel", "torch"], help="who computes the ground truth")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the frozen model")
    parser.add_argument("--log-every", type=int, default=10, help="steps from one measured recall to the next, default 10")
    for option in fields(Recipe):
        flag, text = "--" + option.name.replace("_", "-"), f"{option.metadata['help']}; default {option.default}"
        choices = REDUCTIONS if option.name == "loss" else None
        parser.add_argument(flag, type=type(option.default), default=argparse.SUPPRESS, choices=choices, help=text)
    args = command.parse(parser, argv)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    if args.init is not None:
        kind = gate_options(args.init)
        kept = {name: kind[name] for name in ("gate_type", "block", "gate_dim")}
        if other := [name for name in kept if given.get(name, kept[name]) != kept[name]]:
            raise ValueError(
                f"gate {args.init} has {', '.join(f'{name}={kept[name]}' for name in other)}: leave that option out"
            )
        given |= kept
    recipe = Recipe(**given)
    if args.ctx <= recipe.block:
        raise ValueError(f"--ctx {args.ctx} is one block of {recipe.block} tokens: a gate learns to choose among several")
    return args, recipe


def _distill(argv: list[str] | None) -> None:
    from ...models import zoo

    args, recipe = _parse(argv)
    training = arguments(
        args.checkpoints, steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, warmup=recipe.warmup, seed=recipe.seed,
        save_steps=args.save_every, log_every=args.log_every, cpu=args.device == "cpu",
    )  # fmt: skip
    loaded = zoo.load(args.model, dtype=getattr(torch, args.dtype), device=training.device)
    loaded.check_length(args.ctx)
    sequences, names = command.packed(args.data, loaded.tokenizer, args.ctx, recipe.steps * recipe.batch)
    history = train(
        loaded.model, loaded.spec, sequences, recipe, training, args.out, teacher=args.teacher, init=args.init, data=names
    )
    if training.process_index == 0:
        print(f"loss {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f} on {len(sequences)} sequences; gates in {args.out}")


def main(argv: list[str] | None = None) -> int:
    return command.answer(lambda: _distill(argv))


if __name__ == "__main__":
    sys.exit(main())
