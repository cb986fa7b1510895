"""How fast an expert of Scout's width is quantized, beside a plain copy of it in the same run: GB/s of bf16 read.

    python benchmarks/kernels.py [--threads 2] [--rounds 7] [--device cuda]

[5120 in, 8192 out], as experts lie in Meta's files, and the transpose. Medians; compiling is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4
from quant.schemes.nf4 import Nf4

SHAPE = (5120, 8192)
SCHEMES: dict[str, Any] = {
    "int4 plain": Int4(128, "plain"),
    "int4 search": Int4(128, "search"),
    "int4 signed": Int4(128, "signed"),
    "fp8 plain": Fp8("channel", "plain"),
    "fp8 search": Fp8("channel", "search"),
    "fp8 block plain": Fp8("block", "plain"),
    "fp8 block search": Fp8("block", "search"),
    "nf4, double": Nf4(64, True),
}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(threads: int, rounds: int, device: str = "cpu", shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """By scheme: GB/s of bf16 read, [in, out] and [out, in], and the former as a part of a plain copy's."""
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    turned, copy = np.ascontiguousarray(bits.T), np.empty_like(bits)
    size = bits.nbytes / 1e9
    on = f"{threads} threads" if device == "cpu" else device
    print(f"  {'GB/s, ' + on:20} {'[in, out]':>10} {'[out, in]':>10} {'of a copy':>10}")
    schemes, found = SCHEMES, {}
    if device != "cpu":
        from quant.torch_backend import on_device

        schemes = {name: on_device(scheme, device) for name, scheme in SCHEMES.items()}
    for name, scheme in schemes.items():
        runs: list[tuple[float, float, float]] = []
        for _ in range(rounds + 1):
            runs.append(
                (
                    seconds(lambda scheme=scheme: scheme.quantize(bits, in_out=True, threads=threads)),  # type: ignore[misc]
                    seconds(lambda scheme=scheme: scheme.quantize(turned, in_out=False, threads=threads)),  # type: ignore[misc]
                    seconds(lambda: np.copyto(copy, bits)),
                )
            )
        # The first round compiles.
        straight, across, copied = (size / statistics.median(column) for column in zip(*runs[1:], strict=True))
        found[name] = {"in_out": straight, "out_in": across, "of_copy": straight / copied, "copy": copied}
        print(f"  {name:20} {straight:10.2f} {across:10.2f} {straight / copied:10.2f}", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument(
        "--device", default="cpu", help="a GPU's time includes the way of weights and results over its bus"
    )
    args = options.parse_args()
    measure(args.threads, args.rounds, args.device)


if __name__ == "__main__":
    main()
