"""What gate training costs beside the frozen model's own forward pass: seconds, tokens a second, GPU memory. Random weights.

python docs/training_cost.py OUT.csv        # on a GPU
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from sparsebench.kernels.attention_with_map import attention_with_map
from sparsebench.methods.base import LayerContext, Method, ModelSpec
from sparsebench.methods.seer.gated_model import GatedModel, Recipe, new_gates
from sparsebench.models.attach import attach

SHAPES = {
    # name: (tokens, layers, heads, KV heads, head_dim, hidden, intermediate, vocabulary)
    "SmolLM2-135M": (8192, 30, 9, 3, 64, 576, 1536, 49152),
    "Llama-3.1-8B": (32768, 32, 32, 8, 128, 4096, 14336, 128256),
}
STEPS = 5


class WithMap(Method):
    """Dense attention that also makes the ground truth, which nobody reads."""

    name = "with_map"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return attention_with_map(q, k, v, of="row_mass", scale=ctx.scale)[0]


def measured(step: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of a step after the first, and the peak of allocated GPU memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:]), torch.cuda.max_memory_allocated() / 2**30


def rows(name: str) -> list[dict]:
    tokens, layers, heads, kv_heads, dim, hidden, intermediate, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, vocab_size=vocabulary, max_position_embeddings=tokens,
    )  # fmt: skip
    with torch.device("cuda"):
        base = LlamaModel._from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(vocabulary, (1, tokens))
    recipe = Recipe(gate_dim=dim, loss="row_mass")
    gates = [gate.cuda() for gate in new_gates(ModelSpec(name, layers, heads, kv_heads, dim), recipe)]
    module = GatedModel(base, gates, recipe, "kernel")
    optimizer = torch.optim.AdamW(module.gates.parameters(), lr=1e-3)

    def forward() -> None:
        with torch.no_grad():
            base(input_ids=ids, use_cache=False)

    def learn() -> None:
        module(ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    found = []
    for what, method, step in (
        ("forward", None, forward), ("forward with block maps", WithMap(), forward), ("gate training", module.method, learn)
    ):  # fmt: skip
        with attach(base, method) if method else nullcontext():
            seconds, memory = measured(step)
        row = {"shape": name, "tokens": tokens, "what": what, "seconds": round(seconds, 4)}
        found.append(row | {"tokens_per_second": round(tokens / seconds), "GiB": round(memory, 1)})
    return found


def main() -> None:
    torch.manual_seed(0)
    table = pd.DataFrame([row for name in SHAPES for row in rows(name)])
    table["gpu"], table["torch"] = torch.cuda.get_device_name(), torch.__version__
    table.to_csv(sys.argv[1], index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
