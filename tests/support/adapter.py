"""Adapters trained (well: filled with noise) and merged by PEFT itself, and what a directory holds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from llama4_convert.validation.parity.transformers_runner import load_transformers

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is as it should be: biases, embeddings that are saved, patterns that it matches all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model: Any, folder: Path, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """A saved adapter for `model` whose factors are all noise (PEFT begins with B = 0); what is trained whole is, too."""
    generator = torch.Generator().manual_seed(7)
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**config))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
        if dtype:
            adapted.to(dtype)
        adapted.save_pretrained(folder)
    return folder


def merged_model(model: Any, adapter: Path) -> Any:
    with quiet():
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def merged(path: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What PEFT makes of a directory and an adapter."""
    state: dict[str, Tensor] = merged_model(load_transformers(path, dtype), adapter).state_dict()
    return state


def tensors(path: Path) -> dict[str, Tensor]:
    return {key: t for file in sorted(path.glob("*.safetensors")) for key, t in load_file(file).items()}


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The keys of tensors that are not equal bit by bit."""
    assert found.keys() == expected.keys()
    return [
        key for key in found if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key])
    ]


def linearize(model: Any) -> Any:
    """The model with each expert's projections as linear layers, as quantized models have them."""
    for module in model.modules():
        if type(module).__name__ == "Llama4TextMoe":
            module.experts = nn.ModuleList(_Expert(module.experts, e) for e in range(module.experts.num_experts))
    return model


class _Expert(nn.Module):
    def __init__(self, fused: Any, e: int) -> None:
        super().__init__()
        gate, up = fused.gate_up_proj[e].chunk(2, -1)
        for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[e])):
            linear = nn.Linear(*matrix.shape, bias=False)
            linear.weight.data = matrix.T.contiguous().detach().clone()
            setattr(self, name, linear)


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a linearized model with its experts fused again."""
    found = {key: t for key, t in state.items() if ".experts." not in key}
    for stem in sorted({key.partition(".experts.")[0] for key in state if ".experts." in key}):
        each = [
            {name: state[f"{stem}.experts.{e}.{name}_proj.weight"].T for name in ("gate", "up", "down")}
            for e in range(sum(key.startswith(f"{stem}.experts.") for key in state) // 3)
        ]
        found[f"{stem}.experts.gate_up_proj"] = torch.stack([torch.cat([m["gate"], m["up"]], -1) for m in each])
        found[f"{stem}.experts.down_proj"] = torch.stack([m["down"] for m in each])
    return found
