"""Rounding of inputs: worked numbers, then what must hold for any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.inputs import InputRounding, cache_round, cache_scale, input_scale, round_inputs
from quantkit.schemes import Activations, Scheme, parse_scheme

INT8, STATIC, MIXED = (parse_scheme(name) for name in ("w8a8", "w8a8_static", "w8a8_mixed"))
FP8, FP8_STATIC, FP8_BLOCK = (parse_scheme(name) for name in ("fp8a8", "fp8a8_static", "fp8a8_block"))


def e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def test_int8_per_token_by_hand() -> None:
    # scale 127.5/127.5 = 1: 2.5 → 2 and 3.5 → 4 (ties to even), 127.5 → 128, cut to 127; −127.5 → −128
    first = torch.tensor([127.5, 2.5, 3.5, -0.4])
    assert round_inputs(first[None], INT8).tolist() == [[127.0, 2.0, 4.0, 0.0]]
    # its own scale 63.75/127.5 = ½ for the next token: 1.3 → 3 · ½, 0.2 → 0
    both = torch.stack((-first, torch.tensor([-63.75, 1.3, 0.2, 63.5])))
    assert round_inputs(both, INT8).tolist() == [[-128.0, -2.0, -4.0, 0.0], [-64.0, 1.5, 0.0, 63.5]]


def test_int8_with_one_scale_from_calibration() -> None:
    scale = input_scale(torch.tensor([3.0, 63.75, 1.0]), STATIC)
    assert (scale.tolist(), scale.dtype) == ([0.5], torch.float16)
    x = torch.tensor([[0.7, -0.3, 1000.0, -1000.0], [63.75, 0.0, 0.25, 0.75]])
    expected = [[0.5, -0.5, 63.5, -64.0], [63.5, 0.0, 0.0, 1.0]]
    assert round_inputs(x, STATIC, scale).tolist() == expected
    assert InputRounding(STATIC, 0.5)(x).tolist() == expected


def test_fp8_per_token_by_hand() -> None:
    # scale 1, points near 100 are 8 apart: 100 → 96 (tie between 96 and 104, even), 300 → 288 (32 apart)
    x = torch.tensor([[448.0, 100.0, -300.0, 1.05], [224.0, 50.0, -150.0, 0.525]])
    assert round_inputs(x, FP8).tolist() == [[448.0, 96.0, -288.0, 1.0], [224.0, 48.0, -144.0, 0.5]]


def test_fp8_with_one_scale_saturates() -> None:
    scale = input_scale(torch.tensor([896.0]), FP8_STATIC)
    assert scale.tolist() == [2.0]
    x = torch.tensor([[1e6, -1e6, 200.0]])
    assert round_inputs(x, FP8_STATIC, scale).tolist() == [[896.0, -896.0, 192.0]]


def test_fp8_groups_have_scales_of_their_own() -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)) * 100
    x[..., 128:] /= 1e4
    scales = x.view(2, 3, 2, 128).abs().amax(-1, keepdim=True) / 448
    expected = e4m3(x.view(2, 3, 2, 128) / scales) * scales
    assert torch.equal(round_inputs(x, FP8_BLOCK), expected.view_as(x))
    per_token = round_inputs(x, FP8)
    assert not torch.equal(per_token, expected.view_as(x))


def test_llm_int8_by_hand() -> None:
    # column 1 holds 8 ≥ 6, so it stays in both tokens. Token 0: of the rest 1.27 is largest, steps of 0.01.
    # Token 1: 5.08 counts although its column is not rounded, steps of 0.04.
    x = torch.tensor([[1.27, 8.0, 0.504, -0.25], [0.05, 5.08, 1.0, -2.54]])
    found = round_inputs(x, MIXED)
    expected = torch.tensor([[1.27, 8.0, 0.5, -0.25], [0.04, 5.08, 1.0, -2.56]])
    # fp16 first: 11 bits of 1.27 and of 5.08
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert torch.equal(found[:, 1], x[:, 1])
    assert not torch.equal(found[:, 0], x[:, 0])


def test_llm_int8_columns_belong_to_a_row_of_text() -> None:
    x = torch.full((2, 3, 4), 0.501)
    x[0, 2, 1] = -6.0
    x[..., 3] = 1.0
    found = round_inputs(x, MIXED)
    assert torch.equal(found[0, :, 1], x[0, :, 1])
    assert not torch.equal(found[1, :, 1], x[1, :, 1])
    assert torch.equal(found[1], round_inputs(x[1], MIXED))
    # flat tokens are one text
    assert torch.equal(round_inputs(x.view(6, 4), MIXED)[:, 1], x.view(6, 4)[:, 1])


def test_llm_int8_of_zeros_and_of_outliers_alone() -> None:
    assert torch.equal(round_inputs(torch.zeros(2, 3), MIXED), torch.zeros(2, 3))
    x = torch.tensor([[7.123, -9.0], [0.0, 0.0]])
    assert torch.equal(round_inputs(x, MIXED), x)


def test_thresholds() -> None:
    x = torch.tensor([[3.0, 1.001, 127.0]])
    high = round_inputs(x, parse_scheme("w8a8_mixed200"))
    assert high.tolist() == [[3.0, 1.0, 127.0]]
    low = round_inputs(x, parse_scheme("w8a8_mixed2"))
    assert low[0, 0] == 3.0 and low[0, 2] == 127.0
    assert round_inputs(x, parse_scheme("w8a8_mixed0")).tolist() == [[3.0, 1.0, 127.0]]


def test_beyond_float16_is_an_outlier() -> None:
    x = torch.tensor([[1e6, 1.0, 0.5]])
    found = round_inputs(x, MIXED)
    assert found[0, 0] == 1e6
    assert torch.isfinite(found).all()


def test_weights_only_leaves_inputs() -> None:
    x = torch.randn(3, 8)
    assert round_inputs(x, parse_scheme("w8")) is x
    empty = torch.empty(0, 8)
    assert round_inputs(empty, INT8) is empty


def test_a_missing_static_scale() -> None:
    with pytest.raises(ValueError, match="w8a8_static rounds inputs with a scale from calibration"):
        round_inputs(torch.ones(1, 2), STATIC)


@pytest.mark.parametrize("scheme", [INT8, FP8, FP8_BLOCK, MIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_shape_and_source_are_kept(scheme: Scheme, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    found = round_inputs(x, scheme)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    # turned around in memory
    assert torch.equal(round_inputs(x.transpose(0, 1), scheme).transpose(0, 1), found) or scheme is MIXED


@pytest.mark.parametrize("scheme", [INT8, FP8, FP8_BLOCK, MIXED])
def test_zero_tokens_stay_zero(scheme: Scheme) -> None:
    x = torch.zeros(2, 128)
    x[0, 3] = 1.0
    found = round_inputs(x, scheme)
    assert torch.equal(found[1], torch.zeros(128))
    assert torch.isfinite(found).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(-4, 4))
def test_errors_are_bounded(seed: int, magnitude: float) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    largest = x.abs().amax(1, keepdim=True)
    half = largest / 127.5 / 2
    assert bool(((round_inputs(x, INT8) - x).abs() <= half * 1.001).all())
    # e4m3 has 3 bits behind the point: 2⁻⁴ of the value, or 2⁻¹⁰ of the scale where it is subnormal
    bound = torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10)
    assert bool(((round_inputs(x, FP8) - x).abs() <= bound * 1.001).all())


def test_rounded_inputs_are_8_bit_numbers() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 127.5
    codes = round_inputs(x, INT8) / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.unique().numel() <= 256


def test_int8_groups_in_a_scheme_made_by_hand() -> None:
    grouped = Scheme(8, activations=Activations(group_size=2))
    assert round_inputs(torch.tensor([[127.5, 1.2, 0.0, 63.75]]), grouped).tolist() == [
        [127.0, 1.0, 0.0, 63.5]
    ]


def test_equal_roundings_are_equal() -> None:
    assert InputRounding(parse_scheme("w8a8"), None) == InputRounding(INT8)
    assert InputRounding(STATIC, 0.5) != InputRounding(STATIC, 0.25)
    x = torch.randn(2, 4)
    assert torch.equal(InputRounding(INT8)(x), round_inputs(x, INT8))


def test_scales_from_calibration() -> None:
    assert input_scale(torch.tensor([0.0, 255.0]), STATIC).tolist() == [2.0]
    assert input_scale(torch.zeros(3), STATIC).tolist() == [1.0]
    assert cache_scale(torch.tensor(255.0), "int8").tolist() == [2.0]
    assert cache_scale(torch.tensor([224.0]), "fp8").tolist() == [0.5]
    assert cache_scale(torch.tensor(0.0), "fp8").tolist() == [1.0]
    assert cache_scale(torch.tensor(1.0).bfloat16(), "fp8").dtype == torch.float32
    with pytest.raises(NumericsError, match="does not fit float16"):
        input_scale(torch.tensor([1e8]), STATIC)


def test_cache_rounding_by_hand() -> None:
    k = torch.tensor([[[1.3, -64.0, 100.0]]])
    assert cache_round(k, "int8", torch.tensor([0.5])).tolist() == [[[1.5, -64.0, 63.5]]]
    assert cache_round(k, "fp8", torch.tensor([1.0])).tolist() == [[[1.25, -64.0, 96.0]]]
    assert cache_round(k * 100, "fp8", torch.tensor([1.0])).amax() == 448
    assert cache_round(k.bfloat16(), "fp8", torch.tensor([1.0])).dtype == torch.bfloat16


def test_a_calibrated_cache_does_not_clip() -> None:
    k = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    for dtype, error in (("int8", 1 / 127.5 / 2), ("fp8", 2**-4)):
        found = cache_round(k, dtype, cache_scale(k.abs().amax(), dtype))  # type: ignore[arg-type]
        assert (found - k).abs().max() <= error * k.abs().max() * 1.001
