"""`card` and `push`: the model card of an output, and its way onto the Hugging Face Hub, where it is compared with the manifest.

A push is one commit, so that nobody finds half a model: the large files are transferred before it, and those that have arrived
are not sent again when an interrupted push is repeated. huggingface_hub is an extra (`hub`), imported by `push` alone.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import UNSET, Struct, UnsetType, structs

from llama4_convert.checkpoints.digests import digests
from llama4_convert.checkpoints.layouts import directory_names, is_checkpoint, no_checkpoint
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.errors import BadInput, CheckFailed, EnvironmentFailed, UsageError, from_os_error, one_line
from llama4_convert.files import json_object, locked, read_small, write_small
from llama4_convert.metadata.model_card import CARD, METRICS, REPOSITORY_ID, Facts, Parity, render
from llama4_convert.progress import Progress, Start
from llama4_convert.validation.results import Validation
from llama4_convert.version import TOOL
from quant.typed import decode

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".pth", ".bin", ".pt")


class SentFile(Struct, frozen=True, kw_only=True):
    """A file of a push."""

    file: str
    """its path in the directory and in the repository"""
    size: int
    """bytes"""


class Push(Struct, frozen=True, kw_only=True):
    """What was uploaded to the Hub, or would be."""

    output: str
    """DST"""
    repository: str
    """REPO"""
    files: list[SentFile]
    """the files of the manifest, and the manifest"""
    bytes: int
    """of all files"""
    warnings: list[str]
    """what stderr says, too"""
    revision: str | UnsetType = UNSET
    """the branch; not with --dry-run, nor the next two"""
    commit: str | UnsetType = UNSET
    """its id"""
    url: str | UnsetType = UNSET
    """its page"""


class Card(Struct, frozen=True, kw_only=True):
    """A model card: its text, or where it was written."""

    output: str
    """DST"""
    card: str | UnsetType = UNSET
    """the text; not with --write"""
    file: str | UnsetType = UNSET
    """with --write: README.md"""
    sha256: str | UnsetType = UNSET
    """with --write: of the file"""
    status: Literal["written", "unchanged"] | UnsetType = UNSET
    """with --write: whether the file, or its entry in the manifest, is new"""


def outgoing(path: str | os.PathLike[str], repository: str) -> Push:
    """What a push would upload. Touches no network.

    The files of the manifest and the manifest itself, never another. Raises UsageError, BadInput or CheckFailed.
    """
    path = Path(path)
    if not REPOSITORY_ID.fullmatch(repository) or "/" not in repository:
        raise UsageError(f"{repository!r:.80} is no repository: write OWNER/NAME")
    manifest = _manifest(path, "only what this tool has written is pushed")
    _check_finished(manifest, path)
    if lost := sorted(manifest.files.keys() - manifest.intact(path, manifest.files)):
        hint = "card --write, with --adopt if you have edited it" if lost[0] == "README.md" else "verify says more"
        raise CheckFailed(f"{path}: {lost[0]} is missing or of another size than the manifest says: {hint}")
    files = [SentFile(file=name, size=entry.size) for name, entry in sorted(manifest.files.items())]
    files.append(SentFile(file=NAME, size=(path / NAME).stat().st_size))
    found = []
    if "LICENSE" not in manifest.files:
        found.append("there is no LICENSE among the files: Llama's licence asks that it goes with every copy")
    if not repository.partition("/")[2].lower().startswith("llama"):
        found.append(
            "the repository's name does not begin with \"Llama\", as Llama's licence asks of what derives from it"
        )
    size = sum(file.size for file in files)
    return Push(output=str(path), repository=repository, files=files, bytes=size, warnings=found)


def push(
    path: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    message: str | None = None,
    create: bool = False,
    private: bool = False,
    verify: bool = True,
    quiet: bool = False,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> Push:
    """Upload a finished output to `repository` ("OWNER/NAME"), and compare what the Hub then has with the manifest.

    `revision` is a branch, "main" by default. `create` makes repository and branch if they are missing, `private` that
    repository private. `verify` reads every byte first; `start(total, done)` and `progress(n)` count these. The token is the
    client's own (HF_TOKEN, `hf auth login`).
    Raises UsageError, BadInput, EnvironmentFailed, or CheckFailed where the directory or the Hub's copy is not the manifest's.
    """
    if private and not create:
        raise UsageError("--private is for --create: it says how a repository is made")
    path = Path(path)
    planned = outgoing(path, repository)
    api = _client(quiet)
    from huggingface_hub import CommitOperationAdd

    is_there = _is_there(api, repository)
    if not is_there and not create:
        raise UsageError(f"{repository} is not there, or your token may not see it: --create makes it")
    if verify:
        _verify(path, start, progress)
    with _one_line(f"pushing to {repository}"):
        if not is_there:
            api.create_repo(repository, private=private, exist_ok=True)
        if create and revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # All files in one commit; the client leaves out those that the Hub has already.
        operations = [CommitOperationAdd(file.file, path / file.file) for file in planned.files]
        commit = api.create_commit(
            repository, operations, commit_message=message or f"Upload with {TOOL}", revision=revision
        )
        theirs, strays = _tree(api, repository, commit.oid, {file.file for file in planned.files})
    _compare(path, theirs, repository)
    found = list(planned.warnings)
    if strays:
        found.append(f"{repository} holds other weights, which readers may take: {', '.join(sorted(strays)[:3])}")
    return structs.replace(
        planned, warnings=found, revision=revision or "main", commit=str(commit.oid), url=str(commit.commit_url)
    )


def _client(quiet: bool) -> HfApi:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]
    except ImportError as error:
        raise EnvironmentFailed("push needs the Hub's client: pip install 'llama4-convert[hub]'") from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # `_one_line` reports the same
    if quiet:
        disable_progress_bars()
    return HfApi(library_name="llama4-convert")


@contextmanager
def _one_line(doing: str) -> Iterator[None]:
    """Turns what the Hub's client raises into UsageError or EnvironmentFailed, with one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RevisionNotFoundError as error:
        raise UsageError(f"{doing}: there is no such branch: --create makes it") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # The client wraps what went wrong while a large file was sent.
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        if not isinstance(cause, HfHubHTTPError):
            raise EnvironmentFailed(f"{doing}: {one_line(cause, 200)}: {_AGAIN}") from error
        code = cause.response.status_code
        raise EnvironmentFailed(f"{doing}: the Hub answers {code}: {_ADVICE.get(code, _AGAIN)}") from error


_AGAIN = "run the same command again, what is there already is not sent twice"
_ADVICE = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there: make one that may",
    404: "is the name right, and may your token see it?",
    429: "too many requests: wait, then run the same command again",
}


def _is_there(api: HfApi, repository: str) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError

    with _one_line(f"asking for {repository}"):
        try:
            api.repo_info(repository)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 404:
                return False
            raise
    return True


def _verify(path: Path, start: Start, progress: Progress) -> None:
    from llama4_convert.inspection.verify import verify

    result = verify(path, start=start, progress=progress)
    if bad := [file for file in result.files if not file.ok]:
        raise CheckFailed(f"{path}: {bad[0].file} is not what the manifest says ({bad[0].note}): nothing was pushed")


def _tree(api: HfApi, repository: str, revision: str, names: set[str]) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Name -> (algorithm, id), as the Hub has the files `names`; and the weights beside them that are not ours."""
    from huggingface_hub.hf_api import RepoFile

    ours, strays = {}, set()
    for entry in api.list_repo_tree(repository, recursive=True, revision=revision):
        if not isinstance(entry, RepoFile):
            continue
        if entry.path in names:
            ours[entry.path] = ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)
        elif entry.path.endswith(_WEIGHTS):
            strays.add(entry.path)
    return ours, strays


def _compare(path: Path, theirs: dict[str, tuple[str, str]], repository: str) -> None:
    """Raises CheckFailed where the Hub's id of a file is not the one that the manifest makes it."""
    manifest = Manifest.read(path)
    if manifest is None:
        raise BadInput(f"{path / NAME} has gone while it was pushed: push again")
    for name in [*manifest.files, NAME]:
        algorithm, value = theirs.get(name, ("", ""))
        expected = manifest.files[name].sha256 if name in manifest.files else None
        if algorithm != "sha256" or expected is None:
            # Git's id is not in the manifest: of bytes that are what it says.
            found = digests(path / name, {"sha256", "git"}, lambda n: None)
            if expected not in (None, found["sha256"]):
                raise CheckFailed(
                    f"{path / name} changed while it was pushed: convert or make its card again, then push again"
                )
            expected = found.get(algorithm)
        if value != expected:
            what = "is another than the manifest's" if value else "is not there"
            raise CheckFailed(f"{repository}: {name} {what}: push again")


def card(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> Card:
    """The card of a finished output. `validation`: a file with what `validate --json` printed of it; `base_model`: the Hub's id
    of the model that this one was made of, where its sizes do not tell. Raises UsageError, BadInput or EnvironmentFailed.
    """
    path = Path(path)
    return Card(output=str(path), card=_card(path, _manifest_for_card(path), validation, base_model))


def write_card(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    adopt: bool = False,
    overwrite: bool = False,
) -> Card:
    """Make README.md of a finished output anew, and its entry in the manifest.

    `status` is "written" or "unchanged". A README.md that somebody has edited is refused: `overwrite` replaces it, `adopt` keeps
    it as it is and takes it into the manifest. Raises UsageError, BadInput or EnvironmentFailed.
    """
    path = Path(path)
    directory_names(path)
    try:
        with locked(path):
            manifest, file = _manifest_for_card(path), path / CARD
            found = digests(file, {"sha256"}, lambda n: None)["sha256"] if file.is_file() else None
            listed = manifest.files[CARD].sha256 if CARD in manifest.files else None
            data = read_small(file) if adopt else _card(path, manifest, validation, base_model).encode()
            new = hashlib.sha256(data).hexdigest()
            # Equal to the new one: a run before this was killed between the card and the manifest.
            if found not in (None, listed, new) and not overwrite:
                raise UsageError(
                    f"{file} was edited: --overwrite replaces it, --adopt takes it into the manifest as it is"
                )
            status: Literal["written", "unchanged"] = "unchanged" if found == new == listed else "written"
            if status == "written":
                if found != new:
                    write_small(file, data)
                manifest.add(CARD, new, len(data))
                manifest.write(path)
    except OSError as error:
        raise from_os_error(error, f"writing {path / CARD}") from error
    return Card(output=str(path), file=CARD, sha256=new, status=status)


def _manifest_for_card(path: Path) -> Manifest:
    manifest = _manifest(path, "a card is made for what `convert` has written")
    if manifest.marker != INDEX:
        raise UsageError(f"{path} is in Meta's layout: a card is for Transformers directories")
    _check_finished(manifest, path)
    return manifest


def _manifest(path: Path, rule: str) -> Manifest:
    directory_names(path)
    manifest = Manifest.read(path)
    if manifest is None and not is_checkpoint(path):
        raise no_checkpoint(path)
    if manifest is None:
        raise UsageError(f"{path} has no {NAME}: {rule}")
    return manifest


def _check_finished(manifest: Manifest, path: Path) -> None:
    if manifest.marker not in manifest.files:
        raise UsageError(f"{path} is unfinished: run its conversion again, it goes on where it stopped")


def _card(path: Path, manifest: Manifest, validation: str | os.PathLike[str] | None, base_model: str | None) -> str:
    from llama4_convert.inspection.inspect import inspect

    if base_model is not None and not REPOSITORY_ID.fullmatch(base_model):
        raise UsageError(f"{base_model!r:.80} is no id of a model on the Hub: write OWNER/NAME")
    found = _read_validation(Path(validation), path) if validation is not None else None
    counts = inspect(path)
    config, parity = json_object(path / "config.json"), _parity(found) if found else None
    return render(Facts(manifest, config, counts.parameters, counts.active_parameters, parity, base_model))


def _parity(result: Validation) -> Parity:
    return Parity(
        passed=result.passed,
        gates_failed=result.gates_failed,
        fields_different=len(result.config_differences),
        tensors_different=len(result.tensors_different),
        tensors_compared=result.tensors_compared,
        matrices_quantized=sum(loss.matrices for loss in result.tensors_quantized.values()),
        runner=result.runner,
        dtype=result.dtype,
        metrics={name: getattr(result, name) for name in METRICS},
    )


def _read_validation(file: Path, path: Path) -> Validation:
    """What `validate --json` printed about `path`. Raises BadInput if it is something else, UsageError if it is of another."""
    try:
        found = decode(json_object(file), Validation, file.name)
        validated = Path(found.path).resolve().name
    except ValueError as error:
        raise BadInput(f"{error}: give what `validate --json` printed") from error
    if validated != path.resolve().name.encode("utf-8", "backslashreplace").decode():  # as the JSON spells it
        raise UsageError(f"{file.name} is of another directory ({found.path!r:.80}): validate {path} itself")
    return found
