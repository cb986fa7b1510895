"""The manifest of an output directory: what it was made from, with which options, and the SHA-256 of every file.

Deterministic: no times, counters or paths. While a run is under way it lists the files that are done, which is all that a
resumed run needs to know; the index file, written last, says that the whole is complete.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field, structs, to_builtins

from llama4_convert.checkpoints.families import family_of
from llama4_convert.errors import BadInput
from llama4_convert.files import is_file_name, parse_json, read_small, write_small
from quant.error import relative_mse, sqnr_db
from quant.typed import decode

NAME = "llama4-convert.json"
INDEX = "model.safetensors.index.json"
_VERSION = 1
MAX_RANKS = 128
# What a conversion was made of beside its source -> the words for it.
_BESIDE_SOURCE = {
    "adapter": "adapter",
    "vision_from": "base for --vision-from",
    "config_from": "base for --config-from",
}
_Natural = Annotated[int, Meta(ge=0)]


def make_again(folder: Path) -> str:
    """How to come by a damaged file of `folder` again: an output of this tool has a manifest."""
    return "convert again with --overwrite" if (folder / NAME).is_file() else "fetch it again from where it comes"


class ManifestFile(Struct, frozen=True, omit_defaults=True):
    """A file of the output."""

    sha256: str
    size: int
    """bytes"""
    nonfinite: dict[str, tuple[int, int]] = {}
    """tensor -> how many NaN and how many infinities it has; only tensors that have any"""


class Manifest(Struct, forbid_unknown_fields=True):
    """What `llama4-convert.json` says, field by field."""

    tool: str
    source: dict[str, Any]
    """layout and SHA-256 fingerprints; see `MetaCheckpoint.fingerprint`"""
    options: dict[str, Any]
    """those that decide bytes: text, numbers and null, and `recipe`, an object"""
    meta_keys: list[str]
    """the source's keys that were used: their spelling, so that the way back is exact"""
    dropped: dict[str, str]
    """source key -> why it was left out"""
    files: dict[str, ManifestFile] = field(default_factory=dict)
    errors: dict[str, Annotated[list[float], Meta(min_length=2, max_length=2)]] = field(default_factory=dict)
    """module -> sums of squares, of the quantization's error and of the weights; relative MSE is their ratio"""
    records: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    """(rank, record) -> bytes read and their CRC-32, of source records that the files so far have read in part"""

    def __post_init__(self) -> None:
        ranks, options = self.source.get("ranks", 1), dict(self.options)
        recipe = options.pop("recipe", {"name": ""})
        if type(ranks) is not int or not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"a source of {ranks!r:.40} ranks")
        if not isinstance(recipe, dict) or not isinstance(recipe.get("name"), str):
            raise ValueError("the recipe has no name")
        if wrong := next((name for name, value in options.items() if not isinstance(value, str | int | None)), None):
            raise ValueError(f"the option {wrong!r:.60} is no text or number")
        if wrong := next((name for name in self.files if not all(map(is_file_name, name.split("/")))), None):
            raise ValueError(f"a file outside the directory: {wrong!r:.60}")

    def add(self, name: str, sha256: str, size: int, nonfinite: Mapping[str, Sequence[int]] | None = None) -> None:
        counts = {tensor: (nan, inf) for tensor, (nan, inf) in (nonfinite or {}).items()}
        self.files[name] = ManifestFile(sha256, size, counts)

    def nonfinite(self) -> dict[str, tuple[int, int]]:
        """Tensor -> (NaN, infinities), for tensors that have any; matrices are counted before they are quantized."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.files.values():
            for tensor, (nan, inf) in entry.nonfinite.items():
                before = found.get(tensor, (0, 0))
                found[tensor] = before[0] + nan, before[1] + inf
        return found

    @property
    def marker(self) -> str:
        """The file that makes the output a model, written last."""
        return "params.json" if self.options.get("layout") == "meta" else INDEX

    def write(self, folder: Path) -> None:
        body = to_builtins(structs.replace(self, records={}))
        body |= {"version": _VERSION, "records": [[*key, *state] for key, state in sorted(self.records.items())]}
        write_small(folder / NAME, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of `folder`; None if there is none. Raises BadInput if it is not one of ours."""
        path = folder / NAME
        if not path.exists():
            return None
        data = read_small(path)
        try:
            body = decode(parse_json(data), dict[str, Any], NAME)
            if body.pop("version", None) != _VERSION:
                raise ValueError("another version")
            records = decode(body.pop("records", []), list[tuple[_Natural, str, _Natural, _Natural]], "records")
            manifest = decode(body, Manifest, NAME)
        except ValueError as error:
            why = str(error).removeprefix(f"{NAME}: ")
            raise BadInput(f"{path} is damaged ({why}): remove it, or convert again with --overwrite") from error
        manifest.records = {(rank, name): (position, crc) for rank, name, position, crc in records}
        return manifest

    def differences(self, other: Manifest) -> list[str]:
        """What makes `other` another conversion than this one, in words; empty if it is the same."""
        found = []
        for name, what in _BESIDE_SOURCE.items():
            before, now = self.source.get(name), other.source.get(name)
            if before != now:
                found.append(f"no {what} there" if before is None else f"another {what}" if now else f"no {what} now")
        if any(
            self.source.get(k) != other.source.get(k) for k in {*self.source, *other.source} - _BESIDE_SOURCE.keys()
        ):
            found.append("another source")
        for name in sorted(self.options.keys() | other.options.keys()):
            before, now = self.options.get(name), other.options.get(name)
            if before != now:
                before, now = (value["name"] if isinstance(value, dict) else value for value in (before, now))
                what = name.replace("_", "-")
                there = f"no {what}" if before in (None, False) else f"{what} {before}"
                found.append(f"{there} there, {now or 'none'} now" if before != now else f"{what} {now}, changed")
        if self.tool != other.tool and not found:
            found.append(f"{other.tool} instead of {self.tool}")
        return found

    def intact(self, folder: Path, names: Iterable[str]) -> set[str]:
        """The `names` that are listed here and lie in `folder` with the listed size."""
        return {
            name
            for name in names
            if name in self.files
            and (folder / name).is_file()
            and (folder / name).stat().st_size == self.files[name].size
        }


_LISTED_MATRICES = 5


class DroppedKey(Struct, frozen=True, kw_only=True):
    """A key of the source that a conversion leaves out."""

    name: str
    """the key"""
    why: str
    """the reason"""


class NonFiniteTensor(Struct, frozen=True, kw_only=True):
    """A tensor with numbers that are not finite."""

    tensor: str
    """its key; a matrix that was quantized has the key of its weight"""
    nan: int
    """how many NaN"""
    inf: int
    """how many infinities"""
    replaced: bool
    """whether quantization has replaced them: by 0, and by the largest magnitude"""


class QuantizationError(Struct, frozen=True, kw_only=True):
    """What quantizing some matrices cost."""

    matrices: int
    """how many"""
    relative_mse: float
    """squared error over the squared weights, summed over the matrices"""
    sqnr_db: float | None
    """the same as a ratio of signal to noise, dB; null where there is no error"""


class MatrixError(Struct, frozen=True, kw_only=True):
    """What quantizing one matrix cost."""

    module: str
    """the key without `.weight`"""
    relative_mse: float
    """squared error over the squared weights"""
    sqnr_db: float | None
    """the same as a ratio of signal to noise, dB; null where there is no error"""


class QuantizationErrors(QuantizationError, frozen=True, kw_only=True):
    """What quantizing all matrices of an output cost."""

    families: dict[str, QuantizationError]
    """by family of tensors"""
    worst: list[MatrixError]
    """the matrices with the largest errors, the largest first"""


def describe_errors(errors: Mapping[str, Sequence[float]]) -> QuantizationErrors:
    """`errors`: module -> its sum of squared errors, and its sum of squared weights; see `Manifest.errors`."""
    families: dict[str, list[Sequence[float]]] = defaultdict(list)
    for module, sums in errors.items():
        families[family_of(f"{module}.weight")].append(sums)

    def summed(several: Iterable[Sequence[float]]) -> QuantizationError:
        pairs = list(several)
        relative = relative_mse(math.fsum(error for error, _ in pairs), math.fsum(power for _, power in pairs))
        return QuantizationError(matrices=len(pairs), relative_mse=relative, sqnr_db=sqnr_db(relative))

    each = {module: relative_mse(error, power) for module, (error, power) in errors.items()}
    worst = sorted(each, key=lambda module: (-each[module], module))[:_LISTED_MATRICES]
    return QuantizationErrors(
        **structs.asdict(summed(pair for pairs in families.values() for pair in pairs)),
        families={family: summed(pairs) for family, pairs in sorted(families.items())},
        worst=[MatrixError(module=m, relative_mse=each[m], sqnr_db=sqnr_db(each[m])) for m in worst],
    )
