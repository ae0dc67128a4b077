from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError
from quantkit.model.graph import Site, Weight
from quantkit.numerics.nearest import nearest
from quantkit.protocols import FormatFacts
from quantkit.recipe.plan import TargetPlan
from quantkit.recipe.spec import Target
from quantkit.run.quantize import Made, Rescaled, quantize_site, relative_error
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, dequantize, rows
from tests.quantized import activations, random_affine, random_quantized, same, statistics_of

Q, K = Weight("b.0.q.weight", (8, 32), "q"), Weight("b.0.k.weight", (4, 32), "k")
V = Weight("b.0.v.weight", (4, 32), "v")
SITE = Site("b.0.in", (Q, K, V))
FOUR, THREE = Scheme(4, 16), Scheme(3, 16)


def plan(
    method: str,
    schemes: Mapping[str, Scheme | None],
    name: str = "t",
    options: Mapping[str, Any] | None = None,
) -> TargetPlan:
    target = Target(format="gptq", scheme="w4g16", method=method, name=name, options=options or {})
    quantizer = registry.load("methods", method).quantizer(target.params)
    facts = FormatFacts((), FOUR, (), False, method, "0")
    return TargetPlan(target, quantizer, (), registry.load("formats", "gptq").FORMAT, FOUR, schemes, facts)


def everywhere(scheme: Scheme | None, weights: Sequence[Weight] = SITE.weights) -> dict[str, Scheme | None]:
    return {w.key: scheme for w in weights}


def solve(
    site: Site,
    stats: Statistics | None,
    matrices: Mapping[str, Tensor],
    targets: Sequence[TargetPlan],
    **rescaled: Rescaled,
) -> dict[str, list[Made]]:
    return quantize_site(site, stats, lambda w: matrices[w.name], targets, rescaled)


@pytest.fixture
def matrices(rng: torch.Generator) -> dict[str, Tensor]:
    return {w.name: torch.randn(w.shape, generator=rng) * 0.1 for w in SITE.weights}


def test_relative_error_by_hand() -> None:
    # w = (1, 2), ŵ = (1, 1): Δ = (0, −1)
    w = torch.tensor([[1.0, 2.0]])
    q = Affine(torch.tensor([[1, 1]], dtype=torch.int8), 4, torch.ones(1, 1), (1, 2))
    error, metric = relative_error(w, q, None)
    assert (error, metric) == (1 / 5, "weights")
    # two tokens (1, 0) and (1, 2): squares 2 and 4; outputs 1 and 5; errors 0 and −2
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    error, metric = relative_error(w, q, statistics_of(x, Need.SQUARES))
    assert (error, metric) == (pytest.approx(4 / (2 * 1 + 4 * 4)), "weighted")
    error, metric = relative_error(w, q, statistics_of(x, Need.GRAM))
    assert (error, metric) == (pytest.approx(4 / 26), "output")


def test_relative_error_is_that_of_the_outputs(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    w, q = torch.randn(6, 16, generator=rng), random_affine((6, 16), Scheme(4, 8), rng)
    x = activations(16, 40, rng)
    outputs = ((dequantize(q) - w) @ x.T).square().sum() / (w @ x.T).square().sum()
    stats = statistics_of(x, Need.GRAM)
    error, _ = relative_error(w, q, stats)
    assert error == pytest.approx(float(outputs), rel=1e-4)
    # of at most three rows: the first, third and fifth
    monkeypatch.setattr("quantkit.run.quantize._MEASURED_ROWS", 3)
    some = ((dequantize(q) - w)[::2] @ x.T).square().sum() / (w[::2] @ x.T).square().sum()
    assert relative_error(w, q, stats)[0] == pytest.approx(float(some), rel=1e-4)


def test_errors_of_zero_weights_are_zero() -> None:
    q = Affine(torch.zeros(2, 4, dtype=torch.int8), 4, torch.ones(2, 1), (1, 4))
    assert relative_error(torch.zeros(2, 4), q, None) == (0.0, "weights")


def test_no_tokens_are_no_measurement() -> None:
    q = Affine(torch.tensor([[1, 1]], dtype=torch.int8), 4, torch.ones(1, 1), (1, 2))
    empty = statistics_of(torch.empty(0, 2), Need.GRAM)
    assert relative_error(torch.tensor([[1.0, 2.0]]), q, empty) == (1 / 5, "weights")


# whose groups lie in one row each, or are the whole weight; and those that cross rows
CUT = ("w4g32_asymf", "nf4", "fp8", "fp8_tensor", "mxfp4", "nvfp4", "w8a8_mixed")
CROSSING = ("nf4_dq", "fp8_block", "w4g3_asymf_axis0")


def members(rng: torch.Generator) -> dict[str, Any]:
    asym = random_affine((6, 16), Scheme(4, 4, sym=False), rng)
    inner = random_affine((6, 4), Scheme(6, 2), rng)
    codes = torch.randint(0, 4, (6, 16), generator=rng).to(torch.uint8)
    return {
        "symmetric": random_affine((6, 16), Scheme(4, 4), rng),
        "asymmetric": asym,
        "regrouped": replace(asym, column_group=torch.randperm(16, generator=rng).to(torch.int32) // 4),
        "one scale": random_affine((6, 16), Scheme(8, per_tensor=True), rng),
        "nested": replace(asym, scale=inner, zero_point=None, offset=replace(inner, bits=7)),
        "floats": Float(torch.randn(6, 16, generator=rng), 8, torch.rand(6, 4, generator=rng), (1, 4)),
        "codebook": Codebook(codes, 2, torch.randn(4, generator=rng), inner, (1, 4)),
        **{name: random_quantized((6, 128), parse_scheme(name), rng) for name in CUT},
    }


def test_rows_mean_what_they_meant(rng: torch.Generator) -> None:
    for name, q in members(rng).items():
        whole = dequantize(q)
        for start, stop in ((0, 6), (0, 2), (3, 4), (5, 6)):
            assert torch.equal(dequantize(rows(q, slice(start, stop))), whole[start:stop]), name
        assert same(rows(q, slice(0, 6)), q), name


def test_one_row_of_one_zero_point(rng: torch.Generator) -> None:
    q = random_affine((6, 16), Scheme(8, None, False, True), rng)
    assert torch.equal(dequantize(rows(q, slice(3, 4))), dequantize(q)[3:4])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_stack_is_solved_as_its_weights_are(
    method: str, matrices: dict[str, Tensor], rng: torch.Generator
) -> None:
    stats = statistics_of(activations(32, 100, rng))
    target = plan(method, everywhere(FOUR))
    made = solve(SITE, stats, matrices, [target])["t"]
    assert [m.linear.name for m in made] == [w.key for w in SITE.weights]
    prepared = target.quantizer.prepare(stats, FOUR)
    for one in made:
        w = matrices[one.linear.name]
        alone = dequantize(target.quantizer.quantize(w, prepared, FOUR).weight)
        # products of another size may round differently and flip a code, which costs next to nothing
        assert float((dequantize(one.linear.weight) - alone).norm() / w.norm()) < 0.05
        assert one.metrics.scheme == "w4g16" and one.metrics.tokens == 100 and one.metrics.note is None
        assert one.metrics.metric == "output"
        assert one.metrics.error == relative_error(w, one.linear.weight, stats)[0]


def test_kept_weights_are_left_out_and_schemes_are_mixed(
    matrices: dict[str, Tensor], rng: torch.Generator
) -> None:
    stats = statistics_of(activations(32, 100, rng))
    target = plan("rtn", {Q.key: FOUR, K.key: None, V.key: THREE})
    made = solve(SITE, stats, matrices, [target])["t"]
    assert {m.linear.name: m.linear.weight.bits for m in made} == {Q.key: 4, V.key: 3}


def test_targets_are_solved_each_for_itself(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    stats = statistics_of(activations(32, 100, rng))
    plans = [
        plan("rtn", everywhere(FOUR), "a"),
        plan("gptq", everywhere(FOUR), "b"),
        plan("rtn", everywhere(THREE), "c"),
    ]
    together = solve(SITE, stats, matrices, plans)
    assert list(together) == ["a", "b", "c"]
    for p in plans:
        alone = solve(SITE, stats, matrices, [p])[p.name]
        for x, y in zip(together[p.name], alone, strict=True):
            assert same(x.linear.weight, y.linear.weight) and x.metrics == y.metrics
    calibrated = sum(m.metrics.error for m in together["b"])
    assert calibrated < 0.8 * sum(m.metrics.error for m in together["a"])


@pytest.mark.parametrize("name", [*CUT, *CROSSING, "w8_tensor"])
def test_errors_of_some_rows_whatever_the_grid(
    name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.run.quantize._MEASURED_ROWS", 4)
    w, q = torch.randn(12, 128, generator=rng), random_quantized((12, 128), parse_scheme(name), rng)
    some = (dequantize(q) - w)[::3].square().sum() / w[::3].square().sum()
    assert relative_error(w, q, None)[0] == pytest.approx(float(some), rel=1e-5)


@pytest.mark.parametrize("name", ["w8_tensor", "fp8_block", "nf4_dq", "w4g4_asymf_axis0"])
def test_weights_whose_rows_are_tied_are_solved_alone(name: str, rng: torch.Generator) -> None:
    weights = [Weight(f"b.0.{n}.weight", (out, 128), n) for n, out in (("q", 8), ("k", 4), ("v", 4))]  # type: ignore[arg-type]
    site, scheme = Site("b.0.in", tuple(weights)), replace(parse_scheme(name), scale_dtype="float32")
    matrices = {w.name: torch.randn(w.shape, generator=rng) * 10**n for n, w in enumerate(weights)}
    made = solve(site, None, matrices, [plan("rtn", everywhere(scheme, weights))])["t"]
    assert [m.linear.name for m in made] == list(matrices)
    for one in made:
        alone = nearest(matrices[one.linear.name], scheme, scheme.convention)
        assert same(one.linear.weight, alone)
        assert one.metrics.metric == "weights" and one.metrics.tokens == 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_engines_fuse_shares_the_scale_of_the_tensor(
    method: str, matrices: dict[str, Tensor], rng: torch.Generator
) -> None:
    """q, k and v one, a gate of the same input another one."""
    other = Weight("b.0.gate.weight", (6, 32), "other")
    site = Site("b.0.in", (*SITE.weights, other))
    matrices |= {other.name: torch.randn(6, 32, generator=rng) * 30}
    matrices[K.name] *= 50
    scheme = parse_scheme("nvfp4")
    stats = statistics_of(activations(32, 100, rng))
    made = solve(site, stats, matrices, [plan(method, everywhere(scheme, site.weights))])["t"]
    outer = {}
    for one in made:
        q = one.linear.weight
        assert isinstance(q, Codebook) and isinstance(q.scale, Float) and isinstance(q.scale.scale, Tensor)
        assert (
            q.codes.shape == matrices[one.linear.name].shape and q.scale.values.shape[0] == q.codes.shape[0]
        )
        assert bool((q.scale.values.float() > 0).all())
        outer[one.linear.name] = float(q.scale.scale)
    largest = max(float(matrices[w.name].abs().max()) for w in SITE.weights)
    assert [outer[w.name] for w in SITE.weights] == [pytest.approx(largest / 2688)] * 3
    assert outer[other.name] == pytest.approx(float(matrices[other.name].abs().max()) / 2688)


FACTORS = torch.logspace(-1, 1, 32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_rescaled_target_sees_other_weights_and_other_inputs(
    method: str, matrices: dict[str, Tensor], rng: torch.Generator
) -> None:
    """Its codes are those of W·s with the statistics of x / s; a neighbour notices nothing."""
    x = activations(32, 100, rng)
    stats = statistics_of(x)
    options = {"scales": "weighted"} if method == "rtn" else {}
    plans = [plan(method, everywhere(FOUR), name, options) for name in ("a", "b")]
    made = solve(SITE, stats, matrices, plans, a=Rescaled(FACTORS))
    scaled = {name: w * FACTORS for name, w in matrices.items()}
    expected = solve(SITE, stats.through(FACTORS), scaled, plans[:1])["a"]
    for one, other in zip(made["a"], expected, strict=True):
        assert same(one.linear.weight, other.linear.weight)
        assert one.metrics.error == other.metrics.error and one.metrics.metric == "output"
        assert one.metrics.facts == {"rescaled_spread": pytest.approx(100)}
    # the statistics of inputs that were really divided
    again = solve(SITE, statistics_of(x / FACTORS), scaled, plans[:1])["a"]
    errors = [[m.metrics.error for m in ms] for ms in (expected, again)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    alone = solve(SITE, stats, matrices, plans[1:])["b"]
    for one, other in zip(made["b"], alone, strict=True):
        assert same(one.linear.weight, other.linear.weight) and one.metrics == other.metrics
        assert one.metrics.facts == {}
    assert not same(made["a"][0].linear.weight, made["b"][0].linear.weight)


def test_static_inputs_get_one_scale_per_site(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    x = activations(32, 100, rng)
    stats = statistics_of(x, Need.SQUARES | Need.ABSMAX)
    for name, reach in (("w8a8_static", 127.5), ("fp8a8_static", 448)):
        scheme = replace(parse_scheme(name), scale_dtype="bfloat16")
        target = plan("rtn", everywhere(scheme))
        made = solve(SITE, stats, matrices, [target])["t"]
        expected = (x.abs().max() / reach).to(torch.bfloat16).view(1)
        assert all(same(m.linear.input_scale, expected) for m in made)
        divided = solve(SITE, stats, matrices, [target], t=Rescaled(FACTORS))["t"]
        expected = ((x / FACTORS).abs().max() / reach).to(torch.bfloat16).view(1)
        assert all(same(m.linear.input_scale, expected) for m in divided)
    for name in ("w8a8", "fp8a8", "fp8", "w8"):
        made = solve(SITE, stats, matrices, [plan("rtn", everywhere(parse_scheme(name)))])["t"]
        assert all(m.linear.input_scale is None for m in made)


def test_static_inputs_need_statistics(matrices: dict[str, Tensor]) -> None:
    target = plan("rtn", everywhere(parse_scheme("w8a8_static")))
    for stats in (None, statistics_of(torch.ones(3, 32), Need.SQUARES)):
        with pytest.raises(NumericsError, match=r"static inputs of `b\.0\.in` need statistics"):
            solve(SITE, stats, matrices, [target])


def test_reasons_and_numbers_reach_the_report(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    x = activations(32, 100, rng).clamp(-5, 5)
    x[3, [1, 7, 30]] = 6.5
    scheme, stats = parse_scheme("w8a8_mixed"), statistics_of(x)
    target = plan("llm_int8", everywhere(scheme))
    for one in solve(SITE, stats, matrices, [target])["t"]:
        assert one.metrics.facts == {"outlier_columns": 3} and one.metrics.note is None
        assert one.metrics.scheme == "w8a8_mixed"
        assert one.metrics.to_json()["facts"] == {"outlier_columns": 3}
    refused = Rescaled(note="not rescaled: weights of one input differ in scheme")
    for one in solve(SITE, stats, matrices, [target], t=refused)["t"]:
        assert one.metrics.note == refused.note and one.metrics.facts == {"outlier_columns": 3}
    both = solve(SITE, stats, matrices, [target], t=Rescaled(FACTORS))["t"][0].metrics.facts
    assert both.keys() == {"outlier_columns", "rescaled_spread"}


def test_a_site_that_no_token_reached_is_an_error(matrices: dict[str, Tensor]) -> None:
    for stats in (None, statistics_of(torch.empty(0, 32))):
        with pytest.raises(NumericsError, match=r"no calibration token reached `b\.0\.in`"):
            solve(SITE, stats, matrices, [plan("gptq", everywhere(FOUR))])


def test_an_expert_that_no_token_reached_is_rounded_and_said_to_be(rng: torch.Generator) -> None:
    expert = Weight("b.0.experts.3.up.weight", (8, 32), "up")
    w = torch.randn(8, 32, generator=rng)
    target = plan("gptq", everywhere(FOUR, [expert]))
    empty = statistics_of(torch.empty(0, 32), Need.GRAM)
    (one,) = solve(Site("e", (expert,)), empty, {expert.name: w}, [target])["t"]
    assert one.metrics.note is not None and "rounded to nearest" in one.metrics.note
    assert one.metrics.tokens == 0
    assert float((dequantize(one.linear.weight) - w).norm() / w.norm()) < 0.12
    refused = Rescaled(note="not rescaled: nobody came by")
    (both,) = solve(Site("e", (expert,)), empty, {expert.name: w}, [target], t=refused)["t"]
    assert both.metrics.note == f"{one.metrics.note}; {refused.note}"


@pytest.mark.parametrize(
    ("method", "scheme", "value", "message"),
    [
        ("rtn", "w4g16", 1e9, r"`b\.0\.k\.weight`: a scale of 1.43e\+08 does not fit float16"),
        ("llm_int8", "w8a8_mixed", 7e4, r"`b\.0\.k\.weight`: a weight of 70,000 is beyond float16"),
        # solved together: any of them may be meant
        ("gptq", "w4g16", 1e9, r"`b\.0\.q\.weight`, `b\.0\.k\.weight`, `b\.0\.v\.weight`: a scale of"),
    ],
)
def test_errors_name_the_weights(
    method: str,
    scheme: str,
    value: float,
    message: str,
    matrices: dict[str, Tensor],
    rng: torch.Generator,
) -> None:
    """A method does not know what it rounds, and a rule needs a name."""
    matrices[K.name][1, 3] = value
    options = {"report_outliers": False} if method == "llm_int8" else {"scales": "absmax"}
    target = plan(method, everywhere(parse_scheme(scheme)), options=options)
    with pytest.raises(NumericsError, match=message) as caught:
        solve(SITE, statistics_of(activations(32, 100, rng)), matrices, [target])
    assert caught.value.remedy is not None and "rule" in caught.value.remedy


def test_broken_statistics_name_the_weights(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    x = activations(32, 100, rng)
    x[3, 4] = torch.inf
    with pytest.raises(NumericsError, match=r"`b\.0\.q\.weight`, .*non-finite"):
        solve(SITE, statistics_of(x), matrices, [plan("gptq", everywhere(FOUR))])


def test_source_weights_are_not_modified(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    kept = {name: w.clone() for name, w in matrices.items()}
    stats = statistics_of(activations(32, 100, rng))
    solve(SITE, stats, matrices, [plan("gptq", everywhere(FOUR))])
    assert all(torch.equal(matrices[name], w) for name, w in kept.items())
