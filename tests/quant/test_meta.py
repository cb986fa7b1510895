"""Meta's own formats: numbers as its code has them, on every code and at the edges of its FP8 formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.formats.meta import MetaFp8, MetaInt4, MetaRows, quantize_fp8, scale_key
from quant.schemes import Indivisible, NotFinite
from tests.support import meta_quantizer


def bits(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.bfloat16().contiguous().view(torch.uint16).numpy()
    return found


def numbers(found: np.ndarray) -> Tensor:
    return torch.from_numpy(found).view(torch.bfloat16)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """bf16 [inputs, outputs] over all magnitudes, with outputs of zeros, of -0 and of numbers far apart."""
    k, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    found = torch.randn(k, n, generator=generator) * 10.0 ** draw(st.integers(-38, 34))
    found[:, 0] *= draw(st.sampled_from([0.0, -0.0, 1.0, 1e-3]))
    found[0] *= draw(st.sampled_from([1.0, 448.0, 1e-4]))
    return found.bfloat16()


@settings(max_examples=200, deadline=None)
@given(weights())
def test_fp8_is_metas_formula(weight: Tensor) -> None:
    """Codes and scales of FBGEMM's operator on the transposed matrix, bit by bit, and the error that this makes."""
    codes, scales = meta_quantizer.fp8_per_row(weight.T.contiguous())
    made = quantize_fp8(bits(weight))
    assert torch.equal(torch.from_numpy(made.scales), scales)
    assert torch.equal(torch.from_numpy(made.codes), codes.T.contiguous().view(torch.uint8))
    error = (weight.double() - codes.T.double() * scales.double()).square().sum().item()
    assert made.squared_error == pytest.approx(error, rel=1e-12, abs=0)
    assert made.squared_sum == pytest.approx(weight.double().square().sum().item(), rel=1e-12, abs=0)


def test_a_scale_has_a_least_value() -> None:
    made = quantize_fp8(bits(torch.tensor([[0.0, 2**-20, 2**-9, 2**-8]])))
    assert made.scales.tolist() == [np.float32(1 / (448 * 512))] * 3 + [np.float32(2**-8 / 448)]
    assert made.codes.tolist()[0][2:] == [0x7E, 0x7E]  # 448


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(7, 5)
    weight[3, 2] = weight[6, 4] = value
    with pytest.raises(NotFinite) as raised:
        quantize_fp8(bits(weight))
    assert raised.value.count == 2


def test_every_fp8_code_times_a_scale() -> None:
    """One rounding to float32 and one to bf16, as torch does it; outputs along either axis."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.contiguous()  # [256 inputs, 3 outputs]
    scales = torch.tensor([0.0123, 3.3, 1e36])
    expected = (codes.view(torch.float8_e4m3fn).float() * scales).bfloat16()
    made = np.empty(codes.shape, np.uint16)
    MetaFp8().decode(codes.numpy(), scales.numpy(), 0, made)
    assert torch.equal(numbers(made).nan_to_num(7), expected.nan_to_num(7))
    assert numbers(made).isnan().sum() == 6
    parts = {"weight": codes.T.contiguous().numpy(), "weight_scale": scales.view(torch.uint32).numpy()[:, None]}
    assert torch.equal(numbers(MetaRows().decode(parts, 3, 256)).T.nan_to_num(7), expected.nan_to_num(7))


def test_every_int4_byte_times_a_scale() -> None:
    """What Meta's int4_row_quantize and pack_int4 made: two inputs of an output in a byte, scales by groups of 128 inputs."""
    with meta_quantizer.importable():
        from llama_models.quantize_impls import int4_row_quantize, pack_int4
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))  # [outputs, inputs]
    codes, scales = int4_row_quantize(weight)
    packed = pack_int4(codes).T.contiguous().view(torch.uint8).numpy()
    expected = (codes.float().view(6, 4, 128) * scales.T.unsqueeze(-1)).view(6, 512).T.bfloat16()
    assert len(codes.unique()) == 16
    made = np.empty((512, 6), np.uint16)
    MetaInt4().decode(packed, scales.numpy(), 0, made)
    assert torch.equal(numbers(made), expected)
    MetaInt4().decode(packed[50:150], scales.numpy(), 100, made[:200])  # rows in the middle, over the bounds of groups
    assert torch.equal(numbers(made[:200]), expected[100:300])


def test_groups_divide_the_inputs() -> None:
    assert MetaInt4().scales_shape(384, 5) == (3, 5)
    with pytest.raises(Indivisible, match="200 inputs"):
        MetaInt4().scales_shape(200, 5)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("layers.3.feed_forward.experts.moe_w_in_eD_F", "layers.3.feed_forward.experts.w1"),
        ("layers.3.feed_forward.experts.moe_w_swiglu_eD_F", "layers.3.feed_forward.experts.w3"),
        ("layers.3.feed_forward.experts.moe_w_out_eF_D", "layers.3.feed_forward.experts.w2"),
        ("layers.3.feed_forward.experts.w2", "layers.3.feed_forward.experts.w2"),
        ("layers.3.feed_forward.w2.weight", None),
        ("layers.3.feed_forward.shared_expert.w1.weight", None),
        ("norm.weight", None),
    ],
)
def test_what_the_scales_of_a_key_are_called(key: str, expected: str | None) -> None:
    assert scale_key(key) == expected
