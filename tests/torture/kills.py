"""Kills conversions and exports: at each call that changes the disk, or at random moments; then lets the same command go on.

    python -m tests.torture.kills '{"run": "convert", "source": ..., "folder": ..., "options": {...}, "every": 1, "random": 0}'

Run as a process of its own, which imports once and forks for each conversion. It prints what it did as JSON, and ends with an
AssertionError if a promise was broken:

- what is there after a kill is no model, or it is a whole one: the new, or the one that was there before (`before`);
- the same command completes it, with the same bytes as a run that nothing disturbed;
- no file that was finished is written again, but for the one whose entry in the manifest the kill came before.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama4_convert import convert, export, files
from llama4_convert.checkpoints.manifest import Manifest
from tests.support.commands import digests

RUNS: dict[str, Callable[..., Any]] = {"convert": convert, "export": export}
# What makes an output a model, and how its weights' names end.
KINDS = {"convert": ("model.safetensors.index.json", ".safetensors"), "export": ("params.json", ".pth")}

# What changes the disk; file objects are wrapped apart.
CHANGES = ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate", "unlink", "mkdir", "rmdir", "open")


class Killer:
    """Ends this very process, as kill -9 does, before or after its n-th change of the disk."""

    def __init__(self, n: int, after: bool) -> None:
        self.left, self.after, self.lock = n, after, threading.Lock()
        for name in CHANGES:
            setattr(os, name, self._counting(getattr(os, name), changes=name != "open"))
        files.open = self._open  # type: ignore[attr-defined]

    def _counting(self, function: Callable[..., Any], changes: bool = True) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not changes and not (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                return function(*arguments, **options)
            with self.lock:
                self.left -= 1
                is_the_one = self.left == 0
            if is_the_one and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **options)
            finally:  # a file that was not there to be removed is a call as well
                if is_the_one:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    def _open(self, path: Any, mode: str) -> Any:
        """A small file: creating it and writing it are changes."""
        if "r" in mode:
            return builtins.open(path, mode)
        file = self._counting(builtins.open)(path, mode)
        file_write = file.write

        class Counted:
            def __enter__(inner) -> Any:  # noqa: N805
                return inner

            def __exit__(inner, *exc: object) -> None:  # noqa: N805
                file.close()

            write = staticmethod(self._counting(file_write))
            flush = staticmethod(file.flush)
            fileno = staticmethod(file.fileno)

        return Counted()


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Torture:
    def __init__(self, order: dict[str, Any]) -> None:
        self.folder, self.options = Path(order["folder"]), order["options"]
        self.run = RUNS[order.get("run", "convert")]
        self.marker, self.suffix = KINDS[order.get("run", "convert")]
        self.source, self.before = order["source"], order.get("before")
        self.straight = self._straight("straight", self.options)
        self.earlier = self._straight("earlier", self.before) if self.before else None
        self.redone = 0

    def _straight(self, name: str, options: dict[str, Any]) -> dict[str, str]:
        assert ended(forked(lambda: self._convert(self.folder / name, options))) == 0
        return digests(self.folder / name)

    def _convert(self, target: Path, options: dict[str, Any]) -> None:
        self.run(self.source, target, **options)

    def target(self) -> Path:
        target = self.folder / "target"
        if self.earlier:
            shutil.copytree(self.folder / "earlier", target)
        return target

    def check(self, target: Path) -> None:
        """What the kill has left, and what becomes of it."""
        left = digests(target) if target.exists() else {}
        if self.marker in left:
            models = [
                model for model in (self.straight, self.earlier) if model and model[self.marker] == left[self.marker]
            ]
            assert models, f"a {self.marker} that belongs to neither model"
            wrong = [[name for name in model if left.get(name) != model[name]] for model in models]
            assert [] in wrong, f"{self.marker} is there, and {wrong[0]} not as it says"
        finished = set()
        if manifest := Manifest.read(target):
            finished = {n for n in manifest.files if n.endswith(self.suffix) and n in left}
        stamps = {name: (target / name).stat().st_mtime_ns for name in finished}
        lying = {n for n in left if n.endswith(self.suffix)}
        assert ended(forked(lambda: self._convert(target, self.options))) == 0
        assert digests(target) == self.straight
        if not self.earlier:
            written = {n for n, stamp in stamps.items() if (target / n).stat().st_mtime_ns != stamp}
            assert not written, f"finished and written again: {written}"
            self.redone = max(self.redone, len(lying - finished))
            assert self.redone <= 1
        shutil.rmtree(target)

    def at_every_change(self, every: int, first: int) -> int:
        """The number of kills."""
        kills, n = 0, first
        while True:
            for after in (False, True):
                target = self.target()

                def work(n: int = n, after: bool = after, target: Path = target) -> None:
                    Killer(n, after)
                    self._convert(target, self.options)

                code = ended(forked(work))
                if code == 0:  # fewer changes than that
                    shutil.rmtree(target)
                    return kills
                assert code == -signal.SIGKILL, code
                kills += 1
                self.check(target)
            n += every

    def at_random_moments(self, count: int, seed: int) -> int:
        chance = random.Random(seed)
        began = time.monotonic()
        self._straight("timed", self.options)
        length = time.monotonic() - began
        kills = 0
        while kills < count:
            target = self.target()
            pid = forked(lambda target=target: self._convert(target, self.options))  # type: ignore[misc]
            time.sleep(chance.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                kills += 1
            else:  # done before the moment came: the machine was busier when the length was taken
                length *= 0.8
            self.check(target)
        return kills


def main() -> None:
    order = json.loads(sys.argv[1])
    torture = Torture(order)
    told = {}
    if order.get("every"):
        told["at_changes"] = torture.at_every_change(order["every"], order.get("first", 1))
    if order.get("random"):
        told["at_random"] = torture.at_random_moments(order["random"], order.get("seed", 0))
    print(json.dumps({**told, "redone": torture.redone}))


if __name__ == "__main__":
    main()
