"""What the trainers of gates and of whole models share: data in a fixed order, resuming, loss.csv, clear failures.

    args = arguments(out, steps=500, batch=8, lr=1e-3, warmup=20, seed=0, save_steps=100)
    trainer = Trainer(module, args, sequences)      # module(input_ids=[1, ctx_len]) -> {"loss": ...}
    run(trainer, recipe)                            # again after a kill: goes on where it stopped

transformers' Trainer on Accelerate does the work, so `torchrun` and `accelerate launch` start it on several GPUs.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

RECIPE_FILE = "recipe.json"  # beside the checkpoints: what they were trained with


class LossNotFiniteError(ValueError):
    """Training stopped at a loss or gradient that is NaN or infinite, before it reached the weights."""


class Stream(Dataset):
    """`count` sequences, {"input_ids": [ctx_len]} each, in an order that the seed fixes: all once before any comes again."""

    def __init__(self, sequences: Tensor, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        passes = -(-count // len(sequences))
        self.sequences = sequences
        self.order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(passes)])[:count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[self.order[i]]}


def arguments(
    out: Path | str, *, steps: int, batch: int, lr: float, warmup: int, seed: int, save_steps: int, log_every: int = 10,
    max_grad_norm: float = 0.0, bf16: bool = False, cpu: bool = False,
) -> transformers.TrainingArguments:  # fmt: skip
    """AdamW without weight decay, `warmup` steps up to `lr`, then a cosine down to 0.

    Args:
        out: folder of the checkpoints checkpoint-STEP, of which the newest two stay, and of TensorBoard's runs/.
        batch: sequences a step over all processes. One runs at a time in each, so memory does not grow with it, and the
            same seed gives the same steps on any number of GPUs.
        max_grad_norm: 0 does not clip.
        bf16: autocast of a model with fp32 weights. cpu: even where there is a GPU.

    Raises: ValueError for a number below 1, or when the processes cannot share the batch.
    """
    if min(steps, batch, save_steps, log_every) < 1:
        raise ValueError(f"steps {steps}, batch {batch}, steps to save {save_steps} and to log {log_every} must be at least 1")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if batch % processes:
        raise ValueError(f"{processes} processes cannot share --batch {batch}: give a multiple of {processes}")
    args = transformers.TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=batch // processes,
        learning_rate=lr, warmup_steps=warmup, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=max_grad_norm,
        seed=seed, train_sampling_strategy="sequential", save_strategy="steps", save_steps=save_steps, save_total_limit=2,
        logging_steps=log_every, logging_nan_inf_filter=False, bf16=bf16, use_cpu=cpu, ddp_find_unused_parameters=False,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [], remove_unused_columns=False,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # one process with several GPUs in sight would become nn.DataParallel
    return args


class Trainer(transformers.Trainer):
    """transformers' Trainer over packed sequences, with a record of every step.

    Args: sequences int64 [n, ctx_len]; the module's forward(input_ids=[1, ctx_len]) returns {"loss": mean over the sequence}.

    history: a row per step: step (from 0), loss (mean over the step's sequences, before the update), lr, tokens_per_second (of
        all processes, since the step before, saving included), and what a subclass puts into `extras` {name: 0-d tensor}
        during the step.
    less_memory: what to lower when the GPU's does not suffice, in this order.
    """

    less_memory = "--ctx"

    def __init__(self, module: nn.Module, args: transformers.TrainingArguments, sequences: Tensor):
        per_step = args.gradient_accumulation_steps * args.world_size
        super().__init__(module, args, train_dataset=Stream(sequences, args.max_steps * per_step, args.seed))
        self.model_accepts_loss_kwargs = False  # the loss is a mean, and the Trainer divides it by the sequences of a step
        self.tokens_per_step = per_step * sequences.shape[1]
        self.history: list[dict[str, float]] = []
        self.extras: dict[str, Tensor] = {}
        self._parts: list[Tensor] = []
        self._since: float | None = None  # None: the next step is the first of this run

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._since = self._since or time.perf_counter()
        part = super().training_step(model, inputs, num_items_in_batch)
        self._parts.append(part)
        return part

    def _get_grad_norm(self, model, grad_norm=None):
        """Called once a step, between the gradients and the update."""
        norm = super()._get_grad_norm(model, grad_norm)
        # The only wait for the device in a step. A NaN of one process becomes that of all, so all stop.
        norm_now = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        names, extras = list(self.extras), list(self.extras.values())
        numbers = torch.stack([torch.stack(self._parts).sum(), *extras]).float()
        numbers = self.accelerator.reduce(numbers, "mean")
        loss, norm_now, *extras = torch.cat((numbers[:1], norm_now.float().to(numbers).view(1), numbers[1:])).tolist()
        self._parts.clear()
        self.extras.clear()
        step = self.state.global_step
        if not (math.isfinite(loss) and math.isfinite(norm_now)):
            raise LossNotFiniteError(
                f"the loss of step {step} is not finite (loss {loss}, gradient norm {norm_now}): "
                f"lower --lr; checkpoints and loss.csv stay in {self.args.output_dir}"
            )
        now = time.perf_counter()
        assert self._since is not None
        speed = self.tokens_per_step / (now - self._since)
        self._since = now
        row = {"step": step, "loss": loss, "lr": self._get_learning_rate(), "tokens_per_second": round(speed, 1)}
        self.history.append(row | dict(zip(names, extras)))
        if self.is_world_process_zero():
            write_history(Path(self.args.output_dir) / "loss.csv", self.history)
        return norm

    def log(self, logs, start_time=None):
        if "loss" in logs and self.history:
            logs = logs | {name: value for name, value in self.history[-1].items() if name not in ("step", "loss", "lr")}
        super().log(logs, start_time)


def run(trainer: Trainer, recipe: dict[str, Any]) -> None:
    """Train, from the newest complete checkpoint in the output folder when there is one, and write loss.csv there as it goes.

    recipe: what decides the curve beside the data, JSON values; a folder begun with another one or other data is refused.
    trainer.history then has the rows of the runs before, too.
    Raises: LossNotFiniteError, checkpoints and loss.csv stay; ValueError for a GPU without memory, saying what to lower, and
        for another recipe.
    """
    out = Path(trainer.args.output_dir)
    checkpoint = newest_checkpoint(out)
    sequences = trainer.train_dataset.sequences
    data = {"sequences": len(sequences), "data_sha256": hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:16]}
    _check_recipe(out, recipe | data, checkpoint is not None, trainer.is_world_process_zero())
    if checkpoint is not None:
        done = int(checkpoint.name.rpartition("-")[2])
        trainer.history = [row for row in read_history(out / "loss.csv") if row["step"] < done]
        if trainer.is_world_process_zero():
            print(f"goes on after step {done} from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (LossNotFiniteError, torch.OutOfMemoryError) as error:
        if trainer.is_world_process_zero():
            print(file=sys.stderr)  # ends the line of the progress bar
        if isinstance(error, LossNotFiniteError):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"out of memory (sequences run one at a time, --batch saves none): lower {trainer.less_memory}; {reason}"
        ) from error


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint-STEP of the most steps that was written whole: the trainer's state comes last."""
    found = []
    for folder in out.glob("checkpoint-*"):
        try:
            found.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def _check_recipe(out: Path, recipe: dict[str, Any], resumes: bool, writes: bool) -> None:
    file, recipe = out / RECIPE_FILE, json.loads(json.dumps(recipe))
    if resumes and file.is_file():
        before = json.loads(file.read_text())
        other = [f"{key}={before.get(key)!r}" for key in sorted({*before, *recipe}) if before.get(key) != recipe.get(key)]
        if other:
            raise ValueError(f"{out} was begun with {', '.join(other)}: give the same, or another --out")
    elif writes:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(recipe, indent=2) + "\n")


def write_history(file: Path, history: list[dict[str, float]]) -> None:
    """CSV with a column for every name that any row has; renamed into place, so that a kill leaves the last whole one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(name for row in history for name in row)))
        writer.writeheader()
        writer.writerows(history)
    partial.rename(file)


def read_history(file: Path) -> list[dict[str, float]]:
    """The rows of write_history(); none when there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as handle:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(handle)]
    return [row | {"step": int(row["step"])} for row in rows]
