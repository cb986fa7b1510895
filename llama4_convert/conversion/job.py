"""What `execution` carries out: a plan, and the content of every file around the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import to_builtins

from llama4_convert.checkpoints.families import active_parameters
from llama4_convert.checkpoints.manifest import INDEX, Manifest, describe_errors
from llama4_convert.conversion.quantization import describe_sizes
from llama4_convert.conversion.request import Request
from llama4_convert.metadata.config_repair import Repair
from llama4_convert.metadata.model_card import CARD, Facts, render
from llama4_convert.planning.adapter import Adapter
from llama4_convert.streaming.bounds import DEFAULT_MEMORY
from llama4_convert.streaming.job import Job
from llama4_convert.streaming.memory import peak_memory


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
        told = describe_sizes(self.plan) | to_builtins(describe_errors(errors))
        return {"recipe": self.recipe.name, **told}

    def describe(self) -> dict[str, Any]:
        """The JSON of `plan`."""
        plan = self.plan
        return {
            "source": str(self.request.source),
            "ranks": len(getattr(self.source, "ranks", self.source.archives)),
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
