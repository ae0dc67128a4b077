"""`Statistics` is a commutative monoid. Integer data keep every sum exact, so equal means equal bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.statistics import Need, Statistics, update, zero

WIDTH = 3
NEEDS = st.sampled_from([Need.GRAM, Need.SQUARES, Need.ABSMAX | Need.ABSSUM, Need.SAMPLE, Need(63)])
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


POWERS = st.lists(st.sampled_from([0.125, 0.5, 1.0, 2.0, 16.0]), min_size=WIDTH, max_size=WIDTH)


def in_order(sample: torch.Tensor | None) -> list[list[float]] | None:
    return None if sample is None else sorted(sample.tolist())


@FEW
@given(ROWS, POWERS, NEEDS)
def test_dividing_afterwards_is_seeing_divided_inputs(
    rows: list[list[int]], powers: list[float], need: Need
) -> None:
    """Powers of two divide without rounding; the sample, which keeps its order, is compared as a set."""
    factors = torch.tensor(powers)
    before, x = made(rows, need), torch.tensor(rows, dtype=torch.float32).reshape(-1, WIDTH)
    divided = update(zero(WIDTH, need, x.device), x / factors)
    found = made(rows, need)
    through = found.through(factors)
    assert equal(replace(through, sample=None), replace(divided, sample=None))
    assert in_order(through.sample) == in_order(divided.sample)
    assert equal(found, before), "the original is for other targets"


@FEW
@given(ROWS, POWERS, POWERS)
def test_divisions_compose_and_ones_change_nothing(
    rows: list[list[int]], first: list[float], second: list[float]
) -> None:
    a, b, stats = torch.tensor(first), torch.tensor(second), made(rows, Need(31))
    assert equal(stats.through(a).through(b), stats.through(a * b))
    assert equal(stats.through(torch.ones(WIDTH)), stats)


def test_a_wide_gram_stays_symmetric_and_shares_nothing(rng: torch.Generator) -> None:
    """It is divided some rows at a time; the factors are no powers of two here."""
    x, factors = torch.randn(40, 600, generator=rng), torch.rand(600, generator=rng) + 0.1
    gram = x.T @ x
    gram = (gram + gram.T) / 2
    kept = gram.clone()
    found = Statistics(40, gram=gram).through(factors).gram
    assert found is not None and found.data_ptr() != gram.data_ptr()
    assert torch.equal(gram, kept) and torch.equal(found, found.T)
    expected = (x.double() / factors.double()).T @ (x.double() / factors.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_importance_follows(rng: torch.Generator) -> None:
    x, factors = torch.randn(40, WIDTH, generator=rng), torch.tensor([2.0, 0.5, 4.0])
    for need in (Need.GRAM, Need.SQUARES):
        stats = update(zero(WIDTH, need, x.device), x)
        torch.testing.assert_close(stats.through(factors).importance(), stats.importance() / factors.square())
