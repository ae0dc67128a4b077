from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.calibrate.statistics import Need
from quantkit.errors import NumericsError
from quantkit.model.graph import Site, Weight
from quantkit.protocols import FormatFacts
from quantkit.recipe.plan import TargetPlan
from quantkit.recipe.spec import Target
from quantkit.run.quantize import quantize_site, relative_error, rows
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, Float, dequantize
from tests.quantized import activations, random_affine, same, statistics_of

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
    return TargetPlan(target, quantizer, registry.load("formats", "gptq").FORMAT, FOUR, schemes, facts)


def everywhere(scheme: Scheme | None, weights: Sequence[Weight] = SITE.weights) -> dict[str, Scheme | None]:
    return {w.key: scheme for w in weights}


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
    made = quantize_site(SITE, stats, lambda w: matrices[w.name], [target])["t"]
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
    made = quantize_site(SITE, stats, lambda w: matrices[w.name], [target])["t"]
    assert {m.linear.name: m.linear.weight.bits for m in made} == {Q.key: 4, V.key: 3}


def test_targets_are_solved_each_for_itself(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    stats = statistics_of(activations(32, 100, rng))
    plans = [
        plan("rtn", everywhere(FOUR), "a"),
        plan("gptq", everywhere(FOUR), "b"),
        plan("rtn", everywhere(THREE), "c"),
    ]
    together = quantize_site(SITE, stats, lambda w: matrices[w.name], plans)
    assert list(together) == ["a", "b", "c"]
    for p in plans:
        alone = quantize_site(SITE, stats, lambda w: matrices[w.name], [p])[p.name]
        for x, y in zip(together[p.name], alone, strict=True):
            assert same(x.linear.weight, y.linear.weight) and x.metrics == y.metrics
    calibrated = sum(m.metrics.error for m in together["b"])
    assert calibrated < 0.8 * sum(m.metrics.error for m in together["a"])


def test_one_scale_per_tensor_is_one_per_weight(matrices: dict[str, Tensor]) -> None:
    scheme = Scheme(8, per_tensor=True)
    made = quantize_site(SITE, None, lambda w: matrices[w.name], [plan("rtn", everywhere(scheme))])["t"]
    for one in made:
        q = one.linear.weight
        assert isinstance(q.scale, Tensor) and q.scale.shape == (1, 1)
        assert float(q.scale) == pytest.approx(float(matrices[one.linear.name].abs().max()) / 127, rel=1e-3)
        assert one.metrics.metric == "weights" and one.metrics.tokens == 0


def test_a_site_that_no_token_reached_is_an_error(matrices: dict[str, Tensor]) -> None:
    for stats in (None, statistics_of(torch.empty(0, 32))):
        with pytest.raises(NumericsError, match=r"no calibration token reached `b\.0\.in`"):
            quantize_site(SITE, stats, lambda w: matrices[w.name], [plan("gptq", everywhere(FOUR))])


def test_an_expert_that_no_token_reached_is_rounded_and_said_to_be(rng: torch.Generator) -> None:
    expert = Weight("b.0.experts.3.up.weight", (8, 32), "up")
    w = torch.randn(8, 32, generator=rng)
    target = plan("gptq", everywhere(FOUR, [expert]))
    empty = statistics_of(torch.empty(0, 32), Need.GRAM)
    (one,) = quantize_site(Site("e", (expert,)), empty, lambda _: w, [target])["t"]
    assert one.metrics.note is not None and "rounded to nearest" in one.metrics.note
    assert one.metrics.tokens == 0
    assert float((dequantize(one.linear.weight) - w).norm() / w.norm()) < 0.12


def test_source_weights_are_not_modified(matrices: dict[str, Tensor], rng: torch.Generator) -> None:
    kept = {name: w.clone() for name, w in matrices.items()}
    stats = statistics_of(activations(32, 100, rng))
    quantize_site(SITE, stats, lambda w: matrices[w.name], [plan("gptq", everywhere(FOUR))])
    assert all(torch.equal(matrices[name], w) for name, w in kept.items())
