"""What every transform must do, for every file in ``quantkit/transforms/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need, Statistics, update
from quantkit.errors import NumericsError
from quantkit.methods import rtn
from quantkit.protocols import Transform
from quantkit.recipe.check import hints, options
from quantkit.schemes import Scheme, parse_scheme
from tests.quantized import ALL_NEEDS, activations, statistics_of

SCHEMES = tuple(
    replace(parse_scheme(name), scale_dtype="float32")
    for name in (
        *("w4g16", "w4g32_asym", "w8", "w8_tensor", "nf4", "mxfp4", "nvfp4", "fp8"),
        *("w8a8", "w8a8_static", "w8a8_tensor", "w8a8_mixed", "fp8a8", "fp8a8_static", "fp8a8_block"),
    )
)
OUT, WIDTH, TOKENS = 130, 128, 96
EVERYTHING = ALL_NEEDS | Need.HELDOUT
# what the target rounds by, where a transform wants to know
QUANTIZER = rtn.quantizer(rtn.Params("weighted"))
# fp32 sums of WIDTH products in another order
CLOSE = 1e-5


def variants() -> Iterator[tuple[str, Any]]:
    """(label, parameters) of every transform: the defaults, and every value of every closed choice."""
    for name in registry.names("transforms"):
        module = registry.load("transforms", name)
        yield name, module.Params()
        of = hints(module.Params)
        for field in fields(module.Params):
            kinds = options(of[field.name])
            choices = [choice for k in kinds if get_origin(k) is Literal for choice in get_args(k)]
            for choice in (*choices, *((True, False) if bool in kinds else ())):
                params = module.Params(**{field.name: choice})
                if params != module.Params():
                    yield f"{name}-{field.name}-{choice}", params


VARIANTS = dict(variants())


def transform_of(label: str) -> Transform:
    found: Transform = registry.load("transforms", label.split("-")[0]).transform(VARIANTS[label])
    return found


CASES = pytest.mark.parametrize(
    "label, scheme",
    [
        pytest.param(label, scheme, id=f"{label}-{scheme.name}")
        for label in VARIANTS
        for scheme in SCHEMES
        if transform_of(label).accepts(scheme) is None
    ],
)


@pytest.fixture
def weight(rng: torch.Generator) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=rng) * 0.05


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return activations(WIDTH, TOKENS, rng)


def factors_of(label: str, weight: Tensor, x: Tensor, scheme: Scheme, ties: Tensor | None = None) -> Tensor:
    """The factors from exactly the statistics that the transform asks for; ones where it leaves the site."""
    transform = transform_of(label)
    found = transform.factors(weight, seen(x, transform.needs), scheme, QUANTIZER, ties)
    return torch.ones(WIDTH) if found is None else found


def seen(x: Tensor, need: Need) -> Statistics:
    """Statistics of x, every eighth row held out."""
    held = torch.arange(x.shape[0]) % 8 == 7
    return update(statistics_of(x[~held], need), x[held], held_out=True)


def check(factors: Tensor) -> None:
    assert factors.shape == (WIDTH,) and factors.dtype == torch.float32
    assert bool(torch.isfinite(factors).all()) and float(factors.min()) > 0
    # what a 16-bit norm can take the division by
    assert float(factors.max() / factors.min()) <= 2.0**16


def test_there_are_transforms() -> None:
    assert {"awq", "smoothquant"} <= set(registry.names("transforms"))


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_modules_say_what_they_are(name: str) -> None:
    module = registry.load("transforms", name)
    assert module.SUMMARY and not module.SUMMARY.endswith(".")
    assert hash(module.transform(module.Params())) == hash(module.transform(module.Params()))
    assert any(module.transform(module.Params()).accepts(scheme) is None for scheme in SCHEMES)


@pytest.mark.parametrize("label", VARIANTS)
def test_refused_schemes_have_a_reason(label: str) -> None:
    for scheme in SCHEMES:
        reason = transform_of(label).accepts(scheme)
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


@CASES
def test_factors_are_well_formed(label: str, scheme: Scheme, weight: Tensor, x: Tensor) -> None:
    check(factors_of(label, weight, x, scheme))


@CASES
def test_same_inputs_same_bits_and_nothing_else_moves(
    label: str, scheme: Scheme, weight: Tensor, x: Tensor
) -> None:
    transform, stats, kept = transform_of(label), seen(x, EVERYTHING), weight.clone()
    values = [t.clone() for f in fields(Statistics) if isinstance(t := getattr(stats, f.name), Tensor)]
    state = torch.random.get_rng_state()
    first, again = (transform.factors(weight, stats, scheme, QUANTIZER, None) for _ in range(2))
    assert (first is None) == (again is None)
    assert first is None or (again is not None and torch.equal(first, again))
    assert torch.equal(weight, kept) and torch.equal(torch.random.get_rng_state(), state)
    now = [t for f in fields(Statistics) if isinstance(t := getattr(stats, f.name), Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))


@CASES
def test_the_model_computes_the_same(label: str, scheme: Scheme, weight: Tensor, x: Tensor) -> None:
    factors = factors_of(label, weight, x, scheme)
    expected = x @ weight.T
    difference = (x / factors) @ (weight * factors).T - expected
    assert float(difference.norm() / expected.norm()) < CLOSE


@CASES
def test_tied_inputs_get_one_factor(label: str, scheme: Scheme, weight: Tensor, x: Tensor) -> None:
    ties = torch.arange(WIDTH) // 64 * 32 + torch.arange(WIDTH) % 32
    factors = factors_of(label, weight, x, scheme, ties)
    check(factors)
    heads = factors.view(2, 2, 32)
    assert torch.equal(heads[:, 0], heads[:, 1])


@CASES
def test_dead_inputs_unused_columns_and_one_token(
    label: str, scheme: Scheme, weight: Tensor, x: Tensor
) -> None:
    x[:, 5], weight[:, 9] = 0, 0
    check(factors_of(label, weight, x, scheme))
    check(factors_of(label, weight, x[:1], scheme))
    check(factors_of(label, torch.zeros(OUT, WIDTH), x, scheme))
    check(factors_of(label, weight[:1], x, scheme))


@CASES
def test_a_site_that_saw_nothing_is_left_alone(label: str, scheme: Scheme, weight: Tensor) -> None:
    for nothing in (torch.empty(0, WIDTH), torch.zeros(3, WIDTH)):
        stats = seen(nothing, EVERYTHING)
        assert transform_of(label).factors(weight, stats, scheme, QUANTIZER, None) is None


@CASES
def test_non_finite_values_are_refused(label: str, scheme: Scheme, weight: Tensor, x: Tensor) -> None:
    broken = weight.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(NumericsError, match="non-finite"):
        factors_of(label, broken, x, scheme)
    x[4, 4] = torch.inf
    with pytest.raises(NumericsError, match="non-finite"):
        factors_of(label, weight, x, scheme)


@pytest.mark.parametrize("label", VARIANTS)
def test_statistics_it_did_not_ask_for_may_be_missing(label: str, weight: Tensor, x: Tensor) -> None:
    transform = transform_of(label)
    scheme = next(s for s in SCHEMES if transform.accepts(s) is None)
    everything = transform.factors(weight, seen(x, EVERYTHING), scheme, QUANTIZER, None)
    assert transform.needs is not Need.NOTHING
    found = factors_of(label, weight, x, scheme)
    assert torch.equal(found, torch.ones(WIDTH) if everything is None else everything)
