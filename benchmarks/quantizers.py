"""Our data-free quantizers beside their peers: error and speed at equal bits and equal format, in one run.

    python benchmarks/quantizers.py [--threads 2] [--rounds 5] [--json FILE]

Peers, each left out aloud if it does not import here: compressed-tensors and llm-compressor, AutoRound without tuning, torchao,
HQQ, bitsandbytes, Meta's llama_models. docs/quantizers.md says how to install them, and shows a run.

The error is that of scale * code in float32 against the bf16 weights, squared, by the squared weights. The tensors: Gaussian and
Student's t with 5 degrees of freedom, 1024 x 4096, and the gate of an expert of the trained demo model. Speed is bf16 read
by a matrix [out, in] larger than the caches; before each call a plain copy of the same bytes is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantizer_methods import (
    FP8,
    GROUP,
    PEERS,
    POSITIVE,
    SHAPE,
    SIGNED,
    SLOW,
    SLOW_ROWS,
    SPEED_SHAPE,
    Method,
    floats,
    fp8_bits,
    ours,
)
from quantizer_table import tell, verdicts

from llama4_convert.reference.checkpoint import Checkpoint

EXPERT = "layers.1.feed_forward.experts.0.gate"


# The lower references


def exhaustive(bits: np.ndarray, signed: bool) -> float:
    """Relative error if every group had the best of all bf16 scales from a third of amax / 7.5 to a little above it."""
    weights = floats(bits).reshape(-1, GROUP)
    total = 0.0
    for first in range(0, len(weights), 512):
        x = weights[first : first + 512]
        top = np.abs(x).max(1, keepdims=True) / np.float32(7.5)
        start = (top.view(np.uint32) >> 16).astype(np.int32)
        best = np.full(len(x), np.inf, np.float32)
        for step in range(-200, 20):
            scale = floats((start + step).astype(np.uint16))
            units = x / scale
            for sign in (1, -1) if signed else (1,):
                q = np.rint(units) if sign == 1 else -np.rint(units)
                left = sign * units - np.clip(q, -8, 7)
                best = np.minimum(best, np.einsum("ij,ij->i", left, left) * scale[:, 0] ** 2)
        total += float(best.sum(dtype=np.float64))
    return total / float(np.square(weights, dtype=np.float64).sum())


def exhaustive_fp8(x: torch.Tensor) -> float:
    """Relative error if every output had the best of all bf16 scales from amax / 640 to amax / 224: an octave above plain is
    enough, as e4m3 by twice the scale is the same but for the smallest numbers."""
    weights = x.float()
    start = (weights.abs().amax(1) / 448).bfloat16().view(torch.int16)
    best = torch.full((len(x),), torch.inf)
    for step in range(-64, 129):
        scale = (start + step).view(torch.bfloat16).float()[:, None]
        read = (weights / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float().mul_(scale)
        best = torch.minimum(best, read.sub_(weights).square_().sum(1))
    return float(best.double().sum() / weights.double().square().sum())


# Measuring


def matrices() -> dict[str, torch.Tensor]:
    drawn = {
        "Gaussian": np.random.default_rng(0).standard_normal(SHAPE, np.float32),
        "t5": np.random.default_rng(1).standard_t(5, SHAPE).astype(np.float32),
    }
    found = {name: torch.from_numpy(values / 32).bfloat16() for name, values in drawn.items()}
    checkpoint = Checkpoint.open(Path(str(resources.files("llama4_convert.samples") / "demo_model")))
    expert = next(tensor for tensor in checkpoint.logical_tensors() if tensor.name == EXPERT)
    found["trained"] = torch.from_numpy(np.array(expert.load(None), order="C")).view(torch.bfloat16)
    return found


def relative_error(x: torch.Tensor, read: np.ndarray) -> float:
    weights = x.float().numpy()
    return float(np.square(weights - read, dtype=np.float64).sum() / np.square(weights, dtype=np.float64).sum())


class Speed:
    """Calls timed in turn, a copy of the same bytes before each."""

    def __init__(self) -> None:
        drawn = np.random.default_rng(2).standard_normal(SPEED_SHAPE, np.float32) / 32
        self.x = torch.from_numpy(drawn).bfloat16()
        self.to = torch.empty_like(self.x)
        self.copies: list[float] = []
        self.to.copy_(self.x)  # allocates its pages

    def copy(self) -> float:
        start = time.perf_counter()
        self.to.copy_(self.x)
        self.copies.append(self.x.nbytes / (time.perf_counter() - start) / 1e9)
        return self.copies[-1]

    def one(self, method: Method, slow: bool) -> tuple[float, float]:
        """GB/s, and that as a part of the copy's."""
        x = self.x[:SLOW_ROWS] if slow else self.x
        copied = self.copy()
        start = time.perf_counter()
        method.encode(x)
        speed = x.nbytes / (time.perf_counter() - start) / 1e9
        return speed, speed / copied


def jiffies() -> tuple[float, float]:
    """Seconds that all processors were busy, and that this process was."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), time.process_time()


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    skipped: dict[str, str] = {}
    pool = ThreadPoolExecutor(chosen.threads)
    methods = list(ours(chosen.threads, pool))
    versions = {"torch": torch.__version__, "numpy": np.__version__, "numba": metadata.version("numba")}
    for package, peer in PEERS.items():
        try:
            methods += peer()
            versions[package] = metadata.version(package)
        except Exception as error:  # whatever a package does as it is imported
            skipped[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "llmcompressor" in versions:
        versions["compressed-tensors"] = metadata.version("compressed-tensors")

    tensors = matrices()
    rows, stored, slow = [], {}, {}
    for method in methods:
        row: dict[str, Any] = {"by": method.by, "method": method.name, "format": method.format, "bits": method.bits}
        row["error"] = {}
        try:
            for name, x in tensors.items():
                start = time.perf_counter()
                made = method.encode(x)
                if x.nbytes >= 1 << 20:
                    slow[id(method)] = x.nbytes / (time.perf_counter() - start) / 1e9 < SLOW and method.by != "ours"
                row["error"][name] = relative_error(x, method.decode(made))
                if method.stored_bytes:
                    blobs = [np.ascontiguousarray(part).tobytes() for part in method.stored_bytes(made)]
                    if method.by == "ours":
                        stored.setdefault((method.format, name), blobs)  # of int4: plain, the first
                    else:
                        row["same_bytes"] = row.get("same_bytes", True) and blobs == stored[method.format, name]
        except Exception as error:
            if method.by == "ours":
                raise
            skipped[f"{method.by}: {method.name}, {method.format}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        rows.append(row)
        row["timed"] = method
        print(f"{method.by}: {method.name}, {method.format}", file=sys.stderr)

    speed = Speed()
    before = jiffies(), time.perf_counter()
    times: dict[int, list[tuple[float, float]]] = {}
    for number in range(chosen.rounds):
        for row in rows:
            method = row["timed"]
            if not (slow[id(method)] and number >= min(3, chosen.rounds)):
                times.setdefault(id(method), []).append(speed.one(method, slow[id(method)]))
        print(f"round {number + 1} of {chosen.rounds}", file=sys.stderr)
    after = jiffies(), time.perf_counter()
    for row in rows:
        method = row.pop("timed")
        taken = times[id(method)]
        row["gb_per_s"], row["of_copy"] = (statistics.median(t[i] for t in taken) for i in (0, 1))
        row["timed_rows"] = SLOW_ROWS if slow[id(method)] else SPEED_SHAPE[0]

    for form, signed in ((POSITIVE, False), (SIGNED, True)):
        error = {name: exhaustive(x.view(torch.uint16).numpy(), signed) for name, x in tensors.items()}
        rows.append({"by": "oracle", "method": "every bf16 scale", "format": form, "bits": 4.125, "error": error})
    error = {name: exhaustive_fp8(x) for name, x in tensors.items()}
    rows.append({"by": "oracle", "method": "every bf16 scale", "format": FP8["channel"]})
    rows[-1] |= {"bits": fp8_bits("channel"), "error": error}
    busy = (after[0][0] - before[0][0]) - (after[0][1] - before[0][1])
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "other_work": busy / ((after[1] - before[1]) * (os.cpu_count() or 1)),
        "load_average": os.getloadavg(),
        "copy_gb_per_s": statistics.median(speed.copies),
        "versions": versions,
        "tensors": {name: list(x.shape) for name, x in tensors.items()},
        "rows": rows,
        "skipped": skipped,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    with torch.no_grad():
        told = measure(chosen)
    tell(told)
    if chosen.json:
        chosen.json.write_text(json.dumps(told | {"verdicts": verdicts(told)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
