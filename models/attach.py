"""Run a model's attention through a method, by transformers' public AttentionInterface: no forked model code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ..kernels import resolve_impl, visible_pairs
from ..methods.base import Method, attended, dense_attention
from ..methods.dense import Dense
from .rope import ModelContext, ModelRope, find_rotary
from .trace import Trace

NAME = "sparsebench"  # in transformers' registry of attention implementations
REFUSED = {  # keywords of transformers' attention functions
    "sliding_window": "a sliding window", "softcap": "soft-capped logits (softcap)", "s_aux": "attention sinks (s_aux)",
    "position_bias": "a position bias", "cache": "a paged cache", "output_attentions": "output_attentions",
}  # fmt: skip
FAULTS = (  # of a call of _attention, in the order in which it looks for them
    "a 4-D attention mask (given by the caller, or for a static cache)", "dropout in training", "attention that is not causal",
    "keys and values of different widths", "no layer_idx on its attention",
)  # fmt: skip
_ATTACHED: dict[int, _Attachment] = {}  # id of a config -> who is attached to the model that owns it


@contextmanager
def attach(model: PreTrainedModel, method: Method) -> Iterator[Trace]:
    """Run every attention layer of `model` through `method` inside a `with` block; on exit, also after an error, the model
    is as it was.

    Batches may be padded on either side: every row runs on its real tokens alone, together with the rows padded like it, and
    padding comes out as zeros.
    Prefill in chunks is prefill; a phase that the method does not have runs dense and is listed in trace.dense_phases.

    Args: method: prepared for this model (Method.prepare).
    Yields: Trace, also readable after the block.
    Raises: ValueError naming the feature of the model, here, or of the call, inside the block, that a method would compute
        wrongly: sliding windows, soft-capping, sinks, packed sequences, 4-D masks, static caches, dropout.
    """
    _refuse_model(model)
    configs = _configs(model)
    if any(id(config) in _ATTACHED for config in configs):
        raise ValueError(f"{type(model).__name__} has a method attached already (or shares its config with a model that has)")
    saved = [(config, config._attn_implementation) for config in configs]
    attachment = _Attachment(model, method)
    try:
        _ATTACHED.update((id(config), attachment) for config in configs)
        model.set_attn_implementation(NAME)
        if model.config.get_text_config()._attn_implementation != NAME:
            raise ValueError(f"{type(model).__name__} does not use transformers' AttentionInterface: nothing to attach to")
        yield attachment.trace
    finally:
        attachment.close()
        for config in configs:
            _ATTACHED.pop(id(config), None)
        for config, implementation in saved:  # parents first: setting a parent sets its sub-configs
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list:
    """Every config that modules of the model refer to, each once, parents before their parts."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    for config in list(found.values()):
        for key in getattr(config, "sub_configs", {}):
            part = getattr(config, key, None)
            if part is not None:
                found.setdefault(id(part), part)
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _refuse_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach() takes a transformers model, got {type(model).__name__}")
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    features = []
    if layer_types is not None:
        features += [f"layer_types with {kind!r}" for kind in sorted(set(layer_types) - {"full_attention"})]
    elif getattr(config, "sliding_window", None) is not None:
        features.append(f"sliding_window={config.sliding_window}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        features.append(f"attn_logit_softcapping={config.attn_logit_softcapping} (soft-capped logits)")
    if any("sinks" in dict(module.named_parameters(recurse=False)) for module in model.modules()):
        features.append("attention sinks (s_aux)")
    if not getattr(config, "is_causal", True) or getattr(model.config, "is_encoder_decoder", False):
        features.append("attention that is not causal")
    if features:
        raise ValueError(f"{type(model).__name__} cannot run a sparse method: it has {', '.join(features)}")


@dataclass(frozen=True)
class _Rows:
    """Rows of a padded batch whose padding is alike, and their real tokens as columns of q and of k."""

    batch: slice | Tensor
    q: slice | Tensor
    k: slice | Tensor
    first: int  # of the rows: names their scratch


def _alike(real: Tensor, q_len: int, device: torch.device) -> list[_Rows]:
    """real: bool [B, kv_len] on the CPU, of which the last q_len are the queries'. Rows without a query are left out"""
    first_query = real.shape[1] - q_len
    alike = defaultdict(list)
    for b, row in enumerate(real.numpy()):
        alike[row.tobytes()].append(b)
    groups = []
    for batch in alike.values():
        keys = real[batch[0]].nonzero().flatten()
        queries = keys[keys >= first_query] - first_query
        if len(queries):
            rows, q, k = (_columns(index, device) for index in (torch.tensor(batch), queries, keys))
            groups.append(_Rows(rows, q, k, batch[0]))
    return groups


def _columns(index: Tensor, device: torch.device) -> slice | Tensor:
    """A slice where the columns are consecutive, which spares a copy of k and v."""
    start, stop = int(index[0]), int(index[-1]) + 1
    return slice(start, stop) if stop - start == len(index) else index.to(device)


class _Attachment:
    """One model with one method: what a forward pass must remember from layer to layer and from chunk to chunk."""

    def __init__(self, model: PreTrainedModel, method: Method):
        self.method = method
        # Dense attention is what a missing phase runs as well: it needs no context and no splitting of decoded batches.
        self.phases = frozenset() if isinstance(method, Dense) else method.phases
        self.layers = {id(module) for module in model.modules()}
        self.num_layers = model.config.get_text_config().num_hidden_layers
        self.trace = Trace(self.num_layers)
        # Scratch of the methods by layer, then by rows of a padded batch; None is a whole batch without padding.
        self.states: dict[int, dict[int | None, dict[str, Any]]] = {}
        self.lengths: tuple[int, int] | None = None  # q_len, kv_len of the forward pass, as the mask function was told
        self.real: Tensor | None = None  # bool [B, kv_len] where a row of the batch is padded
        # Phase and pairs of a forward pass that is dense and without padding: its cost of being attached should not be seen.
        self.plain: tuple[str, int] | None = None
        self.decode_pairs = 0  # (query, key) pairs of the whole batch where every row brings one token
        self._rows: list[_Rows] | None = None
        self.positions: Tensor | None = None  # [1 or B, kv_len]: what the rotary embedding was given for every key
        self.new_positions: Tensor | None = None
        self.query_positions: Tensor | None = None  # of the forward pass, [q_len], made on first use
        self.rotary = find_rotary(model)
        self.ropes: dict[int, ModelRope] = {}
        self.hook = self.rotary and self.rotary.register_forward_pre_hook(self._watch_positions, with_kwargs=True)

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.states.clear()

    def _watch_positions(self, _module, args: tuple, kwargs: dict) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            raise ValueError("a sparse method needs a rotary embedding with one position per token (position_ids [B, q_len])")
        self.new_positions = positions

    def plan(self, batch: int, q_len: int, kv_len: int, real: Tensor | None) -> Tensor | None:
        """Once per forward pass: where the padding is. Syncs with the GPU once when there is a padding mask."""
        self.lengths, self.real, self._rows, self.query_positions = (q_len, kv_len), None, None, None
        self.plain = None
        if real is None:
            if not self.phases:
                self.plain = "decode" if q_len == 1 < kv_len else "prefill", batch * visible_pairs(q_len, kv_len)
            return None
        if real.shape[1] != kv_len:
            raise ValueError(f"the attention mask has {real.shape[1]} columns for {kv_len} keys")
        real = real.bool()
        keys, self.decode_pairs = torch.stack((real.sum(), (real & real[:, -1:]).sum())).tolist()
        self.real = real if keys < real.numel() else None
        return self.real

    @property
    def rows(self) -> list[_Rows]:
        """The real tokens of a padded batch, rows with the same padding together."""
        if self._rows is None:
            assert self.real is not None and self.lengths is not None
            self._rows = _alike(self.real.cpu(), self.lengths[0], self.real.device)
        return self._rows

    def _update_positions(self, q_len: int, kv_len: int) -> None:
        """Append what the rotary embedding was given in this pass to what it was given for the cached keys.

        A cache that was filled before attach() is taken to hold the positions that lead up to the new ones.
        """
        new, known, past = self.new_positions, self.positions, kv_len - q_len
        if new is None:
            return
        self.new_positions = None
        if past and (known is None or known.shape[1] < past or known.shape[0] != new.shape[0]):
            known = new[:, :1] - torch.arange(past, 0, -1, device=new.device)
        self.positions = new if known is None or not past else torch.cat((known[:, :past], new), dim=1)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, H, q_len, D] of one layer."""
        if self.plain is not None:
            phase, pairs = self.plain
            self.trace.add_dense(module.layer_idx, phase, q, pairs, phase not in self.method.phases)
            return dense_attention(q, k, v, scale)
        q_len, kv_len, layer = q.shape[2], k.shape[2], module.layer_idx
        self._update_positions(q_len, kv_len)
        if q_len == kv_len:
            self.states[layer] = defaultdict(dict)
        states = self.states.setdefault(layer, defaultdict(dict))
        if self.real is None:
            return self._run(module, q, k, v, scale, states[None], self.positions, q_len == 1)
        if q_len == 1 < kv_len and "decode" not in self.phases:
            self.trace.add_dense(layer, "decode", q, self.decode_pairs, "decode" not in self.method.phases)
            return dense_attention(q, k, v, scale, self.real).where(self.real[:, -1, None, None, None], 0)
        out = torch.zeros_like(q)
        for rows in self.rows:
            positions = self.positions
            if positions is not None:
                positions = (positions[rows.batch] if positions.shape[0] > 1 else positions)[:, rows.k]
            one_q, one_k, one_v = (x[rows.batch][:, :, columns] for x, columns in ((q, rows.q), (k, rows.k), (v, rows.k)))
            part = torch.zeros_like(q[rows.batch])
            part[:, :, rows.q] = self._run(module, one_q, one_k, one_v, scale, states[rows.first], positions, q_len == 1)
            out[rows.batch] = part
        return out

    def _run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, state: dict[str, Any],
        rotary_positions: Tensor | None, one_token: bool,
    ) -> Tensor:  # fmt: skip
        """A batch without padding. one_token: the whole batch decodes (a row may bring one token to a chunk of many)."""
        q_len, kv_len, layer = q.shape[2], k.shape[2], module.layer_idx
        phase = "decode" if one_token and kv_len > 1 else "prefill"
        if phase not in self.phases:
            self.trace.add_dense(layer, phase, q, q.shape[0] * visible_pairs(q_len, kv_len), phase not in self.method.phases)
            return dense_attention(q, k, v, scale)
        if layer not in self.ropes:
            self.ropes[layer] = ModelRope(self.rotary, module, q.shape[-1], q.dtype)
        queries = self.query_positions  # of a padded batch every row has its own
        if queries is None or self.real is not None:
            queries = self.query_positions = torch.arange(kv_len - q_len, kv_len, device=q.device)
        ctx = ModelContext(
            layer=layer, phase=phase, scale=scale, v=v, positions=queries, state=state, rope=self.ropes[layer],
            num_layers=self.num_layers, q=q, k=k, rotary_positions=rotary_positions,
        )  # fmt: skip
        out = attended(self.method, q, k, v, ctx)
        if ctx.mask is None:
            self.trace.add_dense(layer, phase, q, q.shape[0] * visible_pairs(q_len, kv_len))
        else:
            self.trace.add(layer, phase, q, ctx.mask, resolve_impl("auto", q, ctx.mask))
        return out


def _refuse_call(module: nn.Module, faults: tuple[bool, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError with the feature of a call that a method would compute wrongly, if it has one."""
    given = [kwargs.get(name) is not None and kwargs[name] is not False for name in REFUSED]
    for feature, found in zip((*FAULTS, *REFUSED.values()), (*faults, *given), strict=True):
        if found:
            raise ValueError(f"{type(module).__name__} cannot run a sparse method with {feature}")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: q, k, v [B, H or H_kv, len, D] -> [B, q_len, H, D] and no weights.

    Called once a layer: on a GPU that waits for the host, every microsecond here is the method's time to first token.
    """
    attachment = _ATTACHED.get(id(module.config))
    if attachment is None or id(module) not in attachment.layers:
        raise ValueError(f"{type(module).__name__} runs as {NAME!r} with no method attached to its model: use attach()")
    shape = key.shape
    faults = (
        attention_mask is not None and attention_mask.ndim != 2,
        dropout > 0,
        not (getattr(module, "is_causal", True) if is_causal is None else is_causal),
        shape != value.shape,
        getattr(module, "layer_idx", None) is None,
    )
    if True in faults or not REFUSED.keys().isdisjoint(kwargs):
        _refuse_call(module, faults, kwargs)
    q_len, dim = query.shape[2:]
    if attachment.lengths != (q_len, shape[2]):
        raise ValueError(
            f"{type(module).__name__} has {q_len} queries and {shape[2]} keys, its mask was made for {attachment.lengths}: "
            "static or shared caches and masks made outside transformers.masking_utils are not supported"
        )
    scale = dim**-0.5 if scaling is None else scaling
    out = attachment.attend(module, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function=causal_mask_function,
    attention_mask: Tensor | None = None, config=None, device: torch.device | str = "cpu", **kwargs,
) -> Tensor | None:  # fmt: skip
    """transformers' mask function: bool [B, kv_len] of the real tokens, or None when nothing is padded."""
    attachment = _ATTACHED.get(id(config))
    if attachment is None:
        raise ValueError(f"a model runs as {NAME!r} with no method attached to it: use attach()")
    if mask_function is not causal_mask_function:
        raise ValueError(
            "a sparse method cannot run with a mask that is not plain causal (packed sequences, sliding windows, overlays)"
        )
    if isinstance(q_offset, Tensor) or kv_offset or kv_length != q_offset + q_length:
        raise ValueError("a sparse method cannot run with a static or sliding cache: use DynamicCache")
    return attachment.plan(batch_size, q_length, kv_length, attention_mask)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
