"""`validate` at real widths: seconds a stage, own memory, what a second candidate costs, and what that makes of a whole Scout.

    python benchmarks/parity.py [--tokens 4096] [--experts 16] [--vocab 16384] [--geometries scout] [--json FILE]

Two layers of Scout's width and two of Maverick's (a dense one and one of experts), random weights: 30 GB of disk, half an hour
on 2 cores. The whole model is *extrapolated*: weights by their bytes, layers by their number, logits by the vocabulary; to 8
cores by the time that one core and two take, of which a part is the same for any number. One prompt, random tokens, no picture.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import idle, measured

from llama4_convert import convert, plan, synth

GEOMETRIES = ("scout", "maverick")
VALIDATE = """
import json, sys, time
import torch
from llama4_convert import validate
candidate, source, ids, cache, threads, out = sys.argv[1:]
if int(threads):
    torch.set_num_threads(int(threads))
seconds, last = {}, [None, time.perf_counter()]
def at(stage):
    now = time.perf_counter()
    if last[0] is not None:
        seconds[last[0]] = seconds.get(last[0], 0) + now - last[1]
    last[:] = [stage, now]
result = validate(candidate, reference=source, token_ids=ids, cache=cache or None, at=at)
at("end")
assert not result.tensors_different and not result.candidate_failure, result
json.dump({"seconds": seconds, "kind": result.kind, "kl_mean": result.kl_mean}, open(out, "w"))
"""


@dataclass(frozen=True)
class Run:
    wall_s: float
    own_mib: float
    seconds: dict[str, float]  # by stage

    def layers(self) -> list[float]:
        return [s for stage, s in self.seconds.items() if stage.startswith("layers.")]


def run(candidate: Path, source: Path, ids: Path, cache: str, threads: int = 0) -> Run:
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, "-c", VALIDATE, candidate, source, ids, cache, str(threads), out.name]
        told = measured(command)
        return Run(told.wall_s, (told.peak_bytes - idle()) / (1 << 20), json.loads(out.read())["seconds"])


def measure(folder: Path, geometry: str, tokens: int, quick: bool, **sizes: int) -> dict[str, Any]:
    source, ids = folder / "meta", folder / "ids.json"
    synth(source, geometry=geometry, ranks=8, **({"tiny": True} if quick else sizes))  # type: ignore[arg-type]
    ids.write_text(json.dumps([[random.Random(0).randrange(256) for _ in range(tokens)]]))
    convert(source, folder / "bf16")
    found: dict[str, Run] = {}

    def tell(name: str, candidate: str, cache: Path | str, threads: int = 0) -> None:
        found[name] = one = run(folder / candidate, source, ids, str(cache), threads)
        layers = ", ".join(f"{s:.1f}" for s in one.layers())
        print(f"  {name:38} {one.wall_s:7.1f} s, own {one.own_mib:6.0f} MiB, layers {layers}", flush=True)

    tell("bf16", "bf16", folder / "cache")
    tell("bf16, the reference computed before", "bf16", folder / "cache")
    tell("bf16, one core", "bf16", "", threads=1)
    shutil.rmtree(folder / "bf16")
    convert(source, folder / "nf4", recipe="nf4")
    tell("nf4, the reference computed before", "nf4", folder / "cache")
    size = sum(path.stat().st_size for path in source.iterdir())
    vocab = plan(source).tensors[0].shape[0] if quick else sizes["vocab"]
    for path in (source, folder / "nf4", folder / "cache"):
        shutil.rmtree(path)
    return {"bytes": size, "tokens": tokens, "vocab": vocab, "runs": {name: asdict(one) for name, one in found.items()}}


def extrapolated(
    scout: dict[str, Any], cores: int, layers: int = 48, vocab: int = 202_048, size: float = 217.3e9
) -> dict[str, float]:
    """Seconds of a whole Scout by part, on so many cores."""
    two, one = (Run(**scout["runs"][name]) for name in ("bf16", "bf16, one core"))

    def on(one_s: float, two_s: float) -> float:
        """Amdahl's law from the times of one core and two: what does not get quicker stays."""
        parallel = min(max(2 * (one_s - two_s), 0.0), one_s)
        return one_s - parallel + parallel / cores

    layer = on(sum(one.layers()) / len(one.layers()), sum(two.layers()) / len(two.layers()))
    parts = {
        "weights": on(one.seconds["weights"], two.seconds["weights"]) * size / scout["bytes"],
        "layers": layers * layer,
        "logits": on(one.seconds["logits"], two.seconds["logits"]) * vocab / scout["vocab"],
    }
    return {"a layer": layer, **parts, "all": sum(parts.values())}


def compare(
    folder: Path,
    geometries: Sequence[str] = GEOMETRIES,
    tokens: int = 4096,
    experts: int = 16,
    vocab: int = 16384,
    quick: bool = False,
) -> dict[str, Any]:
    tokens = 24 if quick else tokens
    found: dict[str, Any] = {}
    for geometry in geometries:
        print(geometry, flush=True)
        found[geometry] = measure(folder, geometry, tokens, quick, layers=2, experts=experts, vocab=vocab)
    if "scout" not in found:
        return found
    found["scout"]["extrapolated"] = {str(cores): extrapolated(found["scout"], cores) for cores in (2, 8)}
    for cores, parts in found["scout"]["extrapolated"].items():
        told = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in parts.items())
        print(f"  a whole Scout on {cores} cores, {tokens} tokens, seconds: {told}", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--experts", type=int, default=16)
    options.add_argument("--vocab", type=int, default=16384)
    options.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=GEOMETRIES)
    options.add_argument("--quick", action="store_true", help="does it run? The figures mean nothing")
    options.add_argument("--folder", type=Path)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
        found = compare(Path(folder), args.geometries, args.tokens, args.experts, args.vocab, args.quick)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
