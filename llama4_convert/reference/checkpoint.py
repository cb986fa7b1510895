"""`load_reference`: a checkpoint of either layout as a running model of our own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4 import weights_meta, weights_transformers
from llama4.config import Llama4Config
from llama4.geometry import InvalidModel
from llama4.weights import BindingError, LogicalTensor
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.manifest import make_again
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.readers import CheckpointReader, DirectoryReader, RankReader
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from llama4_convert.files import json_object
from llama4_convert.metadata.tokenizer import TokenIds
from llama4_convert.planning.binding import check_complete, check_ranks

if TYPE_CHECKING:
    import torch

    from llama4.model import Llama4ForCausalLM

_KEPT_WEIGHTS_BYTES = 4 << 30  # in memory, unless the caller asks for another bound
_WEIGHTS_AHEAD_BYTES = 256 << 20  # that are read before they are needed: three of Scout's matrices


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of either layout, as the reference sees it: what it says of itself, and its logical tensors."""

    path: Path
    layout: str  # "meta" or "transformers"
    config: Llama4Config
    stop_ids: tuple[int, ...]  # tokens that end a generation
    bos_id: int | None
    pad_id: int | None
    readers: tuple[CheckpointReader, ...]  # one a rank, or the directory's
    # What config.json says beside the configuration: field -> (what it should be, what it is).
    stated_fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should know of the files that were read
    is_text_only: bool = False  # a directory that says it is a text model's, not one whose vision tower is lost

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Meta's directory or a Transformers one. Raises UsageError, BadInput or EnvironmentFailed."""
        path = Path(path)
        meta = is_meta(path)
        try:
            return (
                _open_meta(MetaCheckpoint.open(path)) if meta else _open_transformers(TransformersCheckpoint.open(path))
            )
        except InvalidModel as error:
            raise BadInput(f"{path}: {'params.json' if meta else 'config.json'}: {error}") from error

    @property
    def quantized(self) -> Mapping[str, str]:
        """Keys that are dequantized as they are read, each with its scheme: "int4"."""
        return {key: tensor.kind for key, tensor in self.readers[0].quantized.items()}

    @property
    def unknown_quantization(self) -> str | None:
        """The method of a quantized directory whose matrices we cannot read, as its config.json calls it."""
        return self.readers[0].unknown_method

    def lossy_beside(self, reference: Checkpoint) -> Mapping[str, str]:
        """Which of `quantized` cannot be the reference's bit by bit: none if that is quantized in the same layout and ranks.

        A quantized original is the reference as it is: what its conversion was quantized to is another thing.
        """
        alike = reference.layout == self.layout and len(reference.readers) == len(self.readers)
        return {} if reference.quantized and alike else self.quantized

    def logical_tensors(self, config: Llama4Config | None = None, *, lenient: bool = False) -> Iterator[LogicalTensor]:
        """Every tensor, in model order, bound for this checkpoint's configuration or another.

        Raises BindingError; if `lenient` what is missing is `llama4.weights.absent`.
        """
        config = config or self.config
        if self.layout == "meta":
            return weights_meta.logical_tensors(self.readers, config, lenient)
        return weights_transformers.logical_tensors(self.readers[0], config, lenient, self.is_multimodal)

    @property
    def is_multimodal(self) -> bool:
        """Whether its tensors are named as those of a model that sees are (also if its vision tower is lost)."""
        return self.config.vision_config is not None if self.layout == "meta" else not self.is_text_only


def load_reference(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_bytes: int = _KEPT_WEIGHTS_BYTES,
) -> Llama4ForCausalLM:
    """The model of a checkpoint in either layout: Meta's of any rank count, or Transformers', experts fused or linearized.

    `model(tokens, pixel_values=None)` takes token ids [batch, tokens] and tiles [tiles, 3, H, W] and returns logits [batch,
    tokens, vocabulary]. Weights are read when they are needed and cast to `dtype` (None: the checkpoint's); up to `keep_bytes`
    of them stay in memory, so that a small model is read once and a large one runs all the same. Raises UsageError, BadInput
    or EnvironmentFailed.
    """
    try:
        return model_of(Checkpoint.open(path), dtype=dtype, device=device, keep_bytes=keep_bytes)
    except InvalidModel as error:
        raise BadInput(f"{path}: {error}: {make_again(Path(path))}") from error


def model_of(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_bytes: int = _KEPT_WEIGHTS_BYTES,
    ahead_bytes: int = _WEIGHTS_AHEAD_BYTES,
    config: Llama4Config | None = None,
    rounded_to: Mapping[str, str] | None = None,
) -> Llama4ForCausalLM:
    """A checkpoint's model; `config` in the place of its own, to tell wrong weights from wrong words about them.

    `rounded_to`: see `LazyWeights`. Raises BindingError if a tensor is missing, ConfigError for a configuration that contradicts
    itself.
    """
    from llama4.loading import DTYPES, LazyWeights
    from llama4.model import build

    config = config or checkpoint.config
    for error in checkpoint.readers[0].damaged.values():
        raise error  # now, not when the first token comes to that expert
    tensors = list(checkpoint.logical_tensors(config))
    if dtype is None:
        if tensors[0].dtype not in DTYPES:
            raise BindingError(f"{tensors[0].keys[0]} is {tensors[0].dtype}, which the reference cannot compute with")
        dtype = DTYPES[tensors[0].dtype]
    weights = LazyWeights(
        tensors,
        config,
        dtype=dtype,
        device=device,
        keep_bytes=keep_bytes,
        ahead_bytes=ahead_bytes,
        rounded_to=rounded_to,
    )
    return build(config, weights)


def _open_meta(checkpoint: MetaCheckpoint) -> Checkpoint:
    check_ranks(checkpoint)
    readers = tuple(RankReader(index) for index in checkpoint.ranks)
    config = Llama4Config.from_geometry(weights_meta.complete(readers, checkpoint.geometry))
    rows = config.text_config.vocab_size
    ids = TokenIds.from_tokenizer(checkpoint.small_files.get("tokenizer.model"), rows)
    if ids is not None and ids.vocab_size > rows:
        ids = None  # another model's tokenizer: `convert` refuses it
    if ids is not None and config.vision_config:
        config = replace(config, image_token_index=ids.patch, boi_token_index=ids.boi, eoi_token_index=ids.eoi)
    return Checkpoint(
        checkpoint.path,
        "meta",
        config,
        stop_ids=(ids.eos, ids.eom, ids.eot) if ids else (),
        bos_id=ids.bos if ids else None,
        pad_id=ids.pad if ids else None,
        readers=readers,
        notes=checkpoint.notes,
    )


def _open_transformers(checkpoint: TransformersCheckpoint) -> Checkpoint:
    check_complete(checkpoint)
    text: Any = checkpoint.config.get("text_config") or checkpoint.config
    config = Llama4Config.from_json(checkpoint.config)
    return Checkpoint(
        checkpoint.path,
        "transformers",
        config,
        stop_ids=_stop_ids(checkpoint.path, text),
        bos_id=_token(text, "bos_token_id"),
        pad_id=_token(text, "pad_token_id"),
        readers=(_reader(checkpoint),),
        notes=checkpoint.notes,
        stated_fields=_stated_fields(checkpoint, text),
        is_text_only="text_config" not in checkpoint.config,
    )


def _reader(checkpoint: TransformersCheckpoint) -> DirectoryReader:
    if "quantization_config" not in checkpoint.config:
        return DirectoryReader(checkpoint)
    from llama4_convert.checkpoints.quantized import QuantizedReader

    return QuantizedReader(checkpoint)


def _stated_fields(checkpoint: TransformersCheckpoint, text: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that no computation of ours needs and readers choose their code by, each with what it should be."""
    body = checkpoint.config
    whole = "text_config" in body
    vision = body.get("vision_config")
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in TORCH_NAMES:
            sizes[tensor.dtype] += tensor.nbytes
    dtype = TORCH_NAMES[sizes.most_common(1)[0][0]] if sizes else None
    name = "torch_dtype" if "torch_dtype" in body else "dtype"
    expected: dict[str, Any] = {
        "model_type": "llama4" if whole else "llama4_text",
        "architectures": ["Llama4ForConditionalGeneration" if whole else "Llama4ForCausalLM"],
        name: dtype,
    }
    found: dict[str, tuple[Any, Any]] = {
        field: (expected[field], body.get(field)) for field in expected if field in body
    }
    if whole and "model_type" in text:
        found["text_config.model_type"] = "llama4_text", text["model_type"]
    if whole and body.get("pad_token_id") is not None:
        found["pad_token_id"] = text.get("pad_token_id"), body["pad_token_id"]
    if isinstance(vision, Mapping) and "num_channels" in vision:
        found["vision_config.num_channels"] = 3, vision["num_channels"]
    return found


def _stop_ids(path: Path, text: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json decides where it is there, as in Transformers."""
    file = path / "generation_config.json"
    eos = (json_object(file) if file.exists() else text).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    return tuple(i for i in ids if type(i) is int)


def _token(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    return value if type(value) is int else None
