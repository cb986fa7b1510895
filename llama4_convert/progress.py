"""What library code calls back: a warning in words, and how many bytes of how many are done. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable

Warn = Callable[[str], None]

Progress = Callable[[int], None]

Start = Callable[[int, int], None]
