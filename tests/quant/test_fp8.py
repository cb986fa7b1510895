"""The FP8 scheme: against compressed-tensors' own functions and torch's e4m3, against a slow oracle, and what it promises."""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import bf16, floats

from quant.schemes import NotFinite
from quant.schemes.fp8 import BLOCK, VALUES, Fp8, Granularity, Quantized

GRANULARITIES = get_args(Granularity)
LARGEST = 448


weights = functools.partial(samples.weights, span=15)


def awkward() -> np.ndarray:
    """Rows of zeros, of subnormals, of the largest bf16 and of everything between, both signs of zero."""
    random = np.random.default_rng(1)
    every = random.integers(0, 1 << 16, (BLOCK + 9, 2 * BLOCK + 5), dtype=np.uint16)
    every[(every & 0x7F80) == 0x7F80] &= 0xBFFF
    every[0] = 0
    every[1] = 0x8000
    every[2] &= 0x807F  # subnormal
    every[3] &= 0x8003  # at the very bottom: amax / 448 rounds to 0
    every[4] = np.where(every[4] & 0x8000, 0xFF7F, 0x7F7F)  # the largest
    every[5] = bf16(floats(every[5] & 0x80FF) * np.float32(2.0**10))  # scales that have no inverse in float32
    every[6:48] = weights("any", 42, every.shape[1])
    every[48:] = weights("gaussian", len(every) - 48, every.shape[1])
    return every


def rows_of(scale: np.ndarray, shape: tuple[int, int], granularity: str) -> np.ndarray:
    """The scale of each weight, float32 [N, K]."""
    if granularity == "block":
        scale = np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[: shape[0], : shape[1]]
    return floats(np.broadcast_to(scale, shape))


# The oracle: all values of e4m3 in a row, nothing clever.


def nearest_code(value: float) -> int:
    """The code of the nearest e4m3 number, of two the even one; -0 is 0."""
    limited = min(abs(float(value)), LARGEST)
    distances = np.abs(VALUES[:127].astype(np.float64) - limited)
    nearest = np.flatnonzero(distances == distances.min())
    code = int(nearest[0] if nearest[0] % 2 == 0 else nearest[-1])
    return code + (128 if value < 0 else 0)


def oracle(bits: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    x = floats(bits)
    if granularity == "block":
        n, k = (-(-size // BLOCK) for size in x.shape)
        blocks = np.zeros((n * BLOCK, k * BLOCK), np.float32)
        blocks[: x.shape[0], : x.shape[1]] = np.abs(x)
        amax = blocks.reshape(n, BLOCK, k, BLOCK).max((1, 3))
    else:
        amax = np.abs(x).max(1, keepdims=True) if granularity == "channel" else np.abs(x).max(keepdims=True)[0]
    scale = bf16(amax / np.float32(LARGEST))
    scale[scale == 0] = bf16(2.0**-7)
    quotient = floats(bf16(x / rows_of(scale, bits.shape, granularity)))
    codes = [nearest_code(value) for value in quotient.ravel()]
    return np.array(codes, np.uint8).reshape(bits.shape), scale


def quantized(bits: np.ndarray, granularity: Any = "channel", in_out: bool = False, **options: Any) -> Quantized:
    given = np.ascontiguousarray(bits.T) if in_out else bits
    return Fp8(granularity).quantize(given, in_out=in_out, **options)


def assert_same(one: Quantized, other: Quantized) -> None:
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale, other.scale)
    assert (one.squared_error, one.squared_sum) == (other.squared_error, other.squared_sum)


# The numbers themselves


def test_values_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(VALUES, theirs)


@pytest.mark.parametrize("in_out", [True, False])
def test_every_bf16_is_rounded_as_torch_rounds_it(in_out: bool) -> None:
    """All 65,536: at scale 1 those up to 448, the others limited to it, as each row's extreme makes the scale 1."""
    torch = pytest.importorskip("torch")
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    every = every[np.abs(floats(every)) <= LARGEST]  # neither NaN
    bits = np.zeros((-(-len(every) // 255), 256), np.uint16)
    bits[:, 0] = bf16(LARGEST)
    bits[:, 1:].flat[: len(every)] = every
    ours = quantized(bits, "channel", in_out)
    assert (floats(ours.scale) == 1).all()
    x = torch.from_numpy(bits).view(torch.bfloat16)
    theirs = (x + 0).to(torch.float8_e4m3fn).view(torch.uint8).numpy()  # the zero point takes the sign off -0
    np.testing.assert_array_equal(ours.codes, theirs)


def test_ties_subnormals_and_saturation_by_hand() -> None:
    cases = {
        448: 0x7E, 440: 0x7E, 432: 0x7E, 430: 0x7D, 416: 0x7D, 400: 0x7C,  # 432 lies between 416 and 448
        17: 0x58, 19: 0x5A, 1.0625: 0x38, 1.1875: 0x3A,  # ties to even
        2.0**-6: 0x08, 2.0**-6 * 15 / 16: 0x08, 2.0**-9: 0x01, 2.0**-10: 0x00, 3 * 2.0**-10: 0x02, 2.0**-30: 0x00,
    }  # fmt: skip
    row = bf16([*cases, *(-value for value in cases)])[None]
    ours = quantized(row)
    assert floats(ours.scale) == 1
    np.testing.assert_array_equal(ours.codes[0], [*cases.values(), *(code | 0x80 for code in cases.values())])
    # A scale that was rounded down leaves its extreme above 448: limited, not the NaN behind it.
    above = quantized(bf16([[3.0, -3.0]]))
    assert np.float32(3) / floats(above.scale)[0, 0] > LARGEST
    np.testing.assert_array_equal(above.codes, [[0x7E, 0xFE]])


# Against compressed-tensors


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["awkward", "gaussian", "t5"])
@pytest.mark.parametrize("in_out", [True, False])
def test_compressed_tensors_bit_for_bit(granularity: Any, kind: str, in_out: bool) -> None:
    theirs = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    torch = pytest.importorskip("torch")
    arguments = theirs.QuantizationArgs(**Fp8(granularity).compressed_tensors_args()["weights"])
    bits = awkward() if kind == "awkward" else weights(kind, 2 * BLOCK + 3, 3 * BLOCK - 1)
    x = torch.from_numpy(bits).view(torch.bfloat16)
    if granularity == "block":
        padded = helpers.maybe_pad_tensor_for_block_quant(x, (BLOCK, BLOCK))
        tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    elif granularity == "channel":
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    else:
        low, high = torch.aminmax(x)
    scale, zero_point = helpers.calculate_qparams(low, high, arguments)
    assert scale.dtype == torch.bfloat16
    codes = forward.quantize(x, scale, zero_point, arguments, dtype=torch.float8_e4m3fn)

    ours = quantized(bits, granularity, in_out)
    np.testing.assert_array_equal(ours.scale, scale.view(torch.uint16).numpy())
    np.testing.assert_array_equal(ours.codes, codes.view(torch.uint8).numpy())
    read = Fp8(granularity).dequantize(ours.codes, ours.scale)
    whole = forward.dequantize(codes, scale, None, arguments)
    np.testing.assert_array_equal(read, whole.view(torch.uint16).numpy())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compressed_tensors_takes_the_arguments(granularity: Any) -> None:
    theirs = pytest.importorskip("compressed_tensors.quantization")
    args = Fp8(granularity).compressed_tensors_args()
    assert set(args) == {"weights", "input_activations"}
    scheme = theirs.QuantizationScheme(targets=["Linear"], format="float-quantized", **args)
    assert scheme.weights.strategy == granularity
    assert scheme.input_activations.dynamic is True
    presets = {"channel": "FP8_DYNAMIC", "block": "FP8_BLOCK"}
    if granularity in presets:
        preset = theirs.preset_name_to_scheme(presets[granularity], ["Linear"])
        assert scheme.weights.model_dump(exclude={"observer"}) == preset.weights.model_dump(exclude={"observer"})
        exclude = {"observer"}
        assert scheme.input_activations.model_dump(exclude=exclude) == preset.input_activations.model_dump(
            exclude=exclude
        )


def test_arguments_of_each_granularity() -> None:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    assert Fp8().compressed_tensors_args() == {
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    assert Fp8("block").compressed_tensors_args()["weights"]["block_structure"] == [128, 128]
    assert Fp8("block").compressed_tensors_args()["input_activations"]["group_size"] == 128


def test_every_quotient_of_two_bf16_rounds_as_the_exact_one() -> None:
    """The kernel multiplies by an inverse. All significands by those of all extremes, over the octaves that codes have."""
    extremes = np.arange(0x4080, 0x4100, dtype=np.uint16)
    below = np.concatenate([np.arange(high - 19 * 128, high, dtype=np.uint16)[None] for high in extremes])
    bits = np.concatenate([below, extremes[:, None]], axis=1)
    bits[:, 1::2] |= 0x8000
    x = floats(bits)
    ours = quantized(bits, in_out=True)
    quotient = floats(bf16(x / floats(ours.scale)))
    limited = np.minimum(np.abs(quotient), LARGEST).astype(np.float64)
    unit = 2.0 ** (np.maximum(np.floor(np.log2(limited)), -6) - 3)
    np.testing.assert_array_equal(np.abs(VALUES[ours.codes]), np.rint(limited / unit) * unit)
    np.testing.assert_array_equal(np.signbit(VALUES[ours.codes]), np.signbit(x))


# Against the oracle


@settings(max_examples=40, deadline=None)
@given(
    granularity=st.sampled_from(GRANULARITIES),
    outputs=st.integers(1, BLOCK + 3),
    inputs=st.integers(1, 19) | st.integers(BLOCK - 2, BLOCK + 6) | st.integers(4 * BLOCK - 1, 4 * BLOCK + 2),
    threads=st.integers(1, 4),
    margin=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_neither_orientation_nor_slices_nor_threads_change_a_byte(
    granularity: Any, outputs: int, inputs: int, threads: int, margin: int, seed: int
) -> None:
    bits = weights("any", outputs, inputs, seed)
    alone = quantized(bits, granularity)
    assert_same(quantized(bits, granularity, threads=threads), alone)
    assert_same(quantized(bits, granularity, in_out=True, threads=threads), alone)
    wide = np.zeros((inputs, outputs + margin), np.uint16)
    wide[:, margin:] = bits.T
    with ThreadPoolExecutor(2) as pool:
        part = Fp8(granularity).quantize(wide[:, margin:], in_out=True, threads=threads, pool=pool)
    assert_same(part, alone)
    rows = slice(0, 3) if granularity == "channel" else slice(None)
    codes, scale = oracle(bits[rows, :300] if granularity == "channel" and inputs <= 300 else bits[rows], granularity)
    np.testing.assert_array_equal(alone.codes[rows], codes)
    np.testing.assert_array_equal(alone.scale[rows], scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gaussian", "t5", "any"])
def test_error_and_sum_are_those_of_the_dequantized_matrix(granularity: Any, kind: str) -> None:
    bits = weights(kind, BLOCK + 3, 1030)
    ours = quantized(bits, granularity)
    exact = Fp8(granularity).dequantize(ours.codes, ours.scale, dtype="F32").astype(np.float64)
    x = floats(bits).astype(np.float64)
    assert ours.squared_error == pytest.approx(np.square(x - exact).sum(), rel=1e-5)
    assert ours.squared_sum == pytest.approx(np.square(x).sum(), rel=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gaussian", "t5"])
def test_error_of_a_whole_matrix(granularity: Any, kind: str) -> None:
    assert quantized(weights(kind, 1024, 1024), granularity).relative_error == pytest.approx(0.0007, rel=0.05)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_bytes_do_not_depend_on_the_machine(granularity: str) -> None:
    """Golden sums: computed once; every machine that runs this must find them again. Integers make the weights."""
    mixed = np.arange(200 * 512, dtype=np.uint64) * np.uint64(6364136223846793005)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    bell = mixed.view(np.uint16).reshape(200, 512, 4).astype(np.int64).sum(2) - 2 * 0xFFFF
    ours = quantized(bf16(bell / 2.0**20), granularity)
    found = (zlib.crc32(ours.codes.tobytes()), zlib.crc32(ours.scale.tobytes()), ours.squared_error.hex())
    assert found == GOLDEN[granularity]


GOLDEN = {
    "channel": (4119179596, 2074277617, "0x1.7e61377643ca0p-4"),
    "tensor": (1090883126, 1571517039, "0x1.87d4526be6f00p-4"),
    "block": (1917306249, 1207577199, "0x1.85062b67f9050p-4"),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_stay_zeros(granularity: Any) -> None:
    bits = np.zeros((3, 200), np.uint16)
    bits[1] = 0x8000
    ours = quantized(bits, granularity)
    assert not ours.codes.any()
    assert (floats(ours.scale) == 2.0**-7).all()
    assert (ours.squared_error, ours.squared_sum, ours.relative_error) == (0, 0, 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("exponent", [-110, 126])
def test_huge_and_tiny_weights_keep_their_precision(granularity: Any, exponent: int) -> None:
    """compressed-tensors' scale of the largest bf16 of all, 1.99 * 2^127, is rounded up, and what it reads infinite."""
    bits = bf16(floats(weights("gaussian", 40, 200)).clip(-0.1, 0.1) * np.float64(2) ** exponent)
    ours = quantized(bits, granularity)
    read = floats(Fp8(granularity).dequantize(ours.codes, ours.scale)).astype(np.float64)
    x = floats(bits).astype(np.float64)
    assert ours.relative_error == pytest.approx(0.0007, rel=0.1)
    assert np.square(x - read).sum() / np.square(x).sum() == pytest.approx(ours.relative_error, rel=0.02)


@pytest.mark.parametrize("in_out", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_and_infinity_are_counted_and_refused(granularity: Any, in_out: bool) -> None:
    bits = weights("gaussian", BLOCK + 5, 1279)
    for place, value in {
        (0, 0): 0x7F80,
        (BLOCK + 4, 1278): 0xFF80,
        (7, 700): 0x7FC0,
        (7, 701): 0xFFFF,
        (9, 0): 0x7F81,
    }.items():
        bits[place] = value
    with pytest.raises(NotFinite, match="5 of 170,107 weights are NaN or infinite") as caught:
        quantized(bits, granularity, in_out, threads=2)
    assert caught.value.count == 5


@pytest.mark.parametrize("inputs", [64, 66])
def test_results_go_where_the_caller_wants_them(inputs: int) -> None:
    bits = weights("gaussian", 40, inputs)
    out = (np.empty((40, inputs), np.uint8), np.empty((40, 1), np.uint16))
    ours = quantized(bits, out=out)
    assert ours.codes is out[0]
    assert ours.scale is out[1]
    assert_same(ours, quantized(bits))
    with pytest.raises(ValueError, match=rf"expected contiguous uint8 \(41, {inputs}\)"):
        quantized(weights("gaussian", 41, inputs), out=out)


def test_what_is_no_matrix_of_bf16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="not float32"):
        Fp8().quantize(np.zeros((128, 128), np.float32), in_out=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be contiguous"):
        Fp8().quantize(np.zeros((128, 256), np.uint16)[:, ::2], in_out=True)
    with pytest.raises(ValueError, match="channel, tensor, block"):
        Fp8("row")  # type: ignore[arg-type]


# The inverse


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("threads", [1, 3])
def test_dequantizing_is_scale_by_value_of_any_codes_and_scales(granularity: Any, threads: int) -> None:
    random = np.random.default_rng(3)
    scheme = Fp8(granularity)
    shape = (2 * BLOCK + 1, 3 * BLOCK + 7)
    codes = random.integers(0, 0x7F, shape, dtype=np.uint8) | (random.integers(0, 2, shape) << 7).astype(np.uint8)
    scale = random.integers(0x0100, 0x7000, scheme.shapes(*shape)[1], dtype=np.uint16)
    exact = rows_of(scale, shape, granularity) * VALUES[codes]
    np.testing.assert_array_equal(scheme.dequantize(codes, scale, dtype="F32", threads=threads), exact)
    np.testing.assert_array_equal(scheme.dequantize(codes, scale, threads=threads), bf16(exact))


def test_dequantizing_asks_for_scales_that_fit() -> None:
    with pytest.raises(ValueError, match=r"expected contiguous uint16 \(4, 1\)"):
        Fp8().dequantize(np.zeros((4, 32), np.uint8), np.zeros((4, 3), np.uint16))
