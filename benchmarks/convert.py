"""`convert` against `cp` + sync of the same bytes, in turn, in one run: wall time, CPU time and own memory.

    python benchmarks/convert.py [--geometry maverick] [--layers 2] [--experts N] [--vocab N] [--pairs 5] [--recipe NAME]
                                 [--device cuda] [--folder DIR] [--tokenizer FILE] [--cold] [--portable] [--json FILE]

Synthesizes a model of full width with few layers in 8 ranks (some 15 GB for 2 layers of Scout, as much again for the output),
and removes it at the end. Maverick's MoE layers are the odd ones, 32 GB each: take 2 layers and fewer experts. "Own memory" is
the peak resident set of the converting process less that of an idle interpreter, both read from the kernel (Linux).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32
from measuring import copied, dropped, idle, measured, spread, told

CONVERT = """
import os, sys
source, target, recipe, device, refused = sys.argv[1:]
for name in refused.split():
    delattr(os, name)
from llama4_convert import convert
convert(source, target, recipe=recipe or None, device=device)
assert device != 'cpu' or 'torch' not in sys.modules
"""
# What Linux has and macOS, or a network or overlay file system, may not.
OPTIONAL = "O_DIRECT posix_fallocate"


@dataclass(frozen=True)
class Case:
    """How to convert; the copy beside it is always of the source's bytes."""

    recipe: str = ""  # a built-in one or a file
    cold: bool = False  # the source is dropped from the page cache before each side
    portable: bool = False  # without OPTIONAL
    device: str = "cpu"


def compare(source: Path, work: Path, case: Case, pairs: int) -> dict[str, Any]:
    """Copy and convert `source` in turn; the output is removed each time."""
    target, nothing = work / "out", idle()
    rows = []
    for _ in range(pairs):
        if case.cold:
            dropped(source)
        copy = copied(source, target)
        _removed(target)
        if case.cold:
            dropped(source)
        refused = OPTIONAL if case.portable else ""
        ours = measured([sys.executable, "-c", CONVERT, source, target, case.recipe, case.device, refused])
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        _removed(target)
        rows.append(
            {
                "cp_s": copy.wall_s,
                "cp_cpu_s": copy.cpu_s,
                "convert_s": ours.wall_s,
                "convert_cpu_s": ours.cpu_s,
                "own_bytes": ours.peak_bytes - nothing,
                "output_bytes": size,
            }
        )
        print(f"  cp {copy.wall_s:6.2f} s   convert {ours.wall_s:6.2f} s   {ours.wall_s / copy.wall_s:.2f}", flush=True)
    size = sum(path.stat().st_size for path in source.iterdir())
    return {
        "bytes": size,
        "output_bytes": rows[0]["output_bytes"],
        "ratio": spread([row["convert_s"] / row["cp_s"] for row in rows]),
        "convert_s": spread([row["convert_s"] for row in rows]),
        "cp_s": spread([row["cp_s"] for row in rows]),
        "convert_cpu_s": spread([row["convert_cpu_s"] for row in rows]),
        "cp_cpu_s": spread([row["cp_cpu_s"] for row in rows]),
        "digests_cpu_s": digest_seconds(size),
        "own_mib": max(row["own_bytes"] for row in rows) / (1 << 20),
    }


def _removed(folder: Path) -> None:
    shutil.rmtree(folder)
    os.sync()  # neither side pays for the other's dirty pages


def digest_seconds(size: int) -> float:
    """CPU seconds of one CRC-32 and one SHA-256 of so many bytes, from a buffer in the cache."""
    chunk, began = os.urandom(1 << 20), time.process_time()
    digest, crc = hashlib.sha256(), 0
    for _ in range(512):
        digest.update(chunk)
        crc = crc32(chunk, crc)
    return (time.process_time() - began) / (512 << 20) * size


def cpu_limit(result: dict[str, Any]) -> float:
    """CPU seconds of a copy, a CRC and a SHA-256 of the same bytes."""
    return float(result["cp_cpu_s"]["median"] + result["digests_cpu_s"])


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['bytes'] / 1e9:.1f} GB: {told(result['ratio'])}x cp + sync; CPU {result['convert_cpu_s']['median']:.1f} s,"
        f" a copy, a CRC and a SHA-256 {cpu_limit(result):.1f} s; {result['own_mib']:.0f} MiB of its own"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--geometry", default="scout")
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--experts", type=int, help="fewer than published, as disks go")
    options.add_argument("--vocab", type=int)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--recipe", default="", help="quantize on the way: the copy is of the source's bytes")
    options.add_argument("--device", default="cpu", help="where to quantize")
    options.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.model to put into the source: its memory counts too"
    )
    options.add_argument("--cold", action="store_true", help="with nothing of the source in the page cache")
    options.add_argument("--portable", action="store_true", help=f"convert without {OPTIONAL}")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    from llama4_convert import synth

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
        work = Path(folder)
        source = work / "meta"
        synth(source, geometry=args.geometry, layers=args.layers, experts=args.experts, vocab=args.vocab, ranks=8)
        os.sync()
        if args.tokenizer:
            shutil.copy(args.tokenizer, source / "tokenizer.model")
        case = Case(args.recipe, args.cold, args.portable, args.device)
        result = compare(source, work, case, args.pairs)
    print(line(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
