from __future__ import annotations

import pytest
import torch

from quantkit.numerics.levels import E2M1, FP4, NF4, Integers, levels_of, table_of
from quantkit.schemes import parse_scheme
from tests.quantized import restore, steps


def test_limits_are_signed_when_symmetric() -> None:
    assert Integers(4, True).limits == (-8, 7)
    assert Integers(4, False).limits == (0, 15)
    assert Integers(2, True).limits == (-2, 1)
    assert Integers(8, False).limits == (0, 255)


def test_symmetric_steps_round_and_clip() -> None:
    # 0.13 / 0.125 = 1.04 → 1; −1.2 / 0.125 = −9.6 → −8; 1 / 0.125 = 8 → 7
    w = torch.tensor([0.13, -1.2, 1.0, 0.0])
    code = steps(w, torch.tensor([0.125]), None, 4)
    assert code.tolist() == [1, -8, 7, 0]
    assert restore(code, torch.tensor([0.125]), None).tolist() == [0.125, -1.0, 0.875, 0.0]


def test_asymmetric_steps_add_the_zero_point_after_rounding() -> None:
    # scale ½, zero point 3: −1 → −2 + 3 = 1; 0 → 3; 1.2 → 2 + 3 = 5; −5 → −10 + 3 < 0; 100 → 15
    w = torch.tensor([-1.0, 0.0, 1.2, -5.0, 100.0])
    scale, zero = torch.tensor([0.5]), torch.tensor([3.0])
    code = steps(w, scale, zero, 4)
    assert code.tolist() == [1, 3, 5, 0, 15]
    assert restore(code, scale, zero).tolist() == [-1.0, 0.0, 1.0, -1.5, 6.0]


def test_ties_go_to_even() -> None:
    w = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert steps(w, torch.tensor([1.0]), None, 4).tolist() == [0, 2, 2, 0, -2]


def test_a_negative_scale_mirrors_the_grid() -> None:
    # with scale −1 the reachable values are −7 … 8
    w = torch.tensor([8.0, -8.0, 3.0])
    code = steps(w, torch.tensor([-1.0]), None, 4)
    assert code.tolist() == [-8, 7, -3]
    assert restore(code, torch.tensor([-1.0]), None).tolist() == [8.0, -7.0, 3.0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_codes_fit_their_dtype_and_stay_on_the_grid(bits: int, sym: bool) -> None:
    low, high = Integers(bits, sym).limits
    codes = torch.arange(low, high + 1, dtype=torch.float32)
    zero = None if sym else torch.tensor([float(1 << (bits - 1))])
    scale = torch.tensor([0.0371])
    again = steps(restore(codes, scale, zero), scale, zero, bits)
    assert torch.equal(again, codes)
    assert torch.equal(codes.to(torch.int8 if sym else torch.uint8).float(), codes)


def test_fractional_zero_points_are_added_before_rounding() -> None:
    # 1/.5 + .4 = 2.4 → 2; −.1/.5 + .4 = .2 → 0; 1.6/.5 + .4 = 3.6 → 3, the last of 2 bits
    levels = Integers(2, sym=False, fractional=True)
    code = levels.codes(torch.tensor([1.0, -0.1, 1.6]), torch.tensor([0.5]), torch.tensor([0.4]))
    assert code.tolist() == [2, 0, 3]
    assert levels.units(code, torch.tensor([0.4])).tolist() == pytest.approx([1.6, -0.4, 2.6])


def test_nf4_is_what_its_formula_says() -> None:
    """Quantiles of a normal distribution: 8 above zero, 7 below, and zero itself, over the largest."""
    normal = torch.distributions.Normal(0.0, 1.0)
    tail = 1 - 0.5 * (1 / 32 + 1 / 30)
    above = normal.icdf(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([below, torch.zeros(1), above]).sort().values / above.max()
    torch.testing.assert_close(torch.tensor(NF4).double(), table, rtol=0, atol=1e-4)


def test_e2m1_ties_go_to_the_even_code() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 100.0])
    table, one = levels_of(parse_scheme("mxfp4")), torch.ones(1)
    found = table.units(table.codes(torch.cat([x, -x]), one, None), None)
    expected = [0, 1, 1, 2, 2, 4, 4, 6, 6]
    assert found.tolist() == [*expected, *(-v for v in expected)]


def test_e4m3_rounds_as_the_worked_numbers_say_and_saturates() -> None:
    levels = levels_of(parse_scheme("fp8"))
    code = levels.codes(torch.tensor([17.0, 19.0, 21.0, -1.5, 500.0, -1e9]), torch.ones(1), None)
    assert code.tolist() == [16.0, 20.0, 20.0, -1.5, 448.0, -448.0]


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4"])
def test_tables_find_the_nearest_point(name: str, rng: torch.Generator) -> None:
    """Bins only speed it up: the point found is the one that searching all of them finds."""
    table = table_of(parse_scheme(name))
    middles = (table.points[1:] + table.points[:-1]) / 2
    edges = torch.arange(-3000, 3001) / 512
    x = torch.cat([torch.randn(20_000, generator=rng) * table.reach, middles * (1 + 1e-6), edges + 1e-7])
    found = table.units(table.codes(x, torch.ones(1), None), None)
    nearest = (x[:, None] - table.points).abs().amin(1)
    # a middle that falls between two floats may go either way
    torch.testing.assert_close((x - found).abs(), nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["w4", "w4_asym", "nf4", "fp4", "mxfp4", "fp8"])
def test_units_of_a_search_are_units_of_codes(name: str, rng: torch.Generator) -> None:
    levels, w = levels_of(parse_scheme(name)), torch.randn(50, 64, generator=rng)
    scale = w.abs().amax(1, keepdim=True) / levels.reach
    zero = torch.full_like(scale, 5.0) if name == "w4_asym" else None
    exact = levels.units(levels.codes(w, scale, zero), zero)
    quick = levels.nearest_units(w, scale, zero, torch.empty_like(w))
    assert float((exact == quick).float().mean()) > 0.99
    # where a bin decides, the error is that of the neighbouring point at most
    assert float((quick * scale - w).square().sum() / (exact * scale - w).square().sum()) < 1.001


def test_tables_in_file_order() -> None:
    for name, table in (("nf4", NF4), ("fp4", FP4), ("mxfp4", E2M1)):
        found = table_of(parse_scheme(name))
        values = torch.tensor(table)[found.in_file.long()]
        assert torch.equal(values, found.points)
        # bitsandbytes uses both zeros of FP4, the second for what is above zero
        assert int((found.points.diff() == 0).sum()) == (name == "fp4")
    with pytest.raises(ValueError, match="no table"):
        table_of(parse_scheme("w4"))
