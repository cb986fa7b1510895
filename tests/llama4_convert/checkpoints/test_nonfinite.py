"""NaN and infinities: kept and counted by convert, refused by recipes unless allowed, named by inspect."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from msgspec import to_builtins
from safetensors.torch import load_file

from llama4_convert import convert, inspect
from llama4_convert.checkpoints.numbers import count_nonfinite, make_finite
from llama4_convert.errors import BadInput, CheckFailed, UsageError
from tests.support import commands, meta_model

NUMPY = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EXPERT = "model.layers.0.feed_forward.experts.1.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
ROUTER = "model.layers.0.feed_forward.router.weight"


def as_torch(data: bytes | bytearray, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype])


@hypothesis.given(dtype=st.sampled_from(list(NUMPY)), data=st.data())
def test_counts_are_torchs(dtype: str, data: st.DataObject) -> None:
    width = np.dtype(NUMPY[dtype]).itemsize
    infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    near = st.sampled_from([infinity + step for step in (-1, 0, 1)])
    patterns = st.one_of(st.integers(0, 256**width - 1), near, near.map(lambda x: x | 1 << (8 * width - 1)))
    bits = np.array(data.draw(st.lists(patterns, min_size=1, max_size=40)), NUMPY[dtype])
    values = as_torch(bits.tobytes(), dtype)
    assert count_nonfinite(bits.tobytes(), dtype) == (int(values.isnan().sum()), int(values.isinf().sum()))

    made = bytearray(bits.tobytes())
    assert make_finite(made, dtype) == count_nonfinite(bits.tobytes(), dtype)
    finite = values[values.isfinite()]
    largest = finite.abs().max() if len(finite) else torch.tensor(0, dtype=TORCH[dtype])
    expected = torch.where(values.isinf(), torch.copysign(largest, values), torch.where(values.isnan(), 0, values))
    assert torch.equal(as_torch(made, dtype), expected)


def test_one_among_many_is_found_wherever_it_is() -> None:
    for at in (0, 524_287, 524_288, 1_300_000):  # pieces of the pass end at multiples of 524,288
        for bits in (0x7F80, 0xFF80, 0x7FFF, 0xFFFF):
            numbers = np.full(1_300_001, 0xBF80, np.uint16)
            numbers[at] = bits
            assert sum(count_nonfinite(numbers.tobytes(), "BF16")) == 1


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Meta's code with NaN and infinities in an expert, the embedding and a router."""
    params = {
        **meta_model.GEOMETRIES["scout"],
        "dim": 256,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 64,
        "multiple_of": 128,
        "ffn_dim_multiplier": 0.5,
        "ffn_exp": 4.0,
        "vision_args": None,
    }
    model = meta_model.build(params, seed=0)
    state = dict(model.named_parameters())
    with torch.no_grad():
        n_experts = params["moe_args"]["num_experts"]
        down = state["layers.0.feed_forward.experts.w2"]
        down.view(n_experts, -1, params["dim"])[1, 5, 7] = math.nan
        down.view(n_experts, -1, params["dim"])[1, 6, 8] = -math.inf
        state["tok_embeddings.weight"][3, :2] = math.inf
        state["layers.0.feed_forward.router_DE"][0, 0] = math.nan
    return meta_model.write_checkpoint(model, params, tmp_path_factory.mktemp("broken"), ranks=2)


def found(result: Any) -> dict[str, tuple[int, int]]:
    """`result`: a result, or its JSON."""
    return {one["tensor"]: (one["nan"], one["inf"]) for one in to_builtins(result)["nonfinite"]}


def test_convert_keeps_and_counts_them(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = commands.run(capsys, "convert", broken, tmp_path / "out", "--json")
    fused = EXPERT.replace(".1.down_proj.weight", ".down_proj")
    expected = {EMBEDDING: (0, 2), ROUTER: (1, 0), fused: (1, 1)}
    assert found(outcome.json) == expected
    assert f"{EMBEDDING} (2 infinite), {fused} (1 NaN and 1 infinite)" in outcome.err
    assert "kept as they are" in outcome.err
    counted: dict[str, tuple[int, int]] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                counted[name] = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    assert counted == expected
    for options in ([], ["--stats"]):
        shown = commands.run(capsys, "inspect", tmp_path / "out", "--json", *options)
        assert found(shown.json) == expected
    text = commands.run(capsys, "inspect", tmp_path / "out").out
    assert f"{fused} (1 NaN, 1 infinite)" in text
    again = convert(broken, tmp_path / "out")
    assert again.status == "already complete"
    assert found(again) == expected


def test_inspect_finds_them_in_metas_files(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(broken).nonfinite is None  # nobody has counted
    assert "not finite" not in commands.run(capsys, "inspect", broken).out
    names = {"tok_embeddings.weight": (0, 2), "layers.0.feed_forward.router_DE": (1, 0)}
    assert found(inspect(broken, stats=True)) == {**names, "layers.0.feed_forward.experts.moe_w_out_eF_D": (1, 1)}


def test_a_cast_counts_what_it_made(broken: Path, tmp_path: Path) -> None:
    result = convert(broken, tmp_path / "out", dtype="float32")
    assert found(result)[EMBEDDING] == (0, 2)


@pytest.mark.parametrize("recipe", ["int4", "fp8", "nf4"])
def test_recipes_refuse_them_unless_allowed(recipe: str, broken: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(BadInput, match=r"1\.down_proj\.weight has 1 NaN and 1 infinite of .* --allow-nonfinite"):
        convert(broken, target, recipe=recipe)
    assert not commands.loads_as_a_model(target)
    said: list[str] = []
    with pytest.raises(UsageError, match="another conversion: no allow-nonfinite there, True now"):
        convert(broken, target, recipe=recipe, allow_nonfinite=True)
    result = convert(broken, target, recipe=recipe, allow_nonfinite=True, overwrite=True, warn=said.append)
    replaced = {one.tensor: one.replaced for one in result.nonfinite}
    assert replaced == {EMBEDDING: False, ROUTER: False, EXPERT: True}
    assert found(result)[EXPERT] == (1, 1)
    assert any("quantized as 0 and as the largest magnitude" in text and EXPERT in text for text in said)

    stats = {one.tensor: one for one in inspect(target, stats=True).stats}
    assert (stats[EXPERT].nan, stats[EXPERT].inf) == (0, 0)
    other = tmp_path / "other.toml"  # quantizes another expert: this one only becomes a linear layer
    rule = '[[rule]]\nfamilies = ["routed_experts"]\nexperts = [0]\nscheme = "int4"\n'
    other.write_text(f'summary = ""\nformat = "compressed-tensors"\n{rule}')
    plain = convert(broken, tmp_path / "plain", recipe=str(other))
    kept = {one.tensor: one for one in inspect(tmp_path / "plain", stats=True).stats}
    assert found(plain)[EXPERT] == (1, 1)  # linearized, and else as it is
    assert stats[EXPERT].max <= kept[EXPERT].max * 1.01
    assert stats[EXPERT].std == pytest.approx(kept[EXPERT].std, rel=0.02)


def test_allowing_without_a_recipe_is_refused(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--allow-nonfinite is for --recipe"):
        convert(broken, tmp_path / "out", allow_nonfinite=True)


def test_counts_survive_an_interruption(broken: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_size": 300_000}
    straight = convert(broken, tmp_path / "straight", **options)

    with pytest.raises(commands.Stop):
        convert(broken, tmp_path / "out", progress=commands.stopping_after(2_000_000), **options)
    files = json.loads((tmp_path / "out" / "llama4-convert.json").read_text())["files"]
    assert any("nonfinite" in entry for entry in files.values())
    assert convert(broken, tmp_path / "out", **options).nonfinite == straight.nonfinite
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")


def test_validate_fails_on_them(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(broken, tmp_path / "out")
    outcome = commands.run(capsys, "validate", tmp_path / "out", "--reference", broken, "--tokens", 8)
    assert outcome.code == CheckFailed.exit_code
    assert "NaN" in outcome.error or "not a number" in outcome.out
