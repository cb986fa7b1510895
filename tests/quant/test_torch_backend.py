"""The schemes in torch: the bytes of the compiled kernels, and their error sums; on a GPU too where there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.encoders import encoder_for
from quant.recipe import Scheme
from quant.schemes import Indivisible, NotFinite
from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4
from quant.schemes.nf4 import Nf4, UnfilledBlock
from quant.torch_backend import blocks, on_device

DEVICES = ["torch-cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INT4 = [Int4(group, method) for group in (32, 64, 128) for method in ("plain", "search", "signed")]  # type: ignore[arg-type]
FP8 = [Fp8(shared, method) for shared in ("channel", "tensor", "block") for method in ("plain", "search")]  # type: ignore[arg-type]
NF4 = [Nf4(64), Nf4(64, double_quant=False), Nf4(128), Nf4(512), Nf4(4096)]
SCHEMES = [*INT4, *FP8, *NF4]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks to a small matrix, the last ones ragged."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(blocks.BLOCK_WEIGHTS, device, 1 << 13)
        monkeypatch.setitem(blocks.MAX_BLOCK_OUTPUTS, device, 48)


def bf16(values: Any) -> np.ndarray:
    """Bits of finite numbers rounded to bf16, ties to even."""
    wide = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def finite(bits: np.ndarray) -> np.ndarray:
    return np.where((bits & 0x7F80) == 0x7F80, bits & 0xBFFF, bits).astype(np.uint16)


def weights(kind: str, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """[N, K] bf16 bits."""
    random = np.random.default_rng(seed)
    shape = outputs, inputs
    every = random.integers(0, 1 << 16, shape, dtype=np.uint16)
    drawn = {
        "gaussian": lambda: bf16(random.standard_normal(shape) / 32),
        "t5": lambda: bf16(random.standard_t(5, shape) / 32),
        "magnitudes": lambda: bf16(random.standard_normal(shape) * 10.0 ** random.integers(-30, 30, (outputs, 1))),
        "zeros": lambda: every & 0x8000,
        "subnormal": lambda: every & 0x807F,
        "bottom": lambda: every & 0x8003,  # amax / 7.5 and amax / 448 round to 0
        "no inverse": lambda: bf16((every & 0x00FF) * 2.0 ** random.integers(-136, -120, (outputs, 1))),  # of scales
        "largest": lambda: (every & 0x8000) | 0x7F7F,
        "any bits": lambda: finite(every),
        # quotients k + 1/2 at many scales; of e4m3 the midpoints too
        "ties": lambda: bf16(random.integers(-16, 16, shape) / 2 * 2.0 ** random.integers(-20, 20, (outputs, 1))),
        # one large and many small weights
        "outliers": lambda: bf16(random.standard_normal(shape) * np.where(random.random(shape) < 0.01, 1, 0.05)),
    }
    if kind == "mixed":
        kinds = random.choice([*drawn], outputs)
        return np.concatenate([weights(name, 1, inputs, seed + 1 + i) for i, name in enumerate(kinds)])
    return drawn[kind]()


KINDS = ("gaussian", "t5", "magnitudes", "zeros", "subnormal", "bottom", "no inverse", "largest", "any bits", "ties",
         "outliers", "mixed")  # fmt: skip


def assert_same(ours: Any, expected: Any) -> None:
    for field in fields(expected):
        one, other = getattr(ours, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), field.name)
        elif field.name.startswith("squared"):
            np.testing.assert_allclose(one, other, rtol=1e-10, err_msg=field.name)
        else:
            assert one == other


def compare(scheme: Any, bits: np.ndarray, device: str) -> None:
    for in_out in (True, False):
        source = np.ascontiguousarray(bits.T) if in_out else bits
        source.flags.writeable = False
        assert_same(
            on_device(scheme, device).quantize(source, in_out=in_out), scheme.quantize(source, in_out=in_out, threads=2)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_bytes_of_the_kernels(scheme: Any, kind: str, device: str) -> None:
    outputs = 128 if getattr(scheme, "block_size", 0) > 128 else 133  # blocks must be filled
    compare(scheme, weights(kind, outputs, 384), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", [INT4[2], INT4[7], *FP8, *NF4[::2]], ids=str)
def test_bytes_of_the_kernels_in_blocks_as_they_are(scheme: Any, device: str) -> None:
    compare(scheme, np.concatenate([weights("mixed", 64, 5120), weights("t5", 236, 5120)]), device)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    kind=st.sampled_from(KINDS),
    scheme=st.sampled_from(SCHEMES[:-1]),
    outputs=st.integers(1, 300),
    units=st.integers(1, 7),
    inputs=st.integers(1, 300),
    slices=st.booleans(),
)
def test_any_size_and_slice(
    seed: int, kind: str, scheme: Any, outputs: int, units: int, inputs: int, slices: bool
) -> None:
    if isinstance(scheme, Int4):
        inputs = scheme.group_size * units
    elif isinstance(scheme, Nf4):  # blocks go on over the ends of rows
        outputs, inputs = -(-outputs // 64) * 64, inputs * (scheme.block_size // 64)
    bits = weights(kind, outputs, inputs, seed)
    for in_out in (True, False):
        source = np.ascontiguousarray(bits.T) if in_out else bits
        if slices:
            wider = np.full((source.shape[0] + 2, source.shape[1] + 3), 0x7FFF, np.uint16)
            wider[1:-1, 2:-1] = source
            source = wider[1:-1, 2:-1]
        ours = on_device(scheme, "torch-cpu").quantize(source, in_out=in_out)
        assert_same(ours, scheme.quantize(source, in_out=in_out))


@pytest.mark.parametrize("device", DEVICES)
def test_every_bf16_in_fp8_and_nf4(device: str) -> None:
    """All of them by each of some scales: every rounding there is."""
    every = finite(np.arange(1 << 16, dtype=np.uint16)).reshape(64, -1)
    for largest in (0x3F80, 0x3FD3, 0x4455, 0x0A81):
        bits = np.where((every & 0x7FFF) > largest, largest, every).astype(np.uint16)
        compare(Fp8("tensor", "plain"), bits, device)
        compare(Fp8("tensor", "search"), bits, device)
        compare(Nf4(64), bits, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_out", [True, False])
@pytest.mark.parametrize("scheme", [INT4[0], INT4[4], INT4[8], *FP8, *NF4[:3]], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_nan_and_infinity_are_counted_and_refused_in_the_same_words(scheme: Any, in_out: bool, device: str) -> None:
    bits = weights("gaussian", 133, 1280)
    for place, value in {
        (0, 0): 0x7F80,
        (132, 1279): 0xFF80,
        (7, 700): 0x7FC0,
        (7, 701): 0xFFFF,
        (9, 0): 0x7F81,
    }.items():
        bits[place] = value
    source = np.ascontiguousarray(bits.T) if in_out else bits
    messages = []
    for one in (scheme, on_device(scheme, device)):
        with pytest.raises(NotFinite, match="5 of 170,240 weights are NaN or infinite") as caught:
            one.quantize(source, in_out=in_out)
        assert caught.value.count == 5
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_a_scheme_refuses_is_refused() -> None:
    for scheme in (Int4(), Fp8(), Nf4()):
        with pytest.raises(ValueError, match="not float32"):
            on_device(scheme, "torch-cpu").quantize(np.zeros((128, 128), np.float32), in_out=True)  # type: ignore
        with pytest.raises(ValueError, match="must be contiguous"):
            on_device(scheme, "torch-cpu").quantize(np.zeros((128, 256), np.uint16)[:, ::2], in_out=True)
    with pytest.raises(Indivisible):
        on_device(Int4(), "torch-cpu").quantize(np.zeros((5, 100), np.uint16), in_out=False)
    with pytest.raises(UnfilledBlock):
        on_device(Nf4(), "torch-cpu").quantize(np.zeros((5, 100), np.uint16), in_out=False)


@pytest.mark.parametrize("scheme", [Int4(), Fp8("block")], ids=str)
def test_results_go_where_the_caller_wants_them(scheme: Any) -> None:
    bits = weights("gaussian", 130, 256)
    expected = scheme.quantize(bits, in_out=False)
    first, scale = (np.empty_like(a) for a in (getattr(expected, f.name) for f in fields(expected)[:2]))
    made = on_device(scheme, "torch-cpu").quantize(bits, in_out=False, out=(first, scale))
    assert made.scale is scale
    assert_same(made, expected)


# Encoders


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["int4", "fp8", "nf4"])
def test_encoders_take_a_device(kind: str, device: str) -> None:
    bits = weights("gaussian", 128, 256)
    ours, expected = (encoder_for(Scheme(kind), name) for name in (device, "cpu"))
    assert ours.outputs(128, 256) == expected.outputs(128, 256)
    one, other = (encoder.encode(bits, False, 2) for encoder in (ours, expected))
    assert [part.tobytes() for part in one.parts] == [part.tobytes() for part in other.parts]
    assert [part.dtype for part in one.parts] == [part.dtype for part in other.parts]
    assert one.squared_error == pytest.approx(other.squared_error, rel=1e-10)
    assert one.squared_sum == pytest.approx(other.squared_sum, rel=1e-10)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps", "meta", "", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device '{device}': .*take .*cpu$") as caught:
        encoder_for(Scheme("int4"), device)
    assert "\n" not in str(caught.value)


def test_torch_is_loaded_only_for_a_device() -> None:
    script = """if True:
        import sys
        from quant.encoders import encoder_for
        from quant.recipe import Scheme
        for kind in ("int4", "fp8", "nf4"):
            encoder_for(Scheme(kind))
        assert "torch" not in sys.modules
        encoder_for(Scheme("int4"), "torch-cpu")
        assert "torch" in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)
