"""What `plan`, `convert` and `export` return: the keys of their `--json`, in its order, each with what it is."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from llama4_convert.checkpoints.manifest import DroppedKey, MatrixError, NonFiniteTensor, QuantizationError
from llama4_convert.fitting.results import FitVerdict
from llama4_convert.planning.adapter import AdapterSummary


class Repaired(Struct, frozen=True, kw_only=True):
    """A field of the source's small files that was wrong."""

    field: str
    """its name"""
    found: Any
    """its value in the source; null if it was missing"""
    used: Any
    """the value that is written"""


class PlannedQuantization(Struct, frozen=True, kw_only=True):
    """What a recipe does to the size of a model."""

    recipe: str
    """its name"""
    kept_bits: int
    """matrices whose codes and scales are the source's own"""
    bytes_before: dict[str, int]
    """bytes by family of matrices, before they are encoded"""
    bytes_after: dict[str, int]
    """bytes by family of matrices, codes and scales together"""
    bits_per_quantized_weight: float | None
    """scales included; null if nothing is quantized"""


class Quantization(PlannedQuantization, frozen=True, kw_only=True):
    """What a recipe did, with the error that it made."""

    matrices: int
    """matrices that were quantized"""
    relative_mse: float
    """sum of squared errors over sum of squared weights"""
    sqnr_db: float | None
    """the same in decibels; null if there is no error"""
    families: dict[str, QuantizationError]
    """errors by family"""
    worst: list[MatrixError]
    """the matrices of the largest errors"""


class PlannedFileSummary(Struct, frozen=True, kw_only=True):
    """A weight file that would be written."""

    file: str
    """its name"""
    bytes: int
    """its size"""
    tensors: int
    """how many it holds"""


class PlannedTensorSummary(Struct, frozen=True, kw_only=True):
    """A tensor that would be written."""

    name: str
    """its key"""
    dtype: str
    """as safetensors spells it"""
    shape: list[int]
    """its dimensions"""
    file: str
    """the file that would hold it"""
    offset: int
    """bytes from the beginning of the file"""
    bytes: int
    """its size"""
    sources: list[str]
    """keys of SRC that it is made of"""


class PlanSummary(Struct, frozen=True, kw_only=True):
    """What `convert` would write."""

    source: str
    """SRC as it was given"""
    ranks: int
    """rank files of the source (Meta's layout)"""
    variant: str
    """base, instruct or guard"""
    variant_reason: str
    """what that was concluded from"""
    dtype: str
    """of most of the output, as safetensors spells it"""
    parameters: int
    """numbers of the output, dequantized"""
    output_bytes: int
    """size of all weight files"""
    peak_memory_bytes: int
    """own memory of `convert` under its default bound"""
    max_position_embeddings: int
    """context length that config.json will say"""
    files: list[PlannedFileSummary]
    """the weight files"""
    tensors: list[PlannedTensorSummary]
    """every tensor"""
    dropped: list[DroppedKey]
    """entries of the source that are not converted"""
    warnings: list[str]
    """what stderr says, too"""
    quantization: PlannedQuantization | UnsetType = UNSET
    """with --recipe: sizes"""
    adapter: AdapterSummary | UnsetType = UNSET
    """with --adapter: what is merged"""
    repaired: list[Repaired] | UnsetType = UNSET
    """with --vision-from or --config-from: what was wrong in SRC's config.json"""
    fit: FitVerdict | UnsetType = UNSET
    """with --gpu: the verdict of `fit`"""


class WrittenFile(Struct, frozen=True, kw_only=True):
    """A file of the output."""

    file: str
    """its name"""
    sha256: str
    """its digest"""
    size: int
    """its bytes"""


class Conversion(Struct, frozen=True, kw_only=True):
    """What `convert` wrote."""

    status: Literal["converted", "already complete"]
    """`converted` or `already complete`"""
    output: str
    """DST"""
    variant: str
    """base, instruct or guard"""
    variant_reason: str
    """what that was concluded from"""
    parameters: int
    """numbers of the output, dequantized"""
    output_bytes: int
    """size of all weight files"""
    dropped: list[DroppedKey]
    """entries of the source that were not converted"""
    adapter: AdapterSummary | UnsetType = UNSET
    """with --adapter: as of `plan`"""
    repaired: list[Repaired] | UnsetType = UNSET
    """with --vision-from or --config-from: as of `plan`"""
    files: list[WrittenFile]
    """every file of the output"""
    files_kept_from_earlier_run: int
    """weight files that were there already"""
    warnings: list[str]
    """what stderr says, too"""
    nonfinite: list[NonFiniteTensor]
    """the tensors that have NaN or infinities"""
    quantization: Quantization | UnsetType = UNSET
    """with --recipe: sizes as of `plan`, and errors"""


class ExportQuantization(Struct, frozen=True, kw_only=True):
    """What a recipe of the format meta did."""

    recipe: str
    """its name"""
    matrices: int
    """matrices that were quantized, each expert and rank for itself"""
    kept_bits: int
    """matrices whose codes and scales are the source's own"""
    relative_mse: float
    """sum of squared errors over sum of squared weights"""
    sqnr_db: float | None
    """the same in decibels; null if there is no error"""


class Export(Struct, frozen=True, kw_only=True):
    """What `export` wrote."""

    status: Literal["converted", "already complete"]
    """`converted` or `already complete`"""
    output: str
    """DST"""
    ranks: int
    """rank files"""
    parameters: int
    """numbers of the model"""
    output_bytes: int
    """size of all rank files"""
    dropped: list[DroppedKey]
    """entries of the source that were not exported"""
    files: list[WrittenFile]
    """every file of the output"""
    files_kept_from_earlier_run: int
    """weight files that were there already"""
    warnings: list[str]
    """what stderr says, too"""
    nonfinite: list[NonFiniteTensor]
    """the tensors that have NaN or infinities"""
    quantization: ExportQuantization | UnsetType = UNSET
    """with --recipe: the errors"""
