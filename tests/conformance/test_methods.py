"""What every method must do, for every file in ``quantkit/methods/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, QuantkitError
from quantkit.numerics.levels import table_of
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Quantizer
from quantkit.schemes import Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedTensor, dequantize
from tests.quantized import activations, same, statistics_of

SCHEMES = tuple(
    replace(parse_scheme(name), scale_dtype=dtype)
    for name, dtype in {
        **dict.fromkeys(("w2g8", "w3g16_asym", "w4", "w4g32", "w4g16_asym", "w4g1", "w8"), "float16"),
        **dict.fromkeys(("w8g16_asym", "w8_tensor", "w1g16_asymf", "w3g16_asymf"), "float16"),
        **dict.fromkeys(("w4g4_asymf_axis0", "w2g8_asymf_axis0", "w8_asymf"), "float16"),
        **dict.fromkeys(("w5g8", "w8a8", "w8a8_tensor_static", "fp8", "fp8_tensor", "fp8_block"), "bfloat16"),
        **dict.fromkeys(("nf4g32", "nf4g16_dq", "fp4g32", "mxfp4", "nvfp4", "w8a8_mixed"), "float32"),
    }.items()
)
# enough for a variant of a method whose defaults have met all of them
FEW = tuple(
    s for s in SCHEMES if s.name in ("w2g8", "w4g16_asym", "w8_tensor", "w3g16_asymf", "nf4g16_dq", "nvfp4")
)
OUT, WIDTH, TOKENS = 8, 32, 128
# What a code may be wrong by, as a share of the largest weight: half the widest gap of the points, and room
# for scales that were searched or can only be powers of two. Else a step of the integers.
GAPS = {"nf4": 0.2, "fp4": 0.22, "mxfp4": 0.35, "nvfp4": 0.22, "fp8": 0.1}


def variants() -> Iterator[tuple[str, Any]]:
    """(label, parameters) of every method: the defaults, and every value of every closed choice."""
    for name in registry.names("methods"):
        module = registry.load("methods", name)
        yield name, module.Params()
        hints = get_type_hints(module.Params)
        for field in fields(module.Params):
            if hints[field.name] is bool:
                choices = tuple(b for b in (True, False) if b != field.default)
            else:
                choices = get_args(hints[field.name])
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


def tied(label: str, scheme: Scheme) -> bool:
    return scheme.ties_rows or quantizer_of(label).ties_rows


def some_scheme(label: str) -> Scheme:
    """One that the method accepts, of few inputs to a scale where it can be."""
    found = (*FEW, *SCHEMES)
    return next(scheme for scheme in found if quantizer_of(label).accepts(scheme) is None)


CASES = pytest.mark.parametrize("label, scheme", accepted())


def weight_for(scheme: Scheme, rng: torch.Generator) -> Tensor:
    return torch.randn(OUT, 128 if scheme.tile else WIDTH, generator=rng) * 0.05


def inputs_for(scheme: Scheme, rng: torch.Generator, tokens: int = TOKENS) -> Tensor:
    return activations(128 if scheme.tile else WIDTH, tokens, rng)


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
    match q:
        case Affine():
            check_integers(q, weight, scheme)
        case Float():
            assert scheme.numbers == "fp8" and q.values.dtype == torch.float8_e4m3fn
        case Codebook():
            assert torch.equal(q.table, table_of(scheme).table) and q.offset is None
            assert q.codes.dtype == torch.uint8 and int(q.codes.max()) < len(q.table)
    check_scales(q, scheme, (-(-weight.shape[0] // q.group[0]), weight.shape[1] // q.group[1]))


def check_integers(q: Affine, weight: Tensor, scheme: Scheme) -> None:
    assert scheme.numbers == "int" and q.offset is None
    assert q.codes.dtype == (torch.int8 if scheme.sym else torch.uint8)
    low = -(1 << (q.bits - 1)) if scheme.sym else 0
    assert low <= int(q.codes.min()) and int(q.codes.max()) < low + (1 << q.bits)
    assert (q.zero_point is None) == scheme.sym
    if q.zero_point is not None:
        assert isinstance(q.scale, Tensor) and q.zero_point.shape == q.scale.shape
        if scheme.fractional:
            assert q.zero_point.dtype == q.scale.dtype
        else:
            assert q.zero_point.dtype == torch.uint8 and int(q.zero_point.max()) < 1 << q.bits
    if scheme.axis == 0:
        expected = torch.arange(weight.shape[0]) % (weight.shape[0] // q.group[0])
        assert q.row_group is not None and q.row_group.dtype == torch.int32
        assert q.row_group.tolist() == expected.tolist()
    else:
        assert q.row_group is None
    if q.column_group is not None:
        assert isinstance(q.scale, Tensor)
        assert q.column_group.dtype == torch.int32 and q.column_group.shape == (weight.shape[1],)
        counts = torch.bincount(q.column_group, minlength=q.scale.shape[1])
        assert counts.tolist() == [q.group[1]] * q.scale.shape[1]


def check_scales(q: QuantizedTensor, scheme: Scheme, groups: tuple[int, int]) -> None:
    """Scales in the form that files hold them in, none of them zero."""
    scale, mixed = q.scale, scheme.activations is not None and scheme.activations.outliers is not None
    if isinstance(scale, Tensor):
        powers = scheme.numbers == "mxfp4"
        wanted = torch.float8_e8m0fnu if powers else getattr(torch, scheme.scale_dtype)
        assert not (scheme.nested or mixed or scheme.numbers == "nvfp4")
        assert scale.dtype == wanted and scale.shape == groups
        # bitsandbytes stores the 0 of a group of zeros
        assert scheme.numbers in ("nf4", "fp4") or bool((scale.float() != 0).all())
        assert scheme.numbers in ("int", "nf4", "fp4") or bool((scale.float() > 0).all())
    elif isinstance(scale, Codebook):
        assert scheme.nested and scale.bits == 8 and scale.codes.dtype == torch.uint8
        assert scale.codes.shape == (1, groups[0] * groups[1]) and scale.group == (1, 256)
        assert scale.offset is not None and scale.offset.shape == (1,)
    else:
        assert isinstance(scale, Float) and isinstance(scale.scale, Tensor)
        assert scale.values.shape == groups and scale.scale.shape == (1, 1)
        dtype = torch.float8_e4m3fn if scheme.numbers == "nvfp4" else torch.float32
        assert (scheme.numbers == "nvfp4") != mixed and scale.values.dtype == dtype
        assert scale.group == groups and bool((scale.values.float() > 0).all())


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
    assert {"rtn", "gptq", "llm_int8"} <= set(registry.names("methods"))
    for scheme in SCHEMES:
        assert any(quantizer_of(label).accepts(scheme) is None for label in VARIANTS), scheme.name


@pytest.mark.parametrize("name", registry.names("methods"))
def test_modules_say_what_they_are(name: str) -> None:
    module = registry.load("methods", name)
    assert module.SUMMARY and not module.SUMMARY.endswith(".")
    assert hash(module.quantizer(module.Params())) == hash(module.quantizer(module.Params()))


@CASES
def test_results_are_well_formed_and_repeat_and_nothing_else_moves(
    label: str, scheme: Scheme, rng: torch.Generator
) -> None:
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    kept = weight.clone()
    seen = [t for f in fields(Statistics) if isinstance(t := getattr(stats, f.name), Tensor)]
    before = [t.clone() for t in seen]
    state = torch.random.get_rng_state()
    quantizer = quantizer_of(label)
    prepared = quantizer.prepare(stats, scheme)
    first = quantizer.quantize(weight, prepared, scheme)
    again = quantizer.quantize(weight, prepared, scheme)
    check(first.weight, weight, scheme)
    assert same(first.weight, again.weight) and (first.note, first.facts) == (again.note, again.facts)
    assert same(first.weight, run(label, weight, stats, scheme))
    assert torch.equal(weight, kept)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@CASES
def test_rows_are_independent_unless_a_scale_ties_them(
    label: str, scheme: Scheme, rng: torch.Generator
) -> None:
    """Reordering rows reorders the result; the sweep stacks the weights of a site because of that."""
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    order = torch.randperm(OUT, generator=rng)
    if scheme.axis == 0:
        # rows of a group lie this far apart
        order = torch.arange(OUT).roll(OUT // (scheme.group_size or OUT))
    straight = dequantize(run(label, weight, stats, scheme))
    permuted = dequantize(run(label, weight[order], stats, scheme))
    if tied(label, scheme):
        # one scale for all rows: sums in another order may decide between two grids that are equally good
        losses = [float((value - weight[order]).square().sum()) for value in (straight[order], permuted)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    else:
        assert torch.equal(straight[order], permuted)


@CASES
def test_error_is_not_above_plain_rounding(label: str, scheme: Scheme, rng: torch.Generator) -> None:
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    plain = error(label, weight, nearest(weight, scheme, scheme.convention), stats)
    found = error(label, weight, run(label, weight, stats, scheme), stats)
    if quantizer_of(label).regroups_columns or "plain" in label or scheme.bits == 8:
        # other groups or compensated absmax scales win on average only, and at 8 bits only noise is left
        plain *= 1.2
    if ("plain" in label and scheme.bits == 2) or label == "hqq":
        # 2 bits with absmax scales grow as they are compensated; hqq does not minimise squares
        plain *= 1.6
    assert found <= plain * (1 + 1e-6)


SEARCHED = ("rtn-scales-mse", "rtn-scales-weighted", "gptq")


@pytest.mark.parametrize(
    "label, scheme",
    [
        pytest.param(label, scheme, id=f"{label}-{scheme.name}")
        for label in SEARCHED
        for scheme in SCHEMES
        if (scheme.plain or scheme.numbers == "mxfp4") and quantizer_of(label).accepts(scheme) is None
    ],
)
def test_searched_scales_beat_the_convention_of_every_container(
    label: str, scheme: Scheme, rng: torch.Generator
) -> None:
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    found = error(label, weight, run(label, weight, stats, scheme), stats)
    # one grid of 256 points, or of powers of two, for few weights: trials 6 % apart may miss what luck meets
    luck = {"w8_tensor": 1.3, "mxfp4": 1.05, "w8": 1.05}.get(scheme.name, 1 + 1e-6)
    for convention in get_args(Convention):
        plain = error(label, weight, nearest(weight, scheme, convention), stats)
        assert found <= plain * (1 + 1e-6 if convention == "absmax" else luck), convention


@CASES
def test_zero_and_constant_rows_and_a_dead_channel(label: str, scheme: Scheme, rng: torch.Generator) -> None:
    weight, x = weight_for(scheme, rng), inputs_for(scheme, rng)
    weight[0], weight[1], weight[:, 7] = 0.0, 0.03, 0.0
    x[:, 5] = 0
    q = run(label, weight, statistics_of(x), scheme)
    check(q, weight, scheme)
    value = dequantize(q)
    # groups of zeros alone stay zero, and so does every zero that the grid has a point for
    assert float((value[0] if scheme.axis == 1 else value[:, 7]).abs().max()) == 0
    # whatever the statistics say, the weights of a dead channel are kept roughly where they are
    step = GAPS.get(scheme.numbers, 1.1 / max(1, (1 << (scheme.bits - 1)) - 1))
    assert float((value[:, 5] - weight[:, 5]).abs().max()) <= step * float(weight.abs().max())


@CASES
def test_one_token_and_all_dead_inputs_leave_a_sane_result(
    label: str, scheme: Scheme, rng: torch.Generator
) -> None:
    # one direction of the inputs is all that counts then, so the weights themselves may move further
    limit = {1: 1.5, 2: 1.5, 3: 1.0}.get(scheme.bits, 0.6)
    weight = weight_for(scheme, rng)
    for x in (inputs_for(scheme, rng, 1), torch.zeros(7, weight.shape[1])):
        q = run(label, weight, statistics_of(x), scheme)
        check(q, weight, scheme)
        assert float((dequantize(q) - weight).norm() / weight.norm()) < limit


@pytest.mark.parametrize(
    "label, scheme",
    # rows alone have another scale of the tensor
    [p for p in accepted() if not tied(*p.values[:2]) and p.values[1].numbers != "nvfp4"],  # type: ignore[arg-type, union-attr]
)
def test_rows_alone_are_as_good_as_in_a_stack(label: str, scheme: Scheme, rng: torch.Generator) -> None:
    """A matrix product of another size may round differently: a code may flip, not the quality."""
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    whole = error(label, weight, run(label, weight, stats, scheme), stats)
    prepared = quantizer_of(label).prepare(stats, scheme)
    alone = sum(
        error(label, row, quantizer_of(label).quantize(row, prepared, scheme).weight, stats)
        for row in weight.split(1)
    )
    assert alone == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("label", VARIANTS)
def test_empty_statistics_are_refused_where_they_are_needed(label: str) -> None:
    quantizer, scheme = quantizer_of(label), some_scheme(label)
    empty = statistics_of(torch.empty(0, WIDTH))
    if quantizer.needs is Need.NOTHING:
        quantizer.prepare(None, scheme)
        return
    for nothing in (None, empty):
        with pytest.raises(NumericsError, match="no token"):
            quantizer.prepare(nothing, scheme)


@pytest.mark.parametrize("label", VARIANTS)
def test_non_finite_values_are_refused(label: str, rng: torch.Generator) -> None:
    scheme = some_scheme(label)
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    for value in (torch.nan, torch.inf):
        broken = weight.clone()
        broken[2, 3] = value
        with pytest.raises(QuantkitError, match="non-finite"):
            run(label, broken, stats, scheme)
    if quantizer_of(label).needs is Need.NOTHING:
        return
    assert stats.gram is not None and stats.squares is not None and stats.absmax is not None
    stats.gram[4, 4] = stats.squares[4] = stats.absmax[4] = torch.nan
    with pytest.raises(NumericsError, match="non-finite"):
        run(label, weight, stats, scheme)


@pytest.mark.parametrize("label", VARIANTS)
def test_refused_schemes_have_a_reason(label: str) -> None:
    reasons = [quantizer_of(label).accepts(scheme) for scheme in SCHEMES]
    assert None in reasons
    for reason in reasons:
        assert reason is None or (len(reason) > 20 and not reason.endswith(".") and "!" not in reason)


@pytest.mark.parametrize("label", VARIANTS)
def test_only_methods_that_say_so_regroup_columns(label: str, rng: torch.Generator) -> None:
    scheme = some_scheme(label)
    weight, stats = weight_for(scheme, rng), statistics_of(inputs_for(scheme, rng))
    q = run(label, weight, stats, scheme)
    regrouped = isinstance(q, Affine) and q.column_group is not None
    assert regrouped == quantizer_of(label).regroups_columns
