"""The int4 scheme: against compressed-tensors' own functions, against slow oracles, and the limits of its error."""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats.compressed_tensors import pack_int4, unpack_int4
from quant.kernels import int4 as kernels
from quant.kernels.tiles import LANES
from quant.schemes import Indivisible, NotFinite
from quant.schemes.int4 import GROUP_SIZES, Int4, Quantized
from tests.support.samples import bf16, floats, weights

BLOCK = int(LANES)
METHODS = ("plain", "search", "signed")
GROUP = 128


# The oracles: a group a row, in float64, nothing clever.


def plain_oracle(bits: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bits of compressed-tensors' arithmetic: each step computed exactly enough, then rounded to bf16."""
    x = floats(bits).reshape(-1, group)
    scale = bf16(np.abs(x).max(1) / np.float32(7.5))
    scale[scale == 0] = bf16(2.0**-7)
    quotient = floats(bf16(x / floats(scale)[:, None]))
    codes = np.clip(np.rint(quotient), -8, 7).astype(np.int8)
    return codes.reshape(bits.shape), scale.reshape(len(bits), -1)


def nearest_codes(bits: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    x = floats(bits).astype(np.float64).reshape(-1, group)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.rint(x / floats(scale).reshape(-1, 1)), -8, 7).astype(np.int8).reshape(bits.shape)


def errors(bits: np.ndarray, codes: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Squared error of each group, in float64."""
    x, q = (a.astype(np.float64).reshape(-1, group) for a in (floats(bits), codes))
    return ((x - floats(scale).astype(np.float64).reshape(-1, 1) * q) ** 2).sum(1)


def least_errors(bits: np.ndarray, group: int, signed: bool) -> np.ndarray:
    """The exhaustive search: every bf16 scale from a third of amax / 7.5 to a little above it, of both signs if `signed`."""
    x = floats(bits).reshape(-1, group)
    if signed:
        return np.minimum(least_errors(bits, group, False), least_errors(bits ^ 0x8000, group, False))
    plain = bf16(np.abs(x).max(1) / np.float32(7.5)).astype(np.int32)
    best = np.full(len(x), np.inf)
    for step in range(-200, 20):
        scale = floats((plain + step).astype(np.uint16))[:, None]
        codes = np.clip(np.rint(x / scale), -8, 7)
        best = np.minimum(best, np.square(x - scale * codes).sum(1, dtype=np.float64))
    return best


def quantized(bits: np.ndarray, method: Any, group: int = GROUP, in_out: bool = False, **options: Any) -> Quantized:
    given = np.ascontiguousarray(bits.T) if in_out else bits
    return Int4(group, method).quantize(given, in_out=in_out, **options)


def assert_same(one: Quantized, other: Quantized) -> None:
    np.testing.assert_array_equal(one.packed, other.packed)
    np.testing.assert_array_equal(one.scale, other.scale)
    assert (one.squared_error, one.squared_sum) == (other.squared_error, other.squared_sum)


# plain


@functools.cache
def awkward() -> np.ndarray:
    """Groups of zeros, of subnormals, of the largest bf16 and of everything between, both signs of zero."""
    random = np.random.default_rng(1)
    every = random.integers(0, 1 << 16, (96, 4 * GROUP), dtype=np.uint16)
    every[(every & 0x7F80) == 0x7F80] &= 0xBFFF
    every[0] = 0
    every[1] = 0x8000
    every[2] &= 0x807F  # subnormal
    every[3] &= 0x8003  # at the very bottom: amax / 7.5 rounds to 0
    every[4] = np.where(every[4] & 0x8000, 0xFF7F, 0x7F7F)  # the largest
    every[5:32] = weights("any", 27, 4 * GROUP)
    every[32:64] = weights("gaussian", 32, 4 * GROUP)
    return every


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("in_out", [True, False])
def test_plain_is_compressed_tensors_bit_for_bit(group: int, in_out: bool) -> None:
    theirs = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch = pytest.importorskip("torch")
    arguments = theirs.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    bits = awkward()
    x = torch.from_numpy(bits).view(torch.bfloat16)
    grouped = x.unflatten(-1, (-1, group))
    scale, zero_point = helpers.calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    codes = forward.quantize(x, scale, zero_point, arguments, dtype=torch.int8)

    ours = quantized(bits, "plain", group, in_out)
    np.testing.assert_array_equal(ours.scale, scale.view(torch.uint16).numpy())
    np.testing.assert_array_equal(ours.packed, packing.pack_to_int32(codes, 4).numpy())
    read = Int4(group).dequantize(ours.packed, ours.scale)
    whole = forward.dequantize(codes, scale, zero_point, arguments)
    np.testing.assert_array_equal(read, whole.view(torch.uint16).numpy())


def test_plain_divides_as_bf16_does_for_every_weight_of_every_group() -> None:
    """The kernel multiplies by a reciprocal. A code depends on the weight by the group's extreme: here are all such pairs
    of bf16, down to a 32nd of the extreme; what is smaller still is code 0."""
    below = 5 * 128
    largest = np.arange(0x4080, 0x4100, dtype=np.uint16)[:, None]
    smaller = largest - np.arange(below + 127 - below % 127, dtype=np.uint16)
    groups = smaller.reshape(len(largest), -1, 127)
    bits = np.concatenate([groups, np.broadcast_to(largest[:, None], (*groups.shape[:2], 1))], axis=2).reshape(
        -1, GROUP
    )
    bits[1::2] |= 0x8000
    codes, scale = plain_oracle(bits, GROUP)
    ours = quantized(bits, "plain")
    np.testing.assert_array_equal(ours.scale, scale)
    np.testing.assert_array_equal(unpack_int4(ours.packed), codes)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_plain_is_the_oracle(group: int) -> None:
    codes, scale = plain_oracle(awkward(), group)
    ours = quantized(awkward(), "plain", group)
    np.testing.assert_array_equal(ours.scale, scale)
    np.testing.assert_array_equal(ours.packed, pack_int4(codes))


# search and signed


@pytest.mark.parametrize("method", ["search", "signed"])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_codes_are_the_nearest_to_the_weight_by_the_bf16_scale(method: str, group: int) -> None:
    """Half to even, also at exact ties; for every size of number that bf16 knows, subnormals apart."""
    bits = awkward()
    usual = np.arange(len(bits)) > 4
    ours = quantized(bits[usual], method, group)
    np.testing.assert_array_equal(unpack_int4(ours.packed), nearest_codes(bits[usual], ours.scale, group))


@pytest.mark.parametrize("method", ["search", "signed"])
@pytest.mark.parametrize("kind", ["gaussian", "t5", "any"])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_no_group_is_worse_than_plain(method: str, kind: str, group: int) -> None:
    bits = weights(kind, 256, 1024)
    plain, ours = quantized(bits, "plain", group), quantized(bits, method, group)
    mine = errors(bits, unpack_int4(ours.packed), ours.scale, group)
    theirs = errors(bits, unpack_int4(plain.packed), plain.scale, group)
    assert (mine <= theirs * (1 + 1e-6)).all()  # the kernel compares sums in float32
    assert ours.squared_error < plain.squared_error


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "t5"])
@pytest.mark.parametrize("method", ["search", "signed"])
def test_close_to_trying_every_scale(method: str, kind: str, group: int) -> None:
    bits = weights(kind, 128, 1024)
    least = least_errors(bits, group, method == "signed").sum()
    limit = {"search": 1.001, "signed": 1.0004}[method]
    assert least * 0.99999 < quantized(bits, method, group).squared_error < least * limit


@pytest.mark.parametrize(
    ("method", "gaussian", "t5"), [("plain", 0.0123, 0.0263), ("search", 0.0102, 0.0217), ("signed", 0.0093, 0.0195)]
)
def test_error_of_a_whole_matrix(method: str, gaussian: float, t5: float) -> None:
    assert quantized(weights("gaussian", 1024, 4096), method).relative_error == pytest.approx(gaussian, rel=0.005)
    assert quantized(weights("t5", 1024, 4096), method).relative_error == pytest.approx(t5, rel=0.005)


def test_signed_puts_the_extreme_of_each_group_on_minus_eight_and_search_keeps_scales_positive() -> None:
    bits = weights("gaussian", 64, 1024)
    x = floats(bits).reshape(-1, GROUP)
    signed = quantized(bits, "signed")
    extreme = np.abs(x).argmax(1)
    codes = unpack_int4(signed.packed).reshape(-1, GROUP)[np.arange(len(x)), extreme]
    assert (codes == -8).mean() > 0.95
    assert 0.3 < (floats(signed.scale) < 0).mean() < 0.7
    assert (floats(quantized(bits, "search").scale) > 0).all()


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize(
    ("method", "low", "high"),
    [("search", -8, 7), ("search", -7, 7), ("signed", -8, 7), ("signed", -7, 7), ("signed", -7, 8)],
)
def test_what_is_int4_already_comes_back_without_error(method: str, low: int, high: int, group: int) -> None:
    random = np.random.default_rng(2)
    q = random.integers(low, high + 1, (200, 4, group))
    q[..., 0] = low if abs(low) >= high else high  # the scale shows in the extreme
    scale = random.integers(16, 32, (200, 4, 1)) * 2.0 ** random.integers(-40, 40, (200, 4, 1))
    bits = bf16(scale * q).reshape(200, -1)  # exact: 5 bits by 4
    ours = quantized(bits, method, group)
    np.testing.assert_array_equal(floats(Int4(group).dequantize(ours.packed, ours.scale)), floats(bits))
    assert ours.squared_error == 0


# What holds for each method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_error_and_sum_are_those_of_the_dequantized_matrix(method: str, group: int) -> None:
    bits = weights("any", BLOCK + 3, 2048)
    ours = quantized(bits, method, group)
    exact = Int4(group).dequantize(ours.packed, ours.scale, dtype="F32").astype(np.float64)
    x = floats(bits).astype(np.float64)
    assert ours.squared_error == pytest.approx(np.square(x - exact).sum(), rel=1e-5)
    assert ours.squared_sum == pytest.approx(np.square(x).sum(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    group=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 40),
    outputs=st.integers(1, 2 * BLOCK + 1),
    threads=st.integers(1, 5),
    margin=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_neither_orientation_nor_slices_nor_threads_change_a_byte(
    method: Any, group: int, groups: int, outputs: int, threads: int, margin: int, seed: int
) -> None:
    bits = weights("gaussian", outputs, groups * group, seed)
    alone = quantized(bits, method, group)
    assert_same(quantized(bits, method, group, threads=threads), alone)
    assert_same(quantized(bits, method, group, in_out=True, threads=threads), alone)
    wide = np.zeros((groups * group, outputs + margin), np.uint16)
    wide[:, margin:] = bits.T
    with ThreadPoolExecutor(2) as pool:
        part = Int4(group, method).quantize(wide[:, margin:], in_out=True, threads=threads, pool=pool)
    assert_same(part, alone)
    # No output knows of its neighbours: the same words alone as in the matrix.
    row = seed % outputs
    np.testing.assert_array_equal(quantized(bits[row : row + 1], method, group).packed[0], alone.packed[row])


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_the_machine(method: str) -> None:
    """Golden sums: computed once; every machine that runs this must find them again. Integers make the weights."""
    mixed = np.arange(200 * 1024, dtype=np.uint64) * np.uint64(6364136223846793005)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    bell = mixed.view(np.uint16).reshape(200, 1024, 4).astype(np.int64).sum(2) - 2 * 0xFFFF
    ours = quantized(bf16(bell / 2.0**20), method)
    found = (zlib.crc32(ours.packed.tobytes()), zlib.crc32(ours.scale.tobytes()), ours.squared_error.hex())
    assert found == GOLDEN[method]


GOLDEN = {
    "plain": (50631482, 1593139108, "0x1.5df75fb260000p+1"),
    "search": (1342565823, 4200860820, "0x1.26aa2fdb80000p+1"),
    "signed": (2738057139, 988031377, "0x1.0e54448300000p+1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(method: str) -> None:
    bits = np.zeros((3, 256), np.uint16)
    bits[1] = 0x8000
    ours = quantized(bits, method)
    assert not Int4().dequantize(ours.packed, ours.scale, dtype="F32").any()
    assert (floats(ours.scale) == 2.0**-7).all()
    assert (ours.squared_error, ours.squared_sum, ours.relative_error) == (0, 0, 0)


@pytest.mark.parametrize("method", ["search", "signed"])
def test_the_largest_bf16_stays_finite_and_the_smallest_is_kept(method: str) -> None:
    bits = np.full((2, GROUP), 0x7F7F, np.uint16)
    bits[:, ::2] = 0xFF7F
    bits[1] = np.where(np.arange(GROUP) % 3, 0x0001, 0x8003)  # multiples of the smallest subnormal
    ours = quantized(bits, method)
    read = floats(Int4().dequantize(ours.packed, ours.scale))
    assert np.isfinite(read).all()
    np.testing.assert_allclose(read[0], floats(bits[0]), rtol=0.13)
    np.testing.assert_array_equal(read[1], floats(bits[1]))


@pytest.mark.parametrize("in_out", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_counted_and_refused(method: str, in_out: bool) -> None:
    bits = weights("gaussian", BLOCK + 5, 1280)
    for place, value in {
        (0, 0): 0x7F80,
        (BLOCK + 4, 1279): 0xFF80,
        (7, 700): 0x7FC0,
        (7, 701): 0xFFFF,
        (9, 0): 0x7F81,
    }.items():
        bits[place] = value
    with pytest.raises(NotFinite, match="5 of 170,240 weights are NaN or infinite") as caught:
        quantized(bits, method, in_out=in_out, threads=2)
    assert caught.value.count == 5


def test_inputs_must_divide_by_the_group() -> None:
    with pytest.raises(Indivisible, match=r"5,000 inputs do not divide by the group size 128 \(8 are left over\)"):
        Int4().quantize(np.zeros((5000, 8), np.uint16), in_out=True)
    Int4(32).quantize(np.zeros((8, 1024 - 32), np.uint16), in_out=False)


def test_results_go_where_the_caller_wants_them() -> None:
    bits = weights("gaussian", 40, 512)
    out = (np.empty((40, 64), np.int32), np.empty((40, 4), np.uint16))
    ours = quantized(bits, "search", out=out)
    assert ours.packed is out[0]
    assert ours.scale is out[1]
    assert_same(ours, quantized(bits, "search"))
    with pytest.raises(ValueError, match=r"expected contiguous int32 \(41, 64\)"):
        quantized(weights("gaussian", 41, 512), "search", out=out)


def test_what_is_no_matrix_of_bf16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="not float32"):
        Int4().quantize(np.zeros((128, 128), np.float32), in_out=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be contiguous"):
        Int4().quantize(np.zeros((128, 256), np.uint16)[:, ::2], in_out=True)
    with pytest.raises(ValueError, match="groups of 32, 64, 128"):
        Int4(100)
    with pytest.raises(ValueError, match="plain, search, signed"):
        Int4(128, "best")  # type: ignore[arg-type]


# The inverse


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_dequantizing_is_scale_by_code_of_any_words_and_scales(group: int, threads: int) -> None:
    random = np.random.default_rng(3)
    packed = random.integers(-(2**31), 2**31, (2 * BLOCK + 1, 3 * group // 8), dtype=np.int64).astype(np.int32)
    scale = random.integers(0, 0x7D00, (2 * BLOCK + 1, 3), dtype=np.uint16) | (
        random.integers(0, 2, (1, 3)) << 15
    ).astype(np.uint16)
    exact = np.repeat(floats(scale), group, axis=1) * unpack_int4(packed)
    np.testing.assert_array_equal(Int4(group).dequantize(packed, scale, dtype="F32", threads=threads), exact)
    np.testing.assert_array_equal(Int4(group).dequantize(packed, scale, threads=threads), bf16(exact))
    wide = random.random(scale.shape, np.float32)  # which no bf16 holds
    product = np.repeat(wide, group, axis=1) * unpack_int4(packed)
    np.testing.assert_array_equal(Int4(group).dequantize(packed, wide, dtype="F32", threads=threads), product)
    np.testing.assert_array_equal(Int4(group).dequantize(packed, wide, threads=threads), bf16(product))


def test_dequantizing_asks_for_scales_that_fit() -> None:
    with pytest.raises(ValueError, match=r"expected contiguous uint16 \(4, 2\)"):
        Int4().dequantize(np.zeros((4, 32), np.int32), np.zeros((4, 3), np.uint16))


def test_memory_of_a_thread_does_not_grow_with_the_matrix() -> None:
    for group in GROUP_SIZES:
        buffers = kernels.buffers(group)
        assert sum(buffer.nbytes for buffer in (*buffers.tile, *buffers[1:])) < 256 << 10
