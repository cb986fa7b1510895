"""Writes a random checkpoint in the format of Meta's original files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from llama4.geometry import Geometry
from llama4_convert.checkpoints.digests import digests
from llama4_convert.checkpoints.pth_writer import PthWriter
from llama4_convert.checkpoints.state_dict_pickle import PthTensor
from llama4_convert.errors import EnvironmentFailed, UsageError, from_os_error
from llama4_convert.progress import Progress, Start
from llama4_convert.samples.synthetic.numbers import DTYPES
from llama4_convert.samples.synthetic.params import SPECIAL_TOKENS, synth_params
from llama4_convert.samples.synthetic.tensors import check_ranks, tensors_of
from llama4_convert.samples.synthetic.tokenizer import tokenizer_model

# The file that says, to people and to the next run, that the directory holds random numbers and may be overwritten.
MARKER = "synthetic.json"

_RANKS = {"scout": 8, "maverick": 8, "guard": 1}


class Synthesis(msgspec.Struct, frozen=True, kw_only=True):
    """A random checkpoint that was written."""

    files: list[str]
    """their names"""
    bytes: int
    """of all files"""
    parameters: int
    """numbers of the model"""
    sparse: bool
    """the numbers are zeros, as holes in the files"""


def synth(
    dst: str | os.PathLike[str],
    *,
    geometry: str = "scout",
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    vision_layers: int | None = None,
    tiny: bool = False,
    base: bool = False,
    ranks: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    sparse: bool = False,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> Synthesis:
    """Write `consolidated.NN.pth` and `params.json` into `dst`; tiny models get `tokenizer.model`, `checklist.chk` too.

    `geometry` is "scout", "maverick" or "guard"; `layers`, `experts`, `vocab`, `vision_layers` replace its numbers.
    `tiny` keeps the structure and shrinks every width: some 12 MB. At full size no tokenizer is written: use the
    published one. `base` adds the statistics of base models (`expert_activation_DE`, `{global,running}_gate_stats_3E`).
    `ranks` is the number of `.pth` files, 8 by default (Guard: 1). `dtype` is "bfloat16", "float16" or "float32".

    Values are Gaussian with a standard deviation of fan_in**-0.5 (norm weights: around 1). Each tensor and rank draws
    from its own stream, of (seed, key, rank): cutting layers changes nothing in those that stay. A tensor that ranks
    replicate is the same on all. The dtypes share the streams, so bfloat16 and float16 are the rounded float32.

    `sparse` makes all numbers zeros, as holes in the files: a model of full size that takes no space, for `plan` and `inspect`.

    `start(total, 0)` and `progress(n)` count bytes of tensor data.

    Files appear whole, `params.json` last. A `dst` that holds anything but an earlier synthetic checkpoint is refused:
    the marker `synthetic.json` is in it.
    Raises UsageError for impossible sizes and for a `dst` not ours, EnvironmentFailed for lack of space and I/O errors.
    """
    params = synth_params(geometry, layers, experts, vocab, vision_layers, tiny)
    shape = Geometry.from_params(params)
    ranks = _RANKS[geometry] if ranks is None else ranks
    check_ranks(shape, ranks)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if tiny and params["vocab_size"] < 256 + SPECIAL_TOKENS:
        raise UsageError(
            f"a vocabulary of {params['vocab_size']} has no room for 256 bytes and {SPECIAL_TOKENS} special tokens"
        )

    tensors = tensors_of(shape, ranks, base=base)
    entries = [t.entry(dtype) for t in tensors]
    total = ranks * sum(entry.nbytes for entry in entries if isinstance(entry, PthTensor))
    names = [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
    directory = Path(dst)
    try:
        _prepare(directory, (0 if sparse else total) + ranks * (len(entries) + 16) * _RECORD_OVERHEAD)
        about = {"geometry": geometry, "tiny": tiny, "base": base, "ranks": ranks, "seed": seed, "dtype": dtype}
        about |= {"sparse": True} if sparse else {}
        _write(directory / MARKER, _json({"what": "random numbers, written by synth", **about}))
        start(total, 0)
        for rank, name in enumerate(names):
            with PthWriter(directory / name, entries) as writer:
                for tensor, entry in zip(tensors, entries, strict=True):
                    if not isinstance(entry, PthTensor):
                        continue
                    if sparse:
                        writer.write_zeros(entry.key)
                        progress(entry.nbytes)
                    else:
                        writer.write_tensor(entry.key, _watched(tensor.values(dtype, seed, rank), progress))
        last = _small_files(directory, names, params, seed) if tiny else {"params.json": _json(params)}
        for name, content in last.items():
            _write(directory / name, content)
        names = [MARKER, *names, *last]
        size = sum((directory / name).stat().st_size for name in names)
    except OSError as error:
        raise from_os_error(error, f"writing a checkpoint into {directory}") from error
    parameters = sum(t.parameters(ranks) for t in tensors)
    return Synthesis(files=names, bytes=size, parameters=parameters, sparse=sparse)


# A zip record costs a header, padding, a descriptor, a directory entry, and some 150 bytes of pickle: less than this.
_RECORD_OVERHEAD = 1024


def _watched(chunks: Iterator[memoryview], progress: Progress) -> Iterator[memoryview]:
    for chunk in chunks:
        yield chunk
        progress(chunk.nbytes)


def _prepare(directory: Path, needed: int) -> None:
    """Make `directory`, empty but for the marker of an earlier run. Raises UsageError and EnvironmentFailed."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: choose another destination")
    old = sorted(directory.iterdir()) if directory.exists() else []
    strangers = [file for file in old if not file.is_file() or file.is_symlink() or not _is_ours(file.name)]
    if strangers or (old and not (directory / MARKER).is_file()):
        found = (strangers or old)[0].name
        raise UsageError(f"{directory} holds {found} and no earlier synthetic checkpoint: choose an empty directory")
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in old)
    if needed > free:
        raise EnvironmentFailed(
            f"{directory}: {needed:,} bytes are needed and {free:,} are free; free some space, or cut layers or experts"
        )
    directory.mkdir(parents=True, exist_ok=True)
    # params.json goes first and the marker stays: from here on this is an unfinished checkpoint, and still ours.
    for file in sorted(old, key=lambda file: file.name != "params.json"):
        if file.name != MARKER:
            file.unlink()


def _is_ours(name: str) -> bool:
    name = name.removesuffix(".part")
    if name.startswith("consolidated.") and name.endswith(".pth"):
        return name.removeprefix("consolidated.").removesuffix(".pth").isdecimal()
    return name in (MARKER, "params.json", "tokenizer.model", "checklist.chk")


def _small_files(directory: Path, shards: list[str], params: dict[str, Any], seed: int) -> dict[str, bytes]:
    """Tokenizer, MD5 sums and params of a tiny checkpoint: content by name, in the order to write them."""
    tokenizer, stated = tokenizer_model(params["vocab_size"] - SPECIAL_TOKENS, seed), _json(params)
    sums = {name: digests(directory / name, {"md5"}, lambda n: None)["md5"] for name in shards}
    sums["tokenizer.model"] = hashlib.md5(tokenizer).hexdigest()
    sums["params.json"] = hashlib.md5(stated).hexdigest()
    checklist = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    return {"tokenizer.model": tokenizer, "checklist.chk": checklist.encode(), "params.json": stated}


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
