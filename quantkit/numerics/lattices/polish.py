"""Coordinate descent on the lattice grids: points of a unit, then sub-scales, then d, all else fixed.

E = Ŵ − W, M = A·E. A unit's target is ŵ_B − A_BB⁻¹·m_B under the metric A_BB; a factor that scales points u
moves by −uᵀm / uᵀA u, rounded to what can be stored. A change is taken where 2·δᵀm + δᵀA δ < 0, so
tr(E·A·Eᵀ) never grows. Shape suffixes: i inputs in processing order, n rows, u columns of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature
from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.kinds import COLUMNS
from quantkit.numerics.lattices.state import State

# of its mean diagonal, added to the metric that proposes; what is accepted is judged without
_DAMP = 1e-2


def polish(book: Codebook, state: State, w_in: Tensor, curvature: Curvature, sweeps: int) -> None:
    """Improve `state` in place by `sweeps` passes; w_in (in, n) fp32 original weights in processing order."""
    starts = range(0, w_in.shape[0], COLUMNS)
    error_in = torch.cat([state.values(start // COLUMNS) for start in starts]) - w_in
    m_in = torch.empty_like(w_in)
    for start in starts:
        torch.matmul(curvature.rows(start, start + COLUMNS), error_in, out=m_in[start : start + COLUMNS])
    # always so many: stopping early would make a row depend on those it is stacked with
    for _ in range(sweeps):
        for start in starts:
            coupling = curvature.rows(start, start + COLUMNS)
            before = state.values(start // COLUMNS)
            m = m_in[start : start + COLUMNS].clone()
            metric = coupling[:, start : start + COLUMNS].contiguous()
            _points(book, state, start, m, metric)
            _sub_scales(state, start // COLUMNS, m, metric)
            _scale(state, start // COLUMNS, m, metric)
            m_in.addmm_(coupling.T, state.values(start // COLUMNS) - before)


def _points(book: Codebook, state: State, start: int, m: Tensor, metric: Tensor) -> None:
    """One pass over the units of the super-block at column `start`; m (256, n) is kept current."""
    kind, block = state.places.kind, start // COLUMNS
    steps = state.wide(block, state.steps(block))
    for first in range(0, COLUMNS, kind.unit):
        unit = slice(first, first + kind.unit)
        own, step = metric[unit, unit], steps[first]
        upper = _upper(own)
        inverse = torch.cholesky_inverse(upper.flip((0, 1))).flip((0, 1))
        old = state.unit(start + first)
        value = old.value_nu.T * step
        aim = value - inverse @ m[unit]
        new = state.proposed(book, start + first, aim, upper, step)
        change = new.value_nu.T * step - value
        better = _gain(change, m[unit], own) < 0
        state.put(start + first, old.where(better, new))
        m.addmm_(metric[:, unit], change * better)


def _sub_scales(state: State, block: int, m: Tensor, metric: Tensor) -> None:
    subs, d = state.places.subs(block), state.d_bn[block].float()
    points = state.points_in[block * COLUMNS : (block + 1) * COLUMNS]
    for sub in range(state.places.kind.subs):
        at = (subs == sub).nonzero().squeeze(1)
        moved = points[at] * d
        old = state.sub_bsn[block, sub]
        wanted = (old + _factor(moved, m[at], metric[at][:, at])).round().clamp(0, state.places.kind.top)
        change = moved * (wanted - old)
        better = _gain(change, m[at], metric[at][:, at]) < 0
        state.sub_bsn[block, sub] = torch.where(better, wanted, old)
        m.addmm_(metric[:, at], change * better)


def _scale(state: State, block: int, m: Tensor, metric: Tensor) -> None:
    """m is not kept current: nothing of this super-block reads it any more."""
    points = state.points_in[block * COLUMNS : (block + 1) * COLUMNS]
    units = points * state.wide(block, state.sub_bsn[block] + 0.5)
    old = state.d_bn[block]
    fitted = (old.float() + _factor(units, m, metric)) * state.places.kind.gamma
    wanted = torch.where(fitted > 0, fitted, old.float()).clamp(max=65504.0).to(torch.float16)
    change = units * (wanted.float() - old.float())
    state.d_bn[block] = torch.where(_gain(change, m, metric) < 0, wanted, old)


def _upper(metric: Tensor) -> Tensor:
    """R, upper triangular, with R·Rᵀ the damped metric (u, u)."""
    damped = metric + _DAMP * metric.diagonal().mean() * torch.eye(len(metric), device=metric.device)
    lower: Tensor = torch.linalg.cholesky(damped.flip((0, 1)))
    return lower.flip((0, 1))


def _gain(change: Tensor, m: Tensor, metric: Tensor) -> Tensor:
    """(n,) by how much the loss grows with a change (u, n)."""
    gain: Tensor = (change * (2 * m + metric @ change)).sum(0)
    return gain


def _factor(units: Tensor, m: Tensor, metric: Tensor) -> Tensor:
    """(n,) how much of `units` (u, n) is best added."""
    curved = (units * (metric @ units)).sum(0)
    return torch.where(curved > 0, -(units * m).sum(0) / curved, 0.0)
