"""The trainer under the gates' and the whole models' training: its data, its record, its ways to stop."""

import itertools
import math

import pytest
import torch
from torch import nn

from sparsebench.methods.seer import training
from sparsebench.methods.seer.command import answer, new_parser, packed, parse
from sparsebench.methods.seer.training import (
    LossNotFiniteError,
    Stream,
    Trainer,
    arguments,
    newest_checkpoint,
    read_history,
    run,
)
from sparsebench.suites import corpora

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCES = torch.arange(20).view(5, 4)


class NumberTokenizer:
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_packing(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3")
    (tmp_path / "b.txt").write_text("4 5")
    data = f"file:{tmp_path / 'a.txt'},file:{tmp_path / 'b.txt'}"
    sequences, names = packed(data, NumberTokenizer(), 3, 1)
    assert sequences.tolist() == [[1, 2, 3], [0, 4, 5]] and names == "a.txt,b.txt"
    with pytest.raises(ValueError, match="has 7 tokens, one sequence takes 8"):
        packed(data, NumberTokenizer(), 8, 1)


def test_a_corpus_of_the_hub_is_read_no_further_than_needed(monkeypatch):
    endless = (corpora.Document(str(i), f"{i} {i}") for i in itertools.count(1))
    monkeypatch.setattr(corpora, "read_documents", lambda source, split: endless)
    assert packed("pg19,org/name", NumberTokenizer(), 4, 1)[0].tolist() == [[1, 1, 0, 2], [2, 0, 3, 3], [0, 4, 4, 0]]


@pytest.mark.parametrize("status, error", [(1, LossNotFiniteError("nan")), (2, ValueError("bad")), (2, OSError("full"))])
def test_an_error_is_one_line(status, error, capsys):
    def work():
        raise error

    assert answer(work) == status and capsys.readouterr().err == f"error: {error}\n"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "began.training").mkdir()
    (tmp_path / "began.training" / training.RECIPE_FILE).write_text("{}")
    for name in ("began", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    given = ["--model", "m", "--data", "d", "--device", "cpu", "--out"]
    for name in ("began", "new", "new/below"):
        args = parse(new_parser("x", "text", "2k"), [*given, str(tmp_path / name)])
        assert args.ctx == 2048 and args.checkpoints == tmp_path / f"{name}.training"
    for name, fault in (("file", "is a file"), ("file/below", "file is a file"), ("full", "holds other files")):
        with pytest.raises(ValueError, match=f"--out .*{fault}"):
            parse(new_parser("x", "text", "2k"), [*given, str(tmp_path / name)])
    with pytest.raises(ValueError, match="lengths are 2 tokens or more, written 512, 8k or 1m, got '0'"):
        parse(new_parser("x", "text", "0"), [*given, str(tmp_path / "new")])


def test_every_sequence_is_used_before_any_repeats():
    seen = [row["input_ids"][0].item() // 4 for row in Stream(SEQUENCES, 10, seed=3)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:7] == [row["input_ids"][0].item() // 4 for row in Stream(SEQUENCES, 7, seed=3)]
    assert seen != [row["input_ids"][0].item() // 4 for row in Stream(SEQUENCES, 10, seed=4)]


class Toy(nn.Module):
    """Remembers what it was fed; `failures` maps a call to the loss's factor, or to an error."""

    def __init__(self, failures=()):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.fed, self.failures = [], dict(failures)

    def forward(self, input_ids):
        self.fed.append(input_ids[0, 0].item() // 4)
        failure = self.failures.get(len(self.fed), 1.0)
        if isinstance(failure, BaseException):
            raise failure
        return {"loss": (self.weight * (1 + input_ids[0, 0] / 20)).square().sum() * failure}


def trained(out, module, steps=4, batch=2, recipe=None, sequences=SEQUENCES):
    args = arguments(out, steps=steps, batch=batch, lr=0.1, warmup=2, seed=0, save_steps=1, log_every=2, cpu=True)
    trainer = Trainer(module, args, sequences)

    def go():
        run(trainer, recipe or {})
        return trainer.history

    return trainer, go


def test_the_record_of_a_training(tmp_path):
    module = Toy()
    _, go = trained(tmp_path, module)
    history = go()
    order = Stream(SEQUENCES, 8, 0).order.tolist()
    assert module.fed == order
    # Before the first update the weight is 2, and the warm-up begins with a rate of 0.
    expected = sum((2 * (1 + 4 * i / 20)) ** 2 for i in order[:2]) / 2
    assert [row["step"] for row in history] == [0, 1, 2, 3] and history[0]["loss"] == pytest.approx(expected)
    assert [row["lr"] for row in history] == pytest.approx([0, 0.05, 0.1, 0.05])
    assert all(row["tokens_per_second"] > 0 for row in history)
    assert read_history(tmp_path / "loss.csv") == history
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert trained(tmp_path, Toy())[1]() == history  # it is at its end already


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    recipe = {"lr": 0.1}
    whole = trained(tmp_path / "whole", Toy(), recipe=recipe)[1]()
    _, go = trained(tmp_path / "part", Toy({7: KeyboardInterrupt()}), recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert newest_checkpoint(tmp_path / "part").name == "checkpoint-3"
    state = tmp_path / "part" / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert newest_checkpoint(tmp_path / "part").name == "checkpoint-2"
    module = Toy()
    again = trained(tmp_path / "part", module, recipe=recipe)[1]()
    assert module.fed == Stream(SEQUENCES, 8, 0).order.tolist()[4:]
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    with pytest.raises(ValueError, match=r"part was begun with lr=0.1: give the same, or another --out"):
        trained(tmp_path / "part", Toy(), recipe={"lr": 0.2})[1]()
    with pytest.raises(ValueError, match=r"part was begun with data_sha256='[0-9a-f]{16}': give the same"):
        trained(tmp_path / "part", Toy(), recipe=recipe, sequences=SEQUENCES + 1)[1]()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, factor):
    good, module = Toy(), Toy({5: factor})
    trained(tmp_path / "good", good, steps=2)[1]()
    trainer, go = trained(tmp_path / "bad", module)
    with pytest.raises(LossNotFiniteError, match=r"loss of step 2 is not finite \(loss (nan|inf)"):
        go()
    assert len(trainer.history) == 2 and read_history(tmp_path / "bad" / "loss.csv") == trainer.history
    assert module.weight.isfinite().all() and newest_checkpoint(tmp_path / "bad").name == "checkpoint-2"


def test_a_gpu_without_memory(tmp_path):
    _, go = trained(tmp_path, Toy({4: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")}))
    with pytest.raises(ValueError, match=r"^out of memory .*lower --ctx; CUDA .*2.00 GiB\.$"):
        go()


def test_processes_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(training.os, "environ", {**training.os.environ, "WORLD_SIZE": "3"})
    with pytest.raises(ValueError, match="3 processes cannot share --batch 4: give a multiple of 3"):
        arguments(tmp_path, steps=1, batch=4, lr=1, warmup=0, seed=0, save_steps=1, cpu=True)
