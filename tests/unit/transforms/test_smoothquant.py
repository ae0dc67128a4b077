from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.methods import rtn
from quantkit.numerics.inputs import input_scale, round_inputs
from quantkit.numerics.nearest import nearest
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import dequantize
from quantkit.transforms.smoothquant import Params, SmoothQuant, Trials, smoothing, transform
from tests.quantized import statistics_of

WIDTH, OUT = 64, 48
W8A8 = parse_scheme("w8a8")
NEAREST = rtn.quantizer(rtn.Params())


def seen(x: Tensor) -> Statistics:
    return statistics_of(x, Need.ABSMAX | Need.SAMPLE)


def normal(tokens: int, rng: torch.Generator) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=rng)


def outliers(tokens: int, rng: torch.Generator) -> Tensor:
    """Inputs of which three channels are 60 times larger, as language models have them."""
    x = normal(tokens, rng)
    x[:, [5, 17, 40]] *= 60
    return x


@pytest.fixture
def weight(rng: torch.Generator) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=rng) * 0.02


def error(weight: Tensor, x: Tensor, scheme: Scheme, factors: Tensor | None, absmax: Tensor) -> float:
    """Squared error of the outputs with all weights and inputs really rounded."""
    s = torch.ones(WIDTH) if factors is None else factors
    assert scheme.activations is not None
    scale = None if scheme.activations.dynamic else input_scale(absmax / s, scheme)
    rounded = dequantize(nearest(weight * s, scheme, "absmax"))
    found = round_inputs(x / s, scheme, scale) @ rounded.T
    return float((found - x @ weight.T).square().sum())


@pytest.mark.parametrize(
    ("inputs", "columns", "alpha", "expected"),
    [
        ([4.0, 1.0], [1.0, 1.0], 0.5, [2**0.5, 2**-0.5]),
        ([4.0, 4.0], [1.0, 16.0], 0.5, [2.0, 0.5]),
        ([4.0, 1.0], [9.0, 7.0], 1.0, [2.0, 0.5]),
        ([9.0, 7.0], [4.0, 1.0], 0.0, [0.5, 2.0]),
        ([16.0, 1.0], [1.0, 1.0], 0.25, [2**0.5, 2**-0.5]),
        ([4.0, 1.0, 0.0, 3.0], [1.0, 1.0, 5.0, 0.0], 0.5, [2**0.5, 2**-0.5, 1.0, 1.0]),
        ([0.0, 0.0], [1.0, 1.0], 0.5, [1.0, 1.0]),
        ([1e9, 1e-9], [1.0, 1.0], 1.0, [256.0, 1 / 256]),
    ],
)
def test_worked_factors(
    inputs: list[float], columns: list[float], alpha: float, expected: list[float]
) -> None:
    found = smoothing(torch.tensor(inputs), torch.tensor(columns), alpha)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))


def test_tied_inputs_get_the_geometric_mean_of_what_each_would(weight: Tensor, rng: torch.Generator) -> None:
    inputs, columns = torch.tensor([16.0, 1.0, 4.0, 1.0]), torch.ones(4)
    found = smoothing(inputs, columns, 1.0, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([2**0.5, 2**0.5, 2**-0.5, 2**-0.5]))
    ties = torch.arange(WIDTH) // 4
    factors = transform(Params()).factors(weight, seen(outliers(200, rng)), W8A8, NEAREST, ties)
    assert factors is not None
    groups = factors.view(-1, 4)
    assert torch.equal(groups, groups[:, :1].expand(-1, 4)) and float(groups.std()) > 0


def test_half_way_both_sides_become_equal(weight: Tensor, rng: torch.Generator) -> None:
    """At α = ½ the largest input of a channel and the largest weight of its column become proportional."""
    x = outliers(200, rng)
    s = smoothing(x.abs().amax(0), weight.abs().amax(0), 0.5)
    ratio = (x / s).abs().amax(0) / (weight * s).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand(WIDTH))
    assert float(s.log().mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "alpha", "search"),
    [
        ({}, None, True),
        ({"search": True}, None, True),
        ({"alpha": 0.8}, 0.8, False),
        ({"alpha": 0.8, "search": False}, 0.8, False),
        ({"search": False}, 0.5, False),
        ({"alpha": 0}, 0, False),
    ],
)
def test_parameters_say_which_of_the_two_decides(given: Any, alpha: float | None, search: bool) -> None:
    params = Params(**given)
    assert (params.alpha, params.search) == (alpha, search)
    assert transform(params).needs == (Need.ABSMAX | Need.SAMPLE if search else Need.ABSMAX)
    assert Params(params.alpha, params.search) == params


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.1}, "alpha must lie between 0 and 1, not 1.1"),
        ({"alpha": -0.1}, "alpha must lie between 0 and 1, not -0.1"),
        ({"alpha": 0.5, "search": True}, "search would replace the strength alpha"),
    ],
)
def test_parameters_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Params(**given)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w8a8", None),
        ("w8a8_static", None),
        ("w8a8_tensor_static", None),
        ("fp8a8", None),
        ("fp8a8_block", None),
        ("w8", "weights alone gain nothing"),
        ("w4g128", "weights alone gain nothing"),
        ("nf4", "weights alone gain nothing"),
        ("w8a8_mixed", "LLM.int8 keeps outlier columns in 16 bits"),
    ],
)
def test_only_rounded_inputs_gain(scheme: str, reason: str | None) -> None:
    found = transform(Params()).accepts(parse_scheme(scheme))
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("name", "gain"), [("w8a8", 5), ("w8a8_static", 10), ("w8a8_tensor", 3), ("w8a8_tensor_static", 5)]
)
def test_outliers_are_smoothed(name: str, gain: float, weight: Tensor, rng: torch.Generator) -> None:
    """Measured on inputs that the search did not see, with all rows of the weight."""
    scheme, x, other = parse_scheme(name), outliers(512, rng), outliers(256, rng)
    stats = seen(x)
    factors = transform(Params()).factors(weight, stats, scheme, NEAREST, None)
    assert factors is not None and stats.absmax is not None
    before = error(weight, other, scheme, None, stats.absmax)
    assert error(weight, other, scheme, factors, stats.absmax) * gain < before


def test_the_search_finds_what_no_fixed_strength_beats(weight: Tensor, rng: torch.Generator) -> None:
    stats = seen(outliers(256, rng))
    assert stats.sample is not None and stats.absmax is not None
    errors = {}
    for alpha in (None, 0.1, 0.3, 0.5, 0.7, 0.9):
        factors = transform(Params(alpha)).factors(weight, stats, W8A8, NEAREST, None)
        errors[alpha] = error(weight, stats.sample, W8A8, factors, stats.absmax)
    found = errors.pop(None)
    assert found <= 1.05 * min(errors.values())


def test_sites_without_outliers_are_left_alone(rng: torch.Generator) -> None:
    x = torch.rand(512, WIDTH, generator=rng) * 2 - 1
    weight = (torch.rand(OUT, WIDTH, generator=rng) * 2 - 1) * 0.02
    assert transform(Params()).factors(weight, seen(x), W8A8, NEAREST, None) is None
    fixed = transform(Params(alpha=0.5)).factors(weight, seen(x), W8A8, NEAREST, None)
    assert fixed is not None, "a strength that was asked for is used"


def test_one_row_cannot_both_choose_and_judge(weight: Tensor, rng: torch.Generator) -> None:
    assert transform(Params()).factors(weight, seen(outliers(1, rng)), W8A8, NEAREST, None) is None


@pytest.mark.parametrize("params", [Params(), Params(alpha=0.5)])
def test_nothing_seen_nothing_done(params: Params, weight: Tensor) -> None:
    smooth = transform(params)
    assert smooth.factors(weight, seen(torch.empty(0, WIDTH)), W8A8, NEAREST, None) is None
    assert smooth.factors(weight, seen(torch.zeros(9, WIDTH)), W8A8, NEAREST, None) is None


def test_what_is_missing_or_broken_is_said(weight: Tensor, rng: torch.Generator) -> None:
    smooth, stats = SmoothQuant(Params()), seen(outliers(64, rng))
    assert stats.absmax is not None
    with pytest.raises(NumericsError, match="smoothquant needs a sample of the inputs"):
        smooth.factors(weight, replace(stats, sample=None), W8A8, NEAREST, None)
    with pytest.raises(NumericsError, match="smoothquant needs largest magnitudes of the inputs"):
        smooth.factors(weight, replace(stats, absmax=None), W8A8, NEAREST, None)
    broken = stats.absmax.clone()
    broken[3] = torch.inf
    with pytest.raises(NumericsError, match="the largest magnitudes of the inputs hold non-finite values"):
        smooth.factors(weight, replace(stats, absmax=broken), W8A8, NEAREST, None)
    weight[1, 2] = torch.nan
    with pytest.raises(NumericsError, match="the weights hold non-finite values"):
        smooth.factors(weight, stats, W8A8, NEAREST, None)


def test_the_scale_of_a_tensor_is_that_of_all_its_rows(weight: Tensor, rng: torch.Generator) -> None:
    """Some rows are rounded, one of the others holds the largest weight."""
    scheme = parse_scheme("w8a8_tensor")
    weight[1, 7] = 3.0
    x, some = normal(20, rng), weight[::2]
    trials = Trials(some, weight.abs().amax(0), x.abs().amax(0), x, scheme)
    s = torch.linspace(0.5, 2, WIDTH)
    rounded = dequantize(nearest(weight * s, scheme, "absmax"))[::2]
    expected = (round_inputs(x / s, scheme, None) @ rounded.T - x @ some.T).double().square().sum(1)
    torch.testing.assert_close(trials.errors(s), expected, rtol=1e-5, atol=0)
