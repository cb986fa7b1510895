"""Meta's own quantize script and loader on a CPU: `quantize.py` and `quantization/loader.py` of llama-models' llama4.

Both run as they are. What they need of a GPU is stood in for: FBGEMM's operators by their formulas in plain torch, and the other
ranks' processes by one process that is told another rank each time.

    quantize(src, dst, ranks=2, mode="fp8_mixed")   # consolidated.NN.pth and fp8_scales_N.pt as the script writes them
    load(dst, rank=0, ranks=2)                      # {"layers.1.feed_forward.experts.w1": weight and scale} by the loader
    dequantized(dst, rank=0)                        # the rank's tensors with numbers in the place of codes
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support import meta_model

SCALES = {"fp8_mixed": "fp8_scales_{}.pt", "int4_mixed": "int4_scales_{}.pt"}


def fp8_per_row(x: Tensor, num_tokens: Tensor | None = None, scale_ub: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FBGEMM's quantize_fp8_per_row: codes [..., K] and float32 scales [...], one for each row.

    `dynamicQuantizeMatrixRowwise` of fbgemm_gpu/experimental/gen_ai/src/quantize/quantize.cu: the row's maximum over 448, at
    least 1 / (448 * 512); weight / scale to e4m3, saturating.
    """
    largest = x.float().abs().amax(-1)
    if scale_ub is not None:
        largest = torch.minimum(largest, scale_ub)
    scale = torch.maximum(largest / 448.0, torch.tensor(1 / (448 * 512), dtype=torch.float32))
    return (x.float() / scale.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def fp8_bmm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """f8f8bf16_rowwise_batched: [E, G, K] times [E, N, K], both with scales a row."""
    return torch.bmm(x.float() * x_scale.unsqueeze(-1), (w.float() * w_scale.unsqueeze(-1)).mT).bfloat16()


@functools.cache
def _stand_ins() -> dict[str, types.ModuleType]:
    """Packages that Meta's files import: those that are not here, empty, and `models`, as the script calls llama_models."""
    absent = ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai", "fire")
    modules = {name: types.ModuleType(name) for name in absent}
    with mock.patch.dict(sys.modules, modules):
        for path in ("datatypes", "quantize_impls", "llama4.args", "llama4.model"):
            modules[f"models.{path}"] = importlib.import_module(f"llama_models.{path}")
    modules["models.llama4.generation"] = modules[
        "models.datatypes"
    ]  # of which the script wants QuantizationMode alone
    return {**modules, "models": types.ModuleType("models"), "models.llama4": types.ModuleType("models.llama4")}


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Meta's files of quantization can be imported, though what they ask for is not here."""
    with mock.patch.dict(sys.modules, _stand_ins()):
        yield


@functools.cache
def _module(name: str) -> Any:
    with importable():
        return importlib.import_module(name)


@contextlib.contextmanager
def _as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Meta's code sees `ranks` processes, and is the `rank`-th."""
    meta_model.init()
    operators = types.SimpleNamespace(quantize_fp8_per_row=fp8_per_row, f8f8bf16_rowwise_batched=fp8_bmm)
    distributed, default = torch.distributed, torch.get_default_dtype()
    with (
        importable(),
        mock.patch.object(torch.ops, "fbgemm", operators, create=True),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(distributed, "get_rank", return_value=rank),
        mock.patch.object(distributed, "get_world_size", return_value=ranks),
        mock.patch.object(distributed, "barrier"),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def quantize(src: Path, dst: Path, *, ranks: int, mode: str) -> Path:
    """Run Meta's script on every rank of `src`; params.json and tokenizer.model go with it."""
    script = _module("llama_models.llama4.scripts.quantize")
    for rank in range(ranks):
        with _as_rank(rank, ranks), contextlib.redirect_stdout(None):
            script.ffn_quantize(str(src), str(dst), mode, ranks)
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(src / name, dst / name)
    return dst


def load(folder: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """One rank's quantized experts as Meta's loader makes them of an FP8 checkpoint: Fp8RowwiseWeights by name."""
    loader = _module("llama_models.llama4.quantization.loader")
    params = json.loads((folder / "params.json").read_text())
    with _as_rank(rank, ranks), mock.patch.object(Tensor, "to", _to_cpu), _here():
        from llama_models.llama4.model import Transformer

        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(meta_model.model_args(params))
        state = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=False)
        model.load_state_dict(state, strict=False)
        loader.convert_to_quantized_model(model, str(folder), "fp8_mixed", use_rich_progress=False)
    found = {}
    for layer, block in enumerate(model.layers):
        for name in ("w1", "w2", "w3"):
            weight = getattr(getattr(block.feed_forward, "experts", None), name, None)
            if hasattr(weight, "activation_scale_ub"):
                found[f"layers.{layer}.feed_forward.experts.{name}"] = weight
    return found


_to = Tensor.to
_tensor = torch.tensor


def _to_cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("device", None)
    return _to(self, *args, **kwargs) if args or kwargs else self


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """Tensors that are asked for on a GPU stay on the CPU."""

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return _tensor(*args, **kwargs)

    with mock.patch.object(torch, "tensor", tensor):
        yield


def dequantized(folder: Path, rank: int) -> dict[str, Tensor]:
    """The rank's state dict with bf16 in the place of codes, slowly and by the formats' definitions: [E * K, N]."""
    state = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=False)
    state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}
    mode = next((mode for mode, name in SCALES.items() if (folder / name.format(rank)).exists()), None)
    if mode is None:
        return state
    names = {"moe_w_in_eD_F": "w1", "moe_w_out_eF_D": "w2", "moe_w_swiglu_eD_F": "w3"}
    scales = torch.load(folder / SCALES[mode].format(rank), weights_only=True)
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
            stem, _, name = key.rpartition(".")
            scale = scales[f"{stem}.{names.get(name, name)}"]
            experts, n = scale.shape[0], value.shape[-1]
            codes = value.reshape(experts, -1, n)
            if mode == "fp8_mixed":
                numbers = codes.float() * scale[:, None, :]
            else:
                bytes_ = codes.contiguous().view(torch.int8)
                low, high = (bytes_ << 4) >> 4, bytes_ >> 4
                ints = torch.stack([low, high], 2).flatten(1, 2)  # inputs 2j and 2j + 1 in turn
                numbers = ints.float() * scale.repeat_interleave(128, 1)
            shape = (-1, n) if value.dim() == 2 else (experts, -1, n)
            state[key] = numbers.bfloat16().reshape(shape)
    return state
