"""`inspect --stats`: the numbers are torch's, in either layout, whatever the dtype and the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file

from llama4_convert import convert, inspect
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.inspection.results import TensorStatistics
from llama4_convert.inspection.statistics import statistics
from tests.support import commands

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def numbers(found: TensorStatistics) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(found).items() if name != "tensor"}


def expected(values: torch.Tensor) -> dict[str, Any]:
    wide = values.double().reshape(-1)
    finite = wide[wide.isfinite()]
    nonzero = finite[finite != 0].abs().numpy()
    exponents = np.floor(np.log2(nonzero)).astype(int)
    return {
        "min": finite.min().item(),
        "max": finite.max().item(),
        "mean": pytest.approx(finite.mean().item(), abs=1e-12),
        "std": pytest.approx(finite.std(unbiased=False).item(), abs=1e-9),
        "zeros": int((finite == 0).sum()),
        "nan": int(wide.isnan().sum()),
        "inf": int(wide.isinf().sum()),
        "histogram": [(int(e), int(n)) for e, n in zip(*np.unique(exponents, return_counts=True), strict=True)],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: str) -> None:
    values = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.01
    values[0, :5] = torch.tensor([0.0, -0.0, math.nan, 1.0, -2.0])
    if dtype != "F8_E4M3":
        values[1, :2] = torch.tensor([math.inf, -math.inf])
    values = values.to(DTYPES[dtype])
    bits = values.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[values.itemsize]).numpy()
    assert numbers(statistics([bits[:2], bits[2:]], dtype).result("x")) == expected(values)


def test_every_fp8_pattern() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    found = statistics([every.numpy()], "F8_E4M3").result("x")
    assert numbers(found) == expected(every.view(torch.float8_e4m3fn).float())


def test_nothing_and_nothing_finite() -> None:
    for bits in (np.empty((0, 4), np.uint16), np.full(3, 0x7FC0, np.uint16)):
        found = statistics([bits], "BF16").result("x")
        assert (found.min, found.max, found.mean, found.std) == (None,) * 4
        assert found.nan == bits.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_layouts(meta_checkpoint: Callable[..., Any], tmp_path: Path, dtype: torch.dtype) -> None:
    """Sharded tensors over all ranks, replicated ones once, dropped ones too."""
    source = meta_checkpoint("maverick", 2, dtype=dtype).src
    convert(source, tmp_path / "out")
    tensors: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    told = inspect(tmp_path / "out", stats=True)
    assert {one.tensor: numbers(one) for one in told.stats} == {
        key: expected(tensor) for key, tensor in tensors.items()
    }
    assert told.nonfinite == []
    ours = {one.tensor: one for one in inspect(source, stats=True).stats}
    pairs = {
        "tok_embeddings.weight": "embed_tokens.weight",
        "layers.0.attention.wo.weight": "layers.0.self_attn.o_proj.weight",
        "norm.weight": "model.norm.weight",
    }
    for meta, name in pairs.items():
        theirs = expected(next(tensor for key, tensor in tensors.items() if key.endswith(name)))
        assert numbers(ours[meta]) == theirs


@pytest.mark.parametrize("recipe", ["int4", "fp8", "nf4"])
def test_a_quantized_matrix_is_what_it_stands_for(recipe: str, tmp_path: Path) -> None:
    from llama4_convert import synth

    synth(tmp_path / "meta", tiny=True, ranks=1)
    convert(tmp_path / "meta", tmp_path / "out", recipe=recipe)
    told = {one.tensor: one for one in inspect(tmp_path / "out", stats=True).stats}
    layers = [int(key.split(".")[3]) for key in told if key.startswith("language_model.model.layers.")]
    assert layers == sorted(layers)
    reader = QuantizedReader(TransformersCheckpoint.open(tmp_path / "out"))
    assert reader.quantized
    for key in reader.quantized:
        wide = torch.from_numpy(reader.read(key).astype(np.uint16)).view(torch.bfloat16)
        assert numbers(told[key]) == expected(wide)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llama4_convert import synth

    synth(tmp_path / "meta", tiny=True, ranks=2)
    lines = commands.run(capsys, "inspect", tmp_path / "meta", "--stats").out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:4] == ["min", "max", "mean", "std"])
    rows = {line.split()[-1]: line for line in lines[head + 1 :]}
    told = next(one for one in inspect(tmp_path / "meta", stats=True).stats if one.tensor == "norm.weight")
    shown = [f"{getattr(told, name):.3g}" for name in ("min", "max", "mean", "std", "zeros")]
    assert rows["norm.weight"].split()[:5] == shown
    assert "█" in rows["tok_embeddings.weight"]
