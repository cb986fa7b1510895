"""Where the time of a conversion goes: how long each thread was busy with what, in one run.

    python benchmarks/where.py [--recipe NAME] [--experts 16] [--vocab 20000] [--folder DIR]

One layer of Scout in 8 ranks, read from the page cache. Three threads work at the same time (reading and scattering, digests,
disk), a recipe's in the first one's place: the busiest one is what the run takes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llama4_convert import convert, synth
from llama4_convert.conversion import from_meta
from llama4_convert.streaming import encode, writer
from llama4_convert.streaming.source import Source

BUSY: Counter[str] = Counter()


def timed(owner: Any, name: str, label: str) -> None:
    """Have every call of a function add to what its label has cost."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            BUSY[label] += time.perf_counter() - began

    setattr(owner, name, call)


class TimedDigest:
    """SHA-256 that notes how long it took."""

    def __init__(self, data: bytes = b"") -> None:
        self._digest = hashlib.sha256(data)
        self.hexdigest = self._digest.hexdigest

    def update(self, data: memoryview) -> None:
        began = time.perf_counter()
        self._digest.update(data)
        BUSY["digest thread: SHA-256"] += time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--recipe")
    options.add_argument("--experts", type=int, default=16)
    options.add_argument("--vocab", type=int, default=20_000)
    options.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
        source = Path(folder) / "meta"
        size = synth(source, layers=1, experts=args.experts, vocab=args.vocab, ranks=8).bytes
        os.sync()
        timed(from_meta, "from_meta", "planning")
        timed(Source, "read", "reading threads: read")
        timed(Source, "check", "reading threads: CRC-32")
        timed(encode.MatrixEncoder, "_encode", "main thread: encode, or wait for the next matrix")
        timed(writer.Buffers, "take", "main thread: wait for a buffer")
        timed(writer.FileWriter, "_write", "disk thread: write")
        timed(writer.FileWriter, "commit", "main thread: wait for the end of a file")
        writer.hashlib = SimpleNamespace(sha256=TimedDigest)  # type: ignore[assignment]  # the writer's alone
        began, cpu = time.perf_counter(), time.process_time()
        convert(source, Path(folder) / "out", recipe=args.recipe)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{size / 1e9:.1f} GB in {wall:.2f} s, {cpu:.2f} s of CPU")
    for label, seconds in BUSY.most_common():
        print(f"  {label:50} {seconds:6.2f} s  {seconds / wall:4.0%}")


if __name__ == "__main__":
    main()
