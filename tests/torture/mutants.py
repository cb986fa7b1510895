"""Reads damaged files by the thousand, in one process that watches itself.

    python tests/torture/mutants.py '{"source": ..., "folder": ..., "seed": 0, "count": 10000}'

`source`: Meta's directory of a small model. Each mutant is a seeded change of one file that a stranger may hand us. For each of
them: it is read, or refused with an error of ours that exits with 2 or 3; nothing is executed, started, opened for writing or
fetched (an audit hook); it takes less than 5 seconds; and the process never holds more than 1 GiB. Prints what became of them.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama4_convert import convert, inspect, plan
from llama4_convert.checkpoints.inert_pickle import RefusedPickle, read_state_dict
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.manifest import INDEX, NAME, Manifest
from llama4_convert.tokenizer import tokenizer_files
from llama4_convert.verification import verify
from quant.recipe import RecipeError, load

SECONDS = 5
MEMORY = 1 << 30
# Of Python's audited actions, what no file may lead to. Importing our own modules late is our own doing.
FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "socket.",
    "urllib.",
    "ctypes.",
)
FORBIDDEN_EXACT = (
    "exec",
    "compile",
    "pickle.find_class",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
)


class Watch:
    """While `on`, every forbidden action is noted."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "exec" and "/encodings/" in getattr(arguments[0], "co_filename", ""):
            return  # a codec of Python's own, imported when it is first met
        if event.startswith(FORBIDDEN) or event in FORBIDDEN_EXACT:
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"open for writing: {arguments[0]}")


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


class Mutants:
    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        self.meta, self.out = folder / "meta", folder / "out"
        shutil.copytree(source, self.meta)
        convert(source, self.out)
        self.rank = sorted(self.meta.glob("*.pth"))[0]
        with zipfile.ZipFile(self.rank) as archive:
            self.pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        raw = self.rank.read_bytes()
        self.directory = raw.rindex(b"data.pkl") - 200  # the central directory begins with this name
        self.raw = raw
        self.recipe = (Path(__file__).resolve().parents[2] / "quant" / "recipes" / "mixed.toml").read_bytes()
        self.weights = sorted(self.out.glob("*.safetensors"))[0]
        self.small = {path: path.read_bytes() for path in (self.meta / "params.json", self.meta / "tokenizer.model")}
        self.index = (self.out / INDEX).read_bytes()
        self.config = (self.out / "config.json").read_bytes()
        self.manifest = (self.out / NAME).read_bytes()
        self.safetensors = self.weights.read_bytes()
        self.read_all()

    def read_all(self) -> None:
        """Every reader once, on what is whole: what they import late is imported by then, and it is no mutant's doing."""
        for name, (_, make) in self.kinds().items():
            make(random.Random(name))  # whatever it has damaged is mended by the next line
            self.restore()
        read_state_dict(self.pickle)
        inspect(self.out)
        inspect(self.meta)
        verify(self.out)
        plan(self.out, recipe="nf4")
        plan(self.meta)
        model = self.small[self.meta / "tokenizer.model"]
        tokenizer_files(model, variant="instruct", vision=True, max_length=100)
        load("mixed")

    def restore(self) -> None:
        files = {self.rank: self.raw, self.weights: self.safetensors, self.out / NAME: self.manifest, **self.small}
        files |= {self.out / INDEX: self.index, self.out / "config.json": self.config}
        for path, content in files.items():
            path.write_bytes(content)

    def kinds(self) -> dict[str, tuple[int, Callable[[random.Random], Callable[[], object]]]]:
        """By name: how many of 100, and what makes a mutant and returns how to read it."""
        return {
            "pickle": (25, self._pickle),
            "zip": (20, self._zip),
            "safetensors": (12, self._safetensors),
            "index": (8, self._file_of_output(self.out / INDEX, self.index)),
            "config": (5, self._file_of_output(self.out / "config.json", self.config)),
            "manifest": (8, self._manifest),
            "params": (10, self._params),
            "tokenizer": (4, self._tokenizer),
            "recipe": (8, self._recipe),
        }

    def _pickle(self, chance: random.Random) -> Callable[[], object]:
        data = mutated(self.pickle, chance, False)
        return lambda: read_state_dict(data)

    def _zip(self, chance: random.Random) -> Callable[[], object]:
        """In the directory and the end of the archive, or in a local header."""
        cut = self.directory if chance.random() < 0.7 else 0
        size = len(self.raw) if cut else 4096
        self.rank.write_bytes(self.raw[:cut] + mutated(self.raw[cut:size], chance, False) + self.raw[size:])
        return lambda: PthIndex.read(self.rank)

    def _safetensors(self, chance: random.Random) -> Callable[[], object]:
        end = 8 + int.from_bytes(self.safetensors[:8], "little")
        self.weights.write_bytes(mutated(self.safetensors[:end], chance, True) + self.safetensors[end:])
        return self._restoring(self.weights, self.safetensors, lambda: inspect(self.out))

    def _file_of_output(self, path: Path, content: bytes) -> Callable[[random.Random], Callable[[], object]]:
        def make(chance: random.Random) -> Callable[[], object]:
            path.write_bytes(mutated(content, chance, True))
            return self._restoring(path, content, lambda: plan(self.out, recipe="nf4"))

        return make

    def _restoring(self, path: Path, content: bytes, work: Callable[[], object]) -> Callable[[], object]:
        def read() -> object:
            try:
                return work()
            finally:
                WATCH.on = False
                path.write_bytes(content)

        return read

    def _manifest(self, chance: random.Random) -> Callable[[], object]:
        path = self.out / NAME
        path.write_bytes(mutated(self.manifest, chance, True))
        return self._restoring(path, self.manifest, lambda: (Manifest.read(self.out), verify(self.out)))

    def _params(self, chance: random.Random) -> Callable[[], object]:
        path = self.meta / "params.json"
        path.write_bytes(mutated(self.small[path], chance, True))
        self.rank.write_bytes(self.raw)
        return self._restoring(path, self.small[path], lambda: plan(self.meta))

    def _tokenizer(self, chance: random.Random) -> Callable[[], object]:
        data = mutated(self.small[self.meta / "tokenizer.model"], chance, True)
        return lambda: tokenizer_files(data, variant="instruct", vision=True, max_length=100)

    def _recipe(self, chance: random.Random) -> Callable[[], object]:
        path = self.folder / "recipe.toml"
        path.write_bytes(mutated(self.recipe, chance, True))
        return lambda: load(str(path))


class TooLong(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise TooLong


WATCH: Watch


def main() -> None:
    global WATCH
    order = json.loads(sys.argv[1])
    folder = Path(tempfile.mkdtemp(dir=order["folder"]))
    mutants = Mutants(Path(order["source"]), folder)
    WATCH = Watch()
    signal.signal(signal.SIGALRM, _too_long)
    # Everything is imported by now; what is read is small: a GiB of address space more than this is a bomb that went off.
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    told: dict[str, Counter[str]] = {}
    broken: list[str] = []
    for name, (share, make) in mutants.kinds().items():
        outcomes = told[name] = Counter()
        for n in range(order["count"] * share // 100):
            seed = f"{order['seed']} {name} {n}"
            read = make(random.Random(seed))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            WATCH.on = True
            try:
                read()
                outcome = "read"
            except (BadInput, RefusedPickle, UsageError, RecipeError):
                outcome = "refused"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"[:300]
                broken.append(f"{seed}: {outcome}")
            finally:
                WATCH.on = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            if WATCH.seen:
                broken.append(f"{seed}: {WATCH.seen}")
                WATCH.seen = []
            outcomes[outcome if outcome in ("read", "refused") else "broken"] += 1
    print(json.dumps({"outcomes": told, "broken": broken[:50], "count": sum(sum(c.values()) for c in told.values())}))


if __name__ == "__main__":
    main()
