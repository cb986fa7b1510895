"""What a run carries out: a plan, and the content of every file around the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.planning.plan import Plan
from quant.recipe import Recipe

Contents = Mapping[str, Callable[[], dict[str, bytes]]]  # a name of each group -> what makes the group's files


class Job(ABC):
    """A request bound to its source. Each kind of source, and of output, has one."""

    source: Any  # its `archives` are the files that a run opens
    plan: Plan
    recipe: Recipe | None
    warnings: list[str]
    dtype: str | None = None  # that was asked for
    allow_nonfinite = False  # quantize matrices with NaN and infinities, too
    # Files of the source that have no checksums of their own, and what they must be.
    promised: Mapping[Path, Digest] = MappingProxyType({})
    marker: str  # written last: without it the output is no model
    weights: str  # a pattern: what a reader may take for weights of this output

    @abstractmethod
    def contents(self) -> Contents:
        """Files around the weights, in groups. Everything that can be wrong with the source is found out by this."""

    @abstractmethod
    def closing(self, manifest: Manifest) -> dict[str, bytes]:
        """Files that tell what became of the weights, once these are written and `manifest` has their errors."""

    @abstractmethod
    def marker_content(self) -> bytes: ...

    @abstractmethod
    def peak_memory(self, max_memory: int) -> int:
        """Bytes of own memory that the job takes under a bound of `max_memory`."""

    @abstractmethod
    def manifest(self) -> Manifest:
        """With the source and the options, and no files yet."""

    @abstractmethod
    def told(self) -> dict[str, Any]:
        """What the result says of the output, beside its files."""

    @abstractmethod
    def quantization(self, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """What the result says of a recipe; `errors` by matrix, in sums of squares."""

    def _recipe_options(self) -> dict[str, Any]:
        if self.recipe is None:
            return {}
        allowed = {"allow_nonfinite": True} if self.allow_nonfinite else {}
        return {"recipe": self.recipe.to_json(), **allowed}

    def _dropped(self) -> list[dict[str, str]]:
        return [{"name": name, "why": why} for name, why in self.plan.dropped.items()]
