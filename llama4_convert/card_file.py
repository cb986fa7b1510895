"""`card`: README.md of a finished output, printed or written together with its entry in the manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama4_convert import lock
from llama4_convert.checkpoints.small_files import is_file_name, read_small
from llama4_convert.checkpoints.transformers import json_object
from llama4_convert.errors import BadInput, UsageError, from_os_error
from llama4_convert.manifest import INDEX, NAME, Manifest
from llama4_convert.model_card import CARD, REPOSITORY_ID, Facts, render
from llama4_convert.writer import write_small


def card(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> str:
    """The card of a finished output. `validation`: a file with what `validate --json` printed of it; `base_model`: the Hub's id
    of the model that this one was made of, where its sizes do not tell. Raises UsageError, BadInput or EnvironmentFailed.
    """
    path = Path(path)
    return _card(path, _manifest(path), validation, base_model)


def write_card(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    adopt: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make README.md of a finished output anew, and its entry in the manifest. Returns {output, file, sha256, status}.

    `status` is "written" or "unchanged". A README.md that somebody has edited is refused: `overwrite` replaces it, `adopt` keeps
    it as it is and takes it into the manifest. Raises UsageError, BadInput or EnvironmentFailed.
    """
    from llama4_convert.published import digests

    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    try:
        with lock.owned(path):
            manifest, file = _manifest(path), path / CARD
            found = digests(file, {"sha256"}, lambda n: None)["sha256"] if file.is_file() else None
            listed = manifest.files.get(CARD, {}).get("sha256")
            data = read_small(file) if adopt else _card(path, manifest, validation, base_model).encode()
            new = hashlib.sha256(data).hexdigest()
            # Equal to the new one: a run before this was killed between the card and the manifest.
            if found not in (None, listed, new) and not overwrite:
                raise UsageError(
                    f"{file} was edited: --overwrite replaces it, --adopt takes it into the manifest as it is"
                )
            status = "unchanged" if found == new == listed else "written"
            if status == "written":
                if found != new:
                    write_small(file, data)
                manifest.add(CARD, new, len(data))
                manifest.write(path)
    except OSError as error:
        raise from_os_error(error, f"writing {path / CARD}") from error
    return {"output": str(path), "file": CARD, "sha256": new, "status": status}


def _manifest(path: Path) -> Manifest:
    manifest = Manifest.read(path) if path.is_dir() else None
    if manifest is None:
        raise UsageError(f"{path} has no {NAME}: a card is made for what `convert` has written")
    if manifest.marker != INDEX:
        raise UsageError(f"{path} is in Meta's layout: a card is for Transformers directories")
    if manifest.marker not in manifest.files:
        raise UsageError(f"{path} is unfinished: run its conversion again, it goes on where it stopped")
    return manifest


def _card(path: Path, manifest: Manifest, validation: str | os.PathLike[str] | None, base_model: str | None) -> str:
    from llama4_convert.inspection import inspect

    if base_model is not None and not REPOSITORY_ID.fullmatch(base_model):
        raise UsageError(f"{base_model!r:.80} is no id of a model on the Hub: write OWNER/NAME")
    told = _read_validation(Path(validation), path) if validation is not None else None
    counts = inspect(path)
    return render(
        Facts(
            manifest,
            json_object(path / "config.json"),
            counts["parameters"],
            counts["active_parameters"],
            told,
            base_model,
        )
    )


def _read_validation(file: Path, path: Path) -> Mapping[str, Any]:
    """What `validate --json` printed of `path`. Raises BadInput if it is something else."""
    told = json_object(file)
    kinds = {
        "passed": bool,
        "gates_failed": list,
        "tensors_quantized": dict,
        "config_differences": list,
        "tensors_different": list,
    }
    kinds |= {"tensors_compared": int, "runner": str, "dtype": str, "path": str}
    for name, kind in kinds.items():
        if not isinstance(told.get(name), kind):
            raise BadInput(f"{file.name} is not what `validate --json` prints: no {name}")
    if not all(
        isinstance(one, dict) and type(one.get("matrices")) is int for one in told["tensors_quantized"].values()
    ):
        raise BadInput(f"{file.name} is not what `validate --json` prints: tensors_quantized has no matrices")
    if not all(isinstance(gate, str) and is_file_name(gate) for gate in told["gates_failed"]):
        raise BadInput(f"{file.name} is not what `validate --json` prints: gates_failed has no names")
    if Path(told["path"]).resolve().name != path.resolve().name:
        raise UsageError(f"{file.name} is of another directory ({told['path']!r:.80}): validate {path} itself")
    return told
