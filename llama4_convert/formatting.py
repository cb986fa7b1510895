"""Numbers and sizes for people, and sizes as people write them."""

from __future__ import annotations

import re

from llama4_convert.errors import UsageError


def gib(n: int) -> str:
    """A number of bytes in binary units, as GPUs count."""
    return f"{n / (1 << 30):.1f} GiB"


_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def parse_size(text: str) -> int:
    """Bytes in "5GB" (decimal), "1GiB" (binary) or "1048576". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match:
        raise UsageError(f"{text!r} is not a size: write 5GB, 512MiB or a number of bytes")
    size = float(match[1]) * _UNITS[match[2] or ""]
    if size > 1 << 62:
        raise UsageError(f"{text[:20]!r} is more than any disk holds")
    return int(size)


def gigabytes(n: int) -> str:
    """A number of bytes in decimal units, as disks and model pages count: "1.5 GB"."""
    for unit, size in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if n >= size:
            return f"{n / size:.{1 if n < 100 * size else 0}f} {unit}"
    return f"{n} bytes"


def parameters(n: int) -> str:
    """A number of parameters: "17.2 B parameters"."""
    return f"{n / 1e9:.2f} B parameters" if n >= 1e8 else f"{n / 1e6:.1f} M parameters"


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1.23e-9, 12,300."""
    if 999.5 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def counted(n: int, what: str) -> str:
    """ "1 file", "2 files"."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def differ(n: int, what: str) -> str:
    """ "1 field differs", "2 fields differ"."""
    return f"{counted(n, what)} differ" + ("s" if n == 1 else "")
