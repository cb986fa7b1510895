"""What library code calls back while it works: warnings in words, and bytes done of bytes in all. Library code never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Warn = Callable[[str], None]  # a sentence
Start = Callable[[int, int], None]  # bytes in all, bytes that an earlier run has done
Progress = Callable[[int], None]  # bytes done since the last call; may come from another thread


@dataclass(frozen=True)
class Callbacks:
    """The three together. By default nothing is reported."""

    warn: Warn = lambda text: None
    start: Start = lambda total, done: None
    progress: Progress = lambda n: None
