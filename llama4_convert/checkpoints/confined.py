"""Programs that strangers wrote (chat templates, regular expressions), run in a process that can be stopped.

Such a program may go on for ever, or ask for all memory there is. It gets what it needs many times over, and no more.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

MAX_CPU_SECONDS = 3  # a busy machine is no fault of the program
_MAX_SECONDS = 60  # by the clock
_MAX_MEMORY_BYTES = 128 << 20  # more than Python and the function's own modules take
_MAX_OUTPUT_CHARACTERS = 4 << 20


class Stopped(ValueError):
    """The program failed, or met a bound; the message says which."""


def confined(module: str, function: str, argument: Any) -> Any:
    """What a function makes of `argument`, both of JSON's types. Raises Stopped.

    The function is named, since it is imported in the other process. Bounds begin to count when it has been.
    """
    script = f"from {__name__} import _serve; _serve({module!r}, {function!r}, {MAX_CPU_SECONDS})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(argument).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=_MAX_SECONDS,
            check=False,
        )
        ended = done.returncode not in (-signal.SIGXCPU, -signal.SIGKILL)
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise Stopped(f"it does not end within {MAX_CPU_SECONDS} s")
    if done.returncode:  # Python itself broke
        raise Stopped("it is nested too deeply, or too large")
    result, error = json.loads(done.stdout)
    if error:
        raise Stopped(error)
    return result


def _serve(module: str, function: str, seconds: int) -> None:
    """What the process of `confined` does: the argument from stdin, the result or what went wrong to stdout."""
    called = getattr(importlib.import_module(module), function)
    argument = json.loads(sys.stdin.buffer.read())
    in_use = int(open("/proc/self/statm", "rb").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _MAX_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = ""
    try:
        answer = json.dumps([called(argument), None])
        error = "it makes more text than any needs" if len(answer) > _MAX_OUTPUT_CHARACTERS else None
    except MemoryError:
        error = f"it takes more than {_MAX_MEMORY_BYTES >> 20} MiB of memory"
    except RecursionError:
        error = "it is nested too deeply"
    except Exception as failure:  # of the program
        error = f"{type(failure).__name__}: {failure}"[:1000]
    sys.stdout.write(json.dumps([None, error]) if error else answer)
