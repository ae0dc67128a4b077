"""Block feedback and coordinate descent on the lattice grids."""

from __future__ import annotations

from functools import cache

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


@cache
def gram_of_inputs() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(TOKENS, 32, generator=rng) @ torch.randn(32, WIDTH, generator=rng)
    x = (low + torch.randn(TOKENS, WIDTH, generator=rng)) * torch.randn(WIDTH, generator=rng).exp()
    x[:, 5] = 0.0
    return x.T @ x


def weights(rows: int) -> Tensor:
    return 0.02 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def seen_of(kind: LatticeKind, gram: Tensor) -> Seen:
    plain = curvature(gram, TOKENS, shrink=False)
    ordered = plain.ordered(order(kind, plain.diagonal))
    return Seen(ordered, cholesky.factor(ordered, 0.01), gram.diagonal() / TOKENS, None)


def loss(q: Lattice, w: Tensor, gram: Tensor) -> Tensor:
    delta = (dequantize(q) - w).double()
    return torch.einsum("oi,ij,oj->o", delta, gram.double(), delta)


@cache
def solved(kind: LatticeKind) -> tuple[Lattice, Lattice]:
    """Both stages of 8 rows, row 1 all zero; input 5 never seen."""
    fed, polished = solve(kind, table_of(kind), eight(), seen_of(kind, gram_of_inputs()), 1)
    return fed, polished


def eight() -> Tensor:
    w = weights(8)
    w[1] = 0.0
    return w


@ALL
def test_each_stage_lowers_the_loss(kind: LatticeKind) -> None:
    gram, w, table = gram_of_inputs(), eight(), table_of(kind)
    plain = loss(nearest(kind, table, w, gram.diagonal() / TOKENS), w, gram)
    fed, polished = (loss(q, w, gram) for q in solved(kind))
    assert float(fed.sum()) < 0.7 * float(plain.sum())
    assert bool((polished <= fed * (1 + 1e-4)).all())
    assert float(polished.sum()) < 0.95 * float(fed.sum())


@ALL
def test_what_is_stored_is_on_the_grid(kind: LatticeKind) -> None:
    q, like = solved(kind)[1], nearest(kind, table_of(kind), eight(), None)
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
def test_zero_rows_stay_zero_and_dead_inputs_are_rounded_by_themselves(kind: LatticeKind) -> None:
    for q in solved(kind):
        found = dequantize(q)
        assert float(found[1].abs().max()) == 0.0
        assert float((found[:, 5] - eight()[:, 5]).abs().max()) < 0.06


@ALL
def test_rows_are_independent_and_runs_agree(kind: LatticeKind) -> None:
    *_, some = solve(kind, table_of(kind), eight()[2:5], seen_of(kind, gram_of_inputs()), 1)
    assert torch.equal(dequantize(solved(kind)[1])[2:5], dequantize(some))


def test_without_sweeps_there_is_one_stage() -> None:
    kind = KINDS["iq2_s"]
    assert len(list(solve(kind, table_of(kind), weights(2), seen_of(kind, gram_of_inputs()), 0))) == 1


@ALL
def test_inputs_that_do_not_correlate_leave_nothing_to_feed_back(kind: LatticeKind) -> None:
    """With the identity as gram feedback is rounding to nearest; codes are of the nearest candidates."""
    gram, w, table = torch.eye(WIDTH) * TOKENS, weights(6), table_of(kind)
    plain = loss(nearest(kind, table, w, None), w, gram)
    fed = loss(next(solve(kind, table, w, seen_of(kind, gram), 0)), w, gram)
    torch.testing.assert_close(fed, plain, rtol=0.03, atol=0.0)


def test_without_a_factor_there_is_nothing_to_solve_with() -> None:
    kind = KINDS["iq2_xs"]
    found = seen_of(kind, gram_of_inputs())
    with pytest.raises(ValueError, match="no factor"):
        next(solve(kind, table_of(kind), weights(1), Seen(found.curvature, None, found.importance, None), 1))
