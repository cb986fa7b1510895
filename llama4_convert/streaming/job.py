"""What a run carries out, as one value: the plan of the weights, and every other file of the output. And how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.manifest import Manifest, NonFiniteTensor
from llama4_convert.checkpoints.tensors import TensorFile
from llama4_convert.metadata.config import to_json
from llama4_convert.metadata.tokenizer import TokenizerSource
from llama4_convert.planning.plan import Plan


@dataclass(frozen=True)
class Job:
    """Everything that decides an output, known before a byte of tensor data is read."""

    plan: Plan
    source_files: Sequence[TensorFile]  # the files that the plan's pieces number
    manifest: Manifest  # with the source and the options, and no files yet: it identifies the output
    small_files: Mapping[str, bytes]  # name in the output -> content; config.json is not among them
    marker_content: bytes  # of `manifest.marker`, which is written last
    tokenizer: TokenizerSource | None = None  # converted while small files are written: it takes memory
    # config.json, made when it is written: Transformers cannot express every params.json, and `plan` shows such a model, too.
    config: Callable[[], Mapping[str, Any]] | None = None
    dtype: str | None = None  # every tensor is cast to it
    allow_nonfinite: bool = False  # quantize matrices with NaN and infinities, as 0 and the largest magnitude
    expected_digests: Mapping[Path, Digest] = field(default_factory=dict)  # of source files without checksums
    tokenizer_bytes: int = 0  # size of the tokenizer file that is converted, for the memory that this takes
    warnings: Sequence[str] = ()

    def contents(self) -> dict[str, bytes]:
        """Every small file but the tokenizer's. Raises BadInput for a model that config.json cannot express."""
        return {**({"config.json": to_json(self.config())} if self.config else {}), **self.small_files}


@dataclass(frozen=True)
class Run:
    """A job and its output. `manifest` lists the finished files: a run adds each file that it finishes."""

    job: Job
    output: Path
    manifest: Manifest
    kept_weights: int = 0  # weight files that an earlier run has finished
    was_complete: bool = False  # nothing was left to do

    @property
    def nonfinite(self) -> list[NonFiniteTensor]:
        """The tensors of the finished files that have NaN or infinities, by name."""
        quantized = {encoded.gathered.name for encoded in self.job.plan.matrices if encoded.is_quantized}
        return [
            NonFiniteTensor(tensor=name, nan=nan, inf=inf, replaced=name in quantized)
            for name, (nan, inf) in sorted(self.manifest.nonfinite().items())
        ]
