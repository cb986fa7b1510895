"""`convert`: from Meta's directory to a Transformers directory, resumable, committed by its index file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert import lock, variant
from llama4_convert.errors import BadInput, CheckFailed, EnvironmentFailed, UsageError, from_os_error
from llama4_convert.manifest import INDEX, NAME, Manifest
from llama4_convert.version import TOOL
from llama4_convert.writer import PARTIAL_SUFFIX

if TYPE_CHECKING:
    from llama4_convert.planning import Plan
    from llama4_convert.run import RunResult
    from quant.recipe import Recipe

Warn = Callable[[str], None]
Progress = Callable[[int], None]
Start = Callable[[int, int], None]

DEFAULT_SHARD_SIZE = 5_000_000_000
DEFAULT_MEMORY = 1 << 30
# Below this, buffers and interpreter leave no room for anything (measured: 52 MiB at the smallest buffers, no tokenizer).
LEAST_MEMORY = 64 << 20
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SHOWN = 3  # tensors that a warning names
SOURCE_NOTICES = ("LICENSE", "USE_POLICY", "NOTICE")


class NeedsOverwrite(UsageError):
    """The output directory holds something else. `--overwrite` replaces it."""


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

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.variant is not None and self.variant not in variant.VARIANTS:
            raise UsageError(f"variant {self.variant!r} is not one of {', '.join(variant.VARIANTS)}")
        if self.shard_size < 1:
            raise UsageError("the shard size must be at least 1 byte")
        if self.allow_nonfinite and self.recipe is None:
            raise UsageError("--allow-nonfinite is for --recipe: without one, NaN and infinities are kept as they are")
        if self.device != "cpu":
            _check_device(self)
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise UsageError("max-position-embeddings must be at least 1")


class Job:
    """A request bound to its source: the plan, and the content of every file around the weights."""

    source: Any  # a MetaCheckpoint here; `requantization` has the other layout's

    @staticmethod
    def of(request: Request) -> Job:
        """The job for the layout that the source is in. Raises UsageError, BadInput or EnvironmentFailed."""
        from llama4_convert.checkpoints import is_meta

        if not is_meta(request.source):
            from llama4_convert.requantization import TransformersJob

            return TransformersJob(request)
        return Job(request)

    def __init__(self, request: Request) -> None:
        # The readers import numpy; taking the lock must not wait for that.
        from llama4_convert.checkpoints.meta import MetaCheckpoint
        from llama4_convert.planning import make_plan

        self.request = request
        self.recipe = load_recipe(request.recipe) if request.recipe else None
        self.source = MetaCheckpoint.open(request.source)
        self.plan = make_plan(
            self.source,
            recipe=self.recipe,
            device=request.device,
            text_only=request.text_only,
            dtype=DTYPES[request.dtype] if request.dtype else None,
            shard_size=request.shard_size,
            allow_rank_mismatch=request.allow_rank_mismatch,
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

    def contents(self) -> dict[str, Callable[[], dict[str, bytes]]]:
        """Files around the weights, in groups: a name of each group -> a function that makes the group's files.

        Everything that can be wrong with the source has been found out by the time this returns.
        """
        from llama4_convert import config
        from llama4_convert.quantization import quantization_config

        g, source = self.plan.geometry, self.source
        body = config.model_config(
            g,
            self.token_ids,
            variant=self.variant,
            dtype=self.plan.main_dtype,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.recipe:
            body["quantization_config"] = quantization_config(self.recipe, self.plan)
        made: dict[str, bytes] = {
            "config.json": config.to_json(body),
            "generation_config.json": config.to_json(config.generation_config(self.token_ids, self.variant)),
            "original/params.json": source.small_files["params.json"],
        }
        if g.vision:
            made |= {name: config.to_json(body) for name, body in config.processor_configs(g.vision).items()}
        made |= _notices(source.path)
        groups: dict[str, Callable[[], dict[str, bytes]]] = {
            name: lambda name=name: {name: made[name]}  # type: ignore[misc]
            for name in made
        }
        if "tokenizer.model" in source.small_files:
            groups["tokenizer.json"] = self._tokenizer
        return groups

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
        from llama4_convert.run import peak_memory

        return peak_memory(max_memory, len(self.source.small_files.get("tokenizer.model", b"")), self.plan)

    def manifest(self) -> Manifest:
        options: dict[str, Any] = {
            "dtype": self.request.dtype,
            "max_position_embeddings": self.max_position_embeddings,
            "shard_size": self.request.shard_size,
            "text_only": self.request.text_only,
            "variant": self.variant,
        }
        options |= self._recipe_options()
        source = {"layout": "meta", "ranks": len(self.source.ranks), "sha256": self.source.fingerprint()}
        return Manifest(TOOL, source, options, list(self.plan.meta_keys), dict(self.plan.dropped))

    def _recipe_options(self) -> dict[str, Any]:
        if self.recipe is None:
            return {}
        allowed = {"allow_nonfinite": True} if self.request.allow_nonfinite else {}
        return {"recipe": self.recipe.to_json(), **allowed}

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


def load_recipe(name: str) -> Recipe:
    from quant.recipe import RecipeError, load

    try:
        return load(name)
    except RecipeError as error:
        raise UsageError(str(error)) from error


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
            raise UsageError("a context and a number of GPUs mean something with --gpu only")
        return described
    from llama4_convert.fit import fit
    from llama4_convert.quantization import fit_format

    verdict = fit(
        job.plan.geometry,
        sum(tensor.nbytes for tensor in job.plan.tensors),
        gpu=gpu,
        context=context,
        format=fit_format(job.plan),
        n_gpus=gpus,
        max_context=job.max_position_embeddings,
    )
    return {**described, "fit": verdict}


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
    """Convert Meta's checkpoint at `source` to a Transformers directory at `target`.

    `options` are the fields of `Request`. `max_memory` (bytes) bounds the process's own memory above an idle interpreter.
    `start(total, done)` and `progress(n)` count bytes of tensor data; `progress` may be called from another thread.
    An interrupted conversion goes on when called again; a finished one is left alone.
    `max_error` bounds the relative squared error of every quantized matrix (CheckFailed beyond).
    Raises a ConvertError; the target then holds nothing that loads as a model.
    """
    request, target = Request(Path(source), **options), Path(target)
    if max_memory < LEAST_MEMORY:
        raise UsageError(f"max-memory must be at least {LEAST_MEMORY >> 20} MiB")
    for folder in (target, target / "original"):  # where the output keeps params.json
        if folder.exists() and request.source.exists() and os.path.samefile(folder, request.source):
            raise UsageError(f"the output would overwrite the source in {folder}: choose another directory")
    made_folder = _make_folder(target)
    try:
        with lock.owned(target):
            return _Conversion(Job.of(request), target, max_memory, max_error, overwrite, warn, start, progress).run()
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error
    finally:
        if made_folder:
            with contextlib.suppress(OSError):  # not empty, or gone: somebody else is at work there
                target.rmdir()


class _Conversion:
    def __init__(
        self,
        job: Job,
        target: Path,
        max_memory: int,
        max_error: float | None,
        overwrite: bool,
        warn: Warn,
        start: Start,
        progress: Progress,
    ) -> None:
        self.job, self.target, self.max_memory, self.overwrite = job, target, max_memory, overwrite
        self.max_error = max_error
        self.warn, self.start, self.progress = warn, start, progress
        self.manifest = job.manifest()
        self.index = job.plan.index()
        self.lost_small_files = False

    def run(self) -> dict[str, Any]:
        for text in self.job.warnings:
            self.warn(text)
        contents = self.job.contents()
        if (needed := self.job.peak_memory(LEAST_MEMORY)) > max(self.max_memory, 2 * LEAST_MEMORY):
            raise UsageError(
                f"max-memory must be at least {(needed >> 20) + 1} MiB: "
                + ("a matrix is quantized whole" if self.job.recipe else "the source's tokenizer takes that")
            )
        resumed = self._look_at_target()
        if self._is_finished():
            return self._result("already complete", resumed)
        (self.target / INDEX).unlink(missing_ok=True)
        self.manifest.files.pop(INDEX, None)
        self._check_space()
        self.manifest.write(self.target)
        for first, make in contents.items():
            if first not in self.manifest.files:
                for name, data in make().items():
                    self._write_small(name, data)
        overflows = self._write_weights()
        for name, n in overflows.items():
            self.warn(f"{name}: {n} numbers were too large for {self.job.request.dtype} and became infinite")
        self._warn_of_nonfinite()
        self.manifest.add(INDEX, _sha256(self.index), len(self.index))
        self.manifest.write(self.target)
        self._write_small(INDEX, self.index)
        return self._result("converted", resumed)

    def _look_at_target(self) -> int:
        """Take over what an earlier run of the same conversion finished; refuse or clear anything else."""
        old = None
        if self.overwrite and not self._is_interrupted():
            _clear(self.target)
        else:
            old = Manifest.read(self.target)
            foreign = [p.name for p in self.target.iterdir() if p.name != lock.NAME and not p.name.endswith(".partial")]
            if old is None and foreign:
                raise NeedsOverwrite(
                    f"{self.target} is not empty ({sorted(foreign)[0]}) and not an output of this tool"
                )
        if old is None:
            return 0
        if differences := old.differences(self.manifest):
            raise NeedsOverwrite(f"{self.target} holds another conversion: {', '.join(differences)}")
        kept = old.intact(self.target, old.files)
        weights = {f.name for f in self.job.plan.files}
        # One that somebody has edited is left alone; one that is missing is made again, with its whole group.
        self.lost_small_files = any(not (self.target / name).is_file() for name in old.files.keys() - weights)
        if self.lost_small_files:
            kept &= weights
        self.manifest.files = {name: old.files[name] for name in kept}
        self.manifest.records = old.records
        # Of files that are made again these are made again, too.
        self.manifest.errors, self.manifest.nonfinite = old.errors, old.nonfinite
        return len(self._weights_done())

    def _is_interrupted(self) -> bool:
        """Whether the target holds the unfinished output of this very conversion: --overwrite has begun, and goes on."""
        try:
            old = Manifest.read(self.target)
        except BadInput:
            return False
        return old is not None and not (self.target / INDEX).exists() and not old.differences(self.manifest)

    def _weights_done(self) -> set[str]:
        return {f.name for f in self.job.plan.files} & self.manifest.files.keys()

    def _is_finished(self) -> bool:
        index = self.target / INDEX
        names = {f.name for f in self.job.plan.files}
        return (
            not self.lost_small_files
            and index.is_file()
            and index.read_bytes() == self.index
            and names <= self.manifest.files.keys()
        )

    def _check_space(self) -> None:
        left = [f for f in self.job.plan.files if f.name not in self.manifest.files]
        for file in left:  # what a killed run left may hold the very space that is needed
            (self.target / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
        needed = sum(f.size for f in left) + (64 << 20)  # and room for the tokenizer and other small files
        system = os.statvfs(self.target)
        free = system.f_bavail * system.f_frsize
        if free < needed:
            raise EnvironmentFailed(
                f"{self.target} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free some space or choose"
                " another disk"
            )
        if system.f_files and system.f_favail < len(left) + 32:
            raise EnvironmentFailed(f"{self.target} has no inodes left for {len(left)} files")

    def _write_small(self, name: str, data: bytes) -> None:
        from llama4_convert.writer import write_small

        path = self.target / name
        path.parent.mkdir(exist_ok=True)
        self.manifest.add(name, write_small(path, data), len(data))

    def _write_weights(self) -> dict[str, int]:
        from llama4_convert.planning import gathered
        from llama4_convert.resuming import resumed
        from llama4_convert.run import DamagedRecord, RunResult, Source, check_unread, planned_buffers, write_file
        from llama4_convert.writer import FileWriter, Workers

        going_on = resumed(self.job.plan, self._weights_done(), self.manifest.records)
        plan, left = going_on.plan, going_on.left
        for file in left:
            self.manifest.files.pop(file.name, None)
        checks = sum(record.size for _, record in plan.unread)
        total = sum(f.work for f in plan.files) + checks
        self.start(total, total - sum(f.work for f in left) - checks)
        result = RunResult()
        buffers = planned_buffers(self.max_memory)
        try:
            with Source(self.job.source.ranks, going_on.running) as source, Workers() as workers:
                check_unread(plan, source, self.progress)
                for file in left:
                    with FileWriter(self.target / file.name, file.size, buffers, workers) as writer:
                        for read in file.reads():
                            self.manifest.nonfinite.pop(gathered(read).name, None)
                        allowed = self.job.request.allow_nonfinite
                        write_file(plan, file, source, writer, result, self.progress, allowed)
                        self._take_errors(result)
                        self._take_nonfinite(result)
                        digest = writer.commit()
                    self.manifest.add(file.name, digest, file.size)
                    self.manifest.records = dict(source.running)
                    self.manifest.write(self.target)
        except DamagedRecord as damage:
            self._disown(damage.key)
            raise
        return result.overflows

    def _disown(self, key: tuple[int, str]) -> None:
        """Finished files that the damaged record went into are made again.

        So are those of other records of the same rank that were read in part: of a new download they must not be continued.
        """
        from llama4_convert.resuming import first_reads

        suspect = {key, *(other for other in self.manifest.records if other[0] == key[0])}
        used = [
            f.name for f in self.job.plan.files if f.name in self.manifest.files and suspect & first_reads(f).keys()
        ]
        for name in used:
            del self.manifest.files[name]
        self.manifest.records = {k: state for k, state in self.manifest.records.items() if k not in suspect}
        if used:
            self.manifest.write(self.target)

    def _take_errors(self, result: RunResult) -> None:
        """Into the manifest, with the file that they belong to. Raises CheckFailed beyond what was allowed."""
        from llama4_convert.quantization import relative_mse

        for module, (error, power) in result.errors.items():
            if self.max_error is not None and not relative_mse(error, power) <= self.max_error:
                raise CheckFailed(
                    f"{module}: a relative squared error of {relative_mse(error, power):.4g} is more than the"
                    f" {self.max_error:g} that --max-error allows"
                )
            self.manifest.errors[module] = [error, power]
        result.errors.clear()

    def _take_nonfinite(self, result: RunResult) -> None:
        self.manifest.nonfinite |= {name: list(found) for name, found in result.nonfinite.items()}
        result.nonfinite.clear()

    def _nonfinite(self) -> list[dict[str, Any]]:
        """Where NaN and infinities are, how many, and whether they were replaced because they were quantized."""
        replaced = {planned.gathered.name for planned in self.job.plan.matrices if planned.scheme}
        return [
            {"tensor": name, "nan": nan, "inf": inf, "replaced": name in replaced}
            for name, (nan, inf) in sorted(self.manifest.nonfinite.items())
        ]

    def _warn_of_nonfinite(self) -> None:
        from llama4_convert.nonfinite import NonFinite

        found = self._nonfinite()
        for replaced, what in ((False, "kept as they are"), (True, "quantized as 0 and as the largest magnitude")):
            named = [
                f"{one['tensor']} ({NonFinite(one['nan'], one['inf'])})" for one in found if one["replaced"] == replaced
            ]
            if named:
                more = f" and {len(named) - _SHOWN} more tensors, which inspect lists" if len(named) > _SHOWN else ""
                self.warn(f"numbers that are not finite, {what}: {', '.join(named[:_SHOWN])}{more}")

    def _result(self, status: str, resumed: int) -> dict[str, Any]:
        plan = self.job.plan
        return {
            "status": status,
            "output": str(self.target),
            "variant": self.job.variant,
            "variant_reason": self.job.variant_reason,
            "parameters": plan.parameters,
            "output_bytes": plan.output_bytes,
            "files": [{"file": name, **entry} for name, entry in sorted(self.manifest.files.items())],
            "files_kept_from_earlier_run": resumed,
            "dropped": [{"name": name, "why": why} for name, why in plan.dropped.items()],
            "warnings": self.job.warnings,
            "nonfinite": self._nonfinite(),
            **self._quantization(),
        }

    def _quantization(self) -> dict[str, Any]:
        from llama4_convert.quantization import describe_errors, describe_sizes

        plan, recipe = self.job.plan, self.job.recipe
        if recipe is None:
            return {}
        errors = {module: (pair[0], pair[1]) for module, pair in self.manifest.errors.items()}
        told = {"recipe": recipe.name, **describe_sizes(plan), **describe_errors(plan.matrices, errors)}
        return {"quantization": told}


def _make_folder(target: Path) -> bool:
    """Make `target` if need be; says whether it did."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: give a directory to write to")
    try:
        target.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise from_os_error(error, f"making {target}") from error
    return True


def _clear(target: Path) -> None:
    """Remove a model from `target`: the index first, so that it never points at files of another conversion."""
    (target / INDEX).unlink(missing_ok=True)
    try:
        old = Manifest.read(target)
    except BadInput:
        old = None  # damaged; --overwrite is the advice for that
    for name in old.files if old else ():
        if (target / name).parent.resolve() in (target.resolve(), (target / "original").resolve()):
            (target / name).unlink(missing_ok=True)
    (target / NAME).unlink(missing_ok=True)
    # Readers prefer a bare model.safetensors to an index.
    for path in target.glob("model*.safetensors*"):
        path.unlink()


def _notices(source: Path) -> dict[str, bytes]:
    """Licence texts beside the weights: Meta's licence asks that they go with every copy."""
    from llama4_convert.checkpoints.meta import is_file_name, read_small

    return {
        path.name: read_small(path)
        for path in sorted(source.iterdir())
        if path.name.split(".")[0].upper() in SOURCE_NOTICES and is_file_name(path.name) and path.is_file()
    }


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
