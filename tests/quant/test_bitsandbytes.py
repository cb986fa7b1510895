"""bitsandbytes' tensors on disk: against its own QuantState, and what Transformers makes of the configuration."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.config import Module
from quant.formats.bitsandbytes import Nf4Matrix, bitsandbytes_config, open_nf4
from quant.recipe import Scheme
from tests.support import samples

STATE = "weight.quant_state.bitsandbytes__nf4"
TYPES = {"U8": np.uint8, "F32": np.float32}


def weights(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """[N, K] bf16 bits, Gaussian."""
    drawn = np.random.default_rng(seed).standard_normal((outputs, inputs), np.float32) / 32
    return (drawn.view(np.uint32) >> 16).astype(np.uint16)


def stored(bits: np.ndarray, block: int = 64, double: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a matrix by suffix, from the bytes that would be on disk."""
    matrix = Nf4Matrix(block, double)
    parts = iter(matrix.encode(bits, False, 1).parts)
    found = {}
    for suffix, dtype, shape, constant in matrix.outputs(*bits.shape):
        data = next(parts).tobytes() if constant is None else constant
        found[suffix] = np.frombuffer(data, TYPES[dtype]).reshape(shape)
    assert next(parts, None) is None
    return found


def raw(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a reader hands them over that knows only sizes."""
    return {name: part.view(np.uint32) if part.dtype == np.float32 else part for name, part in parts.items()}


# Against bitsandbytes and Transformers


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 256])
def test_names_types_shapes_and_bytes_are_those_of_bitsandbytes(block: int, double: bool) -> None:
    bnb = samples.bitsandbytes()
    torch = pytest.importorskip("torch")
    bits = weights(96, 512)
    x = torch.from_numpy(bits).view(torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, blocksize=block, compress_statistics=double, quant_type="nf4")
    theirs = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    ours = stored(bits, block, double)
    assert ours.keys() == theirs.keys()
    same = ours.keys() - {STATE}
    if double:  # follow from the mean, which bitsandbytes adds up in an order of its threads
        same -= {"weight.absmax", "weight.nested_absmax"}
        assert json.loads(ours[STATE].tobytes())["nested_offset"] == pytest.approx(state.offset.item(), rel=1e-6)
    for name in ours:
        assert ours[name].dtype == theirs[name].numpy().dtype
        if name != STATE:
            assert ours[name].shape == tuple(theirs[name].shape)
        if name in same:
            np.testing.assert_array_equal(ours[name], theirs[name].numpy())
    # The JSON with our mean in it: the same bytes, then spaces.
    if double:
        state.offset = torch.tensor(json.loads(ours[STATE].tobytes())["nested_offset"])
    packed_state = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].numpy().tobytes()
    assert ours[STATE].tobytes().rstrip(b" ") == packed_state


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_reads_what_is_stored(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install --no-deps bitsandbytes==0.50.2")
    torch = pytest.importorskip("torch")
    bits = weights(96, 512)
    tensors = {name: torch.from_numpy(part.copy()) for name, part in stored(bits, 64, double).items()}
    weight = bnb.nn.Params4bit.from_prequantized(tensors.pop("weight"), tensors, device="cpu")
    whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert whole.dtype == torch.bfloat16
    decoded = Nf4Matrix(64, double).decode(raw(stored(bits, 64, double)), *bits.shape)
    np.testing.assert_array_equal(decoded, whole.view(torch.uint16).numpy())


def test_what_bitsandbytes_stored_can_be_read() -> None:
    bnb = samples.bitsandbytes()
    torch = pytest.importorskip("torch")
    bits = weights(96, 512)
    x = torch.from_numpy(bits).view(torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = {f"weight.{name}": t.numpy() for name, t in state.as_dict(packed=True).items()}
    n, k, matrix = open_nf4(parts[STATE].tobytes())
    assert (n, k) == bits.shape
    decoded = matrix.decode({"weight": packed.numpy(), **parts}, n, k)
    np.testing.assert_array_equal(decoded, bnb.dequantize_4bit(packed, state).view(torch.uint16).numpy())


def linear_layers(scheme: Scheme, kept: set[str]) -> list[Module]:
    """A model of four layers: layer 0 dense, the others with four experts."""
    found = []
    for layer in range(4):
        stem = f"language_model.model.layers.{layer}.feed_forward"
        places: list[tuple[str, str, int | None]] = [("dense_mlp", stem, None)]
        if layer:
            places = [("shared_expert", f"{stem}.shared_expert", None)]
            places += [("routed_experts", f"{stem}.experts.{e}", e) for e in range(4)]
        for family, prefix, expert in places:
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"{prefix}.{projection}"
                found.append(Module(name, family, layer, expert, None if prefix in kept else scheme))
    return found


OTHERS = [
    "language_model.lm_head",
    *(f"language_model.model.layers.11.self_attn.{p}_proj" for p in "qkvo"),
    "language_model.model.layers.1.feed_forward.router",
    "vision_model.model.layers.0.self_attn.q_proj",
    "vision_model.model.layers.0.mlp.fc1",
    "vision_model.vision_adapter.mlp.fc1",
    "vision_model.patch_embedding.linear",
    "multi_modal_projector.linear_1",
]


@pytest.mark.parametrize(
    "kept",
    [
        set(),
        {"language_model.model.layers.0.feed_forward"},
        {"language_model.model.layers.3.feed_forward.shared_expert"},
        {f"language_model.model.layers.{layer}.feed_forward.experts.{e}" for layer in (1, 2) for e in (0, 3)},
        {f"language_model.model.layers.2.feed_forward.experts.{e}" for e in range(4)},
    ],
)
def test_transformers_makes_4_bit_layers_of_what_is_quantized_and_of_nothing_else(kept: set[str]) -> None:
    quantizers = pytest.importorskip("transformers.quantizers.quantizers_utils")
    modules = linear_layers(Scheme("nf4"), kept)
    skipped = bitsandbytes_config(modules)["llm_int8_skip_modules"]
    for module in modules:
        assert quantizers.should_convert_module(module.name, skipped) == (module.scheme is not None), module.name
    assert not [name for name in OTHERS if quantizers.should_convert_module(name, skipped)]


@pytest.mark.parametrize("double", [True, False])
def test_transformers_reads_the_configuration(double: bool) -> None:
    configs = pytest.importorskip("transformers.utils.quantization_config")
    torch = pytest.importorskip("torch")
    written = bitsandbytes_config(linear_layers(Scheme("nf4", double_quant=double), set()))
    read = configs.BitsAndBytesConfig.from_dict(json.loads(json.dumps(written)))
    assert read.quantization_method() == "nf4"
    assert read.bnb_4bit_use_double_quant is double
    assert read.bnb_4bit_compute_dtype == torch.bfloat16
    assert read.bnb_4bit_quant_storage == torch.uint8
    assert read.llm_int8_skip_modules == written["llm_int8_skip_modules"]
    assert {name: value for name, value in read.to_dict().items() if name in written} == written


# By ourselves


def test_outputs_of_a_matrix() -> None:
    found = {output.suffix: (output.dtype, output.shape) for output in Nf4Matrix().outputs(8192, 5120)}
    length = found.pop(STATE)[1][0]
    assert found == {
        "weight": ("U8", (8192 * 5120 // 2, 1)),
        "weight.absmax": ("U8", (8192 * 5120 // 64,)),
        "weight.nested_absmax": ("F32", (8192 * 5120 // 64 // 256,)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
    }
    assert length < 200
    bits = sum(8 * np.prod(shape) * TYPES[dtype]().itemsize for dtype, shape in found.values()) / (8192 * 5120)
    assert bits == pytest.approx(4.127, abs=0.001)
    with pytest.raises(ValueError, match="do not fill blocks of 64"):
        Nf4Matrix().outputs(5, 100)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(96, 512), (16, 12), (1, 64)])
def test_what_is_encoded_comes_back_within_the_error_that_was_told(shape: tuple[int, int], double: bool) -> None:
    bits = weights(*shape)
    matrix = Nf4Matrix(64, double)
    encoded = matrix.encode(bits, False, 1)
    parts = raw(stored(bits, 64, double))
    n, k, opened = open_nf4(parts[STATE].tobytes())
    assert (n, k) == shape
    assert (opened.scheme.block_size, opened.scheme.double_quant) == (64, double)
    x, read = ((b.astype(np.uint32) << 16).view(np.float32) for b in (bits, opened.decode(parts, n, k, threads=2)))
    assert np.square((x - read).astype(np.float64)).sum() == pytest.approx(encoded.squared_error, rel=0.01)
    turned = matrix.encode(np.ascontiguousarray(bits.T), True, 2)
    for one, other in zip(turned.parts, encoded.parts, strict=True):
        np.testing.assert_array_equal(one, other)


@given(offset=st.floats(width=32, min_value=0, allow_nan=False, allow_infinity=False))
def test_the_state_is_as_long_as_was_announced_and_says_the_mean_exactly(offset: float) -> None:
    matrix = Nf4Matrix()
    state = matrix._state(8192, 5120, offset)
    assert len(state) == matrix.outputs(8192, 5120)[-1].shape[0]
    assert json.loads(state)["nested_offset"] == offset
    assert open_nf4(state)[:2] == (8192, 5120)


GOOD = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [2, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.5,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4', not 'nf4'"),
        ({"dtype": "float16"}, "dtype is 'float16', not 'bfloat16'"),
        ({"nested_blocksize": 128}, "nested_blocksize is 128, not 256"),
        ({"nested_offset": "much"}, "nested_offset is 'much', not a number"),
        ({"shape": [128]}, r"shape is \[128\], not that of a matrix"),
        ({"shape": None}, "shape is None, not that of a matrix"),
        ({"blocksize": 63}, "block size 63: NF4 has blocks of"),
        ({"blocksize": "64"}, "blocksize is '64', not a number"),
    ],
)
def test_states_of_others_are_refused(change: dict[str, Any], said: str) -> None:
    assert open_nf4(json.dumps(GOOD).encode())[:2] == (2, 64)
    with pytest.raises(ValueError, match=said):
        open_nf4(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize("state", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_states_that_are_no_json_are_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        open_nf4(state)


def test_parts_that_do_not_fit_are_refused() -> None:
    bits = weights(4, 128)
    parts = raw(stored(bits))
    matrix = Nf4Matrix()
    without = {name: part for name, part in parts.items() if name != "weight.absmax"}
    with pytest.raises(ValueError, match=r"weight\.absmax missing"):
        matrix.decode(without, 4, 128)
    with pytest.raises(ValueError, match=r"weight is \[256, 1\], not \[320, 1\]"):
        matrix.decode(parts, 5, 128)
    other = parts["weight.quant_map"].copy()
    other[3] = 0
    with pytest.raises(ValueError, match=r"quant_map holds other values than NF4's"):
        matrix.decode({**parts, "weight.quant_map": other}, 4, 128)
