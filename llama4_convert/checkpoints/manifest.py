"""The manifest of an output directory: what it was made from, with which options, and the SHA-256 of every file.

Deterministic: no times, counters or paths. While a run is under way it lists the files that are done, which is all that a
resumed run needs to know; the index file, written last, says that the whole is complete.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.tensor_kinds import kind_of
from llama4_convert.errors import BadInput
from llama4_convert.files import is_file_name, read_small, write_small
from quant.error import relative_mse, sqnr_db

NAME = "llama4-convert.json"
INDEX = "model.safetensors.index.json"
_VERSION = 1
MOST_RANKS = 128


@dataclass
class Manifest:
    tool: str
    source: Mapping[str, Any]  # layout and SHA-256 fingerprints; see MetaCheckpoint.fingerprint
    options: Mapping[str, Any]  # those that decide bytes
    meta_keys: list[str]  # the source keys used: the spelling, so that the way back is exact
    dropped: Mapping[str, str]  # source key -> why
    # name -> {"sha256", "size"}, and if there are any "nonfinite": tensor -> how many [NaN, infinities]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    # module -> sums of squares, of the quantization's error and of the weights; relative MSE is their ratio
    errors: dict[str, list[float]] = field(default_factory=dict)
    # (rank, record name) -> bytes read and their CRC-32: source records that the files so far have read in part
    records: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, sha256: str, size: int, nonfinite: Mapping[str, Sequence[int]] | None = None) -> None:
        counts = {tensor: list(counted) for tensor, counted in (nonfinite or {}).items()}
        self.files[name] = {"sha256": sha256, "size": size} | ({"nonfinite": counts} if counts else {})

    def nonfinite(self) -> dict[str, tuple[int, int]]:
        """Tensor -> how many NaN and infinities, of those that have any; of matrices, before they were quantized."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.files.values():
            for tensor, (nan, inf) in entry.get("nonfinite", {}).items():
                before = found.get(tensor, (0, 0))
                found[tensor] = before[0] + nan, before[1] + inf
        return found

    @property
    def marker(self) -> str:
        """The file that makes the output a model, written last."""
        return "params.json" if self.options.get("layout") == "meta" else INDEX

    def write(self, folder: Path) -> None:
        records = [[*key, *state] for key, state in sorted(self.records.items())]
        body = {"version": _VERSION, **self.__dict__, "records": records}
        write_small(folder / NAME, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of `folder`; None if there is none. Raises BadInput if it is not one of ours."""
        path = folder / NAME
        if not path.exists():
            return None
        try:
            body = json.loads(read_small(path))
            if body.pop("version") != _VERSION:
                raise ValueError("another version")
            records = {(rank, name): (position, crc) for rank, name, position, crc in body.pop("records", ())}
            manifest = Manifest(**body, records=records)
            parts = (manifest.source, manifest.options, manifest.files, manifest.errors)
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError("a part is no object")
            if not isinstance(manifest.tool, str):
                raise ValueError("the tool is no text")
            if not (isinstance(manifest.meta_keys, list) and all(isinstance(key, str) for key in manifest.meta_keys)):
                raise ValueError("the source's keys are no list of names")
            if not (
                isinstance(manifest.dropped, dict) and all(isinstance(why, str) for why in manifest.dropped.values())
            ):
                raise ValueError("what was dropped has no reasons")
            if not all(
                value is None or isinstance(value, (str, int)) for k, value in manifest.options.items() if k != "recipe"
            ):
                raise ValueError("an option is no text or number")
            if not isinstance(manifest.options.get("recipe", {"name": ""})["name"], str):
                raise ValueError("the recipe has no name")
            ranks = manifest.source.get("ranks", 1)
            if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
                raise ValueError(f"a source of {ranks!r:.40} ranks")
            for (rank, record), state in records.items():
                if not isinstance(record, str) or not all(type(n) is int and n >= 0 for n in (rank, *state)):
                    raise ValueError("no CRC of a record")
            for module, sums in manifest.errors.items():
                if not (isinstance(sums, list) and len(sums) == 2 and all(isinstance(x, float) for x in sums)):
                    raise ValueError(f"no two sums for {module!r:.60}")
            for name, entry in manifest.files.items():
                if not all(map(is_file_name, name.split("/"))):
                    raise ValueError(f"a file outside the directory: {name!r:.60}")
                if not isinstance(entry["sha256"], str) or not isinstance(entry["size"], int):
                    raise ValueError(f"no digest for {name!r:.60}")
                for counts in entry.get("nonfinite", {}).values():
                    if not (isinstance(counts, list) and len(counts) == 2 and all(type(n) is int for n in counts)):
                        raise ValueError(f"no two counts for {name!r:.60}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path} is damaged ({error}): remove it, or convert again with --overwrite") from error
        return manifest

    def differences(self, other: Manifest) -> list[str]:
        """In words, what makes `other` another conversion than this one; empty if it is the same."""
        found = []
        parts = {
            "adapter": "adapter",
            "vision_from": "base for --vision-from",
            "config_from": "base for --config-from",
        }
        for name, what in parts.items():
            mine, its = self.source.get(name), other.source.get(name)
            if mine != its:
                found.append(f"no {what} there" if mine is None else f"another {what}" if its else f"no {what} now")
        if any(self.source.get(k) != other.source.get(k) for k in {*self.source, *other.source} - parts.keys()):
            found.append("another source")
        for name in sorted(self.options.keys() | other.options.keys()):
            mine, its = self.options.get(name), other.options.get(name)
            if mine != its:
                mine, its = (value["name"] if isinstance(value, dict) else value for value in (mine, its))
                what = name.replace("_", "-")
                there = f"no {what}" if mine in (None, False) else f"{what} {mine}"
                found.append(f"{there} there, {its or 'none'} now" if mine != its else f"{what} {its}, changed")
        if self.tool != other.tool and not found:
            found.append(f"{other.tool} instead of {self.tool}")
        return found

    def intact(self, folder: Path, names: Iterable[str]) -> set[str]:
        """Those of `names` that are listed here and lie in `folder` with the listed size."""
        return {
            name
            for name in names
            if name in self.files
            and (folder / name).is_file()
            and (folder / name).stat().st_size == self.files[name]["size"]
        }


_WORST = 5


def describe_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of every matrix in `errors` (module -> sums of squares, error and weight): overall, by family, and the worst."""
    groups: dict[str, list[Sequence[float]]] = defaultdict(list)
    for module, pair in errors.items():
        groups[kind_of(f"{module}.weight")].append(pair)

    def summed(pairs: Iterable[Sequence[float]]) -> dict[str, Any]:
        pairs = list(pairs)
        relative = relative_mse(math.fsum(e for e, _ in pairs), math.fsum(s for _, s in pairs))
        return {"matrices": len(pairs), "relative_mse": relative, "sqnr_db": sqnr_db(relative)}

    each = {module: relative_mse(*pair) for module, pair in errors.items()}
    worst = sorted(each, key=lambda module: (-each[module], module))[:_WORST]
    return {
        **summed(pair for pairs in groups.values() for pair in pairs),
        "families": {family: summed(pairs) for family, pairs in sorted(groups.items())},
        "worst": [{"module": m, "relative_mse": each[m], "sqnr_db": sqnr_db(each[m])} for m in worst],
    }
