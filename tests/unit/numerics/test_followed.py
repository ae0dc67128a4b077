"""Factors told from rounding: worked numbers."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.followed import compare_matrices, follows, goes_along

W = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
BY = torch.tensor([2.0, 0.5])


def test_columns_that_follow_what_is_known() -> None:
    met = compare_matrices(W * BY, W, BY, by_row=False, by_column=True, exact=True)
    assert (met.error, met.odd) == (0.0, 0) and met.size == pytest.approx(30)
    assert met.columns is not None and met.columns.factors().tolist() == [1.0, 1.0]
    assert follows(met.columns, torch.ones(2)) and not follows(met.columns, BY)


def test_columns_that_do_not() -> None:
    met = compare_matrices(W, W, BY, by_row=False, by_column=True, exact=True)
    # columns of sizes 10 and 20, halved and doubled: 10/4 + 20 over 30
    assert met.error == pytest.approx((22.5 / 30) ** 0.5) and met.odd == 4
    assert met.columns is not None and met.columns.factors().tolist() == [0.5, 2.0]
    assert goes_along(met.columns, 1 / BY) and not follows(met.columns, torch.ones(2))


def test_rows_are_estimated_and_taken_off() -> None:
    met = compare_matrices(W * BY[:, None], W, None, by_row=True, by_column=True, exact=True)
    assert met.rows is not None and met.rows.factors().tolist() == [2.0, 0.5]
    assert met.rows.distance(BY) == 0.0 and met.without(0.0).error == 0.0 and met.odd == 0
    assert met.columns is not None and met.columns.factors().tolist() == [1.0, 1.0]


def test_nothing_is_told_of_what_rounded_away() -> None:
    met = compare_matrices(W * torch.tensor([1.0, 0.0]), W, None, by_row=False, by_column=True, exact=False)
    assert met.columns is not None and met.columns.factors().tolist() == [1.0, 1.0]
    assert follows(met.columns, torch.tensor([1.0, 7.0])), "the second column may have been anything"


def test_even_factors_have_no_slope() -> None:
    met = compare_matrices(W * 8, W, None, by_row=False, by_column=True, exact=False)
    assert met.columns is not None and not goes_along(met.columns, torch.full((2,), 8.0))
    assert not follows(met.columns, torch.ones(2)) and follows(met.columns, torch.full((2,), 8.0))


def test_rounding_alone_looks_like_no_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(64, 64, generator=generator)
    step = 0.9
    met = compare_matrices(
        (source / step).round() * step, source, None, by_row=True, by_column=True, exact=False
    )
    assert met.error > 0.2 and met.columns is not None and met.rows is not None
    assert follows(met.columns, torch.ones(64)) and follows(met.rows, torch.ones(64))
    assert not goes_along(met.columns, 1 / met.rows.factors())
