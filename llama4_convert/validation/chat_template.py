"""What a chat template makes of test dialogs, rendered in a process that can be stopped."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

_MAX_CPU_SECONDS = 20.0  # that a chat template may take: a busy machine is no fault of its
_MAX_CLOCK = 30  # times that, by the clock

DIALOGS: tuple[tuple[bool, list[dict[str, str]]], ...] = (
    (True, [{"role": "user", "content": "Is 17 a prime?"}]),
    (
        True,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is 17 a prime?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And 18?"},
        ],
    ),
)


def rendered(template: str) -> list[str]:
    """`DIALOGS` as the template writes them. Raises ValueError for one that fails, or does not end.

    A template is a program that nobody vouches for: it runs in jinja2's sandbox, and in a process that can be stopped.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = f"from {__name__} import _render_here; _render_here({_MAX_CPU_SECONDS})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=template.encode("utf-8", "replace"),
            capture_output=True,
            env=environment,
            timeout=_MAX_CLOCK * _MAX_CPU_SECONDS,
            check=False,
        )
        ended = done.returncode not in (-signal.SIGXCPU, -signal.SIGKILL)
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise ValueError(f"it does not end within {_MAX_CPU_SECONDS:.0f} s")
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ValueError(last or "it cannot be rendered")
    texts: list[str] = json.loads(done.stdout)
    return texts


def _render_here(seconds: float) -> None:
    """What the process of `rendered` does: a template from stdin, the texts as JSON to stdout; as Transformers renders."""
    from jinja2 import ext, sandbox

    most = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    environment.globals["strftime_now"] = lambda form: ""
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(sys.stdin.buffer.read().decode())
    texts = [
        template.render(messages=messages, add_generation_prompt=prompted, bos_token="<|begin_of_text|>")
        for prompted, messages in DIALOGS
    ]
    sys.stdout.write(json.dumps(texts))


def _raise(message: str) -> None:
    raise ValueError(message)
