import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.suites.base import Cell
from sparsebench.suites.corpora import HUB, Windows, check_corpus, read_documents, shortfall, token_windows
from sparsebench.suites.perplexity import MOST_WINDOWS, Perplexity, sliding_nll, token_nll, windows

pytestmark = pytest.mark.usefixtures("one_thread")


class Words:
    """A tokenizer: one id a word."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [len(word) for word in text.split()]}


def tiny_model(**options):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return LlamaForCausalLM(config).eval()


def test_token_nll_is_the_definition():
    model, ids = tiny_model(), torch.randint(0, 64, (1, 1500))
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
    expected = -log_p[torch.arange(1499), ids[0, 1:]]
    assert torch.allclose(token_nll(model, ids), expected, atol=1e-5)


def test_scores_of_two_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [" ".join(["a", "bb", "ccc"] * 100), "too short", " ".join(["dddd", "e"] * 150)]
    path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)))
    loaded = type("Loaded", (), {"model": tiny_model(), "tokenizer": Words()})
    cell = Cell("m", "", "dense", {}, "perplexity", f"file:{path}", 280, None, None, 0, "float32")
    suite = Perplexity()
    scores = {(s.example, s.metric): s.value for s in suite.run(loaded, cell)}
    assert {example for example, _ in scores} == {"0", "2"}
    assert scores["0", "tokens"] == 279 and scores["0", "tokens_last256"] == 256
    assert suite.notes["documents"] == 2 and suite.notes["documents_too_short"] == 1
    ids = torch.tensor([[1, 2, 3] * 100])[:, :280]
    assert scores["0", "nll"] == pytest.approx(float(token_nll(loaded.model, ids).sum()))
    assert scores["0", "nll_last256"] == pytest.approx(float(token_nll(loaded.model, ids)[-256:].sum()))


def brute_force(model, ids, ctx_len, stride):
    """[-log p] of every token but the first, each from the first window that reaches it, and the windows' starts."""
    length = ids.shape[1]
    starts = [0]
    while starts[-1] + ctx_len < length - 1:
        starts.append(min(starts[-1] + stride, length - 1 - ctx_len))
    nll = []
    for t in range(1, length):
        start = next(s for s in starts if t <= s + ctx_len)
        assert start == 0 or t - start >= ctx_len - stride + 1
        with torch.no_grad():
            logits = model(ids[:, start : start + ctx_len]).logits[0, t - 1 - start]
        nll.append(-float(logits.double().log_softmax(-1)[ids[0, t]]))
    return torch.tensor(nll, dtype=torch.float64), starts


@pytest.mark.parametrize("length", [20, 21, 22, 47])
@pytest.mark.parametrize("stride", [1, 7, 20])
def test_sliding_nll_is_the_definition(length, stride):
    model, ids = tiny_model(), torch.randint(0, 64, (1, length))
    expected, starts = brute_force(model, ids, 20, stride)
    found = sliding_nll(model, ids, 20, stride)
    assert found.shape == (length - 1,) and torch.allclose(found, expected, atol=1e-5)
    assert [start for start, _ in windows(length, 20, stride)] == starts
    if length == 20:
        assert torch.equal(found, token_nll(model, ids))


def test_every_window_has_the_context_length():
    """A shorter last window would be denser than the others, and the row's density that of no length in particular."""
    model, read = tiny_model(), []
    model.base_model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    sliding_nll(model, torch.randint(0, 64, (1, 50)), 20, 9)
    assert read == [20] * 5


def sliding_cell(path, **options):
    return Cell("m", "", "dense", {}, "perplexity", f"file:{path}", 20, None, None, 0, "float32", options=options)


@pytest.fixture
def three_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [" ".join("a" * (1 + (i * i + n) % 9) for i in range(n)) for n in (20, 45, 400)]
    path.write_text("\n".join(json.dumps({"id": f"d{len(t.split())}", "text": t}) for t in texts))
    return path


def test_sliding_scores_of_a_cell(three_documents):
    loaded, suite = type("Loaded", (), {"model": tiny_model(), "tokenizer": Words()}), Perplexity()
    scores = {(s.example, s.metric): s.value for s in suite.run(loaded, sliding_cell(three_documents, stride=10))}
    longest = 20 + 1 + (MOST_WINDOWS - 1) * 10
    assert scores.keys() == {(d, m) for d in ("d20", "d45", "d400") for m in ("nll", "tokens")}
    assert [scores[d, "tokens"] for d in ("d20", "d45", "d400")] == [19, 44, longest - 1]
    assert suite.notes["windows"] == 1 + 4 + MOST_WINDOWS
    ids = torch.tensor([[1 + (i * i + 45) % 9 for i in range(45)]])
    assert scores["d45", "nll"] == pytest.approx(float(brute_force(loaded.model, ids, 20, 10)[0].sum()))


@pytest.mark.parametrize("stride", [0, -3, 21])
def test_a_stride_must_fit_the_context(three_documents, stride):
    loaded = type("Loaded", (), {"model": tiny_model(), "tokenizer": Words()})
    with pytest.raises(ValueError, match=rf"from 1 to the context length, 20 tokens, got {stride}$"):
        list(Perplexity().run(loaded, sliding_cell(three_documents, stride=stride)))


@pytest.mark.parametrize("options", [{}, {"stride": 10}])
def test_an_interrupted_cell_goes_on_with_the_documents_that_are_missing(three_documents, options):
    loaded, whole, rest = type("Loaded", (), {"model": tiny_model(), "tokenizer": Words()}), Perplexity(), Perplexity()
    kept, scores = [], []
    whole.checkpoint = lambda: kept.append({score.example for score in scores})
    for score in whole.run(loaded, sliding_cell(three_documents, **options)):
        scores.append(score)
    assert kept == [{"d20"}, {"d20", "d45"}, {"d20", "d45", "d400"}]
    rest.finished = frozenset({"d20", "d400"})
    again = list(rest.run(loaded, sliding_cell(three_documents, **options)))
    assert again == [score for score in scores if score.example == "d45"] and rest.notes == whole.notes


def test_splits_of_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": "x", "split": "train", "text": "t"}, {"id": "y", "split": "eval", "text": "e"}, {"id": "z", "text": "both"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [d.id for d in read_documents(f"file:{path}", "train")] == ["x", "z"]
    assert [d.id for d in read_documents(f"file:{path}", "eval")] == ["y", "z"]


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"split": "test", "text": "one\u2028two\x85three"}, {"split": "train", "text": "four"}]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert [d.text for d in read_documents(f"file:{path}", "eval")] == ["one\u2028two\x85three"]
    assert [d.text for d in read_documents(f"file:{path}", "train")] == ["four"]


def test_a_corpus_that_holds_fewer_documents_than_asked_for_says_so(tmp_path, hub):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert shortfall("pydoc", 10) == "evaluation documents in pydoc: 4, fewer than the limit of 10"
    assert shortfall(f"file:{path}", 2) == f"evaluation documents in file:{path}: 1, fewer than the limit of 2"
    for source, limit in (("pydoc", 4), (f"file:{path}", 1), (f"file:{path}", None), ("pg19", 10)):
        assert shortfall(source, limit) == ""
    assert not hub.asked


def test_embedded_corpus_splits_share_no_document():
    train, evaluation = ({d.text for d in read_documents("pydoc", split)} for split in ("train", "eval"))
    assert train and evaluation and not train & evaluation


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "no such corpus file"),
        ("empty.txt", "", "is empty"),
        ("bad.jsonl", '{"text": 1\n', "bad.jsonl:1"),
        ("notext.jsonl", '{"body": "x"}\n', "notext.jsonl:1"),
        ("other.jsonl", '{"split": "train", "text": "x"}\n', "no document for split 'eval'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        check_corpus(f"file:{path}")


@pytest.mark.parametrize("corpus", ["pg19", "some/dataset"])
def test_without_a_network_the_hub_is_asked_once(monkeypatch, corpus):
    asked = []

    def info(self, name, **options):
        asked.append(name)
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: pytest.fail("would retry for half a minute"))
    with pytest.raises(ValueError, match=r"cannot read .* offline, use pydoc or file:PATH \(OSError: no network\)$"):
        next(read_documents(corpus, "eval"))
    assert len(asked) == 1


class Hub:
    """Stands in for the hub: every revision asked for has a commit, every data set two records."""

    def __init__(self, monkeypatch):
        self.asked, self.loaded = [], []
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.info)
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def info(self, name, revision, timeout):
        self.asked.append((name, revision))
        assert timeout <= 10
        return type("Info", (), {"sha": f"commit-of-{revision}"})

    def load(self, name, **options):
        assert options["streaming"] and "trust_remote_code" not in options
        self.loaded.append((name, options["split"], options.get("revision"), options.get("data_files")))
        rows = [{"text": "a bb ccc"}, {"text": "dddd e ff"}]
        return iter([{"text": json.dumps(row | {"meta": {"i": 1}})} for row in rows] if name == "text" else rows)


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


@pytest.mark.parametrize(
    "source, name, revision",
    [
        ("pg19", "emozilla/pg19", HUB["pg19"][1]),
        ("pg19@other", "emozilla/pg19", "other"),
        ("some/books", "some/books", "main"),
        ("some/books@refs/convert/parquet", "some/books", "refs/convert/parquet"),
    ],
)
def test_the_hub_is_streamed_at_the_commit_it_names(hub, source, name, revision):
    check_corpus(source)
    assert not hub.asked  # checking the command line asks nobody
    documents = list(read_documents(source, "eval"))
    assert [(d.id, d.text, d.revision) for d in documents] == [
        ("0", "a bb ccc", f"commit-of-{revision}"), ("1", "dddd e ff", f"commit-of-{revision}"),
    ]  # fmt: skip
    assert hub.asked == [(name, revision)] and hub.loaded == [(name, "test", f"commit-of-{revision}", None)]


@pytest.mark.parametrize(
    "split, files", [("eval", ["test/proofpile_test"]), ("train", [f"train/proofpile_train_{i}" for i in range(21)])]
)
def test_proof_pile_is_read_without_its_loading_script(hub, split, files):
    assert [d.text for d in read_documents("proof_pile", split)] == ["a bb ccc", "dddd e ff"]
    name, part, revision, paths = hub.loaded[0]
    commit = f"commit-of-{HUB['proof_pile'][1]}"
    folder = f"hf://datasets/hoskinson-center/proof-pile@{commit}"
    assert paths == {part: [f"{folder}/{file}.jsonl.gz" for file in files]} and (name, revision) == ("text", None)


def test_the_commits_of_named_data_sets_are_pinned():
    assert all(len(bytes.fromhex(commit)) == 20 for _, commit in HUB.values())


@pytest.mark.usefixtures("hub")
def test_a_row_says_which_commit_was_read(tmp_path):
    loaded = type("Loaded", (), {"model": tiny_model(), "tokenizer": Words()})
    path = tmp_path / "a.txt"
    path.write_text("a bb ccc")
    for task, noted in (("some/books@v2", "commit-of-v2"), (f"file:{path}", None)):
        suite = Perplexity()
        list(suite.run(loaded, Cell("m", "", "dense", {}, "perplexity", task, 3, None, 1, 0, "float32")))
        assert suite.notes.get("data_revision") == noted


def test_without_a_text_the_data_set_is_refused(hub, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: iter([{"body": "x"}]))
    with pytest.raises(ValueError, match=r"cannot read data set 'some/books' .* \(KeyError: 'text'\)$"):
        next(read_documents("some/books", "eval"))


@pytest.mark.parametrize(
    "corpus, message", [("pg20", "unknown corpus 'pg20'"), ("pydoc@1", "unknown corpus"), ("pg19@", "no revision")]
)
def test_bad_names(corpus, message):
    with pytest.raises(ValueError, match=message):
        check_corpus(corpus)


def test_only_short_documents_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a b c")
    with pytest.raises(ValueError, match=r"no document .* 1 are shorter"):
        token_windows(Words(), f"file:{path}", "eval", 10, None)


def test_repeated_ids_stay_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": "x", "text": "a bb ccc"}) for _ in range(2)))
    windows = token_windows(Words(), f"file:{path}", "eval", 2, None)
    assert isinstance(windows, Windows)
    assert [name for name, _ in windows.ids] == ["x", "x#2"]
