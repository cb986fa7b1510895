"""The FP8 scheme: against compressed-tensors' own functions and torch's e4m3, against a slow oracle, and what it promises."""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.schemes import NotFinite
from quant.schemes.fp8 import BLOCK, VALUES, Fp8, Granularity, Method, Quantized
from tests.support import samples
from tests.support.samples import bf16, floats

GRANULARITIES, METHODS = get_args(Granularity), get_args(Method)
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


def groups(x: np.ndarray, granularity: str) -> np.ndarray:
    """Weights that share a scale, [scales, weights]; blocks are filled with zeros."""
    if granularity == "channel":
        return x
    if granularity == "tensor":
        return x.reshape(1, -1)
    n, k = (-(-size // BLOCK) for size in x.shape)
    padded = np.zeros((n * BLOCK, k * BLOCK), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded.reshape(n, BLOCK, k, BLOCK).swapaxes(1, 2).reshape(n * k, -1)


def oracle(bits: np.ndarray, granularity: str, method: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    x = floats(bits)
    grouped = groups(x, granularity)
    scale = bf16(np.abs(grouped).max(1) / np.float32(LARGEST))
    scale[scale == 0] = bf16(2.0**-7)
    if method == "search":
        scale = np.array([searched(*one) for one in zip(grouped, scale, strict=True)], np.uint16)
    scale = scale.reshape(Fp8(granularity).shapes(*bits.shape)[1])  # type: ignore[arg-type]
    scales = rows_of(scale, bits.shape, granularity)
    quotient = x * (np.float32(1) / scales) if method == "search" else floats(bf16(x / scales))
    codes = [nearest_code(value) for value in quotient.ravel()]
    return np.array(codes, np.uint8).reshape(bits.shape), scale


def searched(x: np.ndarray, plain: np.uint16) -> int:
    """Every scale of the octave from plain's, by the weights whose codes go by octaves; plain's if the others matter."""
    if not 0x0280 <= plain <= 0x7A91:
        return int(plain)
    octave = 2.0 ** np.floor(np.log2(floats(plain[None]))[0])
    counted = np.abs(x[np.abs(x) >= octave / 16]).astype(np.float64) / octave
    scales = floats(np.arange(plain, plain + 128).astype(np.uint16)).astype(np.float64) / octave
    errors = []
    for scale in scales:
        step = 2.0 ** (np.floor(np.log2(counted / scale)) - 3)
        errors.append(np.square(counted - scale * step * np.rint(counted / (scale * step))).sum())
    best = int(np.argmin(errors))
    return int(plain) + (best if errors[0] - errors[best] > len(x) * 2.0**-16 else 0)


def quantized(
    bits: np.ndarray, granularity: Any = "channel", in_out: bool = False, method: Any = "plain", **options: Any
) -> Quantized:
    given = np.ascontiguousarray(bits.T) if in_out else bits
    return Fp8(granularity, method).quantize(given, in_out=in_out, **options)


def errors_of_groups(bits: np.ndarray, granularity: Any, method: str) -> np.ndarray:
    """Squared errors by scale, of what was written."""
    ours = quantized(bits, granularity, method=method)
    read = rows_of(ours.scale, bits.shape, granularity).astype(np.float64) * VALUES[ours.codes]
    found: np.ndarray = np.square(groups(floats(bits) - read, granularity)).sum(1)
    return found


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
    method=st.sampled_from(METHODS),
    outputs=st.integers(1, BLOCK + 3),
    inputs=st.integers(1, 19) | st.integers(BLOCK - 2, BLOCK + 6) | st.integers(4 * BLOCK - 1, 4 * BLOCK + 2),
    threads=st.integers(1, 4),
    margin=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_neither_orientation_nor_slices_nor_threads_change_a_byte(
    granularity: Any, method: str, outputs: int, inputs: int, threads: int, margin: int, seed: int
) -> None:
    bits = weights("any", outputs, inputs, seed)
    alone = quantized(bits, granularity, method=method)
    assert_same(quantized(bits, granularity, method=method, threads=threads), alone)
    assert_same(quantized(bits, granularity, in_out=True, method=method, threads=threads), alone)
    wide = np.zeros((inputs, outputs + margin), np.uint16)
    wide[:, margin:] = bits.T
    with ThreadPoolExecutor(2) as pool:
        part = Fp8(granularity, method).quantize(wide[:, margin:], in_out=True, threads=threads, pool=pool)  # type: ignore[arg-type]
    assert_same(part, alone)
    rows = slice(0, 3) if granularity == "channel" else slice(None)
    codes, scale = oracle(bits[rows], granularity, method)
    np.testing.assert_array_equal(alone.codes[rows], codes)
    np.testing.assert_array_equal(alone.scale[rows], scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gaussian", "t5", "any"])
def test_error_and_sum_are_those_of_the_dequantized_matrix(granularity: Any, method: str, kind: str) -> None:
    bits = weights(kind, BLOCK + 3, 1030)
    ours = quantized(bits, granularity, method=method)
    exact = Fp8(granularity).dequantize(ours.codes, ours.scale, dtype="F32").astype(np.float64)
    x = floats(bits).astype(np.float64)
    assert ours.squared_error == pytest.approx(np.square(x - exact).sum(), rel=1e-5)
    assert ours.squared_sum == pytest.approx(np.square(x).sum(), rel=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gaussian", "t5"])
def test_error_of_a_whole_matrix(granularity: Any, kind: str) -> None:
    assert quantized(weights(kind, 1024, 1024), granularity).relative_error == pytest.approx(0.0007, rel=0.05)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_the_machine(granularity: str, method: str) -> None:
    """Golden sums: computed once; every machine that runs this must find them again. Integers make the weights."""
    mixed = np.arange(200 * 512, dtype=np.uint64) * np.uint64(6364136223846793005)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    bell = mixed.view(np.uint16).reshape(200, 512, 4).astype(np.int64).sum(2) - 2 * 0xFFFF
    ours = quantized(bf16(bell / 2.0**20), granularity, method=method)
    found = (zlib.crc32(ours.codes.tobytes()), zlib.crc32(ours.scale.tobytes()), ours.squared_error.hex())
    assert found == GOLDEN[method][granularity]


GOLDEN = {
    "plain": {
        "channel": (4119179596, 2074277617, "0x1.7e61377643ca0p-4"),
        "tensor": (1090883126, 1571517039, "0x1.87d4526be6f00p-4"),
        "block": (1917306249, 1207577199, "0x1.85062b67f9050p-4"),
    },
    "search": {
        "channel": (1957242685, 3703943710, "0x1.4368050d16468p-4"),
        "tensor": (3325372660, 2658529611, "0x1.76d8950ee0d00p-4"),
        "block": (2813546718, 490424626, "0x1.711b79760e070p-4"),
    },
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(granularity: Any, method: str) -> None:
    bits = np.zeros((3, 200), np.uint16)
    bits[1] = 0x8000
    ours = quantized(bits, granularity, method=method)
    assert not ours.codes.any()
    assert (floats(ours.scale) == 2.0**-7).all()
    assert (ours.squared_error, ours.squared_sum, ours.relative_error) == (0, 0, 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-110, 126])
def test_huge_and_tiny_weights_keep_their_precision(granularity: Any, method: str, exponent: int) -> None:
    """compressed-tensors' scale of the largest bf16 of all, 1.99 * 2^127, is rounded up, and what it reads infinite."""
    bits = bf16(floats(weights("gaussian", 40, 200)).clip(-0.1, 0.1) * np.float64(2) ** exponent)
    ours = quantized(bits, granularity, method=method)
    read = floats(Fp8(granularity).dequantize(ours.codes, ours.scale)).astype(np.float64)
    x = floats(bits).astype(np.float64)
    assert 0.0005 < ours.relative_error < 0.00075
    assert np.square(x - read).sum() / np.square(x).sum() == pytest.approx(ours.relative_error, rel=0.02)


@pytest.mark.parametrize("in_out", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_counted_and_refused(granularity: Any, in_out: bool, method: str) -> None:
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
        quantized(bits, granularity, in_out, method, threads=2)
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
    with pytest.raises(ValueError, match="method 'signed': FP8 knows plain, search"):
        Fp8("channel", "signed")  # type: ignore[arg-type]


# The search


def outliers(outputs: int, inputs: int, by: float) -> np.ndarray:
    """Gaussian rows with one weight that is `by` times as large."""
    random = np.random.default_rng(4)
    x = random.standard_normal((outputs, inputs))
    x[np.arange(outputs), random.integers(0, inputs, outputs)] *= by
    return bf16(x)


SEARCHED = {
    "gaussian": lambda: weights("gaussian", BLOCK + 9, 3 * BLOCK + 5),
    "t5": lambda: weights("t5", BLOCK + 9, 3 * BLOCK + 5),
    "few": lambda: weights("t5", 300, 5),
    "any": lambda: weights("any", BLOCK + 9, 3 * BLOCK + 5),
    "awkward": awkward,
    **{f"outliers {by:g}": functools.partial(outliers, BLOCK, 515, by) for by in (1e2, 1e3, 1e4, 1e5, 1e7)},
    "sparse": lambda: np.where(np.random.default_rng(0).random((99, 515)) < 0.95, 0, weights("t5", 99, 515)),
    "FP8 before": lambda: bf16(VALUES[np.random.default_rng(0).integers(0, 127, (9, 515))] * np.float32(0.013671875)),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", SEARCHED)
def test_the_search_is_never_worse_than_plain(granularity: Any, kind: str) -> None:
    bits = SEARCHED[kind]().astype(np.uint16)
    plain, search = (errors_of_groups(bits, granularity, method) for method in METHODS)
    assert (search <= plain * (1 + 1e-6)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gaussian", "t5", "few", "outliers 100", "sparse"])
def test_the_search_finds_the_best_scale_of_the_octave(granularity: Any, kind: str) -> None:
    bits = SEARCHED[kind]().astype(np.uint16)
    x = groups(floats(bits), granularity)
    plain = bf16(np.abs(x).max(1) / np.float32(LARGEST)).astype(np.int64)
    plain[plain == 0] = bf16(2.0**-7)
    least = np.full(len(x), np.inf)
    for step in range(128):
        scale = floats((plain + step).astype(np.uint16)).astype(np.float64)[:, None]
        magnitude = np.minimum(np.abs(x) / scale, LARGEST)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(magnitude, 2.0**-6))) - 3)
        least = np.minimum(least, np.square(np.abs(x) - scale * unit * np.rint(magnitude / unit)).sum(1))
    found = errors_of_groups(bits, granularity, "search")
    np.testing.assert_array_less(found, least * (1 + 1e-4) + 1e-30)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["awkward", "outliers 1000", "outliers 1e+07", "sparse", "few", "FP8 before"])
def test_the_search_does_as_the_oracle(granularity: Any, kind: str) -> None:
    bits = SEARCHED[kind]()[:133, :200].astype(np.uint16)
    ours = quantized(bits, granularity, method="search")
    codes, scale = oracle(bits, granularity, "search")
    np.testing.assert_array_equal(ours.scale, scale)
    np.testing.assert_array_equal(ours.codes, codes)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("kind", "channel", "rest"), [("gaussian", 0.000618, 0.00069), ("t5", 0.000584, 0.00069)])
def test_error_that_the_search_leaves(granularity: Any, kind: str, channel: float, rest: float) -> None:
    found = quantized(weights(kind, 1024, 1024), granularity, method="search").relative_error
    assert found == pytest.approx(channel if granularity == "channel" else rest, rel=0.04)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("largest", [0x7EFE, 0x7EFF, 0x7F00, 0x7F50, 0x7F60])
def test_no_searched_scale_makes_a_weight_infinite(granularity: Any, largest: int) -> None:
    bits = np.sort(np.random.default_rng(0).integers(0x7D00, largest + 1, (BLOCK, 77))).astype(np.uint16)
    bits[:, -1] = largest
    ours = quantized(bits, granularity, method="search")
    assert (Fp8(granularity).dequantize(ours.codes, ours.scale) < 0x7F80).all()


def test_weights_that_were_fp8_are_found_again() -> None:
    """Whatever their largest was: plain finds them only if it was 448."""
    random = np.random.default_rng(5)
    scale = floats(random.integers(0x3A00, 0x3B00, (40, 1)).astype(np.uint16))
    values = VALUES[random.integers(0x40, 0x70, (40, 300))]
    bits = bf16(scale * values)
    coarse = floats(bits) == scale * values  # of the rest the product has no bf16
    ours = quantized(np.where(coarse, bits, 0).astype(np.uint16), method="search")
    assert ours.relative_error < 1e-12


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
