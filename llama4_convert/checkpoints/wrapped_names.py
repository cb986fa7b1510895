"""Names with a wrapper around them: what DDP, FSDP, torch.compile and trainers put before, into or behind every key.

`module.layers.0.attention.wo.weight` is the tensor `layers.0.attention.wo.weight` of a model inside a wrapper. A wrapper is taken
off where it is around every key, and the tables know the names that are left; else the keys stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from llama4_convert.errors import BadInput

# Modules that wrap modules anywhere in a model: FSDP, torch.compile, activation checkpointing.
_INSIDE = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")
_MAX_SEGMENTS = 4  # before or behind a name
# A segment that tells which part of a model a tensor is of: what stands in front of it is no wrapper that could be taken off.
_PART = re.compile(r"(^|_)(vision|audio|text|language|speech|image|projector|layers|experts)(_|$)|^\d+$")


def unwrapped(keys: Collection[str], is_known: Callable[[str], object], where: str) -> tuple[dict[str, str], list[str]]:
    """(key -> the name inside its wrappers, what was taken off in words), for the keys of the file or directory `where`.

    `is_known` tells whether a model has a name. Raises BadInput if a wrapper is around some of the keys, or two become one name.
    """
    names = {key: _INSIDE.sub("", key) for key in keys}
    inside = sorted({match[1] for key in keys for match in _INSIDE.finditer(key)})
    notes = [f"{where}: {segment} is taken out of the keys" for segment in inside]
    most = sum(map(bool, map(is_known, names.values())))
    around = ("", "")
    for before, behind in _around([name.split(".") for name in names.values()]) if most < len(names) else ():
        n_known = sum(bool(is_known(name[len(before) : len(name) - len(behind)])) for name in names.values())
        if n_known > most:
            most, around = n_known, (before, behind)
    before, behind = around
    names = {key: name[len(before) : len(name) - len(behind)] for key, name in names.items()}
    notes += [f"{where}: every key begins with {before!r}: taken off"] if before else []
    notes += [f"{where}: every key ends with {behind!r}: taken off"] if behind else []
    _refuse_partial(names.values(), is_known, where)
    if len(set(names.values())) < len(names):
        first: dict[str, str] = {}
        key, other = next((k, first[n]) for k, n in names.items() if first.setdefault(n, k) != k)
        raise BadInput(f"{where}: {other} and {key} are both {names[key]} without what wraps them: keep one")
    return names, notes


def _around(names: Sequence[list[str]]) -> Iterator[tuple[str, str]]:
    """What stands before, and behind, all of the dotted names, the shortest first."""
    if not names:
        return
    first, last = min(names), max(names)
    shortest = min(map(len, names)) - 1
    common = next((i for i in range(shortest) if first[i] != last[i] or _PART.search(first[i])), shortest)
    ends = [i for i in range(1, shortest + 1) if all(name[-i:] == first[-i:] for name in names)]
    for behind in [0, *ends[:_MAX_SEGMENTS]]:
        for before in range(min(common, _MAX_SEGMENTS, shortest - behind) + 1):
            if before or behind:
                yield "".join(f"{s}." for s in first[:before]), "".join(f".{s}" for s in first[len(first) - behind :])


def _refuse_partial(names: Collection[str], is_known: Callable[[str], object], where: str) -> None:
    unknown = [name for name in names if not is_known(name)]
    for name in unknown if len(unknown) < len(names) else ():
        segments = name.split(".")
        for n in range(1, min(len(segments), _MAX_SEGMENTS + 1)):
            if not any(map(_PART.search, segments[:n])) and is_known(".".join(segments[n:])):
                before = ".".join(segments[:n]) + "."
                wrapped = sum(other.startswith(before) for other in unknown)
                raise BadInput(
                    f"{where}: {wrapped} of {len(names)} keys begin with {before!r} ({name}) and the others do not: parts of two"
                    " models, or of one that was saved half inside a wrapper; save it whole"
                )
