"""Tensors read on a thread of their own before they are asked for, so that the disk works while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from llama4.weights import Bits


class ReadAhead:
    """Loads what is expected, in that order, up to `budget` bytes of it before it is taken; what is larger is never loaded ahead.

    One tensor more may be in memory for as long as it takes to read it, if it was expected and is not any longer.
    """

    def __init__(self, load: Callable[[str], Bits], size: Callable[[str], int], budget: int) -> None:
        """`load(name)` reads a tensor, and must be safe to call from another thread; `size(name)` tells its bytes."""
        self._load, self._size, self._largest, self._budget = load, size, budget, budget
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[str, Future[Bits]] = {}
        self._queue: deque[str] = deque()

    def expect(self, names: Iterable[str]) -> None:
        """Say what will be asked for, the next first. What was expected before and is not among it is forgotten."""
        wanted = list(dict.fromkeys(names))
        for name in self._begun.keys() - set(wanted):
            self._forget(name)
        self._queue = deque(name for name in wanted if name not in self._begun and self._size(name) <= self._largest)
        self._begin()

    def take(self, name: str) -> Bits:
        """The tensor, from memory or from the disk; what its reading raised is raised here."""
        future = self._begun.pop(name, None)
        if future is None:
            if name in self._queue:  # there was no room for it
                self._queue.remove(name)
            self._begin()
            return self._load(name)
        try:
            return future.result()
        finally:
            self._budget += self._size(name)
            self._begin()

    def _begin(self) -> None:
        while self._queue and self._size(self._queue[0]) <= self._budget:
            name = self._queue.popleft()
            self._budget -= self._size(name)
            self._begun[name] = self._thread.submit(self._load, name)

    def _forget(self, name: str) -> None:
        self._begun.pop(name).cancel()  # if it has begun already it ends, and nobody holds the result
        self._budget += self._size(name)
