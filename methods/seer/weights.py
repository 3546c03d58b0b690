"""Trained gates on disk and in memory: one AttnGate per layer, under the official names."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base import ModelSpec
from .gate import AttnGate

SHIPPED = Path(__file__).parent / "gates"
WEIGHT_NAME = "model.layers.{layer}.self_attn.attn_gate.{map}.weight"
WEIGHT_PATTERN = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.attn_gate\.(mask_linear_[qk]\.weight)$")
TRAINING_KEYS = {"data", "tokens", "ctx_len"}  # of config["training"], what a result's note tells
CONFIG_KEYS = {
    # config.json: AttnGate's argument; the last is ours, the others are the authors'
    "seerattn_gate_type": "gate_type",
    "seerattn_gate_block_size": "block",
    "seerattn_gate_hidden_size": "gate_dim",
    "seerattn_gate_force_double": "force_double",
    "seerattn_gate_rope_dim": "gate_rope_dim",
}


class LayerGates:
    """The gates of every layer of one model, fixed from here on.

    gates: one per layer, or a single one that serves every layer. source: what the user named, None for shipped ones.
    note: what a reader of a result must know about them.
    """

    def __init__(self, gates: Sequence[AttnGate], source: str | None = None, note: str = ""):
        self._gates = tuple(gates)
        self.source, self.note = source, note
        self._on_device: dict[tuple[int, torch.device], AttnGate] = {}

    def at(self, layer: int, device: torch.device) -> AttnGate:
        """The gate of `layer` on `device`; moved there once. Raises: ValueError for a layer it has no gate for."""
        layer = layer if len(self._gates) > 1 else 0
        if layer >= len(self._gates):
            raise ValueError(f"the gate has {len(self._gates)} layers, layer {layer} was asked for")
        if (layer, device) not in self._on_device:
            self._on_device[layer, device] = copy.deepcopy(self._gates[layer]).to(device).requires_grad_(False)
        return self._on_device[layer, device]

    @functools.cached_property
    def sha256(self) -> str:
        """The first 16 hex digits of the hash over every layer's options and weights."""
        digest = hashlib.sha256()
        for gate in self._gates:
            digest.update(json.dumps(gate.options()).encode())
            for name, weight in sorted(gate.state_dict().items()):
                digest.update(name.encode() + weight.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]

    def trainable(self) -> list[AttnGate]:
        """Copies on the CPU that learn."""
        return [copy.deepcopy(gate).requires_grad_(True) for gate in self._gates]

    def check(self, model: ModelSpec) -> LayerGates:
        """These gates. Raises: ValueError when they are for a model of another shape or depth."""
        gate = self._gates[0]
        sizes = {name: getattr(gate, name) for name in ("heads", "kv_heads", "head_dim")}
        wanted = {name: getattr(model, name) for name in sizes}
        if sizes != wanted:
            raise ValueError(f"gate of {_text(sizes)} does not fit {model.name}, which has {_text(wanted)}")
        if len(self._gates) not in (1, model.layers):
            raise ValueError(f"gate for {len(self._gates)} layers does not fit {model.name}, which has {model.layers}")
        return self


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def shipped_gate(model_name: str) -> Path:
    """The folder where a gate for a model of this name would ship with sparsebench."""
    return SHIPPED / re.sub(r"[^\w.-]+", "--", model_name)


def load_gates(path: str | Path, model: ModelSpec, *, source: str | None = None) -> LayerGates:
    """Gates from a folder (attn_gate_weights.pth or *.safetensors, beside config.json) or one such file.

    model.layers = 0 leaves the number of layers unchecked.
    Raises: ValueError for missing or unreadable files, a pickle that holds code, or weights of another model.
    """
    files, config_path = find_files(Path(path).expanduser())
    config = _read_config(config_path)
    try:
        gate = AttnGate(**_options(config), head_dim=model.head_dim, heads=model.heads, kv_heads=model.kv_heads)
    except TypeError as error:
        raise ValueError(f"{config_path} has an option of the wrong type: {error}") from error
    of = f"{path} (of {config['base_model']})" if "base_model" in config else str(path)
    layers: dict[int, dict[str, Tensor]] = {}
    for file in files:
        for name, tensor in _read_tensors(file).items():
            if match := WEIGHT_PATTERN.search(name):
                layers.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    if not layers:
        raise ValueError(f"{path} holds no tensor named {WEIGHT_NAME.format(layer=0, map='mask_linear_k')}")
    if sorted(layers) != list(range(len(layers))) or (model.layers and len(layers) != model.layers):
        raise ValueError(f"gate {of} has layers {min(layers)} to {max(layers)}, {model.name} has {model.layers}")
    wanted = {name: tuple(weight.shape) for name, weight in gate.state_dict().items()}
    gates = []
    for layer, weights in sorted(layers.items()):
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
        if found != wanted:
            raise ValueError(f"gate {of} does not fit {model.name}: layer {layer} has {found}, the model needs {wanted}")
        gates.append(AttnGate(**gate.options()))
        gates[-1].load_state_dict(weights)
    known = set(config.get("training", ())) >= TRAINING_KEYS
    note = "gate trained on {data}, {tokens} tokens in sequences of {ctx_len}".format(**config["training"]) if known else ""
    return LayerGates(gates, source, note)


def gate_options(path: str | Path) -> dict:
    """gate_type, block, gate_dim and, where config.json names them, AttnGate's other options of the gates at `path`.

    Raises: ValueError for missing or unreadable files.
    """
    return _options(_read_config(find_files(Path(path).expanduser())[1]))


def trained_loss(path: str | Path) -> str:
    """What of a block the gates at `path` learnt (Recipe.loss), "max", the paper's, where config.json does not say.

    Raises: ValueError for missing or unreadable files.
    """
    return _read_config(find_files(Path(path).expanduser())[1]).get("training", {}).get("loss", "max")


def _read_config(file: Path) -> dict:
    required = list(CONFIG_KEYS)[:3]
    try:
        config = json.loads(file.read_text())
        missing = [key for key in required if key not in config]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{file} must be JSON with {', '.join(required)}: {error}") from error
    if missing:
        raise ValueError(f"{file} must be JSON with {', '.join(required)}: it lacks {', '.join(missing)}")
    return config


def _options(config: dict) -> dict:
    return {ours: config[key] for key, ours in CONFIG_KEYS.items() if key in config}


def find_files(path: Path) -> tuple[list[Path], Path]:
    """Weight files and config.json. Raises: ValueError when one of them is missing."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("attn_gate_weights.pth"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ValueError(f"no gate weights at {path}: need attn_gate_weights.pth or *.safetensors")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json beside the gate weights in {folder}")
    return files, folder / "config.json"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} was not loaded, it is damaged or holds something other than tensors: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a dict of tensors, got {type(state).__name__}")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def save_gates(folder: Path, gates: Sequence[AttnGate], model: ModelSpec, training: dict, dtype=torch.bfloat16) -> None:
    """Write gate.safetensors (in `dtype`) and config.json: official keys, the model's name and how the gates were trained
    (training: empty, or with data, tokens and ctx_len, of which results make a note)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        WEIGHT_NAME.format(layer=layer, map=name.removesuffix(".weight")): weight.detach().to("cpu", dtype).contiguous()
        for layer, gate in enumerate(gates)
        for name, weight in gate.state_dict().items()
    }
    options = gates[0].options()
    config = {key: options[ours] for key, ours in CONFIG_KEYS.items()}
    save_file(tensors, folder / "gate.safetensors")
    text = json.dumps({"base_model": model.name, **config, "training": training, "shape": dataclasses.asdict(model)}, indent=2)
    (folder / "config.json").write_text(text + "\n")
