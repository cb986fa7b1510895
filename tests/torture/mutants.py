"""Reads damaged files by the thousand, in one process that watches itself.

    python -m tests.torture.mutants '{"source": ..., "folder": ..., "seed": 0, "count": 10000}'

`source`: Meta's directory of a small model. Each mutant is a seeded change of one file that a stranger may hand us. For each of
them: it is read, or refused with an error of ours that exits with 2 or 3; nothing is executed, started, opened for writing or
fetched (an audit hook); it takes less than 20 seconds of the processor; and the process never holds more than 1 GiB. Prints what
became of them.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.support.subjects import REFUSED, Watch, subjects

CPU_SECONDS = 20
MEMORY = 1 << 30


def mutated(data: bytes, chance: random.Random, is_text: bool) -> bytes:
    """One to four changes: flips, cuts, repeats, insertions, numbers made large, pieces exchanged."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        kind, at = chance.randrange(8), chance.randrange(len(out) + 1)
        length = min(chance.choice((1, 2, 4, 8, 64, 1024)), len(out) - at)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = chance.randrange(256)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * chance.choice((1, 1, 2, 50))
        elif kind == 4:
            out[at : at + length] = chance.choice((b"\xff", b"\0", b"9", b"[", b'"', b"\x7f")) * length
        elif kind == 5:
            out = out[:at]
        elif kind == 6:
            other = chance.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
        elif is_text and at < len(out):
            tokens = (
                b"null",
                b"-1",
                b"1e308",
                b"NaN",
                b"{}",
                b"[]",
                b'""',
                b"true",
                b"9" * 40,
                b"../../x",
                b"\\u0000",
                b"0.5",
            )
            out[at : at + length] = chance.choice(tokens)
        if not out:
            break
    return bytes(out)


class TooLong(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise TooLong


# How many of 100.
SHARES = {
    "pickle": 22,
    "zip directory": 13,
    "zip record": 6,
    "safetensors": 12,
    "index": 7,
    "config": 5,
    "manifest": 7,
    "params": 8,
    "tokenizer": 4,
    "recipe": 7,
    "ids": 3,
    "adapter": 3,
    "parity": 3,
}


def main() -> None:
    order = json.loads(sys.argv[1])
    everything = subjects(Path(order["source"]), Path(tempfile.mkdtemp(dir=order["folder"])))
    watch = Watch()
    signal.signal(signal.SIGPROF, _too_long)
    # Everything is imported by now; what is read is small: a GiB of address space more than this is a bomb that went off.
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    told: dict[str, Counter[str]] = {}
    broken: list[str] = []
    for name, share in SHARES.items():
        outcomes, subject = Counter[str](), everything[name]
        told[name] = outcomes
        for n in range(order["count"] * share // 100):
            seed = f"{order['seed']} {name} {n}"
            data = mutated(subject.seed, random.Random(seed), subject.is_text)
            subject.put(data)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                with watch.on():
                    subject.read(data)
                outcome = "read"
            except REFUSED:
                outcome = "refused"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"[:300]
                broken.append(f"{seed}: {outcome}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if watch.seen:
                broken.append(f"{seed}: {watch.seen}")
                watch.seen = []
            outcomes[outcome if outcome in ("read", "refused") else "broken"] += 1
        subject.put(subject.seed)
    print(json.dumps({"outcomes": told, "broken": broken[:50], "count": sum(sum(c.values()) for c in told.values())}))


if __name__ == "__main__":
    main()
