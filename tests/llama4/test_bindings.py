"""Both bindings yield the same tensors: name by name, in model order, bit for bit, whole or by rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4 import weights_meta, weights_transformers
from llama4.weights import BindingError, LogicalTensor, first_key, parameter_shapes
from llama4_convert import convert
from llama4_convert.checkpoints import readers
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.reference.checkpoint import Checkpoint
from tests.support import meta_model

GEOMETRIES = sorted(meta_model.GEOMETRIES)
SPELLINGS = ("published", "module", "mixed")


def plain(geometry: str) -> dict[str, Any]:
    params = meta_model.GEOMETRIES[geometry]
    return params.get("model", params)


RANKS = [(g, n) for g in GEOMETRIES for n in (1, 2, 4, 8) if plain(g)["n_kv_heads"] % n == 0]
# Each rank count of each geometry in one spelling, and in turn through all.
CASES = [(g, n, SPELLINGS[i % 3]) for i, (g, n) in enumerate(RANKS)]


def pairs(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[LogicalTensor, LogicalTensor]]:
    yield from zip(a.logical_tensors(), b.logical_tensors(), strict=True)


def assert_equal_bits(a: Checkpoint, b: Checkpoint) -> None:
    for ours, theirs in pairs(a, b):
        assert (ours.name, ours.dtype) == (theirs.name, theirs.dtype)
        x, y = ours.load(None), theirs.load(None)
        assert x.dtype == y.dtype == np.uint16, ours.name
        assert np.array_equal(x, y), ours.name


@pytest.mark.parametrize("band", [1, 100, 1 << 20])
def test_columns_are_those_of_the_whole_tensor(
    band: int, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BAND_BYTES", band)
    reader = readers.DirectoryReader(TransformersCheckpoint.open(converted("scout")))
    key = next(key for key in reader.checkpoint.tensors if key.endswith("gate_up_proj"))
    whole = reader.read(key)
    for rows, columns in ((None, (0, 5)), ((1, 3), (7, 99)), ((0, 1), (90, 10**6)), ((2, 2), (3, 3))):
        cut = whole if rows is None else whole[slice(*rows)]
        assert np.array_equal(reader.read(key, rows, columns), cut[..., slice(*columns)])


# -------------------- the same tensors


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_names_order_and_shapes_are_those_of_parameter_shapes(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    for path in (meta_checkpoint(geometry, 2).src, converted(geometry)):
        checkpoint = Checkpoint.open(path)
        found = [(tensor.name, tensor.load(None).shape) for tensor in checkpoint.logical_tensors()]
        assert found == list(parameter_shapes(checkpoint.config).items())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_count_of_numbers_is_that_of_metas_model(geometry: str, meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint(geometry, 2)
    shapes = parameter_shapes(Checkpoint.open(source.src).config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == sum(p.numel() for p in source.model.parameters())


@pytest.mark.parametrize(("geometry", "ranks", "spelling"), CASES)
def test_any_ranks_and_spelling_bind_to_the_bits_of_the_directory(
    geometry: str, ranks: int, spelling: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    source = Checkpoint.open(meta_checkpoint(geometry, ranks, spelling).src)
    assert_equal_bits(source, Checkpoint.open(converted(geometry)))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layout", ["views", "one_storage", "parameters"])
def test_however_torch_stores_a_tensor_it_is_the_same(
    layout: str, spelling: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    source = Checkpoint.open(meta_checkpoint("maverick", 2, spelling, layout=layout).src)
    assert_equal_bits(source, Checkpoint.open(converted("maverick")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_keep_their_bits(dtype: torch.dtype, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = meta_checkpoint("odd", 2, dtype=dtype)
    convert(source.src, tmp_path / "out")
    for ours, theirs in pairs(Checkpoint.open(source.src), Checkpoint.open(tmp_path / "out")):
        assert ours.load(None).itemsize == dtype.itemsize
        assert np.array_equal(ours.load(None), theirs.load(None)), ours.name


def test_the_values_are_those_of_metas_modules(meta_checkpoint: Callable[..., Any]) -> None:
    """One of each kind, by hand: gate is w1, up is w3, down is w2, projections lie as [out, in]."""
    source = meta_checkpoint("scout", 4)
    m = dict(source.model.named_parameters())
    v = "vision_embeddings.vision_encoder."
    expected = {
        "tok_embeddings": m["tok_embeddings.weight"],
        "layers.1.attention_norm": m["layers.1.attention_norm.weight"],
        "layers.1.attention.q": m["layers.1.attention.wq.weight"],
        "layers.1.attention.k": m["layers.1.attention.wk.weight"],
        "layers.1.attention.v": m["layers.1.attention.wv.weight"],
        "layers.1.attention.o": m["layers.1.attention.wo.weight"],
        "layers.1.ffn_norm": m["layers.1.ffn_norm.weight"],
        "layers.1.feed_forward.router": m["layers.1.feed_forward.router_DE"].T,
        "layers.1.feed_forward.experts.3.gate": m["layers.1.feed_forward.experts.w1"][3].T,
        "layers.1.feed_forward.experts.3.up": m["layers.1.feed_forward.experts.w3"][3].T,
        "layers.1.feed_forward.experts.3.down": m["layers.1.feed_forward.experts.w2"][3].T,
        "layers.1.feed_forward.shared.gate": m["layers.1.feed_forward.shared_expert.w1.weight"],
        "layers.1.feed_forward.shared.up": m["layers.1.feed_forward.shared_expert.w3.weight"],
        "layers.1.feed_forward.shared.down": m["layers.1.feed_forward.shared_expert.w2.weight"],
        "norm": m["norm.weight"],
        "output": m["output.weight"],
        "vision.patch_embedding": m[f"{v}conv1._linear.weight"],
        "vision.layers.1.wk.bias": m[f"{v}transformer.resblocks.1.attn.wk.bias"],
        "vision.layers.1.c_proj.weight": m[f"{v}transformer.resblocks.1.mlp.c_proj.weight"],
        "vision.projection": m["vision_projection.weight"],
    }
    found = {tensor.name: tensor for tensor in Checkpoint.open(source.src).logical_tensors()}
    for name, parameter in expected.items():
        bits = torch.from_numpy(found[name].load(None).astype(np.uint16).copy().view(np.int16)).view(torch.bfloat16)
        assert torch.equal(bits.float(), parameter), name


# -------------------- rows


@pytest.mark.parametrize(("geometry", "ranks", "spelling"), [("scout", 4, "mixed"), ("odd", 2, "published")])
def test_rows_are_a_slice_of_the_whole(
    geometry: str, ranks: int, spelling: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    """At random places, over the borders of ranks, beyond the end, and empty."""
    chosen = random.Random(geometry)
    for path in (meta_checkpoint(geometry, ranks, spelling).src, converted(geometry)):
        for tensor in Checkpoint.open(path).logical_tensors():
            whole = tensor.load(None)
            n = len(whole)
            part = max(n // ranks, 1)
            edges = [(0, 0), (0, n), (n, n), (n + 3, n + 9), (0, n + 9), (part - 1, part + 1), (n - 1, 1 << 40)]
            drawn = [tuple(sorted((chosen.randrange(n + 1), chosen.randrange(n + 1)))) for _ in range(3)]
            for start, stop in (*edges, *drawn):
                rows = tensor.load((start, stop))
                assert rows.shape == whole[start:stop].shape, (tensor.name, start, stop)
                assert np.array_equal(rows, whole[start:stop]), (tensor.name, start, stop)


# -------------------- linearized experts


def rewrite(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a directory with other tensors, in one file."""
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            tensors.update(load_file(file))
        elif file.name == "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    change(tensors)
    name = "model-00001-of-00001.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def linearize(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
        stem = key.removesuffix("gate_up_proj")
        for e, (gate_up, down) in enumerate(zip(tensors.pop(key), tensors.pop(f"{stem}down_proj"), strict=True)):
            gate, up = gate_up.chunk(2, dim=1)
            for name, matrix in (("gate", gate), ("up", up), ("down", down)):
                tensors[f"{stem}{e}.{name}_proj.weight"] = matrix.T


@pytest.mark.parametrize("geometry", ["scout", "maverick", "top2", "absent_moe"])
def test_linearized_experts_bind_to_the_same_bits(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    found = Checkpoint.open(rewrite(converted(geometry), tmp_path / "out", linearize))
    assert_equal_bits(Checkpoint.open(meta_checkpoint(geometry, 2).src), found)
    expert = next(tensor for tensor in found.logical_tensors() if ".experts.1.up" in tensor.name)
    assert expert.keys[0].endswith("experts.1.up_proj.weight")
    assert np.array_equal(expert.load((1, 3)), expert.load(None)[1:3])


# -------------------- what is missing


def keys_of(checkpoint: Checkpoint) -> list[str]:
    return sorted({key for tensor in checkpoint.logical_tensors() for key in tensor.keys})


def test_every_missing_tensor_of_a_directory_is_named(converted: Callable[[str], Path]) -> None:
    for geometry in ("scout", "maverick"):
        checkpoint = Checkpoint.open(converted(geometry))
        reader = checkpoint.readers[0]
        for key in keys_of(checkpoint):
            with pytest.raises(BindingError, match=f"no tensor {key}( or |$)".replace(".", r"\.")):
                list(weights_transformers.logical_tensors(Without(reader, key), checkpoint.config))


@pytest.mark.parametrize("spelling", ["published", "module"])
def test_every_missing_tensor_of_metas_layout_is_named(spelling: str, meta_checkpoint: Callable[..., Any]) -> None:
    """By every spelling that was looked for, its own among them."""
    checkpoint = Checkpoint.open(meta_checkpoint("maverick", 2, spelling).src)
    for key in keys_of(checkpoint):
        ranks = [Without(reader, key) for reader in checkpoint.readers]
        with pytest.raises(BindingError, match="no tensor ") as missing:
            list(weights_meta.logical_tensors(ranks, checkpoint.config))
        if not key.endswith(("wqkv.weight", "fc1_weight")):  # named by the modules' spelling
            assert key in str(missing.value)


class Without:
    """A reader that lacks one key."""

    def __init__(self, reader: Any, key: str) -> None:
        self.reader, self.key = reader, key

    def keys(self) -> list[str]:
        return [key for key in self.reader.keys() if key != self.key]  # noqa: SIM118

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)


def test_one_expert_of_many_that_is_missing_is_named_in_both_spellings(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    def lose_one(tensors: dict[str, torch.Tensor]) -> None:
        linearize(tensors)
        del tensors["model.layers.1.feed_forward.experts.2.down_proj.weight"]

    found = Checkpoint.open(rewrite(converted("text_only"), tmp_path / "out", lose_one))
    with pytest.raises(BindingError) as missing:
        list(found.logical_tensors())
    assert str(missing.value) == (
        "no tensor model.layers.1.feed_forward.experts.down_proj"
        " or model.layers.1.feed_forward.experts.2.down_proj.weight"
    )


def test_the_first_spelling_that_is_there_wins() -> None:
    assert first_key(["b", "c"], "a", "b", "c") == "b"
    with pytest.raises(BindingError, match="no tensor a or b"):
        first_key([], "a", "b")


def test_a_tied_output_is_the_embedding_and_an_untied_one_must_be_there(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewrite(converted("text_only"), tmp_path / "out", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BindingError, match=r"no tensor lm_head\.weight"):
        list(Checkpoint.open(path).logical_tensors())
    body = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**body, "tie_word_embeddings": True}))
    tensors = {tensor.name: tensor for tensor in Checkpoint.open(path).logical_tensors()}
    assert np.array_equal(tensors["output"].load(None), tensors["tok_embeddings"].load(None))
