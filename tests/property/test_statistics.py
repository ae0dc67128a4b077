"""`Statistics` is a commutative monoid. Integer data keep every sum exact, so equal means equal bits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.statistics import Need, Statistics, update, zero

WIDTH = 3
NEEDS = st.sampled_from([Need.GRAM, Need.SQUARES, Need.ABSMAX | Need.ABSSUM, Need.SAMPLE, Need(31)])
ROW = st.lists(st.integers(-8, 8), min_size=WIDTH, max_size=WIDTH)
ROWS = st.lists(ROW, max_size=12)
FEW = settings(max_examples=40, deadline=None)


def made(rows: list[list[int]], need: Need) -> Statistics:
    x = torch.tensor(rows, dtype=torch.float32).reshape(-1, WIDTH)
    return update(zero(WIDTH, need, x.device), x)


def equal(a: Statistics, b: Statistics) -> bool:
    if a.tokens != b.tokens:
        return False
    pairs = [(getattr(a, f), getattr(b, f)) for f in ("squares", "absmax", "abssum", "gram", "sample")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@FEW
@given(ROWS, NEEDS)
def test_zero_is_neutral(rows: list[list[int]], need: Need) -> None:
    neutral = zero(WIDTH, need, torch.device("cpu"))
    assert equal(made(rows, need) + neutral, made(rows, need))
    assert equal(neutral + made(rows, need), made(rows, need))


@FEW
@given(ROWS, ROWS, NEEDS)
def test_order_does_not_matter(a: list[list[int]], b: list[list[int]], need: Need) -> None:
    assert equal(made(a, need) + made(b, need), made(b, need) + made(a, need))


@FEW
@given(ROWS, ROWS, ROWS, NEEDS)
def test_grouping_does_not_matter(
    a: list[list[int]], b: list[list[int]], c: list[list[int]], need: Need
) -> None:
    x, y, z = made(a, need), made(b, need), made(c, need)
    assert equal((x + y) + z, x + (y + z))


@FEW
@given(ROWS, ROWS, NEEDS)
def test_merging_is_seeing_everything(a: list[list[int]], b: list[list[int]], need: Need) -> None:
    assert equal(made(a, need) + made(b, need), made(a + b, need))


@FEW
@given(ROWS.flatmap(st.permutations), st.integers(1, 5), NEEDS)
def test_neither_order_nor_sharding_shows(rows: list[list[int]], size: int, need: Need) -> None:
    total = zero(WIDTH, need, torch.device("cpu"))
    for start in range(0, len(rows), size):
        total = total + made(rows[start : start + size], need)
    assert equal(total, made(sorted(rows), need))
