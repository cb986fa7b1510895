"""What the benchmarks share: a process measured from outside, a copy to hold it against, and medians with their spread."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.02  # seconds between two looks at a process's memory


@dataclass(frozen=True)
class Measured:
    wall_s: float
    cpu_s: float
    peak_bytes: int
    """The peak of its resident set, as the kernel counts it (Linux): with the pages of files that it maps."""


def measured(command: Sequence[str | Path]) -> Measured:
    """Run a command to its end. Raises RuntimeError with the end of what it said if it fails."""
    with tempfile.TemporaryFile() as said:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _peak(process.pid))
            time.sleep(_EVERY)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            end = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {end}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak)


def _peak(pid: int) -> int:
    """The kernel's own high-water mark: only what grows in the last moments before the end is missed."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM")), 0)
    except OSError:  # it has just ended
        return 0


def idle() -> int:
    """The peak of an interpreter that does nothing, as `measured` sees it."""
    return measured([sys.executable, "-c", "import time; time.sleep(0.3)"]).peak_bytes


def copied(source: Path, target: Path) -> Measured:
    """`cp` and `sync` of a folder's files."""
    target.mkdir()
    return measured(["sh", "-c", 'cp -r "$1/." "$2" && sync "$2"/*', "sh", source, target])


def dropped(folder: Path) -> None:
    """Let the page cache forget the files of a folder."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def told(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} to {values['most']:.{digits}f})"


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    import platform

    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count() or 0,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
