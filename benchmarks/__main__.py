"""All of it: what README's figures come from. `make bench`, or `python benchmarks [--quick] [--only NAME ...] [--tables]`

Writes benchmarks/results.json and the plots of docs/plots, and prints the tables of docs/benchmarks.md. Works within 40 GB of
disk and removes what it made. About two hours on 2 cores; `--quick` is a smoke run of everything at sizes that mean nothing, and
writes nothing. Peers that are not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels
import parity
import peers
import plots
import reference
import startup
from convert import Case, compare, cpu_limit, line
from measuring import machine, told

from llama4_convert import synth

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PLAIN = HERE / "int4-plain.toml"
MAVERICK_EXPERTS = (8, 16, 32, 64)


class Bench:
    """The parts, each for itself; `folder` holds a source and a result at a time."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.pairs = 1 if quick else 3

    def convert(self) -> dict[str, Any]:
        """A Scout of one layer: as it is, from a cold disk, without what Linux has, and with each recipe."""
        cases = {
            "bf16": Case(),
            "bf16, source not in the page cache": Case(cold=True),
            "bf16, O_DIRECT and fallocate refused": Case(portable=True),
            "int4, plain scales": Case(str(PLAIN)),
            "int4": Case("int4"),
            "int4, source not in the page cache": Case("int4", cold=True),
            "fp8": Case("fp8"),
            "nf4": Case("nf4"),
        }
        source = self._source("scout", layers=1)
        found = {}
        for name, case in cases.items():
            print(name, flush=True)
            found[name] = compare(source, self.folder, case, self.pairs)
            print("  " + line(found[name]), flush=True)
        shutil.rmtree(source)
        return found

    def maverick(self) -> dict[str, Any]:
        """Maverick's width, two layers, more and more experts: time by bytes, memory by nothing."""
        found = {}
        for experts in MAVERICK_EXPERTS[: 1 if self.quick else None]:
            source = self._source("maverick", layers=2, experts=experts, vocab=20_000)
            for recipe in ("", "int4") if experts == 16 else ("",):
                name = f"{experts} experts{recipe and ', ' + recipe}"
                print(name, flush=True)
                found[name] = compare(source, self.folder, Case(recipe), min(self.pairs, 2))
                print("  " + line(found[name]), flush=True)
            shutil.rmtree(source)
        return found

    def _source(self, geometry: str, **cut: int) -> Path:
        source = self.folder / "meta"
        synth(source, geometry=geometry, ranks=8, **({"tiny": True} if self.quick else cut))  # type: ignore[arg-type]
        os.sync()
        return source

    def startup(self) -> dict[str, Any]:
        return startup.compare(1 if self.quick else 7)

    def reference(self) -> list[dict[str, Any]]:
        if importlib.util.find_spec("transformers") is None:
            print("  SKIPPED: Transformers is not installed")
            return []
        return reference.compare(
            [32] if self.quick else [32, 256, 1024], ["float32", "bfloat16"], self.pairs, self.quick
        )

    def parity(self) -> dict[str, Any]:
        """`validate` at real widths."""
        return parity.compare(self.folder, ["scout"] if self.quick else parity.GEOMETRIES, quick=self.quick)

    def kernels(self) -> dict[str, Any]:
        return kernels.measure(2, 1 if self.quick else 7, shape=(256, 512) if self.quick else kernels.SHAPE)

    def peers(self) -> dict[str, Any]:
        if self.quick:
            source = self._source("scout")
            found = peers.compare(
                source, self.folder, 1, [way for way in peers.WAYS if way.startswith(("ours", "whole"))]
            )
        else:
            source = self._source("scout", layers=1, vocab=20_000)
            found = peers.compare(source, self.folder, 3, list(peers.WAYS))
        shutil.rmtree(source)
        shutil.rmtree(self.folder / "bf16")
        peers.tell(found)
        return found


PARTS: dict[str, Callable[[Bench], Any]] = {
    "startup": Bench.startup,
    "convert": Bench.convert,
    "maverick": Bench.maverick,
    "peers": Bench.peers,
    "reference": Bench.reference,
    "parity": Bench.parity,
    "kernels": Bench.kernels,
}


def tables(results: dict[str, Any]) -> None:
    """What docs/benchmarks.md shows."""
    for name in ("convert", "maverick"):
        columns = ["", "GB read", "GB written", "`cp` + sync, s", "`convert`, s", "ratio, median (range)"]
        columns += ["CPU, s", "a copy's, a CRC's and a SHA-256's", "own MiB"]
        print(f"\n| {' | '.join(columns)} |")
        print("|---" * 9 + "|")
        for case, one in results.get(name, {}).items():
            print(
                f"| {case} | {one['bytes'] / 1e9:.1f} | {one['output_bytes'] / 1e9:.1f} | {one['cp_s']['median']:.1f} |"
                f" {one['convert_s']['median']:.1f} | {told(one['ratio'])} | {one['convert_cpu_s']['median']:.1f} |"
                f" {cpu_limit(one):.1f} | {one['own_mib']:.0f} |"
            )
    if found := results.get("peers"):
        print("\n| way | wall, s | peak MiB |\n|---|---|---|")
        for name, one in found["ways"].items():
            print(f"| {name} | {told(one['wall_s'], 1)} | {one['peak_mib']:,.0f} |")
        print("\n| ours | against | times as fast | of its memory |\n|---|---|---|---|")
        for one in found["comparisons"]:
            print(f"| {one['ours']} | {one['peer']} | {one['times_as_fast']:.1f} | {one['of_its_memory']:.3f} |")
    if found := results.get("reference"):
        print("\n| dtype | tokens | ours, tokens/s | Transformers | times as fast |\n|---|---|---|---|---|")
        for one in found:
            print(
                f"| {one['dtype']} | {one['tokens']} | {one['ours_tokens_per_s']:.1f} |"
                f" {one['transformers_tokens_per_s']:.1f} | {told(one['times_as_fast'], 1)} |"
            )
    for geometry, found in results.get("parity", {}).items():
        print(f"\n| candidate, {geometry}'s width | seconds | own MiB | seconds a layer |\n|---|---|---|---|")
        for name, one in found["runs"].items():
            layers = ", ".join(f"{s:.1f}" for stage, s in one["seconds"].items() if stage.startswith("layers."))
            print(f"| {name} | {one['wall_s']:.1f} | {one['own_mib']:,.0f} | {layers} |")
    if found := results.get("kernels"):
        print("\n| GB/s of bf16 read | [in, out] | [out, in] | of a copy |\n|---|---|---|---|")
        for name, one in found.items():
            print(f"| {name} | {one['in_out']:.2f} | {one['out_in']:.2f} | {one['of_copy']:.2f} |")
    if found := results.get("startup"):
        print("\n| | s |\n|---|---|")
        for name, one in found.items():
            print(f"| {name} | {told(one)} |")


def main() -> None:
    options = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="does it run? Writes nothing")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--tables", action="store_true", help="run nothing: the tables and plots of the last results")
    options.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = options.parse_args()
    # Of a part that is not run the last results stay, each with its own date.
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.quick else {}
    for name in () if args.tables else args.only:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
            results[name] = PARTS[name](Bench(Path(folder), args.quick))
        results.setdefault("measured", {})[name] = machine()
        if not args.quick:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    tables(results)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            plots.draw(results, Path(folder))
    else:
        plots.draw(results, HERE.parent / "docs" / "plots")


if __name__ == "__main__":
    main()
