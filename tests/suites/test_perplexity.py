import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.suites.base import Cell
from sparsebench.suites.corpora import Windows, check_corpus, read_documents, token_windows
from sparsebench.suites.perplexity import Perplexity, token_nll


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


def test_the_hub_is_streamed(monkeypatch):
    wanted = []

    def load(name, **options):
        wanted.append((name, options["split"], options["streaming"]))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **options: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert [(d.id, d.text) for d in read_documents("pg19", "eval")] == [("0", "one"), ("1", "two")]
    assert [d.text for d in read_documents("proof_pile", "train")] == ["one", "two"]
    assert wanted == [("emozilla/pg19", "test", True), ("hoskinson-center/proof-pile", "train", True)]


def test_unknown_corpus():
    with pytest.raises(ValueError, match="unknown corpus 'pg20'"):
        check_corpus("pg20")


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
