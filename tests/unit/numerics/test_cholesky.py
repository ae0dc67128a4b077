from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.cholesky import Factor, factor
from quantkit.numerics.curvature import Curvature, curvature


def seen(gram: Tensor) -> Curvature:
    """The matrix itself as a curvature."""
    return curvature(gram, 1, shrink=False)


def whole(found: Factor) -> Tensor:
    """R, of which only the upper triangle means something."""
    width = found.reversed_lower.shape[0]
    return found.columns(0, width).triu()


def test_factor_of_a_2_by_2_gram_by_hand() -> None:
    # [[5, 2], [2, 4]] = R·Rᵀ with R = [[2, 1], [0, 2]]
    found = factor(seen(torch.tensor([[5.0, 2.0], [2.0, 4.0]])), 0.0)
    torch.testing.assert_close(whole(found), torch.tensor([[2.0, 1.0], [0.0, 2.0]]))
    assert found.note is None


def test_columns_reach_down_to_their_last_row() -> None:
    # R = [[1, 2, 3], [0, 4, 5], [0, 0, 6]], reversed [[6, 0, 0], [5, 4, 0], [3, 2, 1]]
    found = Factor(torch.tensor([[6.0, 0, 0], [5, 4, 0], [3, 2, 1]]), None)
    assert found.columns(0, 3).tolist() == [[1, 2, 3], [0, 4, 5], [0, 0, 6]]
    assert found.columns(1, 2).tolist() == [[2], [4]]
    assert found.columns(1, 3).tolist() == [[2, 3], [4, 5], [0, 6]]
    assert found.columns(0, 1).tolist() == [[1]]


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    # mean diagonal 4, damp ¼: one is added
    upper = whole(factor(seen(torch.tensor([[4.0, 2.0], [2.0, 4.0]])), 0.25))
    torch.testing.assert_close(upper @ upper.T, torch.tensor([[5.0, 2.0], [2.0, 5.0]]))


@pytest.mark.parametrize("width", [12, 300])
def test_the_factor_belongs_to_the_permuted_gram(width: int, rng: torch.Generator) -> None:
    x = torch.randn(2 * width, width, generator=rng)
    gram = x.T @ x
    kept, order = gram.clone(), torch.randperm(width, generator=rng)
    upper = whole(factor(seen(gram).ordered(order), 0.01)).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width)
    expected = damped[order][:, order].double()
    assert float((upper @ upper.T - expected).norm() / expected.norm()) < 1e-5
    assert bool((upper.diagonal() > 0).all())
    assert torch.equal(gram, kept)


def test_more_damping_is_tried_and_said() -> None:
    # eigenvalues 1.02 and −.02: damping .02 · ½ leaves it indefinite, three times as much does not
    found = factor(seen(torch.tensor([[0.5, 0.52], [0.52, 0.5]])), 0.02)
    assert found.note == "damping raised to 0.06 in float32"
    upper = whole(found)
    torch.testing.assert_close(upper @ upper.T, torch.tensor([[0.53, 0.52], [0.52, 0.53]]))


def test_an_indefinite_gram_is_refused() -> None:
    with pytest.raises(NumericsError, match="not positive definite") as caught:
        factor(seen(torch.tensor([[1.0, 3.0], [3.0, 1.0]])), 0.01)
    assert "0.1 in float64" in caught.value.message
    assert caught.value.remedy == "calibrate with more rows"


def test_a_shrunk_rank_one_gram_can_be_factorised(rng: torch.Generator) -> None:
    x = torch.randn(1, 16, generator=rng)
    assert factor(curvature(x.T @ x, 1, shrink=True), 0.01).note is None
