import importlib
import json
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sparsebench.methods import METHODS
from sparsebench.models import zoo
from sparsebench.models.attach import attach
from sparsebench.suites import ruler
from sparsebench.suites.base import Cell, NotApplicable
from sparsebench.suites.generation import Example, encode
from sparsebench.suites.ruler import ESSAY_TASKS, OFFLINE_TASKS, Ruler, make_examples

HARNESS = "lm_eval.tasks.ruler"
STORY = "The cat sat down. It saw 3 mice! \u201cWhere to?\u201d they asked. Nobody in the whole of that quiet house knew. "


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """When imported, the harness lists six million needle keys, which takes ten seconds, and asks the network for punkt."""
    import nltk
    import wonderwords

    importlib.import_module(f"{HARNESS}.cwe_utils")  # with all its words
    everything = wonderwords.RandomWord()._categories
    few = SimpleNamespace(_categories={kind: words[:30] for kind, words in everything.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", lambda: few)
        patch.setattr(nltk, "download", lambda *args, **options: print("asked the network"))
        for module in ("prepare_niah", "niah_utils"):
            sys.modules.pop(f"{HARNESS}.{module}", None)
        ruler._harness.cache_clear()
        ruler._harness("niah_utils")
        yield
    for module in ("prepare_niah", "niah_utils"):
        del sys.modules[f"{HARNESS}.{module}"]
    ruler._harness.cache_clear()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_network(*args, **options):
        raise OSError("no network")

    make_examples.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    monkeypatch.setattr("socket.create_connection", no_network)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: pytest.fail("loads a tokenizer"))
    monkeypatch.setattr(ruler, "_has_punkt", lambda: False)


@pytest.fixture(scope="module")
def words():
    """A model without weights, whose tokens are words and signs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}a system prompt of some words < {{ m['content'] }} > now you : {% endfor %}"
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=template))


def cell(task, ctx_len=1024, limit=2, seed=0, **options):
    return Cell("tiny", "", "dense", {}, "ruler", task, ctx_len, None, limit, seed, "float32", options=options)


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY.replace(" ", "\n ") * 100)
    return f"file:{path}"


def texts(model, wanted):
    return [(e.id, e.prompt, e.answer_prefix, e.references) for e in Ruler().examples(model, wanted)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", [*OFFLINE_TASKS, *ESSAY_TASKS])
def test_prompts_fit_and_hold_their_answers(words, story, task, chat):
    options = {"haystack": story} if task in ESSAY_TASKS else {}
    wanted = cell(task, **options, **({"chat_template": True} if chat else {}))
    suite = Ruler()
    examples = suite.examples(words, wanted)
    assert len(examples) == 2 + ruler.SPARE and len({e.prompt for e in examples}) == len(examples)
    for example in examples:
        whole = suite.prompt(words, wanted, example)  # raises when it is too long
        length = len(encode(words.tokenizer, whole)) + example.max_new_tokens
        assert 512 < length <= 1024
        assert example.references and all(r in example.prompt for r in example.references)
        assert whole.endswith(example.answer_prefix) and whole.count(example.answer_prefix) == 1 + (task == "cwe")
        assert example.max_new_tokens == {"vt": 30, "cwe": 120, "fwe": 50}.get(task, 128)
        assert chat == ("a system prompt" in whole)
    expected = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(task, 1)
    assert {len(e.references) for e in examples} == {expected}
    assert suite.notes == ({"haystack": story, "sentences": "simple"} if task in ESSAY_TASKS else {})


def test_the_chat_template_takes_its_tokens_from_the_text(words):
    plain, chat = (Ruler().examples(words, cell("fwe", **options)) for options in ({}, {"chat_template": True}))
    longest = [max(len(encode(words.tokenizer, e.prompt)) for e in examples) for examples in (plain, chat)]
    assert longest[1] < longest[0] <= 1024 - 50  # 12 tokens of the template; words are added in steps of 32


def test_needles_stand_between_sentences(words, story):
    prompt = Ruler().examples(words, cell("niah_single_2", haystack=story))[0].prompt
    before, needle, after = prompt.partition("One of the special magic numbers for ")
    assert before.split("\n")[-1].endswith((". ", "! ", "? ")) or before.endswith("\n")
    assert needle and after.split(". ", 1)[1].startswith(("The", "It", "\u201cWhere", "Nobody", "\nWhat"))


@pytest.mark.parametrize("task", [*OFFLINE_TASKS, "niah_multiquery"])
def test_same_examples_whatever_came_before(words, story, task):
    options = {"haystack": story} if task in ESSAY_TASKS else {}
    for seed, seeded in enumerate((random, np.random, ruler._harness("cwe_utils").RNG)):
        seeded.seed(seed)
    first = texts(words, cell(task, **options))
    make_examples.cache_clear()
    for seeded in (random, np.random, ruler._harness("cwe_utils").RNG):
        seeded.seed(99)
    texts(words, cell("cwe", seed=5))
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert texts(words, cell(task, **options)) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    more = texts(words, cell(task, limit=9, **options))
    assert more[: len(first)] == first and len(more) == 9 + ruler.SPARE
    assert texts(words, cell(task, seed=1, **options)) != first


def test_the_generators_are_as_they_were_also_after_an_error(words, monkeypatch):
    module, own = ruler._harness("cwe_utils"), ruler._harness("cwe_utils").RNG.getstate()
    before = dict(vars(module))

    def fail(*args):
        raise RuntimeError("inside")

    texts(words, cell("cwe"))
    assert dict(vars(module)) == before and module.RNG.getstate() == own
    monkeypatch.setattr(module, "get_example", fail)
    state = random.getstate()
    with pytest.raises(RuntimeError, match="inside"):
        texts(words, cell("cwe", seed=3))
    assert dict(vars(module)) == {**before, "get_example": fail} and module.RNG.getstate() == own
    assert random.getstate() == state


def test_methods_share_the_examples(words):
    wanted = cell("fwe")
    assert Ruler().examples(words, wanted) is Ruler().examples(words, replace(wanted, method="oracle", density=0.25))


def test_without_a_limit_there_are_as_many_as_in_the_harness(words, monkeypatch):
    monkeypatch.setattr(ruler, "ALL", 7)
    assert [name for name, *_ in texts(words, cell("fwe", limit=None))] == list("0123456")


@pytest.mark.parametrize(
    "task, ctx_len, reason",
    [
        ("niah_single_1", 160, "niah_single_1 does not fit into 160"),
        ("niah_multiquery", 512, "steps that are too large"),  # 500 words more or none
        ("vt", 512, "vt needs"),
        ("cwe", 512, "cwe needs"),
        ("fwe", 199, "fwe needs 200 tokens"),
    ],
)
def test_contexts_that_are_too_short(words, story, task, ctx_len, reason):
    with pytest.raises(NotApplicable, match=reason):
        texts(words, cell(task, ctx_len, haystack=story))


@pytest.mark.parametrize("task", ["vt", "cwe", "fwe"])
def test_the_shortest_context_is_enough(words, task):
    """Here the generators' own searches find nothing that fits; left alone, that of vt never ends."""
    with pytest.raises(NotApplicable) as caught:
        texts(words, cell(task, 150))
    shortest = int(str(caught.value).split(" needs ")[1].split()[0])
    for example in Ruler().examples(words, cell(task, shortest)):
        assert Ruler().prompt(words, cell(task, shortest), example) and example.references


def test_equal_names_are_drawn_again(words, monkeypatch):
    module, drawn = ruler._harness("vt_utils"), []

    def choices(letters, k):
        drawn.append("SAME" if len(drawn) < 2 else f"{len(drawn):0{k}}")
        return drawn[-1]

    monkeypatch.setattr(module.random, "choices", choices)
    assert all(len(e.references) == 5 for e in Ruler().examples(words, cell("vt")))


def test_the_longest_worked_example(words):
    """With its answers, by which the search measures it, the shortest one is too long: left alone, the search never ends."""
    factor = 2.0

    def tokenizer(text, **options):
        return {"input_ids": [0] * int(factor * len(encode(words.tokenizer, text)))}

    tokenizer.bos_token = None
    with pytest.raises(NotApplicable, match="worked example"):
        while True:
            found = ruler.make_examples(tokenizer, cell("vt", 4096, seed=int(100 * factor)))
            factor += 0.01
    assert factor > 2 and len(found[0].references) == 5


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "fwe"])
def test_no_length_is_exceeded(words, task):
    for ctx_len in range(600, 640, 2):
        wanted = cell(task, ctx_len, limit=1)
        for example in Ruler().examples(words, wanted):
            assert Ruler().prompt(words, wanted, example)  # raises when it is too long


def test_tokens_that_are_characters(model_folder, monkeypatch):
    monkeypatch.undo()
    loaded = zoo.load(str(model_folder))
    with pytest.raises(NotApplicable, match="worked example may have 500 tokens"):
        texts(loaded, cell("vt", 8192))
    with pytest.raises(NotApplicable, match="no room for its answers"):
        texts(loaded, cell("fwe", 530))


def test_haystack_from_a_text_or_from_lines(words, story, tmp_path):
    path = tmp_path / "story.jsonl"
    halves = (STORY * 5).strip(), (STORY.replace(" ", "\t") * 95).strip()
    lines = [{"text": text, "split": "eval"} for text in halves] + [{"text": "not this", "split": "train"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert texts(words, cell("niah_multikey_1", haystack=f"file:{path}")) == texts(
        words, cell("niah_multikey_1", haystack=story)
    )
    assert Ruler.files("niah_multikey_1", {"haystack": story}) == [story.removeprefix("file:")]
    assert Ruler.files("niah_single_1", {"haystack": story}) == Ruler.files("niah_multikey_1", {}) == []


def test_haystack_that_is_too_short_or_missing(words, tmp_path):
    (tmp_path / "short.txt").write_text("one two three. " * 100)
    with pytest.raises(ValueError, match=r"short.txt has 400 tokens, too few for a context of 1024"):
        texts(words, cell("niah_single_3", haystack=f"file:{tmp_path}/short.txt"))
    with pytest.raises(ValueError, match="no such corpus file"):
        texts(words, cell("niah_single_3", haystack=f"file:{tmp_path}/none.txt"))


def test_essays_from_the_hub(words, monkeypatch):
    with pytest.raises(ValueError, match=r"--haystack file:PATH, or take niah_single_1, .* \(OSError: no network\)$"):
        texts(words, cell("niah_single_2"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **options: SimpleNamespace(sha="abc"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, **options: iter([{"text": f"{name} {STORY * 100}"}]))
    suite = Ruler()
    assert "baber/paul_graham_essays The cat" in suite.examples(words, cell("niah_single_2"))[0].prompt
    assert suite.notes == {"haystack": "baber/paul_graham_essays", "sentences": "simple", "data_revision": "abc"}


def squad(question, answers):
    return {"question": question, "is_impossible": False, "answers": [{"text": text} for text in answers]}


def test_questions_about_documents(words, monkeypatch):
    import requests

    def get(url, timeout):
        assert timeout <= 10
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", get)
    for task in ("qa_1", "qa_2"):
        with pytest.raises(ValueError, match=rf"{task} asks about documents from https.* take niah_single_1.*no network"):
            texts(words, cell(task))

    paragraphs = [
        {
            "context": f"Fact {i} is that room {i} is " + "very " * 30 + f"blue{i}.",
            "qas": [squad(f"Which {i}?", [f"blue{i}", "x"])],
        }
        for i in range(40)
    ]
    answer = SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"data": [{"paragraphs": paragraphs}]})
    monkeypatch.setattr(requests, "get", lambda url, timeout: answer)
    for read in ("read_squad", "download_json"):
        getattr(ruler._harness("qa_utils"), read).cache_clear()
    suite, wanted = Ruler(), cell("qa_1", 1536, chat_template=True)
    examples = suite.examples(words, wanted)
    with pytest.raises(NotApplicable, match="steps that are too large"):  # ten documents or the one with the answer
        texts(words, cell("qa_1", 500))
    ruler._harness("qa_utils").read_squad.cache_clear()
    assert [e.references for e in examples[:2]] == [("blue0", "x"), ("blue1", "x")]
    for example in examples:
        assert 768 < len(encode(words.tokenizer, suite.prompt(words, wanted, example))) + 32 <= 1536
        assert example.max_new_tokens == 32 and example.references[0] in example.prompt


def scores(task, references, answer):
    example = Example("7", "", tuple(references), 1, about={"task": task, "ctx_len": 2048})
    found = list(Ruler().score(example, answer))
    assert [(s.task, s.example, s.metric, s.unit) for s in found] == [
        (task, "7", "score", "%"),
        (task, "7", "harness_score", "ratio"),
    ]
    return [s.value for s in found]


@pytest.mark.parametrize(
    "task, references, answer, score, harness",
    [
        ("niah_single_1", ["123"], " it is 123. 99", 100, 1),
        ("niah_single_1", ["123"], "it is 12 3", 0, 0),
        ("niah_single_1", ["123"], "", 0, 0),
        ("cwe", ["Apple", "pear", "fig", "nut"], "1. APPLE 2. figs", 50, 0.5),  # case does not count, parts of words do
        ("vt", ["AB", "CD", "EF", "GH", "IJ"], "AB CD EF\tGH", 80, 0.8),
        ("fwe", ["a b", "c", "d"], "a\tb c\x00d", 200 / 3, 2 / 3),  # a control character is a line end: "a b" is not found
        ("niah_multivalue", ["1", "2", "3", "4"], "\x01 \x02", 0, 0),
        ("qa_1", ["in Paris", "Paris", "the capital", "paris"], "PARIS.", 100, 0.5),  # one is enough, the harness counts all
        ("qa_2", ["yes", "no"], "maybe", 0, 0),
        ("qa_2", ["yes"], "", 0, 0),
    ],
)
def test_scores_by_hand(task, references, answer, score, harness):
    assert scores(task, references, answer) == pytest.approx([score, harness])


def test_a_run_on_the_tiny_model(model_folder, one_thread, monkeypatch):
    monkeypatch.undo()
    loaded, wanted = zoo.load(str(model_folder)), cell("fwe", limit=3)
    done = []
    for finished in (set(), {"0", "1", "2"}):
        suite = Ruler()
        suite.finished = frozenset(finished)
        with attach(loaded.model, METHODS["dense"]()) as trace:
            found = list(suite.run(loaded, wanted))
        assert {s.example for s in found} == {"0", "1", "2"} - finished == set(suite.answers)
        assert all(0 <= s.value <= 100 for s in found) and suite.notes["examples"] == 3
        done.append(len(found))
        assert finished or float(trace.density.mean()) == 1
    assert done == [6, 0]
    name, calibration = Ruler().calibration(loaded, wanted, 2)
    evaluated = [
        encode(loaded.tokenizer, Ruler().prompt(loaded, wanted, e)).tolist() for e in Ruler().examples(loaded, wanted)[:3]
    ]
    assert name == "fwe (other examples)" and len(calibration) == 2
    assert not any(ids in evaluated for ids in calibration)
