"""Moving codes from grid to grid: equal in every value, or refused with the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.blocks import Q4_0, Q4_1, Q8_0
from quantkit.run.gguf import on_blocks
from quantkit.run.regrid import fits_symmetric, inexact, regrid
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize
from tests.quantized import random_affine

SHAPE = (8, 128)


def linear(scheme: str, seed: int = 0, **changes: object) -> QuantizedLinear:
    found = random_affine(SHAPE, parse_scheme(scheme), torch.Generator().manual_seed(seed))
    return QuantizedLinear("w", replace(found, **changes))  # type: ignore[arg-type]


def affine(q: QuantizedTensor) -> Affine:
    assert isinstance(q, Affine)
    return q


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("w4g64", "w4g64"),
        ("w4g64", "w4g32"),
        ("w4", "w4g128"),
        ("w4", "w4g32"),
        ("w8_tensor", "w8"),
        ("w8_tensor", "w8g64"),
        ("w4g64", "w4g32_asym"),
        ("w4g64_asym", "w4g16_asym"),
        ("w3g64", "w4g32"),
        ("w2g64_asym", "w4g64_asym"),
        ("w2g64_asym", "w8g64"),
    ],
)
def test_finer_groups_more_bits_and_a_zero_point_change_no_value(before: str, after: str) -> None:
    found = regrid(linear(before), parse_scheme(after))
    scheme = parse_scheme(after)
    q = affine(found.weight)
    assert q.group == scheme.group(SHAPE) and q.bits == scheme.bits
    assert (q.zero_point is None) == scheme.sym
    assert q.codes.dtype == (torch.int8 if scheme.sym else torch.uint8)
    assert torch.equal(dequantize(q), dequantize(linear(before).weight))


@given(st.integers(0, 50))
def test_there_and_back_gives_the_same_bytes(seed: int) -> None:
    start = linear("w4g64", seed)
    there = regrid(start, parse_scheme("w4g32_asym"))
    back = regrid(there, parse_scheme("w4g64"))
    for field in ("codes", "scale"):
        one, other = getattr(start.weight, field), getattr(back.weight, field)
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert affine(back.weight).zero_point is None


def test_a_zero_point_in_the_middle_is_none() -> None:
    middle = torch.full((8, 2), 8, dtype=torch.uint8)
    start = linear("w4g64_asym", zero_point=middle)
    assert fits_symmetric(affine(start.weight), 4)
    found = affine(regrid(start, parse_scheme("w4g64")).weight)
    assert found.zero_point is None and torch.equal(
        found.codes, (affine(start.weight).codes - 8).view(torch.int8)
    )


def test_columns_in_groups_of_their_own_keep_them() -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 64
    start = linear("w4g64", column_group=order)
    same = regrid(start, parse_scheme("w4g64_asym"))
    assert torch.equal(dequantize(same.weight), dequantize(start.weight))
    with pytest.raises(UnsupportedError, match=r"act-order\): they cannot be cut anew"):
        regrid(start, parse_scheme("w4g32"))


@pytest.mark.parametrize(
    ("start", "scheme", "reason"),
    [
        (linear("w8g64"), "w4g64", "codes of 8 bits and w4g64 holds 4"),
        (linear("w4g64_asym"), "w4g64", "16 of 16 zero points of `w` are not 8|do not fit 4 bits"),
        (linear("w4g32"), "w4g64", "groups of 32 and neighbours differ: groups of 64 cannot"),
        (linear("w4g64"), "w4", "groups of a whole row cannot"),
        (linear("w4g64", zero_point=torch.full((8, 2), 7.5)), "w4g64", "fractional zero points"),
        (linear("w4g64", offset=torch.ones(8, 2)), "w4g64", "offsets"),
    ],
)
def test_what_would_change_a_value_is_refused(start: QuantizedLinear, scheme: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        regrid(start, parse_scheme(scheme))


def test_tables_floats_and_rounded_inputs_are_refused() -> None:
    scale = torch.ones(8, 1)
    table = Codebook(torch.zeros(SHAPE, dtype=torch.uint8), 4, torch.zeros(16), scale, (1, 128))
    floats = Float(torch.zeros(SHAPE), 8, scale, (1, 128))
    for weight, what in ((table, "codebook"), (floats, "float")):
        with pytest.raises(UnsupportedError, match=rf"no plain grid of integers \({what}\)"):
            regrid(QuantizedLinear("w", weight), parse_scheme("w4"))
    with pytest.raises(UnsupportedError, match="scale of its inputs"):
        regrid(replace(linear("w8"), input_scale=torch.ones(1)), parse_scheme("w8"))


def test_scales_move_to_another_dtype_when_every_one_is_exact() -> None:
    exact: Tensor = torch.tensor([[0.5], [0.25], [-1.5]] * 2 + [[3.0], [7.0]], dtype=torch.float16)
    start = linear("w4", scale=exact)
    bf16 = replace(parse_scheme("w4"), scale_dtype="bfloat16")
    assert affine(regrid(start, bf16).weight).scale.dtype == torch.bfloat16  # type: ignore[union-attr]
    fine = torch.full((8, 1), 0.1, dtype=torch.float16)
    fine[0] = 0.5
    assert inexact(fine, torch.bfloat16) == 7
    with pytest.raises(UnsupportedError, match="7 of 8 float16 scales of `w` are not exact in bfloat16"):
        regrid(linear("w4", scale=fine), bf16)


@pytest.mark.parametrize(
    ("scheme", "kind"), [("w4g64", Q4_0), ("w4g64", Q4_1), ("w4g64_asym", Q8_0), ("w8", Q8_0)]
)
def test_blocks_of_32(scheme: str, kind: object) -> None:
    start = linear(scheme)
    found = on_blocks(start, kind)  # type: ignore[arg-type]
    # −0 and 0 are one number
    assert torch.equal(dequantize(found), dequantize(start.weight))
    assert found.group == (1, 32) and found.zero_point is None


def test_minima_must_be_exact_in_float16() -> None:
    even = torch.full((8, 2), 4, dtype=torch.uint8)
    found = on_blocks(linear("w4g64_asym", zero_point=even), Q4_1)
    assert found.offset is not None and torch.equal(
        dequantize(found), dequantize(linear("w4g64_asym", zero_point=even).weight)
    )
    scale = torch.full((8, 2), 0.1, dtype=torch.float16)
    odd = linear("w4g64_asym", zero_point=even + 1, scale=scale)
    with pytest.raises(UnsupportedError, match=r"32 of 32 minima .* of `w` are not exact in float16"):
        on_blocks(odd, Q4_1)


def test_bits_beyond_eight_do_not_exist() -> None:
    wide = linear("w8g64_asym")
    with pytest.raises(UnsupportedError, match="do not fit 8 bits"):
        regrid(wide, Scheme(8, 64))
