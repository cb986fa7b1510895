"""A wrong tensor is named, and how it is wrong: planted faults end to end, and each hypothesis on small matrices."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_convert import convert
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.diagnosis import (
    block_order,
    changed_values,
    moved_values,
    quantized_faults,
    remainders,
    tensor_pairs,
)
from llama4_convert.validation.diagnosis.moved_values import ALTERNATING_RANKS, RANKS, TRANSPOSED, Move, find_move
from llama4_convert.validation.diagnosis.tolerance import EXACT, Tolerance, floats
from llama4_convert.validation.diagnosis.wrong_tensor import Axis, WrongTensor
from llama4_convert.validation.weight_check import WeightFault, compare_weights, pairs_with_reference
from quant.schemes.nf4 import NF4
from tests.support import commands, meta_model, planted

WEIGHTS = "model-00001-of-00001.safetensors"


class Memory:
    """A directory's tensors in memory, to be damaged without a copy on disk."""

    quantized: Mapping[str, Any] = {}

    def __init__(self, tensors: planted.Tensors) -> None:
        self.tensors = tensors

    def keys(self) -> Any:
        return self.tensors.keys()

    def dtype(self, key: str) -> str:
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[self.tensors[key].dtype]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Any:
        tensor = bits(self.tensors[key])
        tensor = tensor if rows is None or not tensor.ndim else tensor[rows[0] : rows[1]]
        return tensor if columns is None else tensor[..., slice(*columns)]


def bits(tensor: Tensor) -> Any:
    width = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.contiguous().view(width).numpy().view(f"u{tensor.dtype.itemsize}")


def faults_of(reference: Checkpoint, candidate: Checkpoint) -> list[WeightFault]:
    return compare_weights(pairs_with_reference(reference, candidate, reference.config)).faults


# -------------------- every fault of the catalogue, in several geometries


Pair = tuple[Checkpoint, Checkpoint, planted.Tensors]


@pytest.fixture(scope="module")
def opened(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A checkpoint of Meta's code, its conversion, and the conversion's tensors."""

    def get(geometry: str, dtype: torch.dtype = torch.bfloat16) -> Pair:
        source = meta_checkpoint(geometry, ranks=2, dtype=dtype).src
        target = tmp_path_factory.mktemp(f"{geometry}-diagnosed") / "out"
        convert(source, target)
        return Checkpoint.open(source), Checkpoint.open(target), load_file(target / WEIGHTS)

    return get


def shapes_of(checkpoint: Checkpoint) -> planted.Shapes:
    text, vision = checkpoint.config.text_config, checkpoint.config.vision_config
    return planted.Shapes(
        "language_model." if vision else "",
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
        vision.num_attention_heads if vision else 0,
        vision.hidden_size // vision.num_attention_heads if vision else 0,
    )


@pytest.mark.parametrize(
    ("geometry", "dtype", "least"),
    [
        ("scout", "bfloat16", 160),
        ("maverick", "bfloat16", 170),  # dense layers among MoE ones
        ("odd", "bfloat16", 170),  # 6 and 2 heads, 3 experts, widths that are no powers of two
        ("top2", "float16", 140),  # text only
        ("absent", "bfloat16", 110),  # dense
        ("odd", "float32", 170),
    ],
)
def test_planted_faults_are_named_with_their_cause(
    geometry: str, dtype: str, least: int, opened: Callable[..., Pair]
) -> None:
    reference, candidate, tensors = opened(geometry, getattr(torch, dtype))
    count = 0
    wrong: list[str] = []
    for faults in planted.batches(tensors, shapes_of(reference)):
        damaged = dataclasses.replace(candidate, readers=(Memory(planted.plant(tensors, faults)),))
        found = faults_of(reference, damaged)
        assert {fault.tensor for fault in found} == {key for fault in faults for key in fault.keys}
        for one in found:
            assert re.search(
                r"(; |^)([\d,]+ of [\d,]+ elements differ|its shape is |it has (fewer|more) rows)", one.cause
            )
            assert one.result().kind == one.kind
        for fault in faults:
            for key in fault.keys:
                count += 1
                told = [one for one in found if one.tensor == key]
                if {one.kind for one in told} != {fault.kind}:
                    wrong.append(f"{fault.name}: {fault.kind}, not {[(one.kind, one.cause) for one in told][:2]}")
    assert wrong == []
    assert count >= least


@pytest.mark.parametrize("rows", [300, 578, 2312])
def test_a_vocabulary_is_read_in_slices(
    rows: int, opened: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,312 rows; whatever part of them is in memory at a time."""
    monkeypatch.setattr(tensor_pairs, "SLICE_ROWS", rows)
    monkeypatch.setattr(planted, "CATALOGUE", (planted.of_vocabulary,))
    reference, candidate, tensors = opened("odd")
    for faults in planted.batches(tensors, shapes_of(reference)):
        damaged = dataclasses.replace(candidate, readers=(Memory(planted.plant(tensors, faults)),))
        told = {fault.tensor: fault.kind for fault in faults_of(reference, damaged)}
        assert told == {key: fault.kind for fault in faults for key in fault.keys}, [fault.name for fault in faults]


@pytest.mark.parametrize("equal", ["heads", "experts", "layers", "zeros"])
def test_where_several_causes_explain_the_numbers_none_is_claimed(equal: str, opened: Callable[..., Pair]) -> None:
    """The reference has equal parts: which of them stands in another's place, its numbers do not say."""
    _, converted, tensors = opened("odd")
    q = next(key for key in sorted(tensors) if key.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in key)
    changed = next(key for key in sorted(tensors) if key.endswith("experts.down_proj")) if equal == "experts" else q
    right, wrong = tensors[changed].clone(), tensors[changed].clone()
    others: planted.Tensors = {}
    if equal == "heads":  # the first two; then the second and the third are exchanged
        heads, right = right.view(6, -1, right.shape[1]), right.clone()
        right = heads[[0, 0, 2, 3, 4, 5]].reshape(right.shape).contiguous()
        wrong = heads[[0, 2, 0, 3, 4, 5]].reshape(right.shape).contiguous()
    elif equal == "experts":  # the last two; then one of them stands in the place of the first
        right = right[[0, 1, 1]].contiguous()
        wrong = right[[1, 1, 1]].contiguous()
    elif equal == "layers":  # two of them; then one of them stands in the place of another
        others = {q.replace("layers.0", "layers.1"): tensors[q.replace("layers.0", "layers.2")]}
        wrong = tensors[q.replace("layers.0", "layers.2")].clone()
    else:
        right, wrong = torch.zeros_like(right), torch.randn_like(right)
    reference = dataclasses.replace(converted, readers=(Memory({**tensors, **others, changed: right}),))
    candidate = dataclasses.replace(converted, readers=(Memory({**tensors, **others, changed: wrong}),))
    assert faults_of(reference, reference) == []
    found = faults_of(reference, candidate)
    assert {one.tensor for one in found} == {changed}
    if equal == "zeros":
        assert not {one.kind for one in found} & {
            "transposed",
            "rows_permuted",
            "other_tensor",
            "scaled",
            "rank_missing",
        }
    else:
        assert {one.kind for one in found} == {None}, found


def test_tensors_of_any_shape_are_named(opened: Callable[..., Pair]) -> None:
    """And nothing breaks, whatever they hold."""
    reference, candidate, tensors = opened("odd")
    chosen = random.Random(0)
    mutations: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch.zeros(()),
        lambda t: t.reshape(-1),
        lambda t: t.unsqueeze(0),
        lambda t: t[:0],
        lambda t: t[:1],
        lambda t: t[..., :1],
        lambda t: torch.cat([t, t], -1),
        lambda t: t[::2],
        lambda t: torch.randn(5, 3),
        lambda t: torch.randn(2, 4, 3),
        lambda t: torch.full_like(t, math.nan),
        lambda t: torch.full_like(t, -math.inf),
    ]
    for _ in range(8):
        keys = chosen.sample(sorted(tensors), 25)
        damaged = {key: chosen.choice(mutations)(tensors[key]).to(torch.bfloat16).contiguous() for key in keys}
        wrong = {
            key
            for key in keys
            if damaged[key].shape != tensors[key].shape or not torch.equal(damaged[key], tensors[key])
        }
        found = faults_of(reference, dataclasses.replace(candidate, readers=(Memory({**tensors, **damaged}),)))
        assert {fault.tensor for fault in found} == wrong


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (planted.flip_bit(14), r"^one flipped bit: bit 14 \(exponent\) of element \[91, 54\], -?[\d.]+ became "),
        (planted.half_rotation(8), "the other RoPE form: .* half-rotation"),
        (planted.parts(8, 0, [0, 1, 2, None, 4, 5, 6, 7]), r"no numbers of rank 3 of 8, zeros in rows 48\.\.63"),
        (planted.parts(8, 0, [0, 1, 2, 2, 4, 5, 6, 7]), "rank 2 of 8 .* more than once, rank 3 is missing"),
        (planted.parts(8, 0, [0, 1, 4, 3, 2, 5, 6, 7]), "ranks reordered: 2 and 4 of 8"),
        (planted.columns_as_rows(4), "ranks joined on the wrong axis: 4 parts"),
        (lambda t: t * 3, "scaled: all multiplied by 3"),
    ],
)  # fmt: skip
def test_the_words_say_which(damage: planted.Damage, words: str, opened: Callable[..., Pair]) -> None:
    reference, candidate, tensors = opened("text_only")
    damaged = {**tensors, Q0: damage(tensors[Q0]).to(torch.bfloat16).contiguous()}
    [fault] = faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    assert re.search(words, fault.cause), fault.cause


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).float().mean(0)


OUT, DOWNS = "self_attn.o_proj.weight", "feed_forward.experts.down_proj"
LAYER, VISION = "language_model.model.layers.", "vision_model.model.layers.0.self_attn."
O1, O4, NORM = f"{LAYER}1.{OUT}", f"{LAYER}4.{OUT}", "input_layernorm.weight"
PATCHES, POSITIONS = "vision_model.patch_embedding.linear.weight", "vision_model.positional_embedding_vlm"


def grid_turned(w: Tensor) -> Tensor:
    return torch.cat([w[:16].reshape(4, 4, -1).transpose(0, 1).flatten(0, 1), w[16:]])


# The tensor; what it becomes, of it and all; the kind; words of the cause.
TOLD: list[tuple[str, Callable[[Tensor, planted.Tensors], Tensor], str, str]] = [
    (f"{LAYER}1.self_attn.q_proj.weight", lambda w, _: planted.half_rotation(len(w))(w), "rope_permuted", "heads of 96 rows"),
    (f"{LAYER}1.self_attn.k_proj.weight", lambda w, _: _mean([*w.chunk(2)]).repeat(2, 1), "averaged", "mean of all 2 heads"),
    (O1, lambda w, of: _mean([w, of[O4]]), "averaged", rf"0\.5 times those of {O4}"),
    (O1, lambda w, of: _mean([of[f"{LAYER}{i}.{OUT}"] for i in range(6)]), "averaged", "mean of all 6 layers"),
    (f"{LAYER}1.{NORM}", lambda w, of: 0.3 * w + 0.7 * of[f"{LAYER}2.{NORM}"], "averaged", r"0\.(7|699) times those of "),
    (f"{LAYER}2.{DOWNS}", lambda w, _: w.float().mean(0).expand(w.shape), "averaged", "mean of all 3 experts"),
    (O1, lambda w, of: of[O4].T, "other_tensor", rf"those of {O4}, transposed"),
    (O1, lambda w, _: eight_bits(w, 448, 1), "rounded", "to float8_e4m3fn with a scale for each row"),
    (O1, lambda w, _: eight_bits(w, 448, (0, 1)), "rounded", "to float8_e4m3fn with a scale for each tensor"),
    (O1, lambda w, _: eight_bits(w, 127, 0), "rounded", "to int8 with a scale for each column"),
    (PATCHES, lambda w, _: w.reshape(len(w), 3, -1).flip(1), "columns_permuted", "blue, green, red"),
    (PATCHES, lambda w, _: w.reshape(len(w), -1, 3).mT, "columns_permuted", "taken for colours last"),
    (POSITIONS, lambda w, _: w.roll(1, 0), "shifted", "class token comes first"),
    (POSITIONS, lambda w, _: grid_turned(w), "rows_permuted", "height and width exchanged"),
    ("vision_model.vision_adapter.mlp.fc1.weight", lambda w, _: w.reshape(len(w), 4, -1).mT, "columns_permuted", "channel by"),
    (f"{VISION}q_proj.weight", lambda w, of: of[f"{VISION}k_proj.weight"], "other_tensor", rf"{VISION}k_proj\.weight"),
]  # fmt: skip


def eight_bits(tensor: Tensor, most: int, dims: int | tuple[int, ...]) -> Tensor:
    scale = tensor.float().abs().amax(dims, keepdim=True) / most
    codes = tensor.float() / scale
    return (codes.to(torch.float8_e4m3fn).float() if most == 448 else codes.round()) * scale


@pytest.mark.parametrize(("key", "damage", "kind", "words"), TOLD)
def test_how_a_tensor_came_to_be_wrong_is_told_by_the_names_of_its_file(
    key: str,
    damage: Callable[[Tensor, planted.Tensors], Tensor],
    kind: str,
    words: str,
    opened: Callable[..., Pair],
) -> None:
    reference, candidate, tensors = opened("odd")
    damaged = damage(tensors[key], tensors).reshape(tensors[key].shape).to(torch.bfloat16).contiguous()
    found = faults_of(reference, dataclasses.replace(candidate, readers=(Memory({**tensors, key: damaged}),)))
    assert {(fault.tensor, fault.kind) for fault in found} == {(key, kind)}, found
    assert re.search(words, found[0].cause), found[0].cause


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_with_nan_is_no_failure(value: float, opened: Callable[..., Pair]) -> None:
    _, candidate, tensors = opened("odd")
    for key in (O1, f"{LAYER}1.{NORM}", f"{LAYER}2.{DOWNS}", PATCHES):
        strange = tensors[key].clone()
        strange.view(-1)[3] = value
        wrong = dataclasses.replace(candidate, readers=(Memory({**tensors, key: strange}),))
        noisy = tensors[key] + 0.1 * torch.randn_like(tensors[key])
        for one, other in (
            (wrong, candidate),
            (wrong, dataclasses.replace(candidate, readers=(Memory({**tensors, key: noisy}),))),
        ):
            assert {fault.tensor for fault in faults_of(one, other)} == {key}


def test_q_k_and_v_cut_in_another_order(opened: Callable[..., Pair]) -> None:
    reference, candidate, tensors = opened("odd")
    q, k, v = (f"{LAYER}1.self_attn.{part}_proj.weight" for part in "qkv")
    fused = torch.cat([tensors[key] for key in (q, k, v)])
    cut = dict(zip((k, q, v), fused.split([len(tensors[key]) for key in (k, q, v)]), strict=True))
    damaged = {**tensors, **{key: part.contiguous() for key, part in cut.items()}}
    found = faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    assert [(fault.tensor, fault.kind) for fault in found] == [(q, "qkv_interleaved"), (k, "qkv_interleaved")]
    assert "cut in the order k, q, v; " in found[1].cause


def test_a_reference_whose_q_has_another_width_than_its_k_and_v(opened: Callable[..., Pair]) -> None:
    """As the damaged side of `diff` may be."""
    _, candidate, tensors = opened("odd")
    q, k = (f"{LAYER}1.self_attn.{part}_proj.weight" for part in "qk")
    damaged = {**tensors, q: torch.cat(tensors[q].chunk(2), 1), k: -tensors[k]}
    found = faults_of(dataclasses.replace(candidate, readers=(Memory(damaged),)), candidate)
    assert {fault.tensor for fault in found} == {q, k}


@pytest.mark.parametrize("part", ["gate", "up"])
def test_a_reference_whose_gate_has_another_width_than_its_up(part: str, opened: Callable[..., Pair]) -> None:
    _, candidate, tensors = opened("absent")
    key = f"{LAYER.replace('language_model.', '')}1.feed_forward.{part}_proj.weight"
    damaged = {**tensors, key: torch.cat(tensors[key].chunk(2), 1)}
    damaged |= {other: -tensors[other] for other in tensors if "1.feed_forward" in other and other != key}
    found = faults_of(dataclasses.replace(candidate, readers=(Memory(damaged),)), candidate)
    assert key in {fault.tensor for fault in found}


def test_a_reference_one_of_whose_experts_has_another_width(opened: Callable[..., Pair]) -> None:
    _, candidate, tensors = opened("maverick")
    experts = f"{LAYER}1.feed_forward.experts."
    for n, both in enumerate(tensors.pop(f"{experts}gate_up_proj")):
        for part, half in zip(("gate", "up"), both.T.chunk(2), strict=True):
            tensors[f"{experts}{n}.{part}_proj.weight"] = half.contiguous()
    for n, down in enumerate(tensors.pop(f"{experts}down_proj")):
        tensors[f"{experts}{n}.down_proj.weight"] = down.T.contiguous()
    ragged, negated = f"{experts}1.gate_proj.weight", f"{experts}0.up_proj.weight"
    damaged = {
        **tensors,
        ragged: torch.cat(tensors[ragged].chunk(2), 1),
        negated: torch.rand(tensors[negated].shape).bfloat16(),
    }
    reference, candidate = (dataclasses.replace(candidate, readers=(Memory(one),)) for one in (damaged, tensors))
    assert [f.module for f in faults_of(reference, candidate)] == [
        "feed_forward.experts.0.up",
        "feed_forward.experts.1.gate",
    ]


def test_an_expert_says_whose_numbers_it_holds(opened: Callable[..., Pair]) -> None:
    reference, candidate, tensors = opened("maverick")
    key = "language_model.model.layers.1.feed_forward.experts.down_proj"
    damaged = {**tensors, key: tensors[key][[0, 1, 5, 3, 4, 5, 6, 7]]}
    [fault] = faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    assert fault.module == "feed_forward.experts.2.down"
    assert fault.cause.startswith("experts reordered: it holds expert 5's numbers; ")


def test_a_fault_that_no_hypothesis_fits_has_no_kind(opened: Callable[..., Pair]) -> None:
    """Two at once: half of the rows have lost their signs, and every other of these is squared."""
    reference, candidate, tensors = opened("text_only")
    tensor = tensors[Q0].clone()
    tensor[:40] = tensor[:40].abs()
    tensor[:40:2] = tensor[:40:2].square()
    damaged = {**tensors, Q0: tensor}
    [fault] = faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    assert fault.kind is None
    assert re.match(r"[\d,]+ of 16,384 elements differ, by up to ", fault.cause)


# -------------------- tensors that are missing


def test_a_missing_tensor_does_not_hide_the_others(opened: Callable[..., Pair]) -> None:
    reference, candidate, tensors = opened("text_only")
    damaged = {**tensors, "model.norm.weight": -tensors["model.norm.weight"]}
    del damaged["model.layers.0.self_attn.v_proj.weight"], damaged["model.layers.2.feed_forward.experts.down_proj"]
    found = faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    assert [(fault.name, fault.kind) for fault in found] == [
        ("layers.0.attention.v", "missing"),
        *((f"layers.2.feed_forward.experts.{e}.down", "missing") for e in range(4)),
        ("norm", "negated"),
    ]


def test_a_missing_tensor_of_metas_layout_neither(
    meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    path = commands.copy(meta_checkpoint("scout", ranks=2).src, tmp_path / "meta")
    for rank in (0, 1):
        file = path / f"consolidated.{rank:02d}.pth"
        tensors = torch.load(file, weights_only=False)
        del tensors["layers.1.attention.wo.weight"]
        tensors["norm.weight"] *= 2
        torch.save(tensors, file)
    found = faults_of(Checkpoint.open(converted("scout")), Checkpoint.open(path))
    assert [(fault.name, fault.kind) for fault in found] == [("layers.1.attention.o", "missing"), ("norm", "scaled")]


def test_a_tensor_under_another_name_is_found(opened: Callable[..., Pair]) -> None:
    reference, candidate, tensors = opened("text_only")
    damaged = dict(tensors)
    v, down = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.feed_forward.experts.down_proj"
    norm = "model.layers.3.input_layernorm.weight"
    damaged["model.layers.0.self_attn.value.weight"] = damaged.pop(v)
    damaged["model.layers.1.mlp.experts.down_proj"] = damaged.pop(down)
    damaged["model.layers.3.norm1.weight"] = 2 * damaged.pop(norm)
    causes = {
        fault.tensor: fault.cause
        for fault in faults_of(reference, dataclasses.replace(candidate, readers=(Memory(damaged),)))
    }
    assert causes[v] == f"no tensor {v}: it is there under the name model.layers.0.self_attn.value.weight"
    assert causes[down].endswith(": it is there under the name model.layers.1.mlp.experts.down_proj")
    assert causes[norm] == f"no tensor {norm}: maybe it is there under the name model.layers.3.norm1.weight"


# -------------------- quantized candidates


_WIDE: dict[str, Any] = {
    **meta_model.GEOMETRIES["scout"],
    "dim": 384,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 64,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.5,
    "ffn_exp": 4.0,
    "vision_args": None,
    "moe_args": {**meta_model.GEOMETRIES["scout"]["moe_args"], "num_experts": 3, "interleave_moe_layer_step": 2},
}
EXPERTS = "model.layers.1.feed_forward.experts."
GATE, UP, DOWN = f"{EXPERTS}1.gate_proj", f"{EXPERTS}1.up_proj", f"{EXPERTS}0.down_proj"
SHARED, DENSE = "model.layers.1.feed_forward.shared_expert.", "model.layers.0.feed_forward."


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "meta"
    return meta_model.write_checkpoint(meta_model.build(_WIDE, seed=1), _WIDE, folder, ranks=2)


@pytest.fixture(scope="module")
def quantized(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, planted.Tensors]]:
    """A directory to be overwritten, and what was in it."""
    made: dict[str, tuple[Path, planted.Tensors]] = {}

    def get(recipe: str) -> tuple[Path, planted.Tensors]:
        if recipe not in made:
            path = tmp_path_factory.mktemp(recipe) / "out"
            convert(wide, path, recipe=recipe)
            made[recipe] = path, load_file(path / WEIGHTS)
        return made[recipe]

    return get


Change = Callable[[planted.Tensors], None]


def parts_of(tensors: Mapping[str, Tensor], module: str) -> list[str]:
    return [key for key in tensors if key == module or key.startswith(f"{module}.")]


def swap(one: str, other: str) -> Change:
    def change(tensors: planted.Tensors) -> None:
        for key in parts_of(tensors, one):
            theirs = key.replace(one, other)
            tensors[key], tensors[theirs] = tensors[theirs], tensors[key]

    return change


def take(one: str, other: str) -> Change:
    return lambda tensors: tensors.update(
        {key: tensors[key.replace(one, other)].clone() for key in parts_of(tensors, one)}
    )


def part(module: str, suffix: str, damage: planted.Damage) -> Change:
    key = f"{module}.{suffix}"
    return lambda tensors: tensors.update({key: damage(tensors[key]).to(tensors[key].dtype)})


def again(module: str, damage: planted.Damage) -> tuple[str, planted.Damage]:
    """To be quantized from damaged weights."""
    return module, damage


def first_word_flipped(words: Tensor) -> Tensor:
    words = words.clone()
    words[0, 0] ^= 1 << 10
    return words


def nibbles(words: Tensor) -> Tensor:
    return ((words >> 4) & 0x0F0F0F0F) | ((words & 0x0F0F0F0F) << 4)


def of_codes(words: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Words of eight int4 codes, by way of [out, in]."""
    places = torch.arange(0, 32, 4)
    codes = change(((words.long().unsqueeze(-1) >> places) & 15).flatten(-2))
    return (codes.reshape(len(words), -1, 8) << places).sum(-1).to(torch.int32)


def awq(codes: Tensor) -> Tensor:
    """[in, out], eight outputs a word in the order in which AWQ deals them out, under the unchanged shape."""
    return codes.T.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape)


ANY_SCHEME: list[tuple[str, str, Change | tuple[str, planted.Damage]]] = [
    ("experts exchanged", "experts_reordered", swap(GATE, f"{EXPERTS}2.gate_proj")),
    ("an expert's gate and up", "gate_up_swapped", swap(GATE, UP)),
    ("the shared expert's", "gate_up_swapped", swap(f"{SHARED}gate_proj", f"{SHARED}up_proj")),
    ("another layer's", "other_tensor", take(DOWN, "model.layers.3.feed_forward.experts.0.down_proj")),
    ("transposed", "transposed", again(GATE, planted.transposed)),
    ("a dense layer's", "transposed", again(f"{DENSE}down_proj", planted.transposed)),
    ("joined on the wrong axis", "wrong_axis", again(DOWN, planted.columns_as_rows(2))),
    ("ranks exchanged", "ranks_reordered", again(DOWN, planted.halves_exchanged(1))),
    ("a rank repeated", "rank_repeated", again(GATE, planted.first_half_repeated(0))),
    ("a rank missing", "rank_missing", again(GATE, planted.parts(2, 0, [0, None]))),
    ("doubled", "scale", again(DOWN, lambda w: w * 2)),
    ("negated", "scale", again(DOWN, lambda w: -w)),
    ("each row by a factor", "scale", again(DOWN, planted.by_rows)),
    ("zeros", "zeros", again(DOWN, torch.zeros_like)),
    ("a row of zeros", "zeros", again(DOWN, planted.put(0, 5))),
    ("shifted by a row", "shifted", again(DOWN, lambda w: w.roll(1, 0))),
    ("shifted by a column", "shifted", again(DOWN, lambda w: w.roll(1, 1))),
    ("rows exchanged", "rows_permuted", again(DOWN, lambda w: w[[3, 1, 2, 0, *range(4, len(w))]])),
    ("random", "unrelated", again(DOWN, planted.random_again)),
]
OF_A_SCHEME: dict[str, list[tuple[str, str, Change | tuple[str, planted.Damage]]]] = {
    "int4": [
        ("scales doubled", "scale", part(GATE, "weight_scale", lambda s: s * 2)),
        ("scales shifted by a row", "scale", part(GATE, "weight_scale", lambda s: s.roll(1, 0))),
        ("scales shifted by a group", "scale", part(GATE, "weight_scale", lambda s: s.roll(1, 1))),
        ("scales transposed", "scale_axis", part(GATE, "weight_scale", lambda s: s.T.reshape(s.shape))),
        ("scales transposed, shape and all", "scale_axis", part(DOWN, "weight_scale", lambda s: s.T)),
        ("one scale for all", "scale", part(GATE, "weight_scale", lambda s: torch.full_like(s, float(s.float().mean())))),
        ("another expert's scales", "scale", take(f"{GATE}.weight_scale", f"{EXPERTS}2.gate_proj.weight_scale")),
        ("halves of bytes exchanged", "packing", part(DOWN, "weight_packed", nibbles)),
        ("unsigned codes", "packing", part(DOWN, "weight_packed", lambda p: p ^ torch.tensor(-0x77777778, dtype=torch.int32))),
        ("a flipped bit", "flipped_bit", part(DOWN, "weight_packed", first_word_flipped)),
        ("another zero point", "packing", part(DOWN, "weight_packed", lambda p: of_codes(p, lambda c: (c + 1).clamp(max=15)))),
        ("cut to three bits", "packing", part(DOWN, "weight_packed", lambda p: of_codes(p, lambda c: c // 2 * 2))),
        ("words as GPTQ writes them", "packing", part(DOWN, "weight_packed", lambda p: p.T.reshape(p.shape))),
        ("words as AWQ writes them", "packing", part(DOWN, "weight_packed", lambda p: of_codes(p, awq))),
        ("one scale", "scale", part(GATE, "weight_scale", lambda s: s.index_put((torch.tensor([9]),), s[9] * 1.2))),
    ],
    "fp8": [
        ("scales shifted", "scale", part(DOWN, "weight_scale", lambda s: s.roll(1, 0))),
        ("one scale for all", "scale", part(GATE, "weight_scale", lambda s: torch.full_like(s, float(s.float().mean())))),
        ("scales on the other axis", "scale_axis", part(GATE, "weight_scale", lambda s: s.T)),
        ("an exponent bit", "flipped_bit", part(GATE, "weight", lambda w: _flipped_byte(w, 5))),
        ("the lowest bit", "flipped_bit", part(GATE, "weight", lambda w: _flipped_byte(w, 0))),
        ("codes of the other kind", "reinterpreted", part(GATE, "weight", lambda w: _other_codes(w))),
    ],
    "nf4": [
        ("scales shifted", "scale", part(GATE, "weight.absmax", lambda s: s.roll(1))),
        ("scales transposed", "scale_axis", part(DOWN, "weight.absmax", lambda s: s.reshape(384, -1).T.reshape(-1))),
        ("scales of scales", "scale", part(GATE, "weight.nested_absmax", lambda s: s * 3)),
        ("halves of bytes exchanged", "packing", part(DOWN, "weight", lambda p: (p >> 4) | (p << 4))),
        ("a code", "flipped_bit", part(DOWN, "weight", lambda p: torch.cat([p[:7], p[7:8] ^ 0xF0, p[8:]]))),
    ],
}  # fmt: skip


def _flipped_byte(codes: Tensor, bit: int) -> Tensor:
    raw = codes.clone().view(torch.uint8)
    raw[3, 7] ^= 1 << bit
    return raw.view(codes.dtype)


def _other_codes(codes: Tensor) -> Tensor:
    return codes.float().to(torch.float8_e5m2).view(codes.dtype)


def requantize(tensors: planted.Tensors, recipe: str, module: str, weights: Tensor) -> None:
    from quant.encoders import encoder_for
    from quant.recipe import load

    families = {"experts.": "routed_experts", "shared_expert.": "shared_expert"}
    family = next((name for mark, name in families.items() if mark in module), "dense_mlp")
    scheme = load(recipe).scheme(family, 1, 4, 1)
    assert scheme is not None
    encoder = encoder_for(scheme)
    made = iter(encoder.encode(bits(weights.to(torch.bfloat16)), False, 1).parts)
    for output in encoder.outputs(*weights.shape):
        if output.constant is None:
            key = f"{module}.{output.suffix}"
            raw = torch.from_numpy(next(made).copy().view(np.uint8).reshape(-1))
            tensors[key] = raw.view(tensors[key].dtype).reshape(tensors[key].shape)


def weights_of(checkpoint: Checkpoint, module: str) -> Tensor:
    name = module.removeprefix("model.").replace("shared_expert", "shared").removesuffix("_proj")
    tensor = next(tensor for tensor in checkpoint.logical_tensors() if tensor.name == name)
    return torch.from_numpy(np.ascontiguousarray(tensor.load(None)).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("recipe", ["int4", "fp8", "nf4"])
def test_faults_of_quantized_matrices(
    recipe: str, wide: Path, quantized: Callable[[str], tuple[Path, planted.Tensors]]
) -> None:
    path, tensors = quantized(recipe)
    reference = Checkpoint.open(wide)
    wrong = []
    for name, kind, change in [*ANY_SCHEME, *OF_A_SCHEME[recipe]]:
        damaged = dict(tensors)
        if isinstance(change, tuple):
            module, damage = change
            requantize(damaged, recipe, module, damage(weights_of(reference, module)))
        else:
            change(damaged)
        save_file({key: tensor.contiguous() for key, tensor in damaged.items()}, path / WEIGHTS, {"format": "pt"})
        told = [(fault.kind, fault.cause) for fault in faults_of(reference, Checkpoint.open(path))]
        if {one for one, _ in told} != {kind}:
            wrong.append(f"{name}: {kind}, not {told[:2]}")
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    assert faults_of(reference, Checkpoint.open(path)) == []
    assert wrong == []


def test_scales_that_do_not_fit_are_a_fault_for_validate_and_bad_input_for_others(
    wide: Path, quantized: Callable[[str], tuple[Path, planted.Tensors]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, tensors = quantized("fp8")
    damaged = dict(tensors)
    part(GATE, "weight_scale", lambda s: s.T.contiguous())(damaged)
    save_file(damaged, path / WEIGHTS, {"format": "pt"})
    told = commands.run(capsys, "validate", path, "--reference", wide, "--tokens", 2, "--json")
    used = commands.run(capsys, "generate", path, "--prompt", "x")
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    assert told.code == 5
    assert told.json["first_divergence"]["kind"] == "scale_axis"
    assert GATE in told.json["candidate_failure"]
    assert used.code == 3
    assert GATE in used.error


# -------------------- hypotheses on numbers alone


def matrix(rows: int, columns: int, seed: int = 0) -> Any:
    """bf16 bits."""
    return bits(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16))


def wrong(x: Any, y: Any, dtype: str = "BF16") -> WrongTensor:
    return WrongTensor("a matrix", EXACT, dtype, x, y)


@pytest.mark.parametrize("split", [(3, 5, 7), (15, 7, 1), (5, 3, 7)])
@pytest.mark.parametrize("target", ["b (a c)", "(a c) b", "c b a", "a -b c", "(-b -c) a"])
def test_a_move_tells_where_each_number_comes_from(split: tuple[int, ...], target: str) -> None:
    x = np.arange(105)
    move = Move(f"(a b) c -> {target}", "", "")
    assert np.array_equal(move(x, split).ravel(), move.sources(x, split))


def test_a_move_is_written_as_it_lies() -> None:
    x = np.arange(24).reshape(6, 4)
    assert np.array_equal(Move("(n r) C -> r (n C)", "", "")(x, (2, 3, 4)).reshape(3, 8), np.hstack([x[:3], x[3:]]))
    assert np.array_equal(Move("R C -> -R C", "", "")(x, (6, 4)), x[::-1])


@pytest.mark.parametrize("shape", [(12, 18), (9, 15), (16, 16), (7, 30)])
def test_nothing_is_said_of_numbers_that_have_nothing_in_common(shape: tuple[int, int]) -> None:
    x, y = matrix(*shape), matrix(*shape, seed=1)
    unrelated = wrong(x, y)
    assert find_move([TRANSPOSED, RANKS, ALTERNATING_RANKS], x, y, EXACT) is None
    for hypothesis in (
        moved_values.moved,
        moved_values.wrong_axis,
        moved_values.shifted,
        block_order.in_blocks,
        block_order.in_rows,
        changed_values.flipped_bits,
        changed_values.constant_somewhere,
        changed_values.changed_bits,
        changed_values.recalculated,
    ):
        assert hypothesis(unrelated) is None
    told = remainders.near_or_unrelated(unrelated)
    assert told is None or told.kind == "unrelated"


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 16])
@pytest.mark.parametrize("columns", [1, 7])
def test_ranks_of_any_number_are_told(n: int, columns: int) -> None:
    x = matrix(n * 6, columns)
    axis = Axis("row")

    def kind(order: list[int | None]) -> tuple[str, str] | None:
        blocks = np.split(x, n)
        y = np.concatenate([np.zeros_like(x[:6]) if i is None else blocks[i] for i in order])
        told = block_order.block_order(x, y, EXACT, axis)
        return (told.kind, told.cause) if told else None

    places: list[int | None] = list(range(n))
    reversed_ = kind(places[::-1])
    missing = kind([*places[:-1], None])
    repeated = kind([*places[:-1], 0])
    assert reversed_ is not None
    assert reversed_[0] == "ranks_reordered"
    assert missing is not None
    assert missing[0] == "rank_missing"
    assert f"rank {n - 1} of {n}" in missing[1]
    assert repeated is not None
    assert repeated[0] == "rank_repeated"
    assert f"rank 0 of {n}" in repeated[1]


@pytest.mark.parametrize("bit", range(16))
def test_each_bit_of_a_bf16_number(bit: int) -> None:
    x = matrix(5, 3)
    y = x.copy()
    y[3, 1] ^= np.uint16(1 << bit)
    told = changed_values.flipped_bits(wrong(x, y))
    assert told is not None
    assert told.kind == "flipped_bit"
    meaning = "sign" if bit == 15 else "exponent" if bit >= 7 else "mantissa"
    assert told.cause.startswith(f"one flipped bit: bit {bit} ({meaning}) of element [3, 1], ")


def test_only_where_it_is_wrong_a_tensor_is_looked_at() -> None:
    x = torch.randn(24, 18, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[4:9, 3:] *= 5
    told = changed_values.recalculated(wrong(bits(x), bits(y), "F32"))
    assert told is not None
    assert (told.kind, told.cause) == ("scaled", "scaled: all multiplied by 5 in rows 4..8 and columns 3..17")


def test_a_lossy_matrix_is_the_same_within_its_limit() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).numpy()
    y = x + 0.1 * torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).numpy()
    assert Tolerance(0.02)(x, y)
    assert not Tolerance(0.005)(x, y)
    told = find_move([TRANSPOSED], x, y.T.reshape(64, 48), Tolerance(0.02))
    assert told is not None
    assert block_order.find_blocks(x, y, Tolerance(0.02), [2, 4, 64]) is None  # in its order
    found = block_order.find_blocks(x, np.roll(y, 16, 0), Tolerance(0.02), [2, 4, 64])
    assert found is not None
    assert (found.n, found.order.tolist()) == (4, [3, 0, 1, 2])


def test_a_larger_or_smaller_matrix() -> None:
    x = matrix(12, 10)
    axes = Axis("row"), Axis("column")

    def kind(y: Any) -> str | None:
        told = block_order.other_shape(x, y, EXACT, axes)
        return told.kind if told else None

    assert kind(x.T) == "transposed"
    assert kind(x.reshape(10, 12)) == "transposed"
    assert kind(x.reshape(6, 20)) == "reshaped"
    assert kind(x.reshape(2, 6, 10)) == "reshaped"
    assert kind(x[:9]) == kind(np.delete(x, slice(3, 6), 0)) == kind(x[:, :5]) == "rank_missing"
    assert kind(x[:11]) == "truncated"
    assert kind(np.concatenate([x, x])) == "rank_repeated"
    assert kind(np.concatenate([x, np.zeros_like(x[:5])])) == "padded"
    assert kind(np.concatenate(np.split(x, 2), 1)) == kind(np.concatenate(np.split(x, 5, 1))) == "wrong_axis"
    assert kind(matrix(12, 11)) is kind(matrix(10, 12, seed=1)) is None


def test_sound_quantized_matrices_raise_no_suspicion(wide: Path, quantized: Callable[..., Any]) -> None:
    """Of either scheme, with weights that have long tails."""
    from llama4_convert.checkpoints.quantized import QuantizedMatrix
    from quant.encoders import encoder_for
    from quant.recipe import Scheme

    noise = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    for weights in (noise, noise**3, noise * torch.logspace(-3, 0, 512)):
        a = weights.to(torch.bfloat16)
        for scheme in (
            Scheme("int4", method="plain"),
            Scheme("int4", group_size=32),
            Scheme("int4", method="signed"),
            Scheme("fp8"),
            Scheme("fp8", granularity="block", method="plain"),
            Scheme("fp8", granularity="tensor"),
            Scheme("nf4"),
            Scheme("nf4", double_quant=False),
        ):
            encoder: Any = encoder_for(scheme)
            outputs = encoder.outputs(256, 512)
            made = iter(encoder.encode(bits(a), False, 1).parts)
            parts = {
                output.suffix: np.frombuffer(output.constant, np.uint8 if output.dtype == "U8" else np.uint32)
                if output.constant is not None
                else next(made)
                for output in outputs
            }
            b = encoder.decode(parts, 256, 512)
            matrix = QuantizedMatrix(scheme.kind, 256, 512, encoder, {}, False, {"granularity": scheme.granularity})
            pair = quantized_faults.QuantizedPair(a.float().numpy(), floats(b, "BF16"), matrix, parts)
            told = quantized_faults.suspicion(pair)
            assert told is None, (scheme, told)


def test_limits_of_nf4_codes_are_those_of_the_nearest_level() -> None:
    """Held against the search for the nearest level that they stand for."""
    weights = np.random.default_rng(0).uniform(-1, 1, (500, 64)).astype(np.float32)
    read = np.random.default_rng(1).choice(NF4, weights.shape).astype(np.float32)
    scaled, middles = weights / np.abs(weights).max(1, keepdims=True), (NF4[1:] + NF4[:-1]) / 2
    codes, nearest = (NF4[np.searchsorted(middles, part)] for part in (read, scaled))
    wrong = np.abs(scaled - codes) > np.abs(scaled - nearest) + 0.01
    assert 0 < wrong.sum() < wrong.size
    assert np.array_equal(quantized_faults._wrong_nf4_codes(weights, read, np.ones((500, 1), np.float32)), wrong)
