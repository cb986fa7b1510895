"""The tables against the published checkpoints' names, joins and element positions; and what they refuse, by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from mappings import Binding, MappingError, ModelShape, Placement, copies, load_table

Array = NDArray[np.int64]
Tensors = dict[str, Array]

AXES = {"V", "D", "Q", "K", "E", "F", "G", "P", "N", "C", "H", "M", "S", "A", "O"}


def model(
    *,
    n_layers: int = 2,
    moe_layers: Sequence[int] = (1,),
    n_vision_layers: int | None = 1,
    units: Mapping[str, int] | None = None,
    **sizes: int,
) -> ModelShape:
    """Every axis a different size where the architecture allows it, so that no mix-up goes unnoticed."""
    defaults = {"V": 40, "D": 24, "Q": 32, "K": 16, "E": 3, "F": 8, "G": 56}
    vision = {"P": 5, "N": 3, "C": 16, "H": 16, "M": 48, "S": 6, "A": 8, "O": 8}
    return ModelShape(
        {**defaults, **(vision if n_vision_layers else {}), **sizes},
        {"Q": 16, "K": 8, "H": 8, **(units or {})},
        n_layers,
        frozenset(moe_layers),
        n_vision_layers,
    )


def bound(**changes: Any) -> Binding:
    return load_table().bind(model(**changes))


# -- names. Layer 0 is dense, layer 1 MoE. Each Meta key and every Transformers key that it feeds.

LM = "language_model."


def _attention(n: int) -> dict[str, list[str]]:
    meta, hf = f"layers.{n}.", f"model.layers.{n}."
    q, k, v = (f"{hf}self_attn.{x}_proj.weight" for x in "qkv")
    post = [f"{hf}post_attention_layernorm.weight"]
    return {
        f"{meta}attention.wqkv.weight": [q, k, v],
        f"{meta}attention.wq.weight": [q],
        f"{meta}attention.wk.weight": [k],
        f"{meta}attention.wv.weight": [v],
        f"{meta}attention.wo.weight": [f"{hf}self_attn.o_proj.weight"],
        f"{meta}attention.wqkv.layer_norm_weight": [f"{hf}input_layernorm.weight"],
        f"{meta}attention_norm.weight": [f"{hf}input_layernorm.weight"],
        f"{meta}feed_forward.norm.weight": post,
        f"{meta}feed_forward.mlp.layer_norm_weight": post,
        f"{meta}ffn_norm.weight": post,
    }


DENSE = {
    "layers.0.feed_forward.mlp.fc1_weight": [
        "model.layers.0.feed_forward.gate_proj.weight",
        "model.layers.0.feed_forward.up_proj.weight",
    ],
    "layers.0.feed_forward.w1.weight": ["model.layers.0.feed_forward.gate_proj.weight"],
    "layers.0.feed_forward.w3.weight": ["model.layers.0.feed_forward.up_proj.weight"],
    "layers.0.feed_forward.mlp.fc2_weight": ["model.layers.0.feed_forward.down_proj.weight"],
    "layers.0.feed_forward.w2.weight": ["model.layers.0.feed_forward.down_proj.weight"],
}
FFN, HF_FFN = "layers.1.feed_forward.", "model.layers.1.feed_forward."
MOE = {
    f"{FFN}router_DE": [f"{HF_FFN}router.weight"],
    f"{FFN}experts.moe_w_in_eD_F": [f"{HF_FFN}experts.gate_up_proj"],
    f"{FFN}experts.moe_w_swiglu_eD_F": [f"{HF_FFN}experts.gate_up_proj"],
    f"{FFN}experts.moe_w_out_eF_D": [f"{HF_FFN}experts.down_proj"],
    f"{FFN}experts.w1": [f"{HF_FFN}experts.gate_up_proj"],
    f"{FFN}experts.w3": [f"{HF_FFN}experts.gate_up_proj"],
    f"{FFN}experts.w2": [f"{HF_FFN}experts.down_proj"],
    f"{FFN}w_in_shared_FD.weight": [f"{HF_FFN}shared_expert.gate_proj.weight"],
    f"{FFN}w_swiglu_FD.weight": [f"{HF_FFN}shared_expert.up_proj.weight"],
    f"{FFN}w_out_shared_DF.weight": [f"{HF_FFN}shared_expert.down_proj.weight"],
    f"{FFN}shared_expert.w1.weight": [f"{HF_FFN}shared_expert.gate_proj.weight"],
    f"{FFN}shared_expert.w3.weight": [f"{HF_FFN}shared_expert.up_proj.weight"],
    f"{FFN}shared_expert.w2.weight": [f"{HF_FFN}shared_expert.down_proj.weight"],
}
TEXT = {
    "tok_embeddings.weight": ["model.embed_tokens.weight"],
    "output.weight": ["lm_head.weight"],
    "norm.weight": ["model.norm.weight"],
    **_attention(0),
    **_attention(1),
    **DENSE,
    **MOE,
}
ENCODER, BLOCK = "vision_embeddings.vision_encoder.", "vision_embeddings.vision_encoder.transformer.resblocks.0."
HF_BLOCK = "vision_model.model.layers.0."
VISION = {
    f"{ENCODER}class_embedding": "vision_model.class_embedding",
    f"{ENCODER}positional_embedding_vlm": "vision_model.positional_embedding_vlm",
    f"{ENCODER}conv1._linear.weight": "vision_model.patch_embedding.linear.weight",
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "vision_projection.weight": "multi_modal_projector.linear_1.weight",
} | {
    f"{before}.{kind}": f"{after}.{kind}"
    for kind in ("weight", "bias")
    for before, after in {
        f"{ENCODER}ln_pre": "vision_model.layernorm_pre",
        f"{ENCODER}ln_post": "vision_model.layernorm_post",
        f"{BLOCK}ln_1": f"{HF_BLOCK}input_layernorm",
        f"{BLOCK}ln_2": f"{HF_BLOCK}post_attention_layernorm",
        **{f"{BLOCK}attn.w{x}": f"{HF_BLOCK}self_attn.{x}_proj" for x in "qkvo"},
        f"{BLOCK}mlp.c_fc": f"{HF_BLOCK}mlp.fc1",
        f"{BLOCK}mlp.c_proj": f"{HF_BLOCK}mlp.fc2",
    }.items()
}


def names(binding: Binding) -> dict[str, list[str]]:
    """Meta key -> the Transformers keys that hold one of its logical tensors."""
    return {
        key: [hf for hf, s in binding.transformers.items() if set(s.tensors.values()) & set(stored.tensors.values())]
        for key, stored in binding.meta.items()
    }


def test_the_tables_know_these_names_and_no_others() -> None:
    with_vision = {key: [LM + hf for hf in targets] for key, targets in TEXT.items()}
    with_vision |= {key: [hf] for key, hf in VISION.items()}
    assert names(bound()) == with_vision


def test_without_vision_the_language_model_sits_at_the_top() -> None:
    assert names(bound(n_vision_layers=None)) == TEXT


def test_every_layer_has_its_own_number() -> None:
    binding = bound(n_layers=12, moe_layers=range(12), n_vision_layers=11)
    assert "layers.11.feed_forward.router_DE" in binding.meta
    assert f"{ENCODER}transformer.resblocks.10.ln_1.bias" in binding.meta
    assert not any("{" in key for key in [*binding.meta, *binding.transformers])


def test_every_axis_of_the_tables_is_a_known_one() -> None:
    table = load_table()
    used = {axis for family in (*table.text, *table.vision) for axes in family.axes.values() for axis in axes}
    sharded = {axis for family in (*table.text, *table.vision) for axis in family.shard}
    assert used == AXES
    assert sharded <= used


@pytest.mark.parametrize(
    "key",
    [
        "layers.1.feed_forward.global_gate_stats_3E",
        "layers.1.feed_forward.running_gate_stats_3E",
        "layers.1.feed_forward.expert_activation_DE",
        "rope.freqs",
        "freq_cis",
        "layers.0.attention.wo._extra_state",
        "vision_embeddings.vision_encoder.transformer.resblocks.0.attn.wq._extra_state",
    ],
)
def test_keys_without_weights_are_dropped_with_a_reason(key: str) -> None:
    binding = bound()
    dropped = binding.claim({*published(binding), key}).dropped
    assert dropped.keys() == {key}
    assert dropped[key].why


def test_router_statistics_tell_a_base_model() -> None:
    binding = bound()
    claims = binding.claim({*published(binding), "layers.1.feed_forward.expert_activation_DE", "rope.freqs"})
    assert {key: rule.only_in for key, rule in claims.dropped.items()} == {
        "layers.1.feed_forward.expert_activation_DE": "base",
        "rope.freqs": None,
    }


def test_vision_is_dropped_for_a_text_only_model_and_only_then() -> None:
    everything, text = published(bound()), bound(n_vision_layers=None)
    assert text.claim(everything, text_only=True).dropped.keys() == VISION.keys()
    with pytest.raises(MappingError, match="unknown key vision_embeddings"):
        text.claim(everything)


# -- shapes and joins, spelled out


@dataclass(frozen=True)
class Join:
    """How the facts say that the ranks' parts become Transformers tensors: shape a rank holds, and the obvious numpy."""

    shape: tuple[int, ...]
    join: Callable[[list[Array]], list[Array]]


def _cat(axis: int) -> Callable[[list[Array]], list[Array]]:
    return lambda parts: [np.concatenate(parts, axis)]


def _first(parts: list[Array]) -> list[Array]:
    return [parts[0]]


def _blocks(*sizes: int) -> Callable[[list[Array]], list[Array]]:
    cuts = np.cumsum(sizes)[:-1]
    return lambda parts: [np.concatenate(block) for block in zip(*(np.split(p, cuts) for p in parts), strict=True)]


R = 4
V, D, Q, K, E, F, G, C, M, A = 40, 24, 32, 16, 3, 8, 56, 16, 48, 8
JOINS = {
    "tok_embeddings.weight": Join((V // R, D), _cat(0)),
    "output.weight": Join((V // R, D), _cat(0)),
    "norm.weight": Join((D,), _first),
    "layers.0.attention.wqkv.weight": Join(((Q + 2 * K) // R, D), _blocks(Q // R, K // R, K // R)),
    "layers.0.attention.wq.weight": Join((Q // R, D), _cat(0)),
    "layers.0.attention.wk.weight": Join((K // R, D), _cat(0)),
    "layers.0.attention.wv.weight": Join((K // R, D), _cat(0)),
    "layers.0.attention.wo.weight": Join((D, Q // R), _cat(1)),
    "layers.0.attention.wqkv.layer_norm_weight": Join((D,), _first),
    "layers.0.feed_forward.norm.weight": Join((D,), _first),
    f"{FFN}router_DE": Join((D, E), lambda parts: [parts[0].T]),
    f"{FFN}experts.moe_w_out_eF_D": Join(
        (E * F // R, D), lambda parts: [np.concatenate([p.reshape(E, F // R, D) for p in parts], 1)]
    ),
    f"{FFN}experts.w2": Join((E, F // R, D), _cat(1)),
    f"{FFN}w_in_shared_FD.weight": Join((F // R, D), _cat(0)),
    f"{FFN}w_swiglu_FD.weight": Join((F // R, D), _cat(0)),
    f"{FFN}w_out_shared_DF.weight": Join((D, F // R), _cat(1)),
    f"{FFN}shared_expert.w1.weight": Join((F // R, D), _cat(0)),
    f"{FFN}shared_expert.w3.weight": Join((F // R, D), _cat(0)),
    f"{FFN}shared_expert.w2.weight": Join((D, F // R), _cat(1)),
    "layers.0.feed_forward.mlp.fc1_weight": Join((2 * G // R, D), _blocks(G // R, G // R)),
    "layers.0.feed_forward.w1.weight": Join((G // R, D), _cat(0)),
    "layers.0.feed_forward.w3.weight": Join((G // R, D), _cat(0)),
    "layers.0.feed_forward.mlp.fc2_weight": Join((D, G // R), _cat(1)),
    f"{ENCODER}class_embedding": Join((C,), _first),
    f"{ENCODER}positional_embedding_vlm": Join((3, C), _first),
    f"{ENCODER}conv1._linear.weight": Join((C // R, 5), _cat(0)),
    f"{ENCODER}ln_pre.bias": Join((C,), _first),
    f"{BLOCK}ln_2.weight": Join((C,), _first),
    f"{BLOCK}attn.wq.weight": Join((C // R, C), _cat(0)),
    f"{BLOCK}attn.wk.bias": Join((C // R,), _cat(0)),
    f"{BLOCK}attn.wv.weight": Join((C // R, C), _cat(0)),
    f"{BLOCK}attn.wo.weight": Join((C, C // R), _cat(1)),
    f"{BLOCK}attn.wo.bias": Join((C,), _first),
    f"{BLOCK}mlp.c_fc.weight": Join((M // R, C), _cat(0)),
    f"{BLOCK}mlp.c_fc.bias": Join((M // R,), _cat(0)),
    f"{BLOCK}mlp.c_proj.weight": Join((C, M // R), _cat(1)),
    f"{BLOCK}mlp.c_proj.bias": Join((C,), _first),
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": Join((A // R, 6), _cat(0)),
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": Join((A, A // R), _cat(1)),
    "vision_projection.weight": Join((D // R, A), _cat(0)),
}


@pytest.mark.parametrize("key", JOINS)
def test_the_ranks_join_as_the_model_code_splits(key: str) -> None:
    binding, rule = bound(), JOINS[key]
    assert binding.meta_shape(key, R) == rule.shape
    replicated = rule.join is _first or key.endswith("router_DE")
    assert binding.is_replicated(key) == replicated
    size = int(np.prod(rule.shape))
    parts = [np.arange(size).reshape(rule.shape) + (0 if replicated else rank * size) for rank in range(R)]
    targets = names(binding)[key]
    made = {hf: np.full(binding.transformers_shape(hf), -1) for hf in targets}
    for hf, array in made.items():
        _copy_all([(array, binding.transformers_placements(hf))], _placed(binding, [{key: part} for part in parts]))
    for hf, expected in zip(targets, rule.join(parts), strict=True):
        np.testing.assert_array_equal(made[hf], expected, err_msg=hf)


@pytest.mark.parametrize("spelling", ["published", "plain"])
def test_expert_gate_and_up_join_on_their_width_and_lie_side_by_side(spelling: str) -> None:
    binding = bound()
    keys = (
        ("experts.moe_w_in_eD_F", "experts.moe_w_swiglu_eD_F")
        if spelling == "published"
        else ("experts.w1", "experts.w3")
    )
    shape = (E * D, F // R) if spelling == "published" else (E, D, F // R)
    gates, ups = np.arange(2 * E * D * F).reshape(2, R, *shape)
    assert {binding.meta_shape(FFN + key, R) for key in keys} == {shape}
    target = f"{LM}{HF_FFN}experts.gate_up_proj"
    made = np.full(binding.transformers_shape(target), -1)
    ranks = [{FFN + keys[0]: gate, FFN + keys[1]: up} for gate, up in zip(gates, ups, strict=True)]
    _copy_all([(made, binding.transformers_placements(target))], _placed(binding, ranks))
    whole = [np.concatenate([part.reshape(E, D, F // R) for part in parts], 2) for parts in (gates, ups)]
    np.testing.assert_array_equal(made, np.concatenate(whole, 2))


# -- element positions, whole models


def _view(array: Array, p: Placement) -> Array:
    return as_strided(array.reshape(-1)[p.offset :], p.box.size, [s * array.itemsize for s in p.strides])


def _placed(binding: Binding, ranks: Sequence[Tensors]) -> list[tuple[Array, list[Placement]]]:
    return [
        (array, binding.meta_placements(key, len(ranks), rank))
        for rank, tensors in enumerate(ranks)
        for key, array in tensors.items()
    ]


def _copy_all(
    targets: Sequence[tuple[Array, list[Placement]]], sources: Sequence[tuple[Array, list[Placement]]]
) -> None:
    """The executor: every copy between every target and every source, element by element as strided views."""
    by_tensor: dict[str, list[tuple[Array, Placement]]] = {}
    for array, placements in sources:
        for p in placements:
            by_tensor.setdefault(p.tensor, []).append((array, p))
    for target, placements in targets:
        for wanted in placements:
            for source, held in by_tensor.get(wanted.tensor, []):
                if (c := copies(wanted, held)) is not None:
                    read = as_strided(source.reshape(-1)[c.source_offset :], c.shape, [s * 8 for s in c.source_strides])
                    flat = target.reshape(-1)[c.target_offset :]
                    as_strided(flat, c.shape, [s * 8 for s in c.target_strides])[...] = read
        assert (target >= 0).all(), "elements that no source holds"


def published(binding: Binding) -> set[str]:
    """The first spelling of every logical tensor."""
    return {binding.spellings(tensor)[0] for tensor in binding.logical}


def mixed_spelling(binding: Binding, rng: random.Random) -> set[str]:
    """One key for every logical tensor, any spelling beside any other."""
    chosen: set[str] = set()
    held: set[str] = set()
    for tensor in binding.logical:
        if tensor in held:
            continue
        free = [k for k in binding.spellings(tensor) if not held & set(binding.meta[k].tensors.values())]
        key = rng.choice(free)
        chosen.add(key)
        held.update(binding.meta[key].tensors.values())
    return chosen


def numbered(binding: Binding) -> Tensors:
    """Every logical tensor, every element of the model a different number."""
    logical, n = {}, 0
    for name, tensor in binding.logical.items():
        shape = tuple(tensor.sizes.values())
        logical[name] = np.arange(n, n + int(np.prod(shape)), dtype=np.int64).reshape(shape)
        n += logical[name].size
    return logical


def meta_ranks(binding: Binding, keys: set[str], logical: Tensors, ranks: int) -> list[Tensors]:
    made: list[Tensors] = []
    for rank in range(ranks):
        tensors = {}
        for key in sorted(keys):
            tensors[key] = np.full(binding.meta_shape(key, ranks), -1, np.int64)
            for p in binding.meta_placements(key, ranks, rank):
                box = tuple(slice(a, a + n) for a, n in zip(p.box.start, p.box.size, strict=True))
                _view(tensors[key], p)[...] = logical[p.tensor][box]
            assert (tensors[key] >= 0).all(), key
        made.append(tensors)
    return made


def empty_ranks(binding: Binding, keys: set[str], ranks: int) -> list[Tensors]:
    return [{key: np.full(binding.meta_shape(key, ranks), -1, np.int64) for key in keys} for _ in range(ranks)]


def assert_same(found: Sequence[Tensors], expected: Sequence[Tensors]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key, array in a.items():
            np.testing.assert_array_equal(array, b[key], err_msg=key)


@st.composite
def model_shapes(draw: st.DrawFn) -> ModelShape:
    """Models that 8 ranks can share: MoE, interleaved or dense, with or without vision."""
    n_layers = draw(st.integers(1, 3))
    step = draw(st.sampled_from([0, 1, 2]))
    head = draw(st.sampled_from([1, 2]))
    heads, kv_heads = draw(st.sampled_from([(8, 8), (16, 8)]))
    eighths = st.sampled_from([8, 16])
    sizes = {"Q": heads * head, "K": kv_heads * head, "E": draw(st.integers(1, 3))}
    sizes |= {axis: draw(eighths) for axis in "VFGCMA"} | {axis: draw(st.integers(1, 4)) for axis in "PNS"}
    n_vision_layers = draw(st.sampled_from([None, 1, 2]))
    sizes["D"] = draw(st.integers(1, 9)) if n_vision_layers is None else draw(eighths)
    return ModelShape(
        {**sizes, "H": sizes["C"], "O": sizes["A"]},
        {"Q": heads, "K": kv_heads, "H": 8},
        n_layers,
        frozenset(layer for layer in range(n_layers) if step and (layer + 1) % step == 0),
        n_vision_layers,
    )


@settings(max_examples=25, deadline=None)
@given(shape=model_shapes(), ranks=st.sampled_from([1, 2, 4, 8]), rng=st.randoms(use_true_random=False))
def test_meta_to_transformers_and_back_is_the_identity(shape: ModelShape, ranks: int, rng: random.Random) -> None:
    binding = load_table().bind(shape)
    keys, logical = mixed_spelling(binding, rng), numbered(binding)
    assert set(binding.claim(keys).spelling.values()) == keys
    source = meta_ranks(binding, keys, logical, ranks)

    converted = {key: np.full(binding.transformers_shape(key), -1, np.int64) for key in binding.transformers}
    placed = [(array, binding.transformers_placements(key)) for key, array in converted.items()]
    _copy_all(placed, _placed(binding, source))
    everything = np.sort(np.concatenate([array.ravel() for array in converted.values()]))
    np.testing.assert_array_equal(everything, np.arange(sum(t.size for t in logical.values())))

    back = empty_ranks(binding, keys, ranks)
    _copy_all(_placed(binding, back), placed)
    assert_same(back, source)


@settings(max_examples=12, deadline=None)
@given(shape=model_shapes(), ranks=st.sampled_from([1, 2, 4]), rng=st.randoms(use_true_random=False))
def test_resharding_eight_ranks_and_back_is_the_identity(shape: ModelShape, ranks: int, rng: random.Random) -> None:
    """Down to fewer ranks in any spelling, and up to eight in the first one."""
    binding = load_table().bind(shape)
    keys, other = mixed_spelling(binding, rng), mixed_spelling(binding, rng)
    logical = numbered(binding)
    eight = meta_ranks(binding, keys, logical, 8)
    fewer = empty_ranks(binding, other, ranks)
    _copy_all(_placed(binding, fewer), _placed(binding, eight))
    assert_same(fewer, meta_ranks(binding, other, logical, ranks))
    back = empty_ranks(binding, keys, 8)
    _copy_all(_placed(binding, back), _placed(binding, fewer))
    assert_same(back, eight)


# -- what does not fit is named


def test_an_unknown_key_is_named_with_its_nearest_neighbour() -> None:
    binding = bound()
    with pytest.raises(
        MappingError, match=r"unknown key layers\.0\.attention\.wo\.weigth; .*layers\.0\.attention\.wo\.weight"
    ):
        binding.claim({*published(binding), "layers.0.attention.wo.weigth"})
    with pytest.raises(MappingError, match=r"unknown key aaa \(and 1 more\)$"):
        binding.claim({*published(binding), "aaa", "bbb"})


@pytest.mark.parametrize("key", ["layers.2.attention.wo.weight", "layers.0.feed_forward.router_DE", f"{FFN}w1.weight"])
def test_a_key_of_a_layer_that_is_not_there_or_of_the_other_kind_is_unknown(key: str) -> None:
    binding = bound()
    with pytest.raises(MappingError, match=f"unknown key {key}"):
        binding.claim({*published(binding), key})


def test_every_missing_key_is_named_with_all_its_spellings() -> None:
    binding = bound()
    whole = published(binding)
    for key in sorted(whole):
        with pytest.raises(MappingError, match="missing key") as missing:
            binding.claim(whole - {key})
        first = next(iter(binding.meta[key].tensors.values()))
        for spelling in binding.spellings(first):
            assert spelling in str(missing.value)


def test_a_tensor_spelled_twice_is_refused_under_both_names() -> None:
    binding = bound()
    whole = published(binding)
    for key in sorted(set(binding.meta) - whole):
        with pytest.raises(MappingError, match="both hold") as doubled:
            binding.claim({*whole, key})
        assert key in str(doubled.value)


def test_half_of_a_fused_spelling_leaves_the_rest_missing() -> None:
    binding = bound()
    keys = published(binding) - {"layers.0.attention.wqkv.weight"} | {"layers.0.attention.wq.weight"}
    with pytest.raises(
        MappingError, match=r"missing key layers\.0\.attention\.wqkv\.weight or layers\.0\.attention\.wk\.weight"
    ):
        binding.claim(keys)


@pytest.mark.parametrize(
    ("changes", "key", "named"),
    [
        ({"units": {"Q": 12}}, "layers.0.attention.wqkv.weight", r"layers\.0\.q: 12 heads cannot be shared by 8 ranks"),
        ({"units": {"K": 4}}, "layers.0.attention.wk.weight", r"layers\.0\.k: 4 heads cannot be shared by 8 ranks"),
        ({"units": {"H": 4}}, f"{BLOCK}attn.wo.weight", r"vision\.layers\.0\.o_weight: 4 heads cannot"),
        ({"F": 12}, f"{FFN}experts.w2", r"layers\.1\.down: 12 rows cannot be shared by 8 ranks"),
    ],
)
def test_what_the_ranks_cannot_share_is_named(changes: dict[str, Any], key: str, named: str) -> None:
    """Heads stay whole even where their elements would divide."""
    with pytest.raises(MappingError, match=named):
        bound(**changes).meta_shape(key, 8)


@pytest.mark.parametrize(
    ("axis", "key", "found"),
    [
        ("V", "tok_embeddings.weight", 40),
        ("E", f"{FFN}router_DE", 3),
        ("F", f"{FFN}w_in_shared_FD.weight", 8),
        ("F", f"{FFN}experts.moe_w_in_eD_F", 8),
        ("F", f"{FFN}experts.w2", 8),
        ("G", "layers.0.feed_forward.mlp.fc1_weight", 56),
        ("G", "layers.0.feed_forward.w2.weight", 56),
    ],
)
def test_a_size_can_be_read_off_a_tensor(axis: str, key: str, found: int) -> None:
    shapes = {key: bound().meta_shape(key, R)}
    open_shape = model()
    del open_shape.sizes[axis]  # type: ignore[attr-defined]
    draft = load_table().bind(open_shape)
    assert draft.solve(axis, shapes, R) == found
    assert draft.solve(axis, {"norm.weight": (D,)}, R) is None
    with pytest.raises(MappingError, match=f"the size of axis {axis} is not known"):
        draft.meta_shape(key, R)
