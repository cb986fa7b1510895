"""`convert` against `cp` + sync of the same bytes, in turn, in one run: wall time, CPU time and own memory.

    python benchmarks/convert.py [--geometry maverick] [--layers 2] [--experts N] [--vocab N] [--pairs 5] [--recipe NAME]
                                 [--device cuda] [--folder DIR] [--tokenizer FILE] [--cold] [--portable]
                                 [--json FILE]

Synthesizes a model of full width with few layers in 8 ranks (some 15 GB for 2 layers of Scout, as much again for the output),
and removes it at the end. Maverick's MoE layers are the odd ones, 32 GB each: take 2 layers and fewer experts. "Own memory" is
the peak resident set of the converting process less that of an idle interpreter, both read from the kernel (Linux). With --cold
the source is dropped from the page cache before each side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAK = "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
CONVERT = f"""
import os, sys
source, target, recipe, device, refused = sys.argv[1:]
for name in refused.split():
    delattr(os, name)
from llama4_convert import convert
convert(source, target, recipe=recipe or None, device=device)
assert device != 'cpu' or 'torch' not in sys.modules
{PEAK}
print(sum(os.times()[:2]))
"""


# What Linux has and macOS, or a network or overlay file system, may not.
OPTIONAL = "O_DIRECT posix_fallocate"


def measured(source: Path, target: Path, recipe: str, device: str, portable: bool) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak resident KiB) of one conversion in a fresh process."""
    began = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(target), recipe, device, OPTIONAL if portable else ""]
    peak, cpu = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return time.perf_counter() - began, float(cpu), int(peak)


def copied(source: Path, target: Path) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of cp and sync."""
    target.mkdir()
    before, began = os.times(), time.perf_counter()
    subprocess.run(["cp", "-r", f"{source}/.", str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def dropped(folder: Path) -> None:
    """Let the page cache forget the files of a folder."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


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

    work = Path(tempfile.mkdtemp(dir=args.folder, prefix="bench-"))
    try:
        source, target = work / "meta", work / "out"
        cut = {"layers": args.layers, "experts": args.experts, "vocab": args.vocab}
        size = synth(source, geometry=args.geometry, ranks=8, **cut)["bytes"]
        os.sync()
        if args.tokenizer:
            shutil.copy(args.tokenizer, source / "tokenizer.model")
        idle = int(subprocess.check_output([sys.executable, "-c", PEAK]))
        rows = []
        for _ in range(args.pairs):
            if args.cold:
                dropped(source)
            copy_wall, copy_cpu = copied(source, target)
            shutil.rmtree(target)
            os.sync()  # neither side pays for the other's dirty pages
            if args.cold:
                dropped(source)
            wall, cpu, peak = measured(source, target, args.recipe, args.device, args.portable)
            shutil.rmtree(target)
            os.sync()
            rows.append(
                {
                    "cp_s": copy_wall,
                    "cp_cpu_s": copy_cpu,
                    "convert_s": wall,
                    "convert_cpu_s": cpu,
                    "own_kib": peak - idle,
                }
            )
            print(f"cp {copy_wall:6.2f} s   convert {wall:6.2f} s   ratio {wall / copy_wall:.2f}", flush=True)
    finally:
        shutil.rmtree(work)
    ratios = [row["convert_s"] / row["cp_s"] for row in rows]
    result = {
        "bytes": size,
        "pairs": rows,
        "median_ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "median_convert_s": statistics.median(row["convert_s"] for row in rows),
        "median_cp_s": statistics.median(row["cp_s"] for row in rows),
        "median_convert_cpu_s": statistics.median(row["convert_cpu_s"] for row in rows),
        "own_memory_mib": max(row["own_kib"] for row in rows) / 1024,
    }
    print(
        f"{size / 1e9:.1f} GB: {result['median_ratio']:.2f}x cp + sync (from {min(ratios):.2f} to {max(ratios):.2f}),"
        f" {result['own_memory_mib']:.0f} MiB of its own"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
