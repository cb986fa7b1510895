"""Which tensors somebody means: by a stored key of either layout, a name of the reference, a module, or a pattern."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llama4.config import Llama4Config
from llama4.weights import parameter_shapes
from llama4.weights_transformers import transformers_key
from llama4_convert.errors import UsageError
from mappings import Binding, Box
from mappings.matrices import Matrix, matrices


@dataclass(frozen=True)
class Found:
    """A stored tensor, among those that are written ("output") or read ("input").

    `part`: the box of a logical tensor that is meant, where the stored one holds more than that.
    """

    name: str
    role: Literal["output", "input"]
    part: tuple[str, Box] | None = None


class Names:
    """All names of a checkpoint and of what would be made of it. A name of both is taken as the output's."""

    def __init__(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], binding: Binding, config: Llama4Config
    ) -> None:
        self.outputs, self.inputs, self.binding, self.config = outputs, inputs, binding, config

    def find(self, wanted: str) -> list[Found]:
        """Raises UsageError where nothing is called so, with the nearest names."""
        found = self._stored(wanted) or self._logical(wanted) or self._parts_of(wanted)
        if not found:
            # What is no pattern may be a layer or a block: all that is in it.
            pattern = wanted if any(c in wanted for c in "*?[") else f"{wanted}.*"
            found = [one for name in fnmatch.filter(self.all, pattern) for one in self._stored(name)]
            found = found or [one for name in fnmatch.filter(self.logical, pattern) for one in self._logical(name)]
        if not found:
            known = [*self.all, *self.logical]
            # People leave out what stands before and behind ("language_model.", ".weight"), which is far by the letters.
            near = [name for name in known if f".{wanted}" in f".{name}"][:3]
            near = near or difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(near)}" if near else "`inspect --tensors` lists them"
            raise UsageError(f"no tensor {wanted!r}: {hint}")
        return list(dict.fromkeys(found))

    @cached_property
    def all(self) -> list[str]:
        return list(dict.fromkeys([*self.outputs, *self.inputs]))

    @cached_property
    def logical(self) -> list[str]:
        """The reference's names."""
        return list(parameter_shapes(self.config))

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        """The tensors of each linear layer: its weight, or what it is quantized into."""
        modules: dict[str, list[str]] = defaultdict(list)
        for name in self.all:
            if ".weight" in name:
                modules[name.partition(".weight")[0]].append(name)
        return modules

    def _stored(self, name: str) -> list[Found]:
        role: Literal["output", "input"] = "output" if name in self.outputs else "input"
        return [Found(name, role)] if name in self.outputs or name in self.inputs else []

    def _parts_of(self, key: str) -> list[Found]:
        """The tensors that a module is made of, or that take the place of a key of Transformers that is not there."""
        modules = [key.removesuffix(".weight"), *(m.module for m in self._matrices(key))]
        return [one for module in modules for name in self._modules.get(module, ()) for one in self._stored(name)]

    def _matrices(self, key: str) -> Iterator[Matrix]:
        return matrices(self.binding, key) if key in self.binding.transformers else iter(())

    def _logical(self, name: str) -> list[Found]:
        if name not in self.logical:
            return []
        key = transformers_key(name, self.config.vision_config is not None)
        ending = f".{name.partition('feed_forward.')[2]}_proj"  # ".experts.3.gate_proj"
        matrix = next((m for m in self._matrices(key) if m.expert is not None and m.module.endswith(ending)), None)
        parts = self._parts_of(matrix.module if matrix else key)
        tensors = self.binding.transformers[key].tensors.values()
        tensor = matrix.target.tensor if matrix else next(iter(tensors))
        sizes = tuple(self.binding.logical_tensor(tensor).sizes.values())
        box = matrix.target.box if matrix else Box((0,) * len(sizes), sizes)
        holders = [key for key in (key, *self.binding.spellings(tensor)) if key in self.outputs]
        found = [Found(holder, "output", self._part(holder, tensor, box, sizes)) for holder in holders]
        # Of a quantized matrix all parts are meant, also where one of them is called as the matrix was.
        return parts if len(parts) > 1 or not found else found

    def _part(self, holder: str, tensor: str, box: Box, sizes: tuple[int, ...]) -> tuple[str, Box] | None:
        stored = self.binding.meta.get(holder) or self.binding.transformers[holder]
        return None if list(stored.tensors.values()) == [tensor] and box.size == sizes else (tensor, box)
