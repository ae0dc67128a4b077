"""Descent on the lattice grids from states that feedback would not leave behind."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics import cholesky
from quantkit.numerics.curvature import Curvature, curvature
from quantkit.numerics.lattices import KINDS, LatticeKind, order
from quantkit.numerics.lattices.codebook import codebook
from quantkit.numerics.lattices.feedback import round_with_feedback
from quantkit.numerics.lattices.polish import polish
from quantkit.numerics.lattices.state import Places, State
from quantkit.tensors import dequantize
from tests.unit.numerics.lattices.tables import table_of

ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
WIDTH, TOKENS = 512, 1024


def seen(kind: LatticeKind) -> Curvature:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, 64, generator=rng) @ torch.randn(64, WIDTH, generator=rng)
    x += torch.randn(TOKENS, WIDTH, generator=rng)
    plain = curvature(x.T @ x, TOKENS, shrink=False)
    return plain.ordered(order(kind, plain.diagonal))


def started(kind: LatticeKind, found: Curvature) -> tuple[State, torch.Tensor]:
    """What feedback leaves, and the weights (in, 6) in processing order."""
    w = 0.02 * torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(3))
    book = codebook(table_of(kind), kind.neighbours)
    factor = cholesky.factor(found, 0.01)
    return round_with_feedback(book, w, factor, Places(kind, found.order), torch.ones(WIDTH)), w


def loss(state: State, w_in: torch.Tensor, found: Curvature) -> float:
    error = torch.cat([state.values(block) for block in range(WIDTH // 256)]) - w_in
    return float((error * (found.rows(0, WIDTH) @ error)).sum())


@ALL
def test_from_scales_far_off_it_ends_below_what_good_ones_leave_after_feedback(kind: LatticeKind) -> None:
    found = seen(kind)
    state, w = started(kind, found)
    fed = loss(state, w, found)
    state.d_bn.mul_(1.3)
    state.sub_bsn[:, ::2] = (state.sub_bsn[:, ::2] - 2).clamp(min=0)
    assert loss(state, w, found) > 2 * fed
    polish(codebook(table_of(kind), kind.neighbours), state, w, found, 2, torch.ones(WIDTH))
    assert loss(state, w, found) < fed


@ALL
def test_what_is_kept_adds_up_to_what_is_stored(kind: LatticeKind) -> None:
    found = seen(kind)
    state, w = started(kind, found)
    polish(codebook(table_of(kind), kind.neighbours), state, w, found, 2, torch.ones(WIDTH))
    values = torch.cat([state.values(block) for block in range(WIDTH // 256)])
    torch.testing.assert_close(
        dequantize(state.lattice(table_of(kind)))[:, found.order].T, values, rtol=1e-5, atol=1e-8
    )
