"""What .ci/audit.py makes of pip-audit's answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SKIPPED = {"name": "a", "skip_reason": "not on PyPI"}
SOUND = {"name": "b", "version": "1", "vulns": []}
BROKEN = {
    "name": "c",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"], "aliases": [], "description": ""}],
}


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ({"dependencies": [SOUND, SKIPPED]}, 0, "1 packages audited, 0 known vulnerabilities; not in the database: a"),
        ({"dependencies": [SOUND, BROKEN]}, 1, "c 2: CVE-1, fixed in 3"),
        ({"dependencies": [SKIPPED, SKIPPED]}, 0, "SKIPPED, nothing was audited"),
        ("ConnectionError: no route", 0, "SKIPPED, nothing was audited: ConnectionError: no route"),
        (None, 0, "SKIPPED, nothing was audited: the database of vulnerabilities did not answer"),
    ],
)
def test_audit(
    answer: Any, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit", path)
    assert spec is not None
    assert spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if answer is None:
            raise subprocess.TimeoutExpired(command, 300)
        out, err = ("", answer) if isinstance(answer, str) else (json.dumps(answer), "")
        return subprocess.CompletedProcess(command, 1, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main() == code
    assert said in capsys.readouterr().out
