from __future__ import annotations

import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.numerics.rescale import balanced, finite, known, spaced


def logs(*factors: float) -> torch.Tensor:
    return torch.tensor(factors, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("factors", "live", "ties", "expected"),
    [
        ([8.0, 2.0], [1, 1], None, [2.0, 0.5]),
        ([8.0, 2.0, 9.0], [1, 1, 0], None, [2.0, 0.5, 1.0]),
        ([5.0, 7.0], [0, 0], None, [1.0, 1.0]),
        ([16.0, 1.0, 2.0, 8.0], [1, 1, 1, 1], [0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0]),
        ([16.0, 4.0, 1.0, 1.0], [1, 1, 1, 1], [5, 5, 2, 2], [8**0.5, 8**0.5, 8**-0.5, 8**-0.5]),
        ([4.0, 1.0, 9.0, 1.0], [1, 1, 0, 1], [0, 1, 0, 1], [2.0, 0.5, 2.0, 0.5]),
        ([4.0, 9.0, 9.0], [1, 0, 0], [0, 1, 1], [1.0, 1.0, 1.0]),
        ([2.0**40, 2.0**-40], [1, 1], None, [256.0, 1 / 256]),
    ],
)
def test_worked_factors(
    factors: list[float], live: list[int], ties: list[int] | None, expected: list[float]
) -> None:
    of = None if ties is None else torch.tensor(ties)
    found = balanced(logs(*factors), torch.tensor(live) == 1, of)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_is_not_live_may_be_anything() -> None:
    wanted = torch.tensor([torch.inf, torch.nan, 1.0, -1.0], dtype=torch.float64)
    found = balanced(wanted, torch.tensor([False, False, True, True]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, -1.0]).exp())


def test_factors_are_held_within_a_bound() -> None:
    found = balanced(logs(1e-9, 1.0, 1.0, 1e9), torch.ones(4, dtype=torch.bool), largest=4.0)
    torch.testing.assert_close(found, torch.tensor([0.25, 1.0, 1.0, 4.0]))


def test_ties_are_equal_to_the_bit(rng: torch.Generator) -> None:
    ties = torch.randint(0, 7, (64,), generator=rng)
    found = balanced(torch.randn(64, generator=rng).double(), torch.ones(64, dtype=torch.bool), ties)
    assert all(len(set(found[ties == tie].tolist())) == 1 for tie in range(7))


@pytest.mark.parametrize(
    ("out", "rows", "expected"), [(5, 8, [0, 1, 2, 3, 4]), (8, 4, [0, 2, 4, 6]), (7, 3, [0, 2, 4])]
)
def test_rows_are_spread_over_the_weight(out: int, rows: int, expected: list[int]) -> None:
    weight = torch.arange(out).float()[:, None].expand(out, 3)
    assert spaced(weight, rows)[:, 0].tolist() == expected


def test_what_is_missing_or_broken_is_said() -> None:
    with pytest.raises(NumericsError, match="awq needs summed magnitudes of the inputs, and there are none"):
        known(None, "summed magnitudes", "awq")
    with pytest.raises(NumericsError, match="the summed magnitudes of the inputs hold non-finite values"):
        known(torch.tensor([1.0, torch.inf]), "summed magnitudes", "awq")
    with pytest.raises(NumericsError, match="the weights hold non-finite values"):
        finite(torch.tensor([torch.nan]), "the weights")
