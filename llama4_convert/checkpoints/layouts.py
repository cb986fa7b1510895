"""What a path is that somebody gives as a checkpoint: Meta's layout, Transformers', or something else, and then what to do next.

Every command asks here, and only here do messages name what is no checkpoint. Names alone decide, and a file's first bytes.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama4_convert.checkpoints.manifest import INDEX, Manifest
from llama4_convert.errors import BadInput, UsageError, from_os_error
from llama4_convert.files import foreign_content, read_start

SINGLE = "model.safetensors"
RANK_FILE = re.compile(r"consolidated\.(\d{2,})\.pth")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_UNFINISHED = ("*.partial", "*.incomplete", "*.part", "*.aria2", "*.crdownload", "*.download", "*.tmp", "*.!qB")
_DOWNLOADS = ".cache/huggingface/download"
_DEEPEST = (
    5  # levels below a path that are searched for a checkpoint: hub, models--OWNER--NAME, snapshots, COMMIT, original
)
_MAX_FOLDERS = 2000  # that are looked into

_WITH_TRANSFORMERS = "save the model with Transformers' save_pretrained"
# What a directory without a checkpoint holds -> what that is, and what to do. The first row of which a pattern matches decides.
_FOREIGN = [
    (("adapter_config.json", "adapter_model.*"), "an adapter alone", "give its base model, and this with --adapter"),
    (
        ("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*", "mp_rank_*_model_states.pt"),
        "a checkpoint of DeepSpeed",
        f"run its zero_to_fp32.py, then {_WITH_TRANSFORMERS}",
    ),
    (
        ("pytorch_model_fsdp*", "*fsdp*.bin", "*fsdp*.pt"),
        "a checkpoint of FSDP",
        f"merge it (accelerate merge-weights), then {_WITH_TRANSFORMERS}",
    ),
    (
        ("*.distcp", ".metadata"),
        "a checkpoint of torch.distributed.checkpoint",
        f"merge it (python -m torch.distributed.checkpoint.format_utils dcp_to_torch), then {_WITH_TRANSFORMERS}",
    ),
    (
        ("latest_checkpointed_iteration.txt", "iter_*", "model_optim_rng.pt", "mp_rank_*", "tp_rank_*", "*.nemo"),
        "a checkpoint of Megatron or NeMo",
        "convert it to Transformers' layout with the tools of its trainer",
    ),
    (
        ("hf_model_*.pt", "meta_model_*.pt", "recipe_state.pt"),
        "a checkpoint of torchtune",
        "let its checkpointer write safetensors (FullModelHFCheckpointer)",
    ),
    (
        ("pytorch_model*.bin",),
        "pytorch_model*.bin, Transformers' older files, which are pickles",
        f"{_WITH_TRANSFORMERS}, which writes safetensors",
    ),
    (("*.gguf",), "GGUF, llama.cpp's format, which cannot be turned back", "take the model it was made of"),
    (
        ("tf_model*.h5", "*.msgpack", "*.onnx", "*.engine", "*.mlmodelc", "*.npz", "*.ckpt*", "_METADATA"),
        "a model of another framework",
        _WITH_TRANSFORMERS,
    ),
    (
        ("*.tar", "*.tar.*", "*.tgz", "*.zip", "*.7z", "*.zst"),
        "an archive",
        "unpack it, and give the directory that comes out",
    ),
    (
        ("consolidated*.pt", "consolidated.?.pth", "consolidated.pth", "consolidated_*.pth", "*.pth", "*.pt"),
        "torch files of other names",
        "if they are Meta's rank files call them consolidated.00.pth, consolidated.01.pth and so on, beside params.json",
    ),
    (("consolidated*.safetensors",), "weights with Meta's keys as safetensors", "take consolidated.NN.pth instead"),
    (("*.bin",), "pickles of some program", f"{_WITH_TRANSFORMERS}, which writes safetensors"),
]


def is_meta(path: Path) -> bool:
    """Whether a directory is in Meta's layout; else it is in Transformers'.

    Raises UsageError if there is no such directory, BadInput if it is none of the two, or both; the message says what it is.
    """
    names = directory_names(path)
    meta, transformers = _has_ranks(names), _has_safetensors(names)
    if meta and transformers:
        raise BadInput(
            f"{path} holds two sets of weights: consolidated.NN.pth (Meta's layout) and safetensors (Transformers'), and"
            " readers differ in which they take: move one into a directory of its own"
        )
    if not meta and not transformers:
        raise no_checkpoint(path)
    return meta


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory that holds weights in one of the two layouts, whole or not."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:
        return False
    return _has_ranks(names) or _has_safetensors(names)


def directory_names(path: Path) -> set[str]:
    """The names in a directory. Raises UsageError if it is none, which says what it is, or EnvironmentFailed."""
    try:
        if path.is_dir():
            return {entry.name for entry in path.iterdir()}
        raise _no_directory(path)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error


def shards(names: Iterable[str]) -> list[str]:
    """Of the names those of numbered shards, whichever set they are of; copies that an operating system leaves are none."""
    return sorted(name for name in names if _SHARD.fullmatch(name) and not name.startswith("."))


def incomplete_set(names: Iterable[str]) -> str | None:
    """What keeps numbered shards from being 1 to N of N of one set; None if they are."""
    parts = [match for name in shards(names) if (match := _SHARD.fullmatch(name))]
    sets = sorted({(part["stem"], part["count"]) for part in parts})
    if len(sets) > 1:
        return " and ".join(f"{stem}-*-of-{count}" for stem, count in sets[:3]) + " lie there: keep one set"
    stem, count = sets[0]
    numbers = {int(part["number"]) for part in parts}
    if not 1 <= min(numbers) <= max(numbers) <= int(count):
        return f"a shard of {stem} has a number that is not of 1 to {int(count)}"
    lacking = next((n for n in range(1, int(count) + 1) if n not in numbers), None)
    return f"{stem}-{lacking:05d}-of-{count}.safetensors is missing: fetch it" if lacking else None


def unfinished(path: Path) -> str | None:
    """A file in or below a directory that says that a run or a download has not ended; None if there is none."""
    places = (path, path / _DOWNLOADS)
    found = (file for place in places for pattern in _UNFINISHED for file in sorted(place.glob(pattern)))
    return next((file.relative_to(path).as_posix() for file in found), None)


def no_checkpoint(path: Path) -> BadInput:
    """The error for a directory without weights: what it is, and what to do."""
    return BadInput(f"{path} {_what_it_is(path)}")


def _has_ranks(names: Iterable[str]) -> bool:
    return any(map(RANK_FILE.fullmatch, names))


def _has_safetensors(names: Iterable[str]) -> bool:
    names = set(names)
    return INDEX in names or SINGLE in names or bool(shards(names))


def _what_it_is(path: Path) -> str:
    names = sorted(directory_names(path))
    if (manifest := Manifest.read(path)) is not None and manifest.marker not in names:
        return "is an unfinished output of this tool: run its command again, it goes on where it stopped"
    if manifest is not None:
        return "is an output of this tool that has lost its weights: convert again"
    if not names:
        return "is empty"
    if inside := sorted(itertools.islice(_checkpoints_below(path), _MAX_FOLDERS), key=_is_other_model):
        return f"holds no checkpoint itself: did you mean {_choice(inside)}?"
    for patterns, what, advice in _FOREIGN:
        if example := next((entry.name for pattern in patterns for entry in sorted(path.glob(pattern))), None):
            return f"is no checkpoint that is read here, it holds {what} ({example}): {advice}"
    if file := unfinished(path):
        return f"has no weights, but {file}: its download has not ended, let it go on"
    if around := next((parent for parent in path.absolute().parents[:2] if is_checkpoint(parent)), None):
        return f"has no weights: did you mean {around}?"
    if "params.json" in names:
        return "has a params.json and no consolidated.NN.pth: fetch the weights, too"
    if "config.json" in names:
        return f"has a config.json and no weights ({INDEX} or {SINGLE}): fetch them, too"
    return (
        "holds no checkpoint: give a directory with params.json and consolidated.00.pth (Meta's layout), or with config.json and"
        f" {INDEX} (Transformers')"
    )


def _checkpoints_below(path: Path) -> Iterator[Path]:
    """Directories that hold a checkpoint, the shallowest first. Links are not followed: they may lead anywhere, and round."""
    level, seen = [path], 0
    for _ in range(_DEEPEST):
        below: list[Path] = []
        for folder in level:
            try:
                below += sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
            except OSError:  # not ours to read: not what was meant
                continue
        seen += len(below)
        yield from filter(is_checkpoint, below)
        level = below if seen < _MAX_FOLDERS else []


def _is_other_model(path: Path) -> bool:
    return "llama-4" not in str(path).lower()


def _choice(paths: list[Path]) -> str:
    """ "a", "a or b", "a, b or another of them"."""
    first = [str(path) for path in paths[:3]]
    last = "another of them" if len(paths) > 3 else first.pop() if len(first) > 1 else ""
    return f"{', '.join(first)} or {last}" if last else first[0]


def _no_directory(path: Path) -> UsageError:
    """The error for a path that is no directory."""
    if path.exists():
        if not path.is_file():
            return UsageError(f"{path} is no directory: give the one that holds the checkpoint")
        found = foreign_content(read_start(path), "torch zip")
        if found is None and is_checkpoint(path.parent):
            return UsageError(f"{path} is one file: give its directory, {path.parent}")
        return UsageError(f"{path} is {found or 'a file'}{'' if found else ': give the directory of a checkpoint'}")
    if path.is_symlink():
        return UsageError(f"{path} is a link to nothing: fetch what it points to, or correct the link")
    text = str(path)
    if re.match(r"(https?|hf|s3|gs|git@)[:/]", text) or text.startswith("huggingface.co/"):
        return UsageError(
            f"{text} is an address: fetch it (`hf download OWNER/NAME --local-dir DIR`), and give the directory"
        )
    near = _near(path)
    if near is not None:
        return UsageError(f"{path} is not a directory: did you mean {near}?")
    if _REPOSITORY.fullmatch(text) and not path.parent.exists():
        return UsageError(
            f"{text} is not a directory; if it is a name on the Hub: `hf download {text} --local-dir DIR`, and give DIR"
        )
    return UsageError(f"{path} is not a directory: there is nothing of this name")


def _near(path: Path) -> Path | None:
    """A directory beside a path that does not exist, of a name much like it."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, 1, 0.75)
    return path.parent / found[0] if found else None
