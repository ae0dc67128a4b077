"""Positions on a grid: they start at the start's codes, and go where gradients send them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.numerics.learned import Learned
from quantkit.numerics.nearest import nearest
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, QuantizedTensor, dequantize
from tests.quantized import same

PLAIN = ("w2g16", "w3g16_asym", "w4", "w4_tensor", "w4g16_asymf", "w4g4_asymf_axis0", "nf4g32", "fp4g32")
FIXED = ("nf4g16_dq", "mxfp4", "nvfp4")


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) * 0.05


def scheme_of(name: str) -> Scheme:
    dtype = "float32" if name.startswith(("nf4", "fp4", "nv", "mx")) else "float16"
    return replace(parse_scheme(name), scale_dtype=dtype)


def moved(q: QuantizedTensor, steps: Tensor) -> QuantizedTensor:
    """Integers some steps away, as a solver with feedback leaves them."""
    assert isinstance(q, Affine)
    low, high = (
        (0, 2**q.bits - 1) if q.zero_point is not None else (-(2 ** (q.bits - 1)), 2 ** (q.bits - 1) - 1)
    )
    return replace(q, codes=(q.codes.int() + steps).clamp(low, high).to(q.codes.dtype))


def descend(learned: Learned, goal: Tensor, steps: int = 60, rate: float = 0.05) -> float:
    """Squared distance to `goal` after some steps towards it."""
    for step in range(steps):
        gradient = dequantize(learned.quantized()) - goal
        learned.step(gradient, rate * (1 - step / steps))
    return float((dequantize(learned.quantized()) - goal).square().sum())


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("name", PLAIN + FIXED)
def test_starts_at_the_start(name: str, scales: bool) -> None:
    scheme, weight = scheme_of(name), weight_of()
    start = nearest(weight, scheme, "mse")
    # the start of another weight is many steps from nearest to this one
    for source in (weight, weight_of(1)):
        assert same(Learned(start, source, scheme, scales=scales).quantized(), start)


@pytest.mark.parametrize("name", ["w2g16", "w3g16_asym"])
def test_codes_that_are_not_nearest_are_kept(name: str) -> None:
    scheme, weight = scheme_of(name), weight_of()
    steps = torch.randint(-3, 4, weight.shape, generator=torch.Generator().manual_seed(1))
    start = moved(nearest(weight, scheme, "mse"), steps)
    assert same(Learned(start, weight, scheme, scales=True).quantized(), start)


@pytest.mark.parametrize("name", PLAIN + FIXED)
def test_goes_to_another_weight(name: str) -> None:
    scheme, weight = scheme_of(name), weight_of()
    goal = weight + 0.5 * weight_of(1)
    start = nearest(weight, scheme, "mse")
    before = float((dequantize(start) - goal).square().sum())
    assert descend(Learned(start, weight, scheme, scales=True), goal) < 0.6 * before


@pytest.mark.parametrize("name", PLAIN + FIXED)
def test_layout_stays(name: str) -> None:
    scheme, weight = scheme_of(name), weight_of()
    start = nearest(weight, scheme, "mse")
    learned = Learned(start, weight, scheme, scales=True)
    descend(learned, weight_of(1), steps=20)
    found = learned.quantized()
    assert isinstance(found, Affine | Codebook) and isinstance(start, Affine | Codebook)
    assert found.codes.dtype == start.codes.dtype and found.group == start.group
    assert not torch.equal(found.codes, start.codes)
    if isinstance(start.scale, Tensor) and name in PLAIN:
        assert isinstance(found.scale, Tensor) and found.scale.dtype == start.scale.dtype
        assert not torch.equal(found.scale, start.scale)
    else:
        assert found.scale is start.scale


def test_scales_stay_when_told() -> None:
    scheme, weight = scheme_of("w2g16"), weight_of()
    start = nearest(weight, scheme, "mse")
    learned = Learned(start, weight, scheme, scales=False)
    descend(learned, weight_of(1), steps=5)
    found = learned.quantized()
    assert isinstance(found, Affine) and isinstance(start, Affine) and found.scale is start.scale


def test_scales_alone() -> None:
    """A weight a tenth larger than the start: scales grow, whatever codes do meanwhile."""
    scheme, weight = scheme_of("w8"), weight_of()
    start = nearest(weight, scheme, "absmax")
    learned = Learned(start, dequantize(start), scheme, scales=True)
    descend(learned, 1.1 * dequantize(start), steps=200, rate=0.04)
    found, first = learned.quantized(), start
    assert isinstance(found, Affine) and isinstance(first, Affine)
    assert isinstance(found.scale, Tensor) and isinstance(first.scale, Tensor)
    assert (found.scale.float() / first.scale.float() - 1.1).abs().max() < 0.05


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_half_way_to_the_next_code(sign: float) -> None:
    """Scale ±1, weight 2.3, code ±2: the position is 0.3 steps on, so 0.2 steps more change the code."""
    scheme = replace(parse_scheme("w4"), scale_dtype="float32")
    start = Affine(torch.tensor([[2 * int(sign)]], dtype=torch.int8), 4, torch.tensor([[sign]]), (1, 1))
    learned = Learned(start, torch.tensor([[2.3]]), scheme, scales=False)
    learned.step(torch.tensor([[-1.0]]), 0.19)
    assert dequantize(learned.quantized()).item() == 2
    learned.step(torch.tensor([[-1.0]]), 0.02)
    assert dequantize(learned.quantized()).item() == 3


def test_positions_stay_near_the_ends() -> None:
    """However long a gradient pushes past the last code, turning back is not slower for it."""
    scheme = replace(parse_scheme("w2"), scale_dtype="float32")
    start = Affine(torch.tensor([[1]], dtype=torch.int8), 2, torch.tensor([[1.0]]), (1, 1))
    learned = Learned(start, torch.tensor([[9.0]]), scheme, scales=False)
    for _ in range(50):
        learned.step(torch.tensor([[-1.0]]), 0.1)
    assert dequantize(learned.quantized()).item() == 1
    for _ in range(40):
        learned.step(torch.tensor([[1.0]]), 0.1)
    assert dequantize(learned.quantized()).item() < 1


def test_columns_in_free_groups() -> None:
    scheme, weight = scheme_of("w3g16"), weight_of()
    start = nearest(weight, scheme, "mse")
    assert isinstance(start, Affine)
    groups = torch.tensor([n % 2 for n in range(32)], dtype=torch.int32)
    learned = Learned(replace(start, column_group=groups), weight, scheme, scales=True)
    before = float((dequantize(replace(start, column_group=groups)) - weight).square().sum())
    assert descend(learned, weight) < 0.5 * before
    found = learned.quantized()
    assert isinstance(found, Affine) and found.column_group is groups


def test_no_gradient_no_step() -> None:
    scheme, weight = scheme_of("w3g16"), weight_of()
    start = nearest(weight, scheme, "mse")
    learned = Learned(start, weight, scheme, scales=True)
    for _ in range(3):
        learned.step(torch.zeros_like(weight), 0.5)
    assert same(learned.quantized(), start)


def test_floats_have_no_codes() -> None:
    scheme = replace(parse_scheme("fp8"), scale_dtype="bfloat16")
    with pytest.raises(ValueError, match="only codes"):
        Learned(nearest(weight_of(), scheme, "absmax"), weight_of(), scheme, scales=True)
