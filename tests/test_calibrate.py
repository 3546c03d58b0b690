"""Calibration: the density it promises, counted pair by pair, on the layers of a captured model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from sparsebench.kernels.patterns import sink_and_window
from sparsebench.methods import METHODS
from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import Method, dense_attention
from sparsebench.methods.oracle import Oracle
from sparsebench.methods.random_blocks import RandomBlocks
from sparsebench.methods.seer import AttnGate, Seer
from sparsebench.methods.spec import build
from sparsebench.models import load
from sparsebench.models.calibrate import calibrate, calibration_facts, capture_layers

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 700


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


@pytest.fixture(scope="module")
def layers(loaded):
    return capture_layers(loaded.model, torch.randint(1, 28, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist())


def counted_density(method, layers):
    pairs = [method.select(q, k, ctx).tokens().double().sum((-1, -2)).mean() for q, k, ctx in layers]
    return float(torch.stack(pairs).mean()) / (LENGTH * (LENGTH + 1) / 2)


def as_it_is(method):
    return method


def test_capture_is_every_layer_of_the_dense_model(loaded, layers):
    assert [ctx.layer for _, _, ctx in layers] == [0, 1]
    assert {(q.shape, k.shape) for q, k, _ in layers} == {((1, 4, LENGTH, 16), (1, 2, LENGTH, 16))}
    attention, norm = loaded.model.model.layers[0].self_attn, loaded.model.model.layers[0].input_layernorm
    ids = torch.randint(1, 28, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = attention.v_proj(norm(loaded.model.model.embed_tokens(ids[None])))
        k_pre = attention.k_proj(norm(loaded.model.model.embed_tokens(ids[None])))
    ctx = layers[0][2]
    assert torch.allclose(ctx.v, v.unflatten(-1, (2, 16)).transpose(1, 2), atol=1e-5)
    assert torch.allclose(ctx.k_pre, k_pre.unflatten(-1, (2, 16)).transpose(1, 2), atol=1e-4)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("target", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("method", [RandomBlocks(block=32), Oracle(block=16), AShape(init=8)], ids=lambda m: m.name)
def test_reaches_the_target(layers, method, target):
    found, reached = calibrate(method, target, layers, as_it_is)
    assert counted_density(found, layers) == pytest.approx(target, rel=0.01)
    assert reached == pytest.approx(counted_density(found, layers), abs=1e-9)
    assert replace(found, **{found.knob: getattr(method, method.knob)}) == method  # nothing but the knob moved
    assert type(getattr(found, found.knob)) is type(getattr(method, method.knob))


def test_trained_gates_read_the_captured_layers(loaded, layers):
    """A knob that falls as density grows, on a logarithmic scale, of a method that must be prepared and reads k before RoPE."""
    gate = AttnGate("Qavg_Kmaxminavg", 16, head_dim=16, gate_dim=16, heads=4, kv_heads=2)
    found, _ = calibrate(Seer(gate=gate, last_dense=0), 0.3, layers, lambda m: m.prepare(loaded.spec))
    assert counted_density(found, layers) == pytest.approx(0.3, rel=0.01)
    assert 0 < found.threshold < 1 and calibration_facts(found, 0.3, 0.3, "")["knob"] == f"threshold={found.threshold:.6g}"


def test_coarse_steps_give_the_nearest(layers):
    found, reached = calibrate(AShape(init=128), 0.01, layers, as_it_is)  # 128 first keys alone are more
    assert found.local == 1 and reached > 0.3
    density = {step: counted_density(RandomBlocks(block=256, density=step / 50), layers) for step in range(1, 51)}
    nearest = min(abs(d - 0.35) for d in density.values())
    found, _ = calibrate(RandomBlocks(block=256), 0.35, layers, as_it_is)
    assert abs(counted_density(found, layers) - 0.35) == pytest.approx(nearest, abs=1e-9)


@dataclass(frozen=True)
class OwnKernel(Method):
    """Overrides attend(): its density is that of the mask it reports."""

    local: float = 1.0
    name = "own"
    knob = "local"
    knob_range = (1, 1024)

    def attend(self, q, k, v, ctx):
        if self.local < 600:
            ctx.mask = sink_and_window(q.shape[2], k.shape[2], 0, int(self.local))
        return dense_attention(q, k, v, ctx.scale)


def test_a_method_with_its_own_attend(layers):
    found, _ = calibrate(OwnKernel(), 0.3, layers, as_it_is)
    pairs = sum(min(i + 1, int(found.local)) for i in range(LENGTH))
    assert pairs / (LENGTH * (LENGTH + 1) / 2) == pytest.approx(0.3, rel=0.01)
    assert calibrate(OwnKernel(), 1.0, layers, as_it_is)[0].local >= LENGTH - 20  # dense when it reports no mask


@dataclass(frozen=True)
class Silent(OwnKernel):
    name = "silent"

    def attend(self, q, k, v, ctx):
        pass


def test_an_attend_that_returns_nothing_is_named(layers):
    with pytest.raises(ValueError, match=r"silent: attend\(\) must return a tensor, got NoneType"):
        calibrate(Silent(), 0.3, layers, as_it_is)


def test_a_number_that_was_stored_as_a_whole_one_still_turns(layers):
    found, _ = calibrate(build("random", {"density": 1, "block": 32}), 0.3, layers, as_it_is)
    assert counted_density(found, layers) == pytest.approx(0.3, rel=0.01)


def test_a_method_without_a_knob_is_refused(layers):
    with pytest.raises(ValueError, match="dense has no knob"):
        calibrate(METHODS["dense"](), 0.25, layers, as_it_is)


@dataclass(frozen=True)
class Jump(Method):
    """Dense at the end of its range, almost empty everywhere else."""

    level: float = 0.5
    name = "jump"
    knob = "level"
    knob_range = (0.0, 1.0)

    def select(self, q, k, ctx):
        return sink_and_window(q.shape[2], k.shape[2], 0, LENGTH if self.level == 1 else 1)


@dataclass(frozen=True)
class Reversed(OwnKernel):
    name = "reversed"
    knob_range = (1024, 1)


def test_a_range_that_names_the_densest_value_first_is_refused(layers):
    with pytest.raises(ValueError, match=r"reversed.knob_range is \(sparsest, densest value\), but local=1024 keeps 1 "):
        calibrate(Reversed(), 0.3, layers, as_it_is)


def test_the_ends_of_the_range_are_tried(layers):
    found, reached = calibrate(Jump(), 0.9, layers, as_it_is)
    assert found.level == reached == 1
