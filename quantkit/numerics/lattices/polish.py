"""Descent on the lattice grids: points and sub-scale of a sub-block, then sub-scales, then d, all else fixed.

E = Ŵ − W, M = A·E. The target of columns B is ŵ_B − A_BB⁻¹·m_B under the metric A_BB, and they are rounded
to it with feedback among them: those of a sub-block, at first those of a super-block, on several scales.
A factor that scales points u moves by −uᵀm / uᵀA u, rounded to what can be stored. A change is taken where
2·δᵀm + δᵀA δ < 0, so tr(E·A·Eᵀ) never grows. Shape suffixes: i inputs in processing order, n rows, u columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numerics.curvature import Curvature
from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.feedback import Aim, fed, searched
from quantkit.numerics.lattices.kinds import COLUMNS, LARGEST
from quantkit.numerics.lattices.state import Factors, State
from quantkit.numerics.lattices.units import Chosen

# of its mean diagonal, added to the metric that proposes; what is accepted is judged without
_DAMP = 1e-2
# d tried when a super-block is rounded anew, of what the search finds; those beside it are worth 2 % (IQ2_XS)
# or 1 % (IQ3_S) of the loss
_RATIOS = (1.0, 0.94, 1.06)


def polish(book: Codebook, state: State, w_in: Tensor, curvature: Curvature, sweeps: int, v: Tensor) -> None:
    """Improve `state` in place by `sweeps` passes.

    w_in (in, n) fp32 original weights in processing order, v (in,) weights to search scales with, as the file
    has them.
    """
    starts = range(0, w_in.shape[0], COLUMNS)
    error_in = torch.cat([state.values(start // COLUMNS) for start in starts]) - w_in
    m_in = torch.empty_like(w_in)
    for start in starts:
        torch.matmul(curvature.rows(start, start + COLUMNS), error_in, out=m_in[start : start + COLUMNS])
    # always so many: stopping early would make a row depend on those it is stacked with
    for sweep in range(sweeps):
        for start in starts:
            coupling, block = curvature.rows(start, start + COLUMNS), start // COLUMNS
            before = state.values(block)
            m = m_in[start : start + COLUMNS].clone()
            metric = coupling[:, start : start + COLUMNS].contiguous()
            if sweep == 0:
                _anew(book, state, block, m, metric, v)
            _parts(book, state, block, m, metric, 1 - 2 * (sweep % 2))
            _sub_scales(state, block, m, metric)
            _scale(state, block, m, metric)
            m_in.addmm_(coupling.T, state.values(block) - before)


def _anew(book: Codebook, state: State, block: int, m: Tensor, metric: Tensor, v: Tensor) -> None:
    """Rounds a super-block anew, on scales searched for what it should be now and on some d around.

    3 to 4 % less loss after the last sweep; once more in the second sweep would be worth another 1 %.
    """
    every = torch.arange(COLUMNS, device=m.device)
    wanted = _wanted(state, block, every, m, metric)
    found = searched(book, state.places, block, wanted.aim_un, v)
    trials = [found.stretched(ratio) for ratio in _RATIOS]
    _try(book, state, wanted, trials, m, metric)


def _parts(book: Codebook, state: State, block: int, m: Tensor, metric: Tensor, by: int) -> None:
    """Rounds each sub-block anew: on its sub-scale, on that so far off, with the other shift if it has one.

    3 % less loss (IQ2_XS; 1 % IQ3_S) than points and sub-scales in turn, each with the other fixed. To try
    both sides at once takes half as long again for less than another 1 %.
    """
    kind, subs = state.places.kind, state.places.subs(block)
    for sub in range(kind.subs):
        at = (subs == sub).nonzero().squeeze(1)
        now = state.factors(block)
        trials = [now, _stepped(now, sub, by, kind.top)]
        if now.shift_cn is not None:
            trials.append(replace(now, shift_cn=-now.shift_cn))
        _try(book, state, _wanted(state, block, at, m, metric), trials, m, metric)


def _stepped(factors: Factors, sub: int, by: int, top: int) -> Factors:
    """With one sub-scale larger by so much."""
    sub_sn = factors.sub_sn.clone()
    sub_sn[sub] = (sub_sn[sub] + by).clamp(0, top)
    return replace(factors, sub_sn=sub_sn)


def _wanted(state: State, block: int, at: Tensor, m: Tensor, metric: Tensor) -> Aim:
    """What is best for columns `at` of a super-block, all else fixed."""
    upper = _upper(metric[at][:, at])
    pull = torch.cholesky_solve(m[at].flip(0), upper.flip((0, 1))).flip(0)
    return Aim(block, at, state.values(block)[at] - pull, upper)


def _try(
    book: Codebook, state: State, wanted: Aim, trials: Sequence[Factors], m: Tensor, metric: Tensor
) -> None:
    """Round towards what is wanted with each of some factors; keep the one of least loss, and m current.

    Columns outside `wanted` stay as they are: trials share their factors, or there are no such columns.
    """
    block, at, places = wanted.block, wanted.at, state.places
    rows = wanted.aim_un.shape[1]
    factors = Factors.beside([state.factors(block), *trials])
    many = replace(wanted, aim_un=wanted.aim_un.repeat(1, len(trials)))
    found = Chosen.below(state.chosen(block, at), fed(book, places, many, Factors.beside(trials)))
    values = found.value_nu.T * factors.steps()[places.subs(block)[at]]
    change = values - values[:, :rows].repeat(1, len(trials) + 1)
    gain = _gain(change, m[at].repeat(1, len(trials) + 1), metric[at][:, at])
    best = gain.view(-1, rows).argmin(0) * rows + torch.arange(rows, device=m.device)
    state.put(block, at, factors.rows(best), found.rows(best))
    m.addmm_(metric[:, at], change[:, best])


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
    wanted = torch.where(fitted > 0, fitted, old.float()).clamp(max=LARGEST).to(torch.float16)
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
