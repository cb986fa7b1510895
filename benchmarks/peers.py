"""The ways of today, end to end, beside ours: wall time and peak memory from Meta's files to a directory on disk.

    python benchmarks/peers.py [--experts 16] [--vocab 20000] [--rounds 3] [--ways NAME ...] [--folder DIR] [--json FILE]

One layer of Scout at full width in 8 ranks. Each way is a process of its own, and all read the same source, warm. What does not
import is left out, and said so; `make bench` installs the peers. The ways, named by what they take:

  whole model     torch.load of all ranks, torch.cat, one safetensors file: what converters do
  llm-compressor  the same with experts as linear layers, which is all that it quantizes, then its model-free W4A16 or
                  FP8_DYNAMIC; "MSE": with its observer that searches the scale, as our defaults do, where min-max is our `plain`
  bitsandbytes    the same in memory, quantize_4bit of each feed-forward matrix, one safetensors file
  Transformers    after "whole model", whose time it needs first: load with bitsandbytes NF4 and save; fused experts stay bf16

In the peers' favour: names are not translated, nothing is checked, and no digest is made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import idle, measured, spread

# How the ranks of Meta's files join; what is not named is the same on all.
_ROWS = re.compile(
    r"tok_embeddings|output\.weight|wqkv\.weight|_shared_FD|w_swiglu_FD|conv1|attn\.w[qkv]\.|mlp\.c_fc|vision_projection"
)
_COLUMNS = re.compile(r"wo\.weight|w_out_shared_DF|mlp\.c_proj\.weight")
_EXPERTS = re.compile(r"(.+experts)\.(moe_w_in|moe_w_swiglu|moe_w_out)_e")
_PROJECTION = {"moe_w_in": "gate_proj", "moe_w_swiglu": "up_proj", "moe_w_out": "down_proj"}
_FEED_FORWARD = re.compile(r"experts\.\d+\.|w_in_shared|w_swiglu_FD|w_out_shared")


def whole_model(source: Path, linear: bool) -> dict[str, Any]:
    """Every tensor of the model in memory; experts fused, or one by one as linear layers [out, in]."""
    import codecs
    import io

    import torch

    torch.serialization.add_safe_globals([io.BytesIO, codecs.encode])
    ranks = [torch.load(path, weights_only=True) for path in sorted(source.glob("*.pth"))]
    n_experts = json.loads((source / "params.json").read_bytes())["moe_args"]["num_experts"]
    model: dict[str, torch.Tensor] = {}
    for key in list(ranks[0]):
        parts = [rank.pop(key) for rank in ranks]
        if not isinstance(parts[0], torch.Tensor):
            continue
        if found := _EXPERTS.match(key):
            axis = 1 if found[2] == "moe_w_out" else 2
            fused = torch.cat([part.view(n_experts, -1, part.shape[-1]) for part in parts], dim=axis)
            if not linear:
                model[key] = fused
                continue
            for i in range(n_experts):
                model[f"{found[1]}.{i}.{_PROJECTION[found[2]]}.weight"] = fused[i].t().contiguous()
        elif _ROWS.search(key):
            model[key] = torch.cat(parts)
        elif _COLUMNS.search(key):
            model[key] = torch.cat(parts, dim=1)
        else:
            model[key] = parts[0]
    return model


def way_whole(source: Path, target: Path) -> None:
    from safetensors.torch import save_file

    save_file(whole_model(source, linear=False), target / "model.safetensors")


def way_llm_compressor(preset: str, observer: str | None = None) -> Callable[[Path, Path], None]:
    def way(source: Path, target: Path) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme
        from safetensors.torch import save_file

        between = target / "between"
        between.mkdir()
        save_file(whole_model(source, linear=True), between / "model.safetensors")
        (between / "config.json").write_text('{"model_type": "llama4"}')
        from llmcompressor import model_free_ptq

        scheme = preset_name_to_scheme(preset, [])
        if observer:
            scheme.weights.observer = observer
        ignore = ["re:.*attention.*", "re:.*router.*", "tok_embeddings", "output", "re:vision.*", "re:.*rope.*"]
        model_free_ptq(between, target / "quantized", scheme=scheme, ignore=ignore)

    return way


def way_bitsandbytes(source: Path, target: Path) -> None:
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    model = whole_model(source, linear=True)
    for key in [key for key in model if _FEED_FORWARD.search(key)]:
        packed, state = quantize_4bit(model.pop(key), blocksize=64, quant_type="nf4", compress_statistics=True)
        model[key] = packed
        model |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
    save_file(model, target / "model.safetensors")


def way_transformers(source: Path, target: Path) -> None:
    import torch
    from transformers import BitsAndBytesConfig, Llama4ForConditionalGeneration

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = Llama4ForConditionalGeneration.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(target / "quantized")


def way_ours(recipe: str | None) -> Callable[[Path, Path], None]:
    def way(source: Path, target: Path) -> None:
        from llama4_convert import convert

        convert(source, target / "model", recipe=recipe)

    return way


def plain(scheme: str) -> str:
    """A recipe by min-max scales, as the peers' defaults: the path of the file."""
    return str(Path(__file__).with_name(f"{scheme}-plain.toml"))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "whole model": way_whole,
    "llm-compressor W4A16": way_llm_compressor("W4A16"),
    "llm-compressor FP8": way_llm_compressor("FP8_DYNAMIC"),
    "bitsandbytes NF4": way_bitsandbytes,
    "Transformers NF4": way_transformers,
    "ours, bf16": way_ours(None),
    "ours, int4 plain": way_ours(plain("int4")),
    "ours, int4": way_ours("int4"),
    "ours, fp8 plain": way_ours(plain("fp8")),
    "ours, fp8": way_ours("fp8"),
    "ours, nf4": way_ours("nf4"),
    "llm-compressor W4A16, MSE": way_llm_compressor("W4A16", "memoryless_mse"),
    "llm-compressor FP8, MSE": way_llm_compressor("FP8_DYNAMIC", "memoryless_mse"),
}
# Ours, and the steps of a peer, each a process.
COMPARED: list[tuple[str, tuple[str, ...]]] = [
    ("ours, bf16", ("whole model",)),
    ("ours, int4 plain", ("llm-compressor W4A16",)),
    ("ours, int4", ("llm-compressor W4A16, MSE",)),
    ("ours, int4", ("llm-compressor W4A16",)),
    ("ours, fp8 plain", ("llm-compressor FP8",)),
    ("ours, fp8", ("llm-compressor FP8, MSE",)),
    ("ours, fp8", ("llm-compressor FP8",)),
    ("ours, nf4", ("bitsandbytes NF4",)),
    ("ours, nf4", ("whole model", "Transformers NF4")),
]


def compare(source: Path, work: Path, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Those ways in turn; the output is removed each time."""
    from llama4_convert import convert, synth

    bf16, nothing = work / "bf16", idle()
    convert(source, bf16)
    # numba compiles once an installation: before the first round, on a tiny model.
    synth(work / "tiny", tiny=True)
    for name in names:
        if name.startswith("ours"):
            WAYS[name](work / "tiny", work / "compiled")
            shutil.rmtree(work / "compiled")
    shutil.rmtree(work / "tiny")
    rows: dict[str, list[Any]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for name in names:
            if name in skipped or (number and not name.startswith("ours")):  # peers take minutes: once
                continue
            target = work / "out"
            target.mkdir()
            start = bf16 if name.startswith("Transformers") else source
            try:
                run = measured([sys.executable, __file__, "--way", name, "--paths", start, target])
            except RuntimeError as error:
                skipped[name] = str(error).strip().splitlines()[-1]
                print(f"  SKIPPED {name}: {skipped[name]}", flush=True)
            else:
                rows.setdefault(name, []).append(run)
                print(f"  {name:24} {run.wall_s:7.1f} s {(run.peak_bytes - nothing) >> 20:8,} MiB", flush=True)
            shutil.rmtree(target)
            os.sync()
    ways = {
        name: {
            "wall_s": spread([run.wall_s for run in runs]),
            "peak_mib": max(run.peak_bytes - nothing for run in runs) / (1 << 20),
        }
        for name, runs in rows.items()
    }
    found = [
        {
            "ours": ours,
            "peer": ", then ".join(steps),
            "times_as_fast": sum(ways[step]["wall_s"]["median"] for step in steps) / ways[ours]["wall_s"]["median"],
            "of_its_memory": ways[ours]["peak_mib"] / max(ways[step]["peak_mib"] for step in steps),
        }
        for ours, steps in COMPARED
        if {ours, *steps} <= ways.keys()
    ]
    size = sum(path.stat().st_size for path in source.iterdir())
    return {"bytes": size, "ways": ways, "comparisons": found, "skipped": skipped}


def tell(result: dict[str, Any]) -> None:
    for one in result["comparisons"]:
        print(
            f"{one['ours']}: {one['times_as_fast']:.1f} times as fast as {one['peer']},"
            f" in {one['of_its_memory']:.3f} of its memory"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--experts", type=int, default=16)
    options.add_argument("--vocab", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    options.add_argument("--tiny", action="store_true", help="does it run? The figures mean nothing")
    options.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options.add_argument("--json", type=Path)
    options.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options.add_argument("--paths", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.way:
        WAYS[args.way](*args.paths)
        return
    from llama4_convert import synth

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
        source = Path(folder) / "meta"
        if args.tiny:
            synth(source, tiny=True, ranks=8)
        else:
            synth(source, layers=1, experts=args.experts, vocab=args.vocab, ranks=8)
        os.sync()
        result = compare(source, Path(folder), args.rounds, args.ways)
    tell(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
