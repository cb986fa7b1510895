"""What `execution` carries out: a plan, and the content of every file around the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama4_convert.adapters import Adapter
from llama4_convert.composition import active_parameters
from llama4_convert.config_repair import Repair
from llama4_convert.execution import DEFAULT_MEMORY
from llama4_convert.manifest import INDEX, Manifest
from llama4_convert.memory import peak_memory
from llama4_convert.model_card import CARD, Facts, render
from llama4_convert.planned import Plan
from llama4_convert.published import Digest
from llama4_convert.quantization import describe_errors, describe_sizes
from llama4_convert.request import Request
from quant.recipe import Recipe

_NOTICES = ("LICENSE", "USE_POLICY", "NOTICE")
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


class ConversionJob(Job):
    """To Transformers' layout."""

    adapter: Adapter | None
    repaired: list[Repair] | None = None  # of config.json; None: there is no model to repair it by
    variant: str
    variant_reason: str
    max_position_embeddings: int
    marker = INDEX
    weights = "model*.safetensors*"

    def __init__(self, request: Request) -> None:
        self.request = request
        self.dtype, self.allow_nonfinite = request.dtype, request.allow_nonfinite

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    def closing(self, manifest: Manifest) -> dict[str, bytes]:
        """The model card."""
        counts, g = self.plan.parameters_by_kind(), self.plan.geometry
        active = active_parameters(counts, g.n_experts, g.top_k)
        return {CARD: render(Facts(manifest, self.config, sum(counts.values()), active)).encode()}

    def marker_content(self) -> bytes:
        return self.plan.index()

    def peak_memory(self, max_memory: int) -> int:
        return peak_memory(max_memory, 0, self.plan)

    def told(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "variant": self.variant,
            "variant_reason": self.variant_reason,
            "parameters": plan.parameters,
            "output_bytes": plan.output_bytes,
            "dropped": self._dropped(),
            **self.told_of_fine_tune(),
        }

    def told_of_fine_tune(self) -> dict[str, Any]:
        """Of the adapter, if there is one, and of what was repaired after the model that it was made from."""
        told: dict[str, Any] = {"adapter": self.adapter.told(self.plan)} if self.adapter else {}
        if self.repaired is not None:
            told["repaired"] = [one._asdict() for one in self.repaired]
        return told

    def _adapter_source(self) -> dict[str, Any]:
        return {"adapter": dict(self.adapter.fingerprint)} if self.adapter else {}

    def quantization(self, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        assert self.recipe is not None
        told = describe_sizes(self.plan) | describe_errors(errors)
        return {"recipe": self.recipe.name, **told}

    def describe(self) -> dict[str, Any]:
        """The JSON of `plan`."""
        plan = self.plan
        return {
            "source": str(self.request.source),
            "ranks": len(self.source.ranks),
            "variant": self.variant,
            "variant_reason": self.variant_reason,
            "dtype": plan.main_dtype,
            "parameters": plan.parameters,
            "output_bytes": plan.output_bytes,
            "peak_memory_bytes": self.peak_memory(DEFAULT_MEMORY),
            "max_position_embeddings": self.max_position_embeddings,
            "files": [{"file": f.name, "bytes": f.size, "tensors": len(f.tensors)} for f in plan.files],
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "file": f.name,
                    "offset": t.offset,
                    "bytes": t.nbytes,
                    "sources": sorted({p.key for p in t.pieces}),
                }
                for f in plan.files
                for t in f.tensors
            ],
            "dropped": self._dropped(),
            "warnings": self.warnings,
            **({"quantization": {"recipe": self.recipe.name, **describe_sizes(plan)}} if self.recipe else {}),
            **self.told_of_fine_tune(),
        }


def each_alone(made: Mapping[str, bytes]) -> dict[str, Callable[[], dict[str, bytes]]]:
    """Every file a group of its own."""

    def group(name: str) -> Callable[[], dict[str, bytes]]:
        return lambda: {name: made[name]}

    return {name: group(name) for name in made}


def is_notice(name: str) -> bool:
    return name.split(".")[0].upper() in _NOTICES


def notices(source: Path) -> dict[str, bytes]:
    """Licence texts beside the weights: Meta's licence asks that they go with every copy."""
    from llama4_convert.checkpoints.small_files import is_file_name, read_small

    return {
        path.name: read_small(path)
        for path in sorted(source.iterdir())
        if is_notice(path.name) and is_file_name(path.name) and path.is_file()
    }
