"""Values of files that nobody vouches for, made fit to be shown: what is not what it should be counts as absent."""

from __future__ import annotations

from typing import Any

_LARGEST, _SMALLEST = 1e100, 1e-100  # so that sums, differences and quotients of two stay finite


def printable(text: object, limit: int = 300) -> str:
    """`text` on one line and cut; what would not show, or turn the writing around, as its escape."""
    whole = str(text)
    cut = whole[:limit] + " ..." if len(whole) > limit else whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def as_number(value: Any) -> float | None:
    """A finite number, else None. What is no result of any computation in float32 or float64 is absent, or 0 if tiny."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def as_size(value: Any) -> float | None:
    """A number from 0 on, else None."""
    number = as_number(value)
    return number if number is not None and number >= 0 else None


def as_share(value: Any) -> float | None:
    """A number from 0 to 1, else None."""
    size = as_size(value)
    return None if size is None or size > 1 else size


def as_count(value: Any) -> int | None:
    """A whole number from 0 on, else None."""
    size = as_size(value)
    return None if size is None else int(size)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The dictionaries of a list."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def as_numbers(value: Any) -> list[float | None]:
    return [as_number(item) for item in as_list(value)]
