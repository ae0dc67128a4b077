"""The nearest row of a table."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.lattices import KINDS
from quantkit.numerics.lattices.codebook import codebook, nearest_rows
from tests.unit.numerics.lattices.tables import table_of

TOY = torch.tensor([[1.0, 1.0], [1.0, 3.0], [3.0, 3.0], [5.0, 1.0]])


def test_cells_are_numbers_with_the_levels_as_digits() -> None:
    book = codebook(TOY, 4)
    assert book.levels == (1.0, 3.0, 5.0)
    # 1.9 → 1 (digit 0), 2.1 → 3 (digit 1), 9 → 5 (digit 2), −4 → 1
    assert book.cells(torch.tensor([[1.9, 2.1], [9.0, -4.0], [2.1, 4.1]])).tolist() == [1, 6, 5]


def test_neighbours_come_by_distance() -> None:
    # (3, 1): row 3 (5, 1) and row 0 (1, 1) and row 2 (3, 3) are 2 away, row 1 (1, 3) is √8 away
    found = codebook(TOY, 4).neighbours[3].tolist()
    assert sorted(found[:3]) == [0, 2, 3]
    assert found[3] == 1


def test_nearest_row_by_weight() -> None:
    y = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    w = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    error, row = nearest_rows(codebook(TOY, 4), y, w)
    # first: rows 0 and 3 err 1·4; second: row 2 errs 1·4
    assert int(row[0]) in (0, 3)
    assert int(row[1]) == 2
    torch.testing.assert_close(error, torch.tensor([4.0, 4.0]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", KINDS)
def test_nearest_row_is_that_of_exhaustive_search(name: str) -> None:
    table = table_of(KINDS[name])
    rng = torch.Generator().manual_seed(1)
    y = 8 * torch.rand(50, table.shape[1], generator=rng)
    w = torch.rand(50, table.shape[1], generator=rng) + 0.01
    error, row = nearest_rows(codebook(table, 16), y, w)
    every = (w[:, None] * (y[:, None] - table).square()).sum(2)
    torch.testing.assert_close(error, every.amin(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        every.gather(1, row[:, None].long()).squeeze(1), every.amin(1), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("shifts", [(0.0,), (0.25, -0.25)])
def test_errors_of_candidates_hold_at_every_step(shifts: tuple[float, ...]) -> None:
    book = codebook(TOY, 4)
    rng = torch.Generator().manual_seed(2)
    a, w = torch.rand(20, 2, generator=rng), torch.rand(20, 2, generator=rng)
    near = book.candidates(a, w, torch.full((20,), 0.2), shifts)
    for step in (0.1, 0.2, 0.37):
        found = near.errors(torch.full((20,), step)) + (w * a.square()).sum(1, keepdim=True)
        for number, shift in enumerate(shifts):
            every = (w[:, None] * (a[:, None] - step * (TOY + shift)).square()).sum(2)
            torch.testing.assert_close(found[:, number], every.amin(1), rtol=1e-4, atol=1e-5)


def test_a_step_of_zero_changes_nothing() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    near = codebook(TOY, 4).candidates(a, torch.ones(2, 2), torch.zeros(2), (0.0,))
    assert near.errors(torch.zeros(2)).flatten().tolist() == [0.0, 0.0]
