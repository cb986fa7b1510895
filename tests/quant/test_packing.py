"""compressed-tensors' int4 words, held against compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant.formats.compressed_tensors import pack_int4, unpack_int4, weight_shape


def codes(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-8, 8, (rows, columns), dtype=np.int8)


def test_a_word_holds_eight_codes_the_first_in_the_lowest_bits_each_plus_eight() -> None:
    assert pack_int4(np.array([[-8, -7, -6, -5, -4, -3, -2, 7]], np.int8)).view(np.uint32) == 0xF6543210


def test_the_words_are_those_of_compressed_tensors() -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch = pytest.importorskip("torch")
    ours = codes(5, 4096)
    packed = pack_int4(ours)
    np.testing.assert_array_equal(packed, theirs.pack_to_int32(torch.from_numpy(ours), 4).numpy())
    np.testing.assert_array_equal(theirs.unpack_from_int32(torch.from_numpy(packed), 4, ours.shape).numpy(), ours)


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 5), st.integers(0, 9).map(lambda n: 8 * n)), elements=st.integers(-8, 7)
    )
)
def test_unpacking_inverts_packing(ours: np.ndarray) -> None:
    packed = pack_int4(ours)
    assert packed.dtype == np.int32
    assert packed.shape == (ours.shape[0], ours.shape[1] // 8)
    np.testing.assert_array_equal(unpack_int4(packed), ours)


def test_what_would_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="12 codes a row"):
        pack_int4(codes(2, 12))
    with pytest.raises(ValueError, match="4 bits hold -8 to 7"):
        pack_int4(np.full((1, 8), 8, np.int8))


def test_the_shape_is_out_then_in_as_int64() -> None:
    shape = weight_shape(8192, 5120)
    assert (shape.dtype, shape.tolist()) == (np.int64, [8192, 5120])
