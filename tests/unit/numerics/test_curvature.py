from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.curvature import curvature


def test_shrinking_by_hand() -> None:
    # 2 inputs, 4 tokens: ρ = 2 / 16 = ⅛; the diagonal stays and everything is divided by the tokens
    gram = torch.tensor([[3.0, 8.0], [8.0, 5.0]])
    assert curvature(gram, 4, shrink=True).rows(0, 2).tolist() == [[0.75, 1.75], [1.75, 1.25]]
    assert curvature(gram, 4, shrink=False).rows(0, 2).tolist() == [[0.75, 2.0], [2.0, 1.25]]


def test_shrinking_never_takes_more_than_half() -> None:
    gram = torch.tensor([[3.0, 8.0], [8.0, 5.0]])
    assert curvature(gram, 1, shrink=True).rows(0, 2).tolist() == [[3.0, 4.0], [4.0, 5.0]]


def test_dead_inputs_get_the_mean_of_the_living() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0, 4.0, 0.0]))
    assert torch.equal(curvature(gram, 1, shrink=False).rows(0, 4), torch.diag(torch.tensor([2.0, 3, 4, 3])))


def test_an_all_dead_gram_is_the_identity() -> None:
    assert torch.equal(curvature(torch.zeros(3, 3), 7, shrink=True).rows(0, 3), torch.eye(3))


def test_rows_come_in_processing_order(rng: torch.Generator) -> None:
    x = torch.randn(30, 7, generator=rng)
    gram = x.T @ x
    kept, order = gram.clone(), torch.randperm(7, generator=rng)
    seen = curvature(gram, 30, shrink=True)
    whole, ordered = seen.rows(0, 7), seen.ordered(order)
    assert seen.width == 7
    assert torch.equal(ordered.rows(0, 7), whole[order][:, order])
    assert torch.equal(ordered.rows(2, 5), whole[order][:, order][2:5])
    assert torch.equal(ordered.diagonal, whole.diagonal()[order])
    back = ordered.ordered(torch.arange(7))
    assert torch.equal(back.rows(0, 7), whole)
    assert torch.equal(gram, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_grams_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="non-finite"):
        curvature(torch.tensor([[bad, 0.0], [0.0, 1.0]]), 1, shrink=True)
