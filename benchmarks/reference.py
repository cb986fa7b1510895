"""The reference model's mixture of experts beside Transformers', which computes every expert for every token.

    python benchmarks/reference.py [--tokens 32 256 1024] [--dtypes float32 bfloat16] [--rounds 3] [--tiny] [--json FILE]

One MoE layer at Scout's width (16 experts, top 1, and the shared one), the same weights in the same memory, prefill of so many
tokens; each call of ours after one of theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measuring import spread, told

from llama4.loading import DictWeights
from llama4.text import mixture


def compare(tokens: list[int], dtypes: list[str], rounds: int, tiny: bool = False) -> list[dict[str, Any]]:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    hidden, width = (128, 256) if tiny else (5120, 8192)
    rows = []
    for name in dtypes:
        dtype = getattr(torch, name)
        torch.set_default_dtype(dtype)
        config = Llama4TextConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=16)
        theirs = Llama4TextMoe(config)
        torch.set_default_dtype(torch.float32)
        for parameter in theirs.parameters():
            parameter.data.normal_(0, 0.02)
        weights = _weights(theirs, width)
        with torch.inference_mode():
            for count in tokens:
                x = torch.randn(count, hidden).to(dtype)
                seconds: list[tuple[float, float]] = []
                for _ in range(rounds):
                    began = time.perf_counter()
                    expected = theirs(x[None])[0].view(x.shape)
                    between = time.perf_counter()
                    found, _ = mixture(x, weights, "", 1)
                    seconds.append((between - began, time.perf_counter() - between))
                error = float((found - expected).norm() / expected.norm())
                row = {
                    "dtype": name,
                    "tokens": count,
                    "transformers_tokens_per_s": count / spread([a for a, _ in seconds])["median"],
                    "ours_tokens_per_s": count / spread([b for _, b in seconds])["median"],
                    "times_as_fast": spread([a / b for a, b in seconds]),
                    "relative_difference": error,
                }
                rows.append(row)
                print(
                    f"  {name:9} {count:5} tokens: {row['ours_tokens_per_s']:7.1f} tokens/s,"
                    f" {told(row['times_as_fast'], 1)} times Transformers', difference {error:.0e}",
                    flush=True,
                )
    return rows


def _weights(theirs: Any, width: int) -> DictWeights:
    """Transformers' parameters under our names, [out, in]; nothing is copied."""
    weights = DictWeights({"router": theirs.router.weight})
    for name in ("gate", "up", "down"):
        weights[f"shared.{name}"] = getattr(theirs.shared_expert, f"{name}_proj").weight
    for expert, (gate_up, down) in enumerate(zip(theirs.experts.gate_up_proj, theirs.experts.down_proj, strict=True)):
        weights[f"experts.{expert}.gate"] = gate_up[:, :width].T
        weights[f"experts.{expert}.up"] = gate_up[:, width:].T
        weights[f"experts.{expert}.down"] = down.T
    return weights


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, nargs="+", default=[32, 256, 1024])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="does it run? The figures mean nothing")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    rows = compare(args.tokens, args.dtypes, args.rounds, args.tiny)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
