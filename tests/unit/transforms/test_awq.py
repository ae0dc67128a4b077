from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics, update
from quantkit.errors import NumericsError, RecipeError
from quantkit.methods import gptq, rtn
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Outcome, Quantizer
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Float, dequantize
from quantkit.transforms.awq import Params, Trials, strengthening, transform
from tests.quantized import statistics_of

WIDTH, OUT = 64, 160
W4 = replace(parse_scheme("w4g32"), scale_dtype="float32")
LOUD = [5, 17, 40]
ABSMAX = rtn.quantizer(rtn.Params("absmax"))
FEEDBACK = gptq.quantizer(gptq.Params(polish=1))
NEEDS = Need.GRAM | Need.ABSSUM | Need.HELDOUT


def seen(x: Tensor, need: Need = NEEDS) -> Statistics:
    """Every eighth row is held out."""
    held = torch.arange(x.shape[0]) % 8 == 7
    return update(statistics_of(x[~held], need), x[held], held_out=True)


def outliers(tokens: int, rng: torch.Generator) -> Tensor:
    """Inputs of which three channels are 20 times larger, as language models have them."""
    x = torch.randn(tokens, WIDTH, generator=rng)
    x[:, LOUD] *= 20
    return x


@pytest.fixture
def weight(rng: torch.Generator) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=rng) * 0.02


def error(weight: Tensor, x: Tensor, stats: Statistics, quantizer: Quantizer[Any], s: Tensor | None) -> float:
    """Squared error of the outputs for x, all weights rounded after all tokens of `stats`."""
    factors = torch.ones(WIDTH) if s is None else s
    prepared = quantizer.prepare(stats.through(factors), W4)
    rounded = dequantize(quantizer.quantize(weight * factors, prepared, W4).weight)
    return float(((x / factors) @ rounded.T - x @ weight.T).square().sum())


@pytest.mark.parametrize(
    ("inputs", "columns", "exponents", "expected"),
    [
        ([16.0, 1.0], [1.0, 1.0], (0.5, 0.0), [2.0, 0.5]),
        ([16.0, 1.0], [7.0, 9.0], (0.5, 0.0), [2.0, 0.5]),
        ([7.0, 9.0], [1.0, 16.0], (0.0, 0.5), [2.0, 0.5]),
        ([16.0, 1.0], [1.0, 4.0], (0.5, 1.0), [4.0, 0.25]),
        ([4.0, 1.0, 0.0, 3.0], [1.0, 1.0, 5.0, 0.0], (1.0, 0.0), [2.0, 0.5, 1.0, 1.0]),
        ([0.0, 0.0], [1.0, 1.0], (0.5, 0.5), [1.0, 1.0]),
        ([1e9, 1e-9], [1.0, 1.0], (1.0, 0.0), [256.0, 1 / 256]),
    ],
)
def test_worked_factors(
    inputs: list[float], columns: list[float], exponents: tuple[float, float], expected: list[float]
) -> None:
    found = strengthening(torch.tensor(inputs), torch.tensor(columns), exponents)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("given", "exponents"),
    [
        ({}, [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 0.5)]),
        ({"duo": False}, [(0.1, 0.0), (0.2, 0.0), (0.3, 0.0), (0.4, 0.0), (0.5, 0.0)]),
        ({"grid": 4}, [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]),
        ({"grid": 2, "duo": False}, [(0.0, 0.0), (0.5, 0.0)]),
        ({"alpha": 0.25}, [(0.25, 0.75)]),
        ({"alpha": 0.0, "duo": False}, [(0.0, 0.0)]),
    ],
)
def test_what_is_tried(given: Any, exponents: list[tuple[float, float]]) -> None:
    params = Params(**given)
    assert list(params.exponents()) == exponents
    assert transform(params).needs == (Need.ABSSUM if "alpha" in given else NEEDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.1}, "alpha must lie between 0 and 1, not 1.1"),
        ({"grid": 0}, "grid must be at least 1 step, not 0"),
        ({"alpha": 0.5, "grid": 20}, "grid would replace the strength alpha"),
        ({"spread": 1.0}, "spread must be larger than 1, not 1.0"),
    ],
)
def test_parameters_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Params(**given)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        *((name, None) for name in ("w4g128", "w2g64_asym", "w4", "w4g64_asymf", "nf4_dq", "mxfp4", "nvfp4")),
        ("w8a8", "AWQ makes columns of weights larger"),
        ("w8a8_mixed", "LLM.int8 keeps outlier columns"),
        ("w4g64_asymf_axis0", "groups along the outputs follow"),
        ("fp8", "8-bit floats round each weight by its own size"),
        ("w8_tensor", "one scale for all rows"),
    ],
)
def test_only_weights_in_groups_gain(scheme: str, reason: str | None) -> None:
    found = transform(Params()).accepts(parse_scheme(scheme))
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize(("quantizer", "gain"), [(ABSMAX, 2.0), (FEEDBACK, 1.1)])
@pytest.mark.parametrize("duo", [True, False])
def test_outliers_are_spared(
    quantizer: Quantizer[Any], gain: float, duo: bool, weight: Tensor, rng: torch.Generator
) -> None:
    """Measured on inputs that the search did not see, with all rows of the weight."""
    weight[:, LOUD] *= 0.5
    stats, other = seen(outliers(1024, rng)), outliers(256, rng)
    factors = transform(Params(duo=duo)).factors(weight, stats, W4, quantizer, None)
    assert factors is not None
    assert bool((factors[LOUD] > 1).all())
    before = error(weight, other, stats, quantizer, None)
    assert error(weight, other, stats, quantizer, factors) * gain < before


def test_few_trials_find_what_the_published_grid_does(weight: Tensor, rng: torch.Generator) -> None:
    stats, other = seen(outliers(1024, rng)), outliers(256, rng)
    errors = []
    for params in (Params(), Params(grid=20)):
        factors = transform(params).factors(weight, stats, W4, ABSMAX, None)
        errors.append(error(weight, other, stats, ABSMAX, factors))
    assert errors[0] < 1.1 * errors[1]


def test_identity_stays_where_nothing_is_gained(rng: torch.Generator) -> None:
    """All columns alike in size: no trial moves anything by much, and noise is no reason."""
    x = torch.rand(512, WIDTH, generator=rng) * 2 - 1
    weight = (torch.rand(OUT, WIDTH, generator=rng) * 2 - 1) * 0.02
    assert transform(Params()).factors(weight, seen(x), W4, FEEDBACK, None) is None
    assert transform(Params(alpha=0.5)).factors(weight, seen(x), W4, FEEDBACK, None) is not None


@dataclass(frozen=True, slots=True)
class Watched:
    """Quantizer that keeps every weight as it is, and what it was asked."""

    needs: Need = Need.GRAM
    ties_rows: bool = False
    regroups_columns: bool = False
    prepared: list[Statistics] = field(default_factory=list)
    rounded: list[Tensor] = field(default_factory=list)

    def accepts(self, scheme: Scheme) -> str | None:
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> None:
        assert stats is not None
        self.prepared.append(stats)

    def quantize(self, weight: Tensor, prepared: None, scheme: Scheme) -> Outcome:
        self.rounded.append(weight)
        return Outcome(Float(weight, 32, torch.ones(1, 1), (weight.shape[0], weight.shape[1])))


def test_it_climbs_while_it_gains(
    weight: Tensor, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = seen(outliers(64, rng))

    def trial(losses: list[float], params: Params) -> int:
        """Which of the trials was chosen, 0 for the first, which changes nothing; -1: none."""
        offered: list[Tensor] = []

        def loss(_: Trials, factors: Tensor) -> float:
            offered.append(factors)
            return losses[len(offered) - 1]

        monkeypatch.setattr(Trials, "loss", loss)
        found = transform(params).factors(weight, stats, W4, ABSMAX, None)
        assert len(offered) == len(losses) and bool((offered[0] == 1).all())
        return next((n for n, factors in enumerate(offered) if factors is found), -1)

    assert trial([10, 8, 9], Params()) == 1
    assert trial([10, 8, 7, 6, 5], Params()) == 4
    assert trial([10, 11, 9], Params()) == 2, "the gentle one"
    assert trial([10, 11, 12], Params()) == -1
    assert trial([10, 9.96, 9.97], Params()) == -1, "too little to matter"
    assert trial([10, 11, 12, 9, 12], Params(grid=4)) == 3


def test_the_method_of_the_target_judges(weight: Tensor, rng: torch.Generator) -> None:
    """A method that loses nothing gains nothing; it is given rows and statistics as they would be."""
    stats, watched = seen(outliers(512, rng)), Watched()
    assert transform(Params()).factors(weight, stats, W4, watched, None) is None
    train = stats.split()[0]
    assert [s.tokens for s in watched.prepared] == [448] * 3
    assert torch.equal(watched.rounded[0], weight[torch.arange(128) * OUT // 128])
    assert train.gram is not None and train.abssum is not None
    s = strengthening(train.abssum, weight.norm(dim=0), (0.1, 1.0), None, 4.0)
    torch.testing.assert_close(watched.rounded[1], watched.rounded[0] * s)
    torch.testing.assert_close(watched.prepared[1].gram, train.gram / (s[:, None] * s))
    other = transform(Params(judge="rtn")).factors(weight, stats, W4, watched, None)
    assert other is not None and len(watched.prepared) == 3


def test_losses_are_those_of_inputs_that_had_no_say(weight: Tensor, rng: torch.Generator) -> None:
    x, s = outliers(256, rng), torch.linspace(0.5, 2, WIDTH)
    train, held = seen(x).split()
    unseen = x[7::8].double()
    for quantizer in (FEEDBACK, None):
        if quantizer is None:
            rounded = dequantize(nearest(weight * s, W4, "weighted", train.importance() / s**2))
        else:
            prepared = quantizer.prepare(train.through(s), W4)
            rounded = dequantize(quantizer.quantize(weight * s, prepared, W4).weight)
        expected = (unseen @ (rounded / s - weight).double().T).square().sum()
        found = Trials(weight, train, held, W4, quantizer).loss(s)
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_the_spread_is_bounded(weight: Tensor, rng: torch.Generator) -> None:
    x = torch.randn(512, WIDTH, generator=rng)
    x[:, LOUD] *= 1e5
    for spread in (16.0, 4.0):
        factors = transform(Params(spread=spread)).factors(weight, seen(x), W4, ABSMAX, None)
        assert factors is not None
        assert float(factors.max() / factors.min()) <= spread * (1 + 1e-6)


def test_tied_inputs_get_one_factor_and_still_gain(weight: Tensor, rng: torch.Generator) -> None:
    ties = torch.arange(WIDTH) // 32 * 16 + torch.arange(WIDTH) % 16
    stats, other = seen(outliers(1024, rng)), outliers(256, rng)
    factors = transform(Params()).factors(weight, stats, W4, ABSMAX, ties)
    assert factors is not None
    heads = factors.view(2, 2, 16)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert error(weight, other, stats, ABSMAX, factors) < error(weight, other, stats, ABSMAX, None)


@pytest.mark.parametrize("params", [Params(), Params(alpha=0.5), Params(judge="rtn")])
def test_nothing_seen_nothing_done(params: Params, weight: Tensor) -> None:
    awq = transform(params)
    assert awq.factors(weight, seen(torch.empty(0, WIDTH)), W4, FEEDBACK, None) is None
    assert awq.factors(weight, seen(torch.zeros(9, WIDTH)), W4, FEEDBACK, None) is None


def test_what_is_missing_or_broken_is_said(weight: Tensor, rng: torch.Generator) -> None:
    awq, stats = transform(Params()), seen(outliers(64, rng))
    with pytest.raises(NumericsError, match="awq needs summed magnitudes of the inputs"):
        awq.factors(weight, replace(stats, abssum=None), W4, ABSMAX, None)
    with pytest.raises(NumericsError, match="awq needs gram entries of the inputs"):
        awq.factors(weight, seen(outliers(64, rng), Need.ABSSUM), W4, ABSMAX, None)
    weight[1, 2] = torch.nan
    with pytest.raises(NumericsError, match="the weights hold non-finite values"):
        awq.factors(weight, stats, W4, ABSMAX, None)
