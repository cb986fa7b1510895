"""The options of a conversion, before its source is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama4_convert.checkpoints.tensors import SAFETENSORS_NAMES
from llama4_convert.errors import UsageError
from llama4_convert.metadata import variant

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Request:
    """The options of a conversion. Sizes count bytes; None means that the source decides."""

    source: Path
    text_only: bool = False
    variant: str | None = None
    dtype: str | None = None
    shard_size: int = DEFAULT_SHARD_BYTES
    max_position_embeddings: int | None = None
    allow_rank_mismatch: bool = False
    recipe: str | None = None  # a built-in one's name, or the path of a TOML file
    allow_nonfinite: bool = False  # quantize matrices with NaN and infinities, too: as 0 and as the largest magnitude
    device: str = "cpu"  # where a recipe computes: decides no byte
    adapter: Path | None = None  # a PEFT LoRA adapter's directory, to be merged
    vision_from: Path | None = None  # the model that the source, a text-only fine-tune, was made from
    config_from: Path | None = None  # the model that the source was made from, to repair its config.json by

    @property
    def sources(self) -> list[Path]:
        """Every directory that the request names. A conversion reads them and never writes to them."""
        named = (self.source, self.adapter, self.vision_from, self.config_from)
        return [Path(path) for path in named if path is not None]

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in SAFETENSORS_NAMES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(SAFETENSORS_NAMES)}")
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


def _check_device(request: Request) -> None:
    from quant.encoders import encoder_for
    from quant.recipe import Scheme

    if request.recipe is None:
        raise UsageError("--device is where a recipe computes: without --recipe nothing is computed")
    try:
        encoder_for(Scheme("int4"), request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
