"""Block feedback and coordinate descent on the lattice grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import cholesky
from quantkit.numerics.curvature import curvature
from quantkit.numerics.lattices import KINDS, LatticeKind, nearest, order, solve
from quantkit.numerics.solve import Seen
from quantkit.tensors import Lattice, dequantize
from tests.unit.numerics.lattices.tables import table_of

ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
WIDTH, TOKENS = 512, 1024


def inputs() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(TOKENS, 32, generator=rng) @ torch.randn(32, WIDTH, generator=rng)
    return (low + torch.randn(TOKENS, WIDTH, generator=rng)) * torch.randn(WIDTH, generator=rng).exp()


def weights(rows: int) -> Tensor:
    return 0.02 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def seen_of(kind: LatticeKind, gram: Tensor) -> Seen:
    plain = curvature(gram, TOKENS, shrink=False)
    ordered = plain.ordered(order(kind, plain.diagonal))
    return Seen(ordered, cholesky.factor(ordered, 0.01), gram.diagonal() / TOKENS, None)


def loss(q: Lattice, w: Tensor, gram: Tensor) -> Tensor:
    delta = (dequantize(q) - w).double()
    return torch.einsum("oi,ij,oj->o", delta, gram.double(), delta)


@ALL
def test_each_stage_lowers_the_loss(kind: LatticeKind) -> None:
    x = inputs()
    gram, w, table = x.T @ x, weights(12), table_of(kind)
    seen = seen_of(kind, gram)
    plain = loss(nearest(kind, table, w, seen.importance), w, gram)
    fed, polished = (loss(q, w, gram) for q in solve(kind, table, w, seen, 1))
    assert float(fed.sum()) < 0.7 * float(plain.sum())
    assert bool((polished <= fed * (1 + 1e-4)).all())
    assert float(polished.sum()) < 0.95 * float(fed.sum())


@ALL
def test_what_is_stored_is_on_the_grid(kind: LatticeKind) -> None:
    x = inputs()
    table = table_of(kind)
    *_, q = solve(kind, table, weights(4), seen_of(kind, x.T @ x), 1)
    like = nearest(kind, table, weights(4), None)
    assert q.codes.dtype == like.codes.dtype
    assert q.codes.shape == like.codes.shape
    assert 0 <= int(q.codes.min()) <= int(q.codes.max()) < 2**kind.bits
    if kind.signs == "parity":
        assert q.signs is not None
        assert bool(((q.signs < 0).view(-1, 8).sum(1) % 2 == 0).all())
    if like.shift is not None:
        assert q.shift is not None
        assert q.shift.shape == like.shift.shape
        assert bool((q.shift.abs() == 0.25).all())


@ALL
def test_without_sweeps_there_is_one_stage(kind: LatticeKind) -> None:
    x = inputs()
    assert len(list(solve(kind, table_of(kind), weights(2), seen_of(kind, x.T @ x), 0))) == 1


@ALL
def test_inputs_that_do_not_correlate_leave_nothing_to_feed_back(kind: LatticeKind) -> None:
    """With the identity as gram feedback is rounding to nearest; codes are of the nearest candidates."""
    gram, w, table = torch.eye(WIDTH) * TOKENS, weights(6), table_of(kind)
    plain = loss(nearest(kind, table, w, None), w, gram)
    fed = loss(next(solve(kind, table, w, seen_of(kind, gram), 0)), w, gram)
    torch.testing.assert_close(fed, plain, rtol=0.03, atol=0.0)


@ALL
def test_rows_are_independent_and_runs_agree(kind: LatticeKind) -> None:
    x = inputs()
    seen, w, table = seen_of(kind, x.T @ x), weights(6), table_of(kind)
    *_, whole = solve(kind, table, w, seen, 1)
    *_, again = solve(kind, table, w, seen, 1)
    *_, some = solve(kind, table, w[2:5], seen, 1)
    assert torch.equal(dequantize(whole), dequantize(again))
    assert torch.equal(dequantize(whole)[2:5], dequantize(some))


@ALL
def test_zero_rows_stay_zero(kind: LatticeKind) -> None:
    x = inputs()
    w = weights(3)
    w[1] = 0.0
    for q in solve(kind, table_of(kind), w, seen_of(kind, x.T @ x), 1):
        assert float(dequantize(q)[1].abs().max()) == 0.0


def test_a_dead_input_is_rounded_by_itself() -> None:
    kind, x = KINDS["iq2_xs"], inputs()
    x[:, 5] = 0.0
    w = weights(3)
    *_, q = solve(kind, table_of(kind), w, seen_of(kind, x.T @ x), 1)
    assert float((dequantize(q)[:, 5] - w[:, 5]).abs().max()) < 0.05


def test_without_a_factor_there_is_nothing_to_solve_with() -> None:
    kind, x = KINDS["iq2_xs"], inputs()
    found = seen_of(kind, x.T @ x)
    with pytest.raises(ValueError, match="no factor"):
        next(solve(kind, table_of(kind), weights(1), Seen(found.curvature, None, found.importance, None), 1))
