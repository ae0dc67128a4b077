"""Refitted scales solve the least squares of a row; nothing gets worse."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.curvature import curvature
from quantkit.numerics.refit import refit
from quantkit.numerics.stored import Plain

FP32 = Plain(torch.float32)


def problem(
    rng: torch.Generator, width: int = 12, out: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Units and weights (in, out), and a gram (in, in)."""
    x = torch.randn(64, width, generator=rng) @ torch.randn(width, width, generator=rng)
    w = torch.randn(width, out, generator=rng)
    units = torch.round(w * 3 + 0.3 * torch.randn(width, out, generator=rng))
    return units, w, x.T @ x


def loss(units: torch.Tensor, w: torch.Tensor, spread: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    error = (units * spread - w).T.double()
    return ((error @ gram.double()) * error).sum(1)


def test_two_groups_worked_by_hand() -> None:
    # A = I, units 1 and 2, weights 3 and 5: scales 3/1 and 5·2/2² = 2.5
    seen = curvature(torch.eye(2), 1, shrink=False)
    found = refit(
        [torch.tensor([[1.0], [2.0]])],
        torch.tensor([[3.0], [5.0]]),
        torch.ones(1, 2),
        torch.tensor([0, 1]),
        seen,
        FP32,
    )
    assert found.tolist() == [[pytest.approx(3.0, rel=1e-3), pytest.approx(2.5, rel=1e-3)]]


def test_scales_are_those_of_least_squares_over_all_groups(rng: torch.Generator) -> None:
    units, w, gram = problem(rng)
    group_of = torch.arange(12) // 4
    seen = curvature(gram, 64, shrink=False)
    found = refit([units], w, torch.full((5, 3), 0.33), group_of, seen, FP32)
    root = torch.linalg.cholesky(gram.double()).T
    for row in range(5):
        columns = torch.stack([units[:, row] * (group_of == g) for g in range(3)], 1).double()
        wanted = torch.linalg.lstsq(root @ columns, root @ w[:, row].double()).solution
        torch.testing.assert_close(found[row].double(), wanted, rtol=2e-3, atol=1e-4)


def test_regrouped_columns_follow_their_group(rng: torch.Generator) -> None:
    units, w, gram = problem(rng)
    order = torch.randperm(12, generator=rng)
    group_of = torch.arange(12) // 4
    seen = curvature(gram, 64, shrink=False)
    plain = refit([units], w, torch.full((5, 3), 0.33), group_of, seen, FP32)
    turned = refit(
        [units[order]], w[order], torch.full((5, 3), 0.33), group_of[order], seen.ordered(order), FP32
    )
    torch.testing.assert_close(plain, turned, rtol=1e-4, atol=1e-6)


def test_coarse_scales_are_taken_only_where_the_loss_falls(rng: torch.Generator) -> None:
    units, w, gram = problem(rng)
    group_of = torch.arange(12) // 4
    seen = curvature(gram, 64, shrink=False)
    before = torch.full((5, 3), 0.328125)

    class Coarse(Plain):
        def round(self, scale: torch.Tensor) -> torch.Tensor:
            return torch.exp2(torch.round(torch.log2(scale.abs()))).copysign(scale)

    after = refit([units], w, before, group_of, seen, Coarse(torch.float32))
    old = loss(units, w, before.T[group_of], gram)
    new = loss(units, w, after.T[group_of], gram)
    assert bool((new <= old * (1 + 1e-6)).all())
    kept = (after == before).all(1)
    assert bool(kept.any()) and bool((new[~kept] < old[~kept]).all())


def test_a_group_without_units_keeps_its_scale_and_signs_stay(rng: torch.Generator) -> None:
    units, w, gram = problem(rng)
    units[:4] = 0
    before = torch.tensor([[0.5, -0.33, 0.33]]).repeat(5, 1)
    after = refit([units], w, before, torch.arange(12) // 4, curvature(gram, 64, shrink=False), FP32)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert bool((after * before > 0).all())
