from __future__ import annotations

import hashlib
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.stored import (
    Plain,
    PowersOfTwo,
    TwoLevels,
    dynamic_map,
    keep,
    nest,
    round_scale,
    stored_of,
)
from quantkit.schemes import parse_scheme
from quantkit.tensors import Codebook, Float, dequantize
from tests.quantized import same

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs quantkit[bitsandbytes]"
)


def sha16(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def absmaxima(count: int, rng: torch.Generator, signed: bool = False) -> Tensor:
    """(1, count) scales as weights have them, of either sign where `signed`."""
    scale = torch.rand(1, count, generator=rng) * 0.05 + 0.05
    return scale * torch.where(torch.rand(1, count, generator=rng) < 0.5, -1.0, 1.0) if signed else scale


def worst(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted) / wanted).abs().max())


# --- one float per group


def test_zero_scales_become_one_and_underflow_the_smallest_number() -> None:
    # 2^-24 is the smallest of fp16, and the sign stays
    scale = torch.tensor([0.0, 1e-9, -1e-9, 0.1, -0.1])
    assert round_scale(scale, torch.float16).tolist() == [1.0, 2.0**-24, -(2.0**-24), *_fp16(0.1, -0.1)]
    assert round_scale(scale, torch.float32).tolist() == pytest.approx([1.0, 1e-9, -1e-9, 0.1, -0.1])


def _fp16(*values: float) -> list[float]:
    found: list[float] = torch.tensor(values).half().float().tolist()
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_scales_are_stored_as_they_are(dtype: torch.dtype, rng: torch.Generator) -> None:
    plain = Plain(dtype)
    rounded = plain.round(absmaxima(500, rng, signed=True))
    built = plain.build(rounded)
    assert built.dtype == dtype and torch.equal(built.float(), rounded)


def test_scales_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(NumericsError, match="7e\\+04 does not fit float16"):
        round_scale(torch.tensor([70_000.0]), torch.float16)
    assert round_scale(torch.tensor([70_000.0]), torch.bfloat16).item() == 70_144


# --- powers of two


def test_powers_of_two_are_the_nearest_in_ratio() -> None:
    # √2 = 1.41421356… parts 1 from 2, and √½ parts ½ from 1
    scale = torch.tensor([1.0, 1.4142, 1.4143, 0.7072, 0.7071, 3.0, -3.0, 0.0])
    assert PowersOfTwo().round(scale).tolist() == [1.0, 1.0, 2.0, 1.0, 0.5, 4.0, 4.0, 1.0]


def test_every_exponent_survives_and_the_ends_saturate() -> None:
    powers = torch.exp2(torch.arange(-126, 128).float())
    assert torch.equal(PowersOfTwo().round(powers), powers)
    built = PowersOfTwo().build(powers)
    assert isinstance(built, Tensor) and built.dtype == torch.float8_e8m0fnu
    assert torch.equal(built.float(), powers)
    # the byte is the exponent + 127
    assert built.view(torch.uint8).tolist() == list(range(1, 255))
    ends = PowersOfTwo().round(torch.tensor([1e-45, 3.4e38]))
    assert ends.tolist() == [2.0**-126, 2.0**127]


# --- e4m3 times one scale of the tensor


def test_two_levels_by_hand() -> None:
    # largest weight 2688 → tensor scale 1; e4m3 has 8 steps per octave: 1.07 → 1.125, 300 → 288, 500 → 448
    levels = stored_of(parse_scheme("nvfp4"), torch.tensor([[2688.0, -1.0]]))
    assert isinstance(levels, TwoLevels) and levels.tensor_scale.tolist() == [[1.0]]
    scale = torch.tensor([[1.07, 300.0, 500.0, -2.0, 0.0]])
    rounded = levels.round(scale)
    assert rounded.tolist() == [[1.125, 288.0, 448.0, 2.0, 2.0**-9]]
    built = levels.build(rounded)
    assert isinstance(built, Float) and built.group == (1, 5)
    assert torch.equal(dequantize(built), rounded)


def test_two_levels_build_what_they_rounded(rng: torch.Generator) -> None:
    weight = torch.randn(32, 256, generator=rng) * 0.02
    levels = stored_of(parse_scheme("nvfp4"), weight)
    rounded = levels.round(weight.view(32, -1, 16).abs().amax(-1) / 6)
    assert torch.equal(levels.round(rounded), rounded)
    assert torch.equal(dequantize(levels.build(rounded)), rounded)


def test_the_tensor_scale_survives_a_file_that_stores_its_inverse(rng: torch.Generator) -> None:
    """Files hold 2688 / max |w| and engines divide by it: the number that they get is the number we use."""
    largest = torch.exp(torch.rand(1_000_000, generator=rng) * 40 - 20)
    inverse = 2688 / largest
    scale = inverse.reciprocal()
    # 1 / (1 / x) is not x, but one division later nothing moves any more
    assert not torch.equal(scale.reciprocal(), inverse)
    assert torch.equal(scale.reciprocal().reciprocal(), scale)


def test_a_weight_of_zeros_has_a_tensor_scale() -> None:
    levels = stored_of(parse_scheme("nvfp4"), torch.zeros(2, 16))
    scale = levels.round(torch.zeros(2, 1))
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert bool(torch.isfinite(dequantize(levels.build(scale))).all())


# --- double quantization


def test_dynamic_map() -> None:
    table = dynamic_map()
    assert sha16(table) == "e732639a65f497b4"
    assert table.shape == (256,) and torch.equal(table, table.sort().values)
    assert table[127] == 0 and table[-1] == 1
    ends = [table[0], table[128], table[129], table[-2]]
    assert [float(v) for v in ends] == pytest.approx([-0.992968738, 5.5e-7, 3.25e-6, 0.992968738], rel=1e-6)


def test_nest_reference_vector() -> None:
    n = torch.arange(4096)
    weight = ((37 * n % 101) - 50) / 100
    absmax = weight.view(64, 64).abs().amax(1, keepdim=True)
    assert sha16(absmax) == "3c8b18286c8fe66f"
    q = nest(absmax)
    assert q.codes[0, :8].tolist() == [179] * 8 and sha16(q.codes) == "f31b77650420296d"
    assert q.offset is not None and isinstance(q.scale, Tensor)
    assert q.offset.tolist() == [0.49937498569488525]
    assert q.scale.tolist() == [[0.00937497615814209]]


@pytest.mark.parametrize("count", [1, 5, 256, 257, 1000])
def test_nested_scales_are_laid_out_flat_in_groups_of_256(count: int, rng: torch.Generator) -> None:
    scale = absmaxima(count, rng)
    q = nest(scale.view(-1, 1) if count == 1000 else scale)
    assert q.codes.shape == (1, count) and q.codes.dtype == torch.uint8 and q.group == (1, 256)
    assert isinstance(q.scale, Tensor) and q.scale.shape == (1, -(-count // 256))
    assert q.offset is not None and q.offset.shape == (1,)
    # half of the widest gap of the map, 0.0158, times what is left beside the mean
    assert worst(dequantize(q), scale) < 0.0158 / 2


def test_signs_cost_little(rng: torch.Generator) -> None:
    scale = absmaxima(1000, rng, signed=True)
    found = dequantize(nest(scale))
    assert torch.equal(found.sign(), scale.sign())
    assert worst(found, scale) < 0.02


def test_equal_scales_are_exact() -> None:
    for value in (0.125, -0.125):
        scale = torch.full((1, 300), value)
        assert torch.equal(dequantize(nest(scale)), scale)


def test_each_scale_has_the_nearest_code(rng: torch.Generator) -> None:
    scale = absmaxima(512, rng)
    q = nest(scale)
    assert isinstance(q.scale, Tensor) and q.offset is not None
    every = q.offset + q.table[:, None] * q.scale.repeat_interleave(256, 1)
    found = (dequantize(q) - scale).abs()
    assert float((found - (every - scale).abs().amin(0)).abs().max()) < 1e-8


def test_what_is_built_is_what_was_rounded(rng: torch.Generator) -> None:
    """Codes are chosen with rounded scales, so the file must hold these and no others."""
    scale = absmaxima(640, rng, signed=True).view(64, 10)
    scheme = parse_scheme("nf4_dq")
    rounded, kept = keep(scale, scheme, stored_of(scheme, torch.ones(64, 640)))
    assert not isinstance(kept, Tensor)
    assert torch.equal(dequantize(kept).view(64, 10), rounded)


def test_groups_of_zeros_do_not_coarsen_the_others(rng: torch.Generator) -> None:
    """A scale of 1 among scales of 0.05 would take the whole range of the 8 bits."""
    scale = absmaxima(256, rng)
    alone = worst(dequantize(nest(scale[:, 64:])), scale[:, 64:])
    scale[:, :64] = 0
    assert worst(dequantize(nest(scale))[:, 64:], scale[:, 64:]) < max(0.02, 2 * alone)


@needs_bitsandbytes
@pytest.mark.parametrize("count", [5, 64, 300, 4096])
@pytest.mark.parametrize("signed", [False, True])
def test_nest_is_the_double_quantization_of_bitsandbytes(
    count: int, signed: bool, rng: torch.Generator
) -> None:
    from bitsandbytes.functional import quantize_blockwise

    scale = absmaxima(count, rng, signed)[0]
    codes, state = quantize_blockwise(scale - scale.mean(), blocksize=256)
    q = nest(scale.view(1, -1))
    assert isinstance(q.scale, Tensor) and q.offset is not None
    assert torch.equal(q.table, state.code) and torch.equal(q.scale[0], state.absmax)
    assert torch.equal(q.offset[0], scale.mean())
    # its CPU code looks values up in steps of 2^-15, which moves one in a thousand to a neighbour
    off = (q.codes[0].int() - codes.int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 0.01


# --- which of them


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w4g32", Plain),
        ("nf4", Plain),
        ("fp8", Plain),
        ("nf4_dq", Plain),
        ("mxfp4", PowersOfTwo),
    ],
)
def test_stored_of(scheme: str, kind: type) -> None:
    assert isinstance(stored_of(parse_scheme(scheme), torch.ones(2, 64)), kind)


def test_nest_leaves_its_input_alone_and_repeats_itself(rng: torch.Generator) -> None:
    scale = absmaxima(300, rng)
    copy = scale.clone()
    first = nest(scale)
    assert same(first, nest(scale)) and torch.equal(scale, copy)
    assert isinstance(first, Codebook) and first.bits == 8
