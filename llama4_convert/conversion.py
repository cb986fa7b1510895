"""`convert`: from Meta's directory to a Transformers directory. What is to be written; `execution` writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llama4_convert import variant
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.execution import DEFAULT_MEMORY, Bounds, Progress, Start, Warn, execute
from llama4_convert.manifest import INDEX, Manifest
from llama4_convert.version import TOOL

if TYPE_CHECKING:
    from llama4_convert.adapters import Adapter
    from llama4_convert.planned import Plan
    from llama4_convert.published import Digest
    from quant.recipe import Recipe

DEFAULT_SHARD_SIZE = 5_000_000_000
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SOURCE_NOTICES = ("LICENSE", "USE_POLICY", "NOTICE")


@dataclass(frozen=True)
class Request:
    """What is asked for, before the source has been looked at. Sizes in bytes; None: concluded from the source."""

    source: Path
    text_only: bool = False
    variant: str | None = None
    dtype: str | None = None
    shard_size: int = DEFAULT_SHARD_SIZE
    max_position_embeddings: int | None = None
    allow_rank_mismatch: bool = False
    recipe: str | None = None  # a built-in one's name, or the path of a TOML file
    allow_nonfinite: bool = False  # quantize matrices with NaN and infinities, too: as 0 and as the largest magnitude
    device: str = "cpu"  # where a recipe computes: decides no byte
    adapter: Path | None = None  # a PEFT LoRA adapter's directory, to be merged
    vision_from: Path | None = None  # the model that the source, a text-only fine-tune, was made from
    config_from: Path | None = None  # the model that the source was made from, to repair its config.json by

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.variant is not None and self.variant not in variant.VARIANTS:
            raise UsageError(f"variant {self.variant!r} is not one of {', '.join(variant.VARIANTS)}")
        if self.shard_size < 1:
            raise UsageError("the shard size must be at least 1 byte")
        if self.allow_nonfinite and self.recipe is None:
            raise UsageError("--allow-nonfinite is for --recipe: without one, NaN and infinities are kept as they are")
        if self.config_from is not None and self.vision_from is not None:
            raise UsageError("--vision-from repairs config.json as well: leave --config-from out")
        if self.device != "cpu":
            _check_device(self)
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise UsageError("max-position-embeddings must be at least 1")


class Job:
    """A request bound to its source: the plan, and the content of every file around the weights."""

    source: Any  # a MetaCheckpoint here; `requantization` has the other layout's
    recipe: Recipe | None
    adapter: Adapter | None = None
    plan: Plan
    warnings: list[str]
    # Files of the source that have no checksums of their own, and what they must be.
    promised: Mapping[Path, Digest] = MappingProxyType({})
    # Written last: without it the output is no model.
    marker = INDEX
    weights = "model*.safetensors*"  # what a reader may take for weights of this output

    @staticmethod
    def of(request: Request) -> Job:
        """The job for the layout that the source is in. Raises UsageError, BadInput or EnvironmentFailed."""
        from llama4_convert.checkpoints import is_meta

        if request.vision_from is not None:
            from llama4_convert.vision_from import VisionJob

            return VisionJob(request)
        if not is_meta(request.source):
            from llama4_convert.requantization import TransformersJob

            return TransformersJob(request)
        if request.config_from is not None:
            raise UsageError(f"{request.source} has a params.json: --config-from repairs a Transformers directory")
        return Job(request)

    def __init__(self, request: Request) -> None:
        # The readers import numpy; taking the lock must not wait for that.
        from llama4_convert.checkpoints.meta import MetaCheckpoint
        from llama4_convert.planning import make_plan

        self.request = request
        self.recipe = load_recipe(request.recipe) if request.recipe else None
        self.adapter = load_adapter(request.adapter)
        self.source = MetaCheckpoint.open(request.source)
        self.plan = make_plan(
            self.source,
            recipe=self.recipe,
            device=request.device,
            text_only=request.text_only,
            dtype=DTYPES[request.dtype] if request.dtype else None,
            shard_size=request.shard_size,
            allow_rank_mismatch=request.allow_rank_mismatch,
            adapter=self.adapter,
        )
        if self.recipe:
            check_recipe(self.recipe, self.plan)
        self.variant, self.variant_reason = variant.conclude(self.plan, request.source)
        if request.variant:
            self.variant, self.variant_reason = request.variant, "you said so"
        self.max_position_embeddings = request.max_position_embeddings or variant.max_position_embeddings(
            self.variant, self.plan.geometry
        )
        self.warnings = [*self.plan.warnings, *self._vocabulary_warnings()]

    @cached_property
    def token_ids(self) -> Any:
        """TokenIds by tokenizer.model, or by the vocabulary's size without one; None if that is too small to have any."""
        from llama4_convert.tokenizer import TokenIds

        data = self.source.small_files.get("tokenizer.model")
        rows = self.plan.geometry.vocab_size or 0
        ids = TokenIds.of(data, rows)
        if ids and ids.vocab_size > rows:
            raise BadInput(
                f"tokenizer.model has {ids.vocab_size:,} tokens with the special ones,"
                f" tok_embeddings.weight only {rows:,} rows: one of the two is another model's"
            )
        return ids

    def _vocabulary_warnings(self) -> list[str]:
        found = []
        rows = self.plan.geometry.vocab_size or 0
        if "tokenizer.model" not in self.source.small_files:
            found.append(
                "the source has no tokenizer.model: no tokenizer is written, copy tokenizer.json from the model's page;"
                f" token ids in config.json are those of a vocabulary of {rows:,}"
                if self.token_ids
                else "the source has no tokenizer.model and its vocabulary is too small for Meta's special tokens:"
                " no tokenizer is written, and config.json names no token ids"
            )
        elif self.token_ids and self.token_ids.vocab_size < rows:
            found.append(
                f"the vocabulary has {rows - self.token_ids.vocab_size} more rows than tokenizer.model has tokens"
            )
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        from llama4_convert import config
        from llama4_convert.quantization import quantization_config

        body = config.model_config(
            self.plan.geometry,
            self.token_ids,
            variant=self.variant,
            dtype=self.plan.main_dtype,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.recipe:
            body["quantization_config"] = quantization_config(self.recipe, self.plan)
        return body

    def contents(self) -> dict[str, Callable[[], dict[str, bytes]]]:
        """Files around the weights, in groups: a name of each group -> a function that makes the group's files.

        Everything that can be wrong with the source has been found out by the time this returns.
        """
        from llama4_convert import config

        g, source = self.plan.geometry, self.source
        made: dict[str, bytes] = {
            "config.json": config.to_json(self.config),
            "generation_config.json": config.to_json(config.generation_config(self.token_ids, self.variant)),
            "original/params.json": source.small_files["params.json"],
        }
        if g.vision:
            made |= {name: config.to_json(body) for name, body in config.processor_configs(g.vision).items()}
        made |= notices(source.path)
        groups: dict[str, Callable[[], dict[str, bytes]]] = {
            name: lambda name=name: {name: made[name]}  # type: ignore[misc]
            for name in made
        }
        if "tokenizer.model" in source.small_files:
            groups["tokenizer.json"] = self._tokenizer
        return groups

    def closing(self, manifest: Manifest) -> dict[str, bytes]:
        """Files that tell what became of the weights, once these are written and `manifest` has their errors: the model card."""
        from llama4_convert.composition import active_parameters
        from llama4_convert.model_card import CARD, Facts, render

        counts, g = self.plan.parameters_by_kind(), self.plan.geometry
        active = active_parameters(counts, g.n_experts, g.top_k)
        return {CARD: render(Facts(manifest, self.config, sum(counts.values()), active)).encode()}

    def _tokenizer(self) -> dict[str, bytes]:
        from llama4_convert.tokenizer import tokenizer_files

        return tokenizer_files(
            self.source.small_files["tokenizer.model"],
            variant=self.variant,
            vision=self.plan.geometry.vision is not None,
            max_length=self.max_position_embeddings,
        )

    def peak_memory(self, max_memory: int) -> int:
        """Bytes of own memory that the conversion takes under a bound of `max_memory`."""
        from llama4_convert.memory import peak_memory

        return peak_memory(max_memory, len(self.source.small_files.get("tokenizer.model", b"")), self.plan)

    def marker_content(self) -> bytes:
        return self.plan.index()

    def told(self) -> dict[str, Any]:
        """What the result says of the output, beside its files."""
        plan = self.plan
        return {
            "variant": self.variant,
            "variant_reason": self.variant_reason,
            "parameters": plan.parameters,
            "output_bytes": plan.output_bytes,
            "dropped": [{"name": name, "why": why} for name, why in plan.dropped.items()],
            **self.told_of_fine_tune(),
        }

    def told_of_fine_tune(self) -> dict[str, Any]:
        """Of the adapter, if there is one, and of what was repaired."""
        return {"adapter": self.adapter.told(self.plan)} if self.adapter else {}

    def manifest(self) -> Manifest:
        options: dict[str, Any] = {
            "dtype": self.request.dtype,
            "max_position_embeddings": self.max_position_embeddings,
            "shard_size": self.request.shard_size,
            "text_only": self.request.text_only,
            "variant": self.variant,
        }
        options |= self._recipe_options()
        source: dict[str, Any] = {"layout": "meta", "ranks": len(self.source.ranks)}
        source |= {"sha256": self.source.fingerprint(), **self._adapter_source()}
        return Manifest(TOOL, source, options, list(self.plan.meta_keys), dict(self.plan.dropped))

    def _adapter_source(self) -> dict[str, Any]:
        return {"adapter": dict(self.adapter.fingerprint)} if self.adapter else {}

    def _recipe_options(self) -> dict[str, Any]:
        if self.recipe is None:
            return {}
        allowed = {"allow_nonfinite": True} if self.request.allow_nonfinite else {}
        return {"recipe": self.recipe.to_json(), **allowed}

    def quantization(self, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """What the result says of a recipe; `errors` by matrix, in sums of squares."""
        from llama4_convert.quantization import describe_errors, describe_sizes

        assert self.recipe is not None
        told = describe_sizes(self.plan) | describe_errors(errors)
        return {"recipe": self.recipe.name, **told}

    def describe(self) -> dict[str, Any]:
        """The JSON of `plan`."""
        from llama4_convert.quantization import describe_sizes

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
            "dropped": [{"name": name, "why": why} for name, why in plan.dropped.items()],
            "warnings": self.warnings,
            **({"quantization": {"recipe": self.recipe.name, **describe_sizes(plan)}} if self.recipe else {}),
            **self.told_of_fine_tune(),
        }


def _check_device(request: Request) -> None:
    from quant.encoders import encoder_for
    from quant.recipe import Scheme

    if request.recipe is None:
        raise UsageError("--device is where a recipe computes: without --recipe nothing is computed")
    try:
        encoder_for(Scheme("int4"), request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def load_recipe(name: str, *, to_meta: bool = False) -> Recipe:
    """A recipe for the layout that is written. Raises UsageError."""
    from quant.recipe import RecipeError, load

    try:
        recipe = load(name)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    if (recipe.format == "meta") != to_meta:
        layout, command = ("Transformers'", "convert") if to_meta else ("Meta's", "export")
        raise UsageError(f"recipe {recipe.name} writes {layout} layout: give it to {command}")
    return recipe


def load_adapter(path: Path | None) -> Adapter | None:
    if path is None:
        return None
    from llama4_convert.adapters import Adapter

    return Adapter.open(Path(path))


def check_recipe(recipe: Recipe, plan: Plan) -> None:
    from quant.recipe import RecipeError

    try:
        recipe.check(plan.geometry.n_layers, plan.geometry.n_experts or 0)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    if not any(planned.scheme for planned in plan.matrices):
        raise UsageError(f"recipe {recipe.name} quantizes nothing of this model: leave it out")


def plan(
    source: str | os.PathLike[str],
    *,
    gpu: str | None = None,
    gpus: int = 1,
    context: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `convert` would write, as the JSON of the design says. Options: those of `Request`. Reads no tensor data.

    With `gpu` ("h100-80gb"), `fit` says in which runtimes the result fits onto `gpus` of them with `context` tokens.
    """
    job = Job.of(Request(Path(source), **options))
    described = job.describe()
    if gpu is None:
        if context is not None or gpus != 1:
            raise UsageError("--context and --gpus are for --gpu: name one")
        return described
    from llama4_convert.fitting.gpus import find_gpu
    from llama4_convert.fitting.judging import judge
    from llama4_convert.fitting.memory import Weights
    from llama4_convert.fitting.runtimes import Case
    from llama4_convert.quantization import parted_group, storage_format

    kinds = {planned.scheme.kind for planned in job.plan.matrices if planned.scheme}
    case = Case(
        job.plan.geometry,
        Weights.of((tensor.name, tensor.nbytes) for tensor in job.plan.tensors),
        storage_format(kinds),
        find_gpu(gpu),
        n_gpus=gpus,
        context=context,
        group=parted_group(job.recipe) if job.recipe else None,
        max_context=job.max_position_embeddings,
    )
    return {**described, "fit": judge(case)}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MEMORY,
    max_error: float | None = None,
    overwrite: bool = False,
    warn: Warn = lambda text: None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
    **options: Any,
) -> dict[str, Any]:
    """Convert Meta's checkpoint, or a fine-tune in Transformers' layout, at `source` to a Transformers directory at `target`.

    `options` are the fields of `Request`. `max_memory` (bytes) bounds the process's own memory above an idle interpreter.
    `start(total, done)` and `progress(n)` count bytes of tensor data; `progress` may be called from another thread.
    An interrupted conversion goes on when called again; a finished one is left alone.
    `max_error` bounds the relative squared error of every quantized matrix (CheckFailed beyond).
    Raises a ConvertError; the target then holds nothing that loads as a model.
    """
    request = Request(Path(source), **options)
    bounds = Bounds(max_memory, max_error, overwrite)
    others = (request.adapter, request.vision_from, request.config_from)
    sources = [Path(path) for path in (source, *others) if path is not None]
    return execute(lambda: Job.of(request), sources, Path(target), bounds, warn, start, progress)


def notices(source: Path) -> dict[str, bytes]:
    """Licence texts beside the weights: Meta's licence asks that they go with every copy."""
    from llama4_convert.checkpoints.meta import is_file_name, read_small

    return {
        path.name: read_small(path)
        for path in sorted(source.iterdir())
        if path.name.split(".")[0].upper() in SOURCE_NOTICES and is_file_name(path.name) and path.is_file()
    }
