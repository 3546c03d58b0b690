"""Generated answers: prompts, batches, what a model without a chat template or a too long prompt does, and resuming."""

import json
import random

import pandas as pd
import pytest
import torch

from sparsebench import run_bench
from sparsebench.methods import METHODS
from sparsebench.models import zoo
from sparsebench.models.attach import attach
from sparsebench.suites import SUITES, generation
from sparsebench.suites.base import Cell, Score
from sparsebench.suites.generation import Example, GenerationSuite, encode, generate, read_answers, wrap

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}a {% endif %}"
LENGTHS = (90, 100, 60, 90, 100, 70, 80, 95)


class Echo(GenerationSuite):
    """Scores how many letters e an answer has."""

    name = "echo"
    tasks = ("echo",)

    def examples(self, model, cell):
        letters = random.Random(cell.seed)
        texts = ["".join(letters.choices("abcdefgh ", k=length)) for length in LENGTHS]
        return [Example(str(i), text, ("e",), 6, "so") for i, text in enumerate(texts)]

    def score(self, example, answer):
        yield Score("echo", example.id, "score", 100 * answer.count("e") / 6, "%")


@pytest.fixture(scope="module")
def loaded(model_folder):
    return zoo.load(str(model_folder))


def cell(ctx_len=128, limit=6, **options):
    return Cell("m", "", "dense", {}, "echo", "echo", ctx_len, None, limit, 0, "float32", options=options)


def run(suite, model, cell, method="dense"):
    with torch.no_grad(), attach(model.model, METHODS[method]()) as trace:
        return {score.example: score.value for score in suite.run(model, cell)}, trace


def test_answers_of_a_batch_are_those_of_greedy_decoding_alone(loaded):
    suite = Echo()
    run(suite, loaded, cell())
    assert set(suite.answers) == {"0", "1", "2", "3", "4", "5"}
    for example in suite.examples(loaded, cell())[:6]:
        ids = torch.from_numpy(encode(loaded.tokenizer, f"{example.prompt} so")).long()[None]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat((ids, loaded.model(ids).logits[:, -1:].argmax(-1)), dim=1)
        new = ids[0, -6:].tolist()
        stop = loaded.model.generation_config.eos_token_id
        new = new[: new.index(stop) + 1] if stop in new else new
        assert suite.answers[example.id] == loaded.tokenizer.decode(new, skip_special_tokens=True), example.id


def test_a_repetition_penalty_of_the_checkpoint_does_not_count(loaded, monkeypatch):
    prompts = ["abc def gh so is the", "hgfe so"]
    with attach(loaded.model, METHODS["dense"]()):
        expected = generate(loaded, 128, prompts, 12)
        monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", 1.8)
        assert generate(loaded, 128, prompts, 12) == expected


def test_notes_tell_what_was_asked_and_how_the_question_was_read(loaded):
    suite = Echo()
    _, trace = run(suite, loaded, cell(limit=2))
    assert suite.notes["examples"] == 2 and suite.notes["chat_template"] is False
    assert trace.question() == {"question": "dense", "question_density": 1.0}
    again = Echo()
    _, trace = run(again, loaded, cell(limit=2), "random")
    assert again.notes["text_sha256"] == suite.notes["text_sha256"]
    assert trace.question()["question"] != "dense" and 0 < trace.question()["question_density"] < 1
    assert trace.dense_phases == {"decode"}


def test_batches_are_of_like_length_and_hold_what_the_memory_does(loaded, monkeypatch):
    examples = Echo().examples(loaded, cell())
    prompts = {example.id: example.prompt for example in examples}
    per_token = 2 * 2 * 2 * 16 * 4  # k and v, layers, KV heads, channels, bytes
    monkeypatch.setattr(generation, "CPU_CACHE_BYTES", 330 * per_token)
    lengths = [[len(prompts[e.id]) for e in batch] for batch in generation._batches(loaded, examples, prompts)]
    assert lengths == [[100, 100, 95], [90, 90, 80], [70, 60]]
    monkeypatch.setattr(generation, "CPU_CACHE_BYTES", 1)
    assert [len(batch) for batch in generation._batches(loaded, examples, prompts)] == [1] * 8


def test_an_empty_answer_counts_nothing_and_is_noted(loaded, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda model, ctx_len, prompts, n: [""] + ["eee"] * (len(prompts) - 1))
    suite = Echo()
    scores, _ = run_without_model(suite, loaded)
    assert sorted(scores.values()) == [0, 50, 50, 50, 50, 50] and suite.notes["empty_answers"] == 1


def test_an_answer_that_is_read_is_right_where_every_token_is_the_most_likely(loaded):
    prompts = ["abc def gh so", "hgfe so", "ab so"]
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            ids = torch.from_numpy(encode(loaded.tokenizer, prompt + " ")).long()[None]
            for _ in range(3):
                ids = torch.cat((ids, loaded.model(ids).logits[:, -1:].argmax(-1)), dim=1)
            tokens = loaded.tokenizer.convert_ids_to_tokens(ids[0, -3:].tolist())
            first = loaded.model(ids[:, : len(prompt)]).logits[0, -1].argmax()  # the space between prompt and answer counts
            right = "".join(tokens)
            wrong = right[:2] + ("a" if right[2] != "a" else "b")
            expected = int(first) == ids[0, len(prompt)]
            assert read_answers(loaded, [prompt, prompts[0]], [right, "abcdefgh"]) == [expected, False], number
            assert read_answers(loaded, [prompt], [wrong]) == [False]
            assert read_answers(loaded, [prompt + " "], [right]) == [True]


def test_answers_in_the_prefill_are_a_metric_on_request(loaded):
    scores = {(s.example, s.metric): s.value for s in Echo().run(loaded, cell(limit=2, answer_in_prefill=True))}
    assert set(scores) == {(e, m) for e in "01" for m in ("score", "score_in_prefill")}
    assert {scores[e, "score_in_prefill"] for e in "01"} <= {0, 100}


def run_without_model(suite, loaded):
    return {score.example: score.value for score in suite.run(loaded, cell())}, suite


def test_a_chat_template_goes_around_the_prompt_and_the_answer_starts_behind_it(loaded, monkeypatch):
    assert wrap(loaded.tokenizer, "abc", "so", chat=False) == "abc so"
    assert wrap(loaded.tokenizer, "abc", "", chat=False) == "abc"
    with pytest.raises(ValueError, match="no chat template: leave out --chat-template"):
        wrap(loaded.tokenizer, "abc", "so", chat=True)
    monkeypatch.setattr(loaded.tokenizer, "chat_template", TEMPLATE)
    assert wrap(loaded.tokenizer, "abc", "so", chat=True) == "<abc>a so"
    suite, never = Echo(), Example("x", "abc", (), 6, "so", chat=False)
    assert suite.prompt(loaded, cell(chat_template=True), never) == "abc so"


def test_a_prompt_that_does_not_fit_is_refused_or_cut_in_its_middle(loaded):
    suite, long = Echo(), Example("x", "ab" * 50 + "cd" * 50, (), 8, "so")
    with pytest.raises(ValueError, match="example x has 203 tokens and 8 are generated: too long for 64"):
        suite.prompt(loaded, cell(64), long)
    suite.cut_middle = True
    prompt = suite.prompt(loaded, cell(64), long)
    letters = prompt.replace(" ", "")  # this tokenizer puts spaces between the tokens that it decodes
    assert letters.startswith("ab" * 5) and letters.endswith("cd" * 5 + "so") and len(prompt) <= 56
    with pytest.raises(generation.NotApplicable, match="leave no room"):
        suite.prompt(loaded, cell(8), long)


def test_the_beginning_of_text_is_not_written_twice(loaded, monkeypatch):
    asked = []

    class Tokenizer:
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens, verbose):
            asked.append(add_special_tokens)
            return {"input_ids": [1]}

    tokenizer = Tokenizer()
    encode(tokenizer, "<s>abc")
    encode(tokenizer, "abc")
    assert asked == [False, True]


def test_knobs_are_turned_on_examples_that_are_not_evaluated(loaded):
    suite = Echo()
    name, ids = suite.calibration(loaded, cell(), 2)
    spare = suite.examples(loaded, cell())[6:]
    assert name == "echo (other examples)" and [len(x) for x in ids] == [len(e.prompt) + 3 for e in spare]
    name, ids = suite.calibration(loaded, cell(limit=8), 1)  # nothing is left over
    assert name == "pydoc (train)" and [len(x) for x in ids] == [128]


class Interrupted:
    """generate(), stopped by Ctrl-C at call number `at`."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return generate(*args)


@pytest.fixture
def command(model_folder, tmp_path, monkeypatch):
    """command(out): the exit status of a run of dense and random on Echo, three examples a batch, into the folder `out`."""
    monkeypatch.setitem(SUITES, "echo", Echo)
    monkeypatch.setattr(generation, "CPU_CACHE_BYTES", 330 * 2 * 2 * 2 * 16 * 4)
    words = f"--models {model_folder} --suites echo --methods random --ctx 128 --limit 6 --device cpu --answer-in-prefill"
    return lambda out: run_bench.main([*words.split(), "--out", str(tmp_path / out)])


def test_an_interrupted_cell_goes_on_with_the_next_batch(command, tmp_path, monkeypatch):
    def results(out):
        frame = pd.read_csv(tmp_path / out / "results.csv").sort_values(["method", "example", "metric"])
        columns = ["method", "example", "metric", "value", "density", "density_min", "prov_question_density"]
        return frame[columns].reset_index(drop=True)

    assert command("whole") == 0
    assert set(results("whole")["metric"]) == {"score", "score_in_prefill"}
    stopped = Interrupted(at=4)  # two batches of dense, one of random
    monkeypatch.setattr(generation, "generate", stopped)
    assert command("halves") == 130
    (journal,) = (tmp_path / "halves" / "cells").glob("*.jsonl")
    (record,) = map(json.loads, journal.read_text().splitlines())
    assert len(record["scores"]) == 6 and len(record["answers"]) == 3
    journal.write_text(journal.read_text() + '{"scores": [')  # a kill while writing
    assert command("halves") == 0 and stopped.calls == 5
    pd.testing.assert_frame_equal(results("halves"), results("whole"))
    assert not list((tmp_path / "halves" / "cells").glob("*.jsonl"))
    answers = [(tmp_path / out / "answers" / f"{journal.stem}.jsonl").read_text() for out in ("halves", "whole")]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 6


def test_an_interrupted_cell_goes_on_where_batches_are_larger(command, tmp_path, monkeypatch):
    stopped = Interrupted(at=2)
    monkeypatch.setattr(generation, "generate", stopped)
    assert command("out") == 130
    monkeypatch.setattr(generation, "CPU_CACHE_BYTES", 2**30)
    assert command("out") == 0 and stopped.calls == 4
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    rows = rows[rows["metric"] == "score"]
    assert rows.groupby("method")["example"].apply(sorted).map(list).tolist() == [list(range(6))] * 2


def test_other_code_starts_an_interrupted_cell_anew(command, monkeypatch):
    stopped = Interrupted(at=2)
    monkeypatch.setattr(generation, "generate", stopped)
    assert command("out") == 130
    monkeypatch.setattr(run_bench, "source_digest", lambda: "another")
    assert command("out") == 0 and stopped.calls == 6
