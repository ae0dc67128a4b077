"""What every method must do, for every file in ``quantkit/methods/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, QuantkitError
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Quantizer
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedTensor, dequantize
from tests.quantized import activations, same, statistics_of

SCHEMES = (
    Scheme(2, 8),
    Scheme(3, 16, sym=False),
    Scheme(4),
    Scheme(4, 32),
    Scheme(4, 16, sym=False),
    Scheme(4, 1),
    Scheme(5, 8, scale_dtype="bfloat16"),
    Scheme(8),
    Scheme(8, 16, sym=False),
    Scheme(8, per_tensor=True),
)
# enough for a variant of a method whose defaults have met all of them
FEW = (SCHEMES[0], SCHEMES[2], SCHEMES[4], SCHEMES[9])
OUT, WIDTH, TOKENS = 5, 32, 128


def variants() -> Iterator[tuple[str, Any]]:
    """(label, parameters) of every method: the defaults, and every value of every closed choice."""
    for name in registry.names("methods"):
        module = registry.load("methods", name)
        yield name, module.Params()
        hints = get_type_hints(module.Params)
        for field in fields(module.Params):
            choices = (True,) if hints[field.name] is bool else get_args(hints[field.name])
            for choice in choices:
                if choice != field.default:
                    yield f"{name}-{field.name}-{choice}", module.Params(**{field.name: choice})


VARIANTS = dict(variants())


def quantizer_of(label: str) -> Quantizer[Any]:
    found: Quantizer[Any] = registry.load("methods", label.split("-")[0]).quantizer(VARIANTS[label])
    return found


def accepted() -> list[Any]:
    """Every (variant, scheme) that the method accepts."""
    return [
        pytest.param(label, scheme, id=f"{label}-{scheme.name}")
        for label in VARIANTS
        for scheme in (FEW if "-" in label else SCHEMES)
        if quantizer_of(label).accepts(scheme) is None
    ]


CASES = pytest.mark.parametrize("label, scheme", accepted())


@pytest.fixture
def weight(rng: torch.Generator) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=rng) * 0.05


@pytest.fixture
def stats(rng: torch.Generator) -> Statistics:
    return statistics_of(activations(WIDTH, TOKENS, rng))


def run(label: str, weight: Tensor, stats: Statistics | None, scheme: Scheme) -> QuantizedTensor:
    quantizer = quantizer_of(label)
    return quantizer.quantize(weight, quantizer.prepare(stats, scheme), scheme).weight


def check(q: QuantizedTensor, weight: Tensor, scheme: Scheme) -> None:
    """Shapes, dtypes, ranges, and a finite result."""
    value = dequantize(q)
    assert value.shape == weight.shape
    assert bool(torch.isfinite(value).all())
    assert q.bits == scheme.bits
    assert q.group == scheme.group((weight.shape[0], weight.shape[1]))
    if not isinstance(q, Affine):
        return
    low = 0 if q.zero_point is not None else -(1 << (q.bits - 1))
    assert low <= int(q.codes.min()) and int(q.codes.max()) < low + (1 << q.bits)
    assert (q.zero_point is None) == scheme.sym
    assert isinstance(q.scale, Tensor) and q.scale.dtype == getattr(torch, scheme.scale_dtype)
    assert q.scale.shape == (weight.shape[0] // q.group[0], weight.shape[1] // q.group[1])
    if q.zero_point is not None:
        assert q.zero_point.shape == q.scale.shape
        assert int(q.zero_point.min()) >= 0 and int(q.zero_point.max()) < 1 << q.bits
    if q.column_group is not None:
        assert q.column_group.dtype == torch.int32 and q.column_group.shape == (weight.shape[1],)
        counts = torch.bincount(q.column_group, minlength=q.scale.shape[1])
        assert counts.tolist() == [q.group[1]] * q.scale.shape[1]


def error(label: str, weight: Tensor, q: QuantizedTensor, stats: Statistics) -> float:
    """The error on the statistic that the method asks for."""
    delta = (dequantize(q) - weight).double()
    needs = quantizer_of(label).needs
    if Need.GRAM in needs and stats.gram is not None:
        return float(torch.einsum("oi,ij,oj->", delta, stats.gram.double(), delta))
    if Need.SQUARES in needs:
        return float((delta.square() * stats.importance().double()).sum())
    return float(delta.square().sum())


def test_there_are_methods() -> None:
    assert {"rtn", "gptq"} <= set(registry.names("methods"))


@pytest.mark.parametrize("name", registry.names("methods"))
def test_modules_say_what_they_are(name: str) -> None:
    module = registry.load("methods", name)
    assert module.SUMMARY and not module.SUMMARY.endswith(".")
    assert hash(module.quantizer(module.Params())) == hash(module.quantizer(module.Params()))


@CASES
def test_results_are_well_formed(label: str, scheme: Scheme, weight: Tensor, stats: Statistics) -> None:
    check(run(label, weight, stats, scheme), weight, scheme)


@CASES
def test_same_inputs_same_bits_and_nothing_else_moves(
    label: str, scheme: Scheme, weight: Tensor, stats: Statistics
) -> None:
    kept = weight.clone()
    assert stats.gram is not None and stats.squares is not None
    gram, squares = stats.gram.clone(), stats.squares.clone()
    state = torch.random.get_rng_state()
    quantizer = quantizer_of(label)
    prepared = quantizer.prepare(stats, scheme)
    first = quantizer.quantize(weight, prepared, scheme).weight
    again = quantizer.quantize(weight, prepared, scheme).weight
    assert same(first, again)
    assert same(first, run(label, weight, stats, scheme))
    assert torch.equal(weight, kept)
    assert torch.equal(stats.gram, gram) and torch.equal(stats.squares, squares)
    assert torch.equal(torch.random.get_rng_state(), state)


@CASES
def test_rows_are_independent_unless_a_scale_ties_them(
    label: str, scheme: Scheme, weight: Tensor, stats: Statistics, rng: torch.Generator
) -> None:
    """Reordering rows reorders the result; the sweep stacks the weights of a site because of that."""
    order = torch.randperm(OUT, generator=rng)
    straight = dequantize(run(label, weight, stats, scheme))
    permuted = dequantize(run(label, weight[order], stats, scheme))
    if scheme.per_tensor:
        # one scale for all rows: sums in another order may decide between two grids that are equally good
        losses = [float((value - weight[order]).square().sum()) for value in (straight[order], permuted)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    else:
        assert torch.equal(straight[order], permuted)


@CASES
def test_error_is_not_above_plain_rounding(
    label: str, scheme: Scheme, weight: Tensor, stats: Statistics
) -> None:
    plain = error(label, weight, nearest(weight, scheme, "absmax"), stats)
    found = error(label, weight, run(label, weight, stats, scheme), stats)
    if quantizer_of(label).regroups_columns or "plain" in label or scheme.bits == 8:
        # other groups or compensated absmax scales win on average only, and at 8 bits only noise is left
        plain *= 1.2
    assert found <= plain * (1 + 1e-6)


@CASES
def test_zero_and_constant_rows_and_a_dead_channel(
    label: str, scheme: Scheme, weight: Tensor, rng: torch.Generator
) -> None:
    weight = weight.clone()
    weight[0], weight[1] = 0.0, 0.03
    x = activations(WIDTH, TOKENS, rng)
    x[:, 5] = 0
    q = run(label, weight, statistics_of(x), scheme)
    check(q, weight, scheme)
    value = dequantize(q)
    assert float(value[0].abs().max()) == 0
    # whatever the statistics say, the weights of a dead channel are kept roughly where they are
    coarse = 1.1 * float(weight.abs().max()) / ((1 << (scheme.bits - 1)) - 1)
    assert float((value[:, 5] - weight[:, 5]).abs().max()) <= coarse


@CASES
def test_one_token_and_all_dead_inputs_leave_a_sane_result(
    label: str, scheme: Scheme, weight: Tensor, rng: torch.Generator
) -> None:
    # one direction of the inputs is all that counts then, so the weights themselves may move further
    limit = {2: 1.5, 3: 1.0}.get(scheme.bits, 0.6)
    for x in (activations(WIDTH, 1, rng), torch.zeros(7, WIDTH)):
        q = run(label, weight, statistics_of(x), scheme)
        check(q, weight, scheme)
        assert float((dequantize(q) - weight).norm() / weight.norm()) < limit


@pytest.mark.parametrize("label, scheme", [c for c in accepted() if not c.values[1].per_tensor])
def test_rows_alone_are_as_good_as_in_a_stack(
    label: str, scheme: Scheme, weight: Tensor, stats: Statistics
) -> None:
    """A matrix product of another size may round differently: a code may flip, not the quality."""
    whole = error(label, weight, run(label, weight, stats, scheme), stats)
    rows = weight.split(1)
    alone = sum(error(label, row, run(label, row, stats, scheme), stats) for row in rows)
    assert alone == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("label", VARIANTS)
def test_empty_statistics_are_refused_where_they_are_needed(label: str) -> None:
    quantizer = quantizer_of(label)
    empty = statistics_of(torch.empty(0, WIDTH))
    if quantizer.needs is Need.NOTHING:
        quantizer.prepare(None, Scheme(4, 32))
        return
    for nothing in (None, empty):
        with pytest.raises(NumericsError, match="no token"):
            quantizer.prepare(nothing, Scheme(4, 32))


@pytest.mark.parametrize("label", VARIANTS)
def test_non_finite_values_are_refused(label: str, weight: Tensor, stats: Statistics) -> None:
    scheme = Scheme(4, 16)
    broken = weight.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(QuantkitError, match="non-finite"):
        run(label, broken, stats, scheme)
    if quantizer_of(label).needs is Need.NOTHING:
        return
    assert stats.gram is not None and stats.squares is not None
    stats.gram[4, 4] = stats.squares[4] = torch.nan
    with pytest.raises(NumericsError, match="non-finite"):
        run(label, weight, stats, scheme)


@pytest.mark.parametrize("label", VARIANTS)
def test_refused_schemes_have_a_reason(label: str) -> None:
    for scheme in SCHEMES:
        reason = quantizer_of(label).accepts(scheme)
        assert reason is None or len(reason) > 10


@pytest.mark.parametrize("label", VARIANTS)
def test_only_methods_that_say_so_regroup_columns(label: str, weight: Tensor, stats: Statistics) -> None:
    q = run(label, weight, stats, Scheme(4, 8))
    assert isinstance(q, Affine)
    assert (q.column_group is not None) == quantizer_of(label).regroups_columns
