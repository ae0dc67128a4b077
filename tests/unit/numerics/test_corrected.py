"""Corrected targets: rounding W* by the gram is rounding W against what the untouched model computes."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.corrected import correction, loss


def streams(rng: torch.Generator, tokens: int = 64, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(x̃, x) (tokens, in) fp64: x has drifted."""
    mixed = torch.randn(width, width, generator=rng, dtype=torch.float64)
    untouched = torch.randn(tokens, width, generator=rng, dtype=torch.float64) @ mixed
    return untouched, untouched + 0.3 * torch.randn(tokens, width, generator=rng, dtype=torch.float64)


def test_one_input_by_hand() -> None:
    # x̃ = 2, x = 1: the weight must double; with λ as large as the gram it goes half the way
    gram, cross = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    assert correction(gram, cross, damp=0.0).tolist() == [[pytest.approx(1.0)]]
    assert correction(gram, cross, damp=1.0).tolist() == [[pytest.approx(0.5)]]


def test_the_identity_of_the_corrected_target(rng: torch.Generator) -> None:
    untouched, x = streams(rng)
    weight = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    gram, cross = x.T @ x, untouched.T @ x
    target = weight + weight @ correction(gram, cross, damp=0.0)
    constant = None
    for _ in range(5):
        rounded = torch.round(target * 2 + torch.randn(target.shape, generator=rng, dtype=torch.float64)) / 2
        direct = float((untouched @ weight.T - x @ rounded.T).square().sum())
        quadratic = float((((target - rounded) @ gram) * (target - rounded)).sum())
        constant = direct - quadratic if constant is None else constant
        assert direct == pytest.approx(quadratic + constant, rel=1e-12)


def test_no_drift_no_share_and_no_trust_leave_the_weight(rng: torch.Generator) -> None:
    untouched, x = streams(rng)
    gram = x.T @ x
    assert float(correction(gram, gram).abs().max()) == 0.0
    assert float(correction(gram, untouched.T @ x, damp=1e12).abs().max()) < 1e-9


def test_the_loss_differs_from_the_real_one_by_a_constant(rng: torch.Generator) -> None:
    untouched, x = streams(rng)
    weight = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    gram, cross = x.T @ x, untouched.T @ x
    constant = float((untouched @ weight.T).square().sum())
    for step in (0.1, 0.5):
        rounded = torch.round(weight / step) * step
        direct = float((untouched @ weight.T - x @ rounded.T).square().sum())
        assert loss(weight, rounded, gram, cross) + constant == pytest.approx(direct, rel=1e-9)
        plain = float(((rounded - weight) @ x.T).square().sum())
        assert loss(weight, rounded, gram, None) == pytest.approx(plain, rel=1e-9)


def test_grams_that_cannot_be_solved_with_are_refused() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        correction(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.eye(2))
    with pytest.raises(NumericsError, match="non-finite"):
        correction(torch.eye(2), torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]))
