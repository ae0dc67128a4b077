from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.cholesky import factor, revive_, shrink_


def test_factor_of_a_2_by_2_gram_by_hand() -> None:
    # H = [[5, 2], [2, 4]] = R·Rᵀ with R = [[2, 1], [0, 2]], so U = R⁻¹ = [[½, −¼], [0, ½]]
    gram = torch.tensor([[5.0, 2.0], [2.0, 4.0]])
    found = factor(gram, torch.tensor([0, 1]), 0.0)
    torch.testing.assert_close(found.upper, torch.tensor([[0.5, -0.25], [0.0, 0.5]]))
    assert found.note is None


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    # mean diagonal 4, damp ¼: H + I = [[5, 2], [2, 5]], whose inverse is [[5, −2], [−2, 5]] / 21
    gram = torch.tensor([[4.0, 2.0], [2.0, 4.0]])
    upper = factor(gram, torch.tensor([0, 1]), 0.25).upper
    torch.testing.assert_close(upper.T @ upper, torch.tensor([[5.0, -2.0], [-2.0, 5.0]]) / 21)


def test_the_factor_belongs_to_the_permuted_gram(rng: torch.Generator) -> None:
    x = torch.randn(60, 12, generator=rng)
    gram = x.T @ x
    order = torch.randperm(12, generator=rng)
    kept, upper = gram.clone(), factor(gram, order, 0.01).upper
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    inverse = torch.linalg.inv(damped[order][:, order].double())
    assert float((upper.T.double() @ upper.double() - inverse).norm() / inverse.norm()) < 1e-5
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    assert torch.equal(gram, kept)


def test_more_damping_is_tried_and_said() -> None:
    # eigenvalues 1.02 and −0.02: damping .01 leaves it indefinite, three times as much does not
    gram = torch.tensor([[0.5, 0.52], [0.52, 0.5]])
    found = factor(gram, torch.tensor([0, 1]), 0.02)
    assert found.note == "damping raised to 0.06 in float32"


def test_an_indefinite_gram_is_refused() -> None:
    with pytest.raises(NumericsError, match="not positive definite") as caught:
        factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.tensor([0, 1]), 0.01)
    assert "0.1 in float64" in caught.value.message
    assert caught.value.remedy == "calibrate with more rows"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_grams_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="non-finite"):
        factor(torch.tensor([[bad, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), 0.01)


def test_shrink_by_hand() -> None:
    # 2 inputs, 4 tokens: ρ = 2 / 16 = ⅛; the diagonal stays
    gram = torch.tensor([[3.0, 8.0], [8.0, 5.0]])
    shrink_(gram, 4)
    assert gram.tolist() == [[3.0, 7.0], [7.0, 5.0]]


@pytest.mark.parametrize("tokens", [0, 1])
def test_shrink_never_takes_more_than_half(tokens: int) -> None:
    gram = torch.tensor([[3.0, 8.0], [8.0, 5.0]])
    shrink_(gram, tokens)
    assert gram.tolist() == [[3.0, 4.0], [4.0, 5.0]]


def test_a_shrunk_rank_one_gram_can_be_factorised(rng: torch.Generator) -> None:
    x = torch.randn(1, 16, generator=rng)
    gram = x.T @ x
    shrink_(gram, 1)
    assert factor(gram, torch.arange(16), 0.01).note is None


def test_revive_puts_the_mean_of_the_living_in_dead_places() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0, 4.0, 0.0]))
    assert revive_(gram) == 2
    assert gram.diagonal().tolist() == [2.0, 3.0, 4.0, 3.0]
    assert revive_(gram) == 0


def test_revive_of_an_all_dead_gram_is_the_identity() -> None:
    gram = torch.zeros(3, 3)
    assert revive_(gram) == 3
    assert torch.equal(gram, torch.eye(3))
