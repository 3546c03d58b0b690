"""Save q, k and v of one layer of a real model run, for run_bench.py --suites speed --qkv FILE.

python -m sparsebench.suites.capture --model smollm2-135m --data file:books.jsonl --ctx 8k --layer 15 --out layer15.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.base import LayerContext
from ..methods.spec import parse_tokens
from ..models import zoo
from ..models.calibrate import visit
from .corpora import token_windows
from .inputs import save_layer


def capture(loaded: zoo.LoadedModel, ids: list[int], layer: int) -> dict[str, Tensor]:
    """q [1, H, L, D], k, v [1, H_kv, L, D] after RoPE in bf16, cos, sin [L, D] in fp32, and 0-d scale, of the dense model.

    Raises: ValueError for a layer the model does not have, or a rotary embedding that cannot be written as tables.
    """
    if not 0 <= layer < loaded.spec.layers:
        raise ValueError(f"--layer {layer}: {loaded.spec.name} has the layers 0 to {loaded.spec.layers - 1}")
    found: dict[str, Tensor] = {}

    def look(q: Tensor, k: Tensor, ctx: LayerContext) -> None:
        if ctx.layer == layer:
            assert ctx.rope is not None
            cos, sin = ctx.rope(ctx.positions, q.shape[-1])
            half = {name: x.to(torch.bfloat16) for name, x in (("q", q), ("k", k), ("v", ctx.v))}
            found.update(half, cos=cos, sin=sin, scale=torch.tensor(ctx.scale, dtype=torch.float64))

    visit(loaded.model, [ids], look)
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after bad input, with the reason in one line."""
    parser = argparse.ArgumentParser(prog="python -m sparsebench.suites.capture", description=__doc__)
    parser.add_argument("--model", required=True, help="name, local folder or hub id, as in run_bench.py")
    parser.add_argument("--data", required=True, help="corpus whose first long enough document of split 'eval' is read")
    parser.add_argument("--ctx", default="8k", help="tokens, default 8k")
    parser.add_argument("--layer", type=int, required=True, help="counted from 0")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        ctx_len = parse_tokens(args.ctx)
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder: name the file")
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        loaded = zoo.load(args.model, dtype=dtype, device=args.device)
        loaded.check_length(ctx_len)
        document, ids = token_windows(loaded.tokenizer, args.data, "eval", ctx_len, 1).ids[0]
        tensors = capture(loaded, ids, args.layer)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    spec = loaded.spec
    facts: dict[str, Any] = {"model": spec.name, "revision": loaded.revision, "corpus": args.data, "document": document}
    facts |= {"tokens": len(ids), "layer": args.layer, "layers": spec.layers, "scale": float(tensors.pop("scale"))}
    save_layer(args.out, tensors, facts | {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim})
    print(f"layer {args.layer} of {spec.name} on {len(ids)} tokens of {document}: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
