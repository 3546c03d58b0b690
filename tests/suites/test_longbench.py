import hashlib
import json
import sys
import zipfile

import pytest
from tokenizers import decoders

from sparsebench.methods import METHODS
from sparsebench.models import zoo
from sparsebench.models.attach import attach
from sparsebench.suites.base import Cell
from sparsebench.suites.generation import Example, cut_middle, encode
from sparsebench.suites.longbench import BALANCED, METRICS, LongBench, length_bucket, prompt_format, task_score
from sparsebench.suites.longbench2 import LongBench2, chosen_letter

QASPER = {"input": "which model", "context": "a story of words", "answers": ["the tiny model"], "length": 3999}
QUESTION = {
    "question": " why ", "choice_A": "one", "choice_B": "two", "choice_C": "three ", "choice_D": "four", "answer": "C",
    "context": " long text\n", "difficulty": "hard", "length": "medium",
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget():
    LongBench.load.cache_clear()


@pytest.fixture
def model(model_folder, one_thread):
    """The tiny model, whose tokens are decoded without spaces between them."""
    loaded = zoo.load(str(model_folder))
    loaded.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return loaded


def cell(task, folder, ctx_len=256, limit=2, suite="longbench", **options):
    options |= {"longbench_data": str(folder)} if folder else {}
    return Cell("tiny", "", "dense", {}, suite, task, ctx_len, None, limit, 0, "float32", options=options)


def write_lines(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path.parent


@pytest.mark.parametrize(
    "task, answer, references, expected",
    [
        # without articles: {cat sat on mat} and {cat sat}, 2 common: precision 2/4, recall 2/2, F1 = 2 * .5 * 1 / 1.5
        ("narrativeqa", "The cat sat on the mat.", ("a cat sat",), 2 / 3),
        ("musique", "The cat sat on the mat.", ("dog", "a cat sat", "bird"), 2 / 3),  # the best reference counts
        # 巴黎 是 法国 的 首都 and 法国 首都 巴黎, 3 common: precision 3/5, recall 3/3, F1 = 2 * .6 / 1.6
        ("multifieldqa_zh", "巴黎是法国的首都。", ("法国首都巴黎",), 0.75),
        # longest common subsequence a c: precision 2/4, recall 2/3, F1 = 2 * (1/3) / (7/6)
        ("gov_report", "a x c d", ("a b c",), 4 / 7),
        # 今天天气 很 好 and 今天天气 不好, 1 common: precision 1/3, recall 1/2, F1 = 2 * (1/6) / (5/6)
        ("vcsum", "今天天气很好", ("今天天气不好",), 0.4),
        ("passage_retrieval_en", "Paragraph 3 or paragraph 12", ("Paragraph 3",), 1 / 2),  # one of two numbers
        ("passage_retrieval_zh", "7 7 8", ("段落7",), 2 / 3),
        ("passage_count", "5 unique, so 5 of 20", ("5",), 2 / 3),
        # the first line without a comment sign; 5 equal characters in order of 5 + 6: 2 * 5 / 11 = .909, whole percent
        ("lcc", "\n\n# comment\nx = 1\ny", ("x = 12",), 0.91),
        ("repobench-p", "// c\n`x`", ("x",), 0.0),
        # a blank line counts as a line: two of its two blanks are in the 6 characters, 2 * 2 / 8
        ("lcc", "  \nx = 12", ("x = 12",), 0.5),
        # the first line only, after newlines; without that rule {paris question more} gives F1 = 2 * (1/3) / (4/3)
        ("triviaqa", "\n\nParis\nQuestion: more", ("Paris",), 1.0),
        ("hotpotqa", "\n\nParis\nQuestion: more", ("Paris",), 0.5),
        ("samsum", "a x c d\nDialogue: b", ("a b c",), 4 / 7),
        # all lines: the union of a c and of b is the whole reference, 3 of the 6 words: F1 = 2 * .5 * 1 / 1.5
        ("qmsum", "a x c d.b e", ("a b c",), 2 / 3),
    ],
)
def test_scores_by_hand(task, answer, references, expected):
    assert task_score(task, answer, references) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "task, answer, reference, expected",
    [
        ("trec", "Food type", "Food type", 1.0),  # Food is in the answer too, but as a part of the right class
        ("trec", "City or Food", "City", 0.5),  # one of two
        ("trec", "\nCity\nQuestion: what Food?", "City", 1.0),  # first line
        ("lsht", "City\nFood", "Food", 0.0),
        ("lsht", "Sport", "City", 0.0),
    ],
)
def test_classes_by_hand(task, answer, reference, expected):
    assert task_score(task, answer, (reference,), ["Food", "Food type", "City"]) == expected


def test_an_empty_answer_scores_nothing():
    references = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落1"}
    for task in METRICS:
        for answer in ("", "\n"):
            assert task_score(task, answer, (references.get(task, "x"),), ["x"]) == 0


def test_prompts():
    assert prompt_format("triviaqa") == (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
    )
    assert prompt_format("repobench-p") == ("Please complete the code given below. \n{context}{input}Next line of code:\n", 64)
    assert prompt_format("vcsum") == (
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",  # noqa: RUF001
        512,
    )
    assert prompt_format("passage_count")[0].endswith("such as 1, 2, 3, and so on.\n\nThe final answer is: ")
    # all 21 of the authors' config/dataset2prompt.json
    everything = json.dumps({task: prompt_format(task)[0] for task in METRICS}, sort_keys=True)
    assert hashlib.sha256(everything.encode()).hexdigest().startswith("bb89f011861ff65f")
    lengths = {prompt_format(task)[1]: 0 for task in METRICS} | {"tasks": len(METRICS), "balanced": len(BALANCED)}
    assert lengths == {128: 0, 64: 0, 32: 0, 512: 0, "tasks": 21, "balanced": 13}


def test_examples_of_a_folder(tmp_path):
    folder = write_lines(tmp_path / "data" / "qasper.jsonl", QASPER, QASPER | {"context": "{input}", "answers": ["a", "b"]})
    first, second = LongBench().examples(None, cell("qasper", folder))
    assert "Article: a story of words\n\n Answer the question" in first.prompt
    assert first.prompt.endswith("\n\nQuestion: which model\n\nAnswer:")
    assert "Article: {input}\n\n" in second.prompt and second.references == ("a", "b") and second.max_new_tokens == 128
    assert first.chat and (first.id, second.id) == ("0", "1")
    assert LongBench().examples(None, cell("qasper", tmp_path)) == [first, second]  # the folder above data/
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(folder / "qasper.jsonl", "data/trec.jsonl")
    assert LongBench.files("trec", {"longbench_data": str(tmp_path)}) == [str(tmp_path / "data.zip")]
    assert LongBench.files("trec", {}) == LongBench.files("lcc", {"longbench_data": "nowhere"}) == []
    write_lines(tmp_path / "lcc.jsonl", QASPER | {"input": "", "context": ""})
    (code,) = LongBench().examples(None, cell("lcc", tmp_path))
    plain = {task for task in METRICS if not LongBench.example(task, 0, QASPER | {"all_classes": ["x"]}).chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert code.prompt == "Please complete the code given below. \nNext line of code:\n" and not code.chat


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("qasper", json.dumps(QASPER) + "\n\n{broken", r"qasper\.jsonl:3 is not JSON"),
        ("qasper", '{"question": "x", "context": "y", "answers": ["z"]}', r"qasper\.jsonl:1 is not a .*no field 'input'"),
        ("qasper", json.dumps(QASPER | {"answers": "x"}), r"qasper\.jsonl:1 .*'answers' is not a list"),
        ("qasper", json.dumps(QASPER | {"context": None}), r"qasper\.jsonl:1 .*'context' is not text"),
        ("qasper", "[1]", r"qasper\.jsonl:1 is not a record"),
        ("qasper_e", json.dumps({k: v for k, v in QASPER.items() if k != "length"}), r"qasper_e\.jsonl:1 .*no field 'length'"),
        ("trec", json.dumps(QASPER), r"trec\.jsonl:1 .*no field 'all_classes'"),
        ("qasper", "", "has no record of qasper"),
        ("longbench2", json.dumps(QUESTION | {"answer": "E"}), r"longbench2\.jsonl:1 .*'answer' is 'E', not one of A, B, C, D"),
    ],
)
def test_malformed_files(tmp_path, task, content, message):
    (tmp_path / f"{task}.jsonl").write_text(content)
    suite = LongBench2 if task == "longbench2" else LongBench
    with pytest.raises(ValueError, match=message):
        suite().examples(None, cell(task, tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--longbench-data .* has no data for lsht: none of lsht\.jsonl, data/lsht\.jsonl"):
        LongBench().examples(None, cell("lsht", tmp_path))
    (tmp_path / "data.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"cannot read lsht from .*data\.zip"):
        LongBench().examples(None, cell("lsht", tmp_path))


@pytest.mark.parametrize("suite, task, name", [(LongBench, "qasper", "data.zip"), (LongBench2, "longbench2", "data.json")])
def test_without_a_network_the_hub_is_asked_once(monkeypatch, suite, task, name):
    asked = []

    def info(self, repository, **options):
        asked.append(repository)
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("would retry"))
    message = rf"cannot read {name} .*; offline, use --longbench-data FOLDER \(OSError: no network\)$"
    with pytest.raises(ValueError, match=message):
        suite().examples(None, cell(task, None))
    assert asked == [suite.hub[0]]


def test_the_hub_is_read_at_one_commit(monkeypatch, tmp_path):
    wanted = []

    def download(repository, name, **options):
        wanted.append((repository, name, options))
        return str(tmp_path / name)

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(QASPER | {"context": "one\u2028two"}, ensure_ascii=False) + "\n")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **options: type("Info", (), {"sha": "abc"}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for _ in range(2):  # read once
        suite = LongBench()
        (example,) = suite.examples(None, cell("qasper", None))
        assert "one\u2028two" in example.prompt and suite.notes == {"data_revision": "abc"}
    assert wanted == [("zai-org/LongBench", "data.zip", {"repo_type": "dataset", "revision": "abc"})]


def test_missing_libraries(monkeypatch):
    from sparsebench.suites import longbench

    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match=r'pip install "lm-eval\[longbench\]"'):
        longbench._harness_metrics.__wrapped__()


@pytest.mark.parametrize("words, bucket", [(0, "0_4k"), (3999, "0_4k"), (4000, "4_8k"), (7999, "4_8k"), (8000, "8k")])
def test_length_buckets(words, bucket):
    assert length_bucket(words) == bucket
    example = Example("7", "", ("x",), 8, about={"task": "qasper_e", "length": words})
    scores = [(s.task, s.example, s.metric, s.value, s.unit) for s in LongBench().score(example, "x y y")]
    # 1 of 3 words and of 1: F1 = 2 * (1/3) / (4/3)
    assert scores == [("qasper_e", "7", metric, 50.0, "%") for metric in ("score", f"score_{bucket}")]


def test_the_middle_is_cut(model):
    suite, example = LongBench(), Example("0", "a" * 1000 + "b" * 1000, ("x",), 64)
    prompt = suite.prompt(model, cell("lcc", None, ctx_len=256), example)
    assert prompt == "a" * 95 + "b" * 96  # 256 - 64 - 1 that the rest may need
    assert suite.prompt(model, cell("lcc", None, ctx_len=4096), example) == example.prompt
    model.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # spaces between characters: more tokens than were cut
    encode.cache_clear()
    cut = cut_middle(model.tokenizer, example.prompt, 100)
    assert 90 < len(encode(model.tokenizer, cut)) <= 100 and cut.startswith("a a") and cut.endswith("b b")


def test_longbench_end_to_end(tmp_path, model):
    records = [QASPER | {"length": words, "context": "é word " * 99} for words in (9000, 10, 11)]
    write_lines(tmp_path / "hotpotqa_e.jsonl", *records)
    suite = LongBench()
    with attach(model.model, METHODS["dense"]()):
        scores = list(suite.run(model, cell("hotpotqa_e", tmp_path, ctx_len=400)))
    assert sorted((s.example, s.metric) for s in scores) == [
        ("0", "score"), ("0", "score_8k"), ("1", "score"), ("1", "score_0_4k"),
    ]  # fmt: skip
    assert suite.notes["examples"] == 2 and set(suite.answers) == {"0", "1"}
    for score in scores:
        expected = 100 * task_score("hotpotqa", suite.answers[score.example], ("the tiny model",))
        assert (score.value, score.unit, score.task) == (expected, "%", "hotpotqa_e")
    name, ids = suite.calibration(model, cell("hotpotqa_e", tmp_path, ctx_len=400), 2)
    assert name == "hotpotqa_e (other examples)" and len(ids) == 1 and len(ids[0]) <= 400 - 32


def test_longbench2_end_to_end(tmp_path, model):
    folder = write_lines(tmp_path / "a" / "longbench2.jsonl", QUESTION, QUESTION | {"difficulty": "easy", "length": "long"})
    suite = LongBench2()
    with attach(model.model, METHODS["dense"]()):
        scores = list(suite.run(model, cell("longbench2", folder, ctx_len=600, suite="longbench2")))
    assert sorted((s.example, s.metric, s.value) for s in scores) == [
        ("0", "score", 0), ("0", "score_hard", 0), ("0", "score_medium", 0),
        ("1", "score", 0), ("1", "score_easy", 0), ("1", "score_long", 0),
    ]  # fmt: skip
    example = suite.examples(None, cell("longbench2", folder))[0]
    assert example.prompt == (
        "Please read the following text and answer the question below.\n\n<text>\nlong text\n</text>\n\n"
        "What is the correct answer to this question: why\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert [s.value for s in suite.score(example, "The correct answer is (C).")] == [100, 100, 100]
    (tmp_path / "data.json").write_text(json.dumps([QUESTION]))
    assert suite.examples(None, cell("longbench2", tmp_path)) == [example]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is D because", "D"),
        ("**The correct answer is (A)**", "A"),
        ("The correct answer is A, no: The correct answer is (C)", "C"),  # parentheses come first
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("The correct answer is: (A)", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_answers_of_longbench2(answer, letter):
    assert chosen_letter(answer) == letter
