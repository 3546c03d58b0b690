"""The documentation's examples run as they are printed."""

import re
from pathlib import Path

import torch

import sparsebench
from sparsebench.methods import METHODS
from sparsebench.methods.spec import load_plugin

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_add_a_method_example(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-method.md").read_text(), re.DOTALL)
    assert len(code[0].splitlines()) < 30
    plugin = tmp_path / "pooled.py"
    plugin.write_text(code[0])
    try:
        assert load_plugin(str(plugin)) == {"pooled"}
        q, k, v = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16), torch.randn(1, 2, 1000, 16)
        names = {"Pooled": METHODS["pooled"], "q": q, "k": k, "v": v}
        exec(code[1], names)
        mask = names["mask"]
        assert mask.kv_num_blocks.shape == (1, 4, 16)
        half_a_block = 64 * 64 / 2 / (1000 * 1001 / 2)
        assert float((mask.density() - 0.25).abs().max()) < half_a_block
        assert not torch.equal(mask.kv_indices[:, 0], mask.kv_indices[:, 1])  # every head chooses for itself
        assert torch.equal(names["out"], sparsebench.attention(METHODS["pooled"](density=0.25), q, k, v)[0])
    finally:
        METHODS.pop("pooled", None)
