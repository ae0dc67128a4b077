"""Scales of super-blocks without minima, from the sums of trial codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.superblocks import trials
from quantkit.numerics.superblocks.grids import Scales, half, inverse
from quantkit.numerics.superblocks.trials import TINY, Chunk, best_of, least


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is tried.

    factors  trial scales: the lowest point falls on the largest weight over this, with a negative one on the
             other side of zero
    starts   first d, as factors of the one by which the largest scale gets the lowest sub-scale
    rounds   of d for the sub-scales, then sub-scales for d
    """

    factors: tuple[float, ...]
    starts: tuple[float, ...] = (1.0,)
    rounds: int = 1


def fit(chunk: Chunk, plan: Plan) -> Scales:
    """Scales that minimise Σ v·(x − y)²."""
    low, high = chunk.x_sgn.amin(1), chunk.x_sgn.amax(1)
    largest = torch.where(high > -low, high, low)
    reach = chunk.block.low * inverse(largest)
    pool = _Pool(chunk, *trials.symmetric(chunk, [reach * f for f in plan.factors]))
    return _plain(pool) if chunk.block.scales is None else _nested(pool, chunk.block.scales, plan)


class _Pool:
    """Trial codes of every sub-block as parabolas in the scale s:

        error over that of the best trial = energy · (s − scale)² + loss
    with energy = Σ v·q², scale = Σ v·q·x / energy.
    """

    def __init__(self, chunk: Chunk, cross: Tensor, energy: Tensor) -> None:
        self._room = chunk.room
        self.energy = energy.clamp_(min=TINY)
        self.scale = torch.div(cross, energy, out=self._room.like("scale", cross))
        gain = cross.mul_(self.scale)
        self.loss = torch.sub(gain.amax(0), gain, out=cross)

    def best(self) -> Tensor:
        """(1, s, n) trials that are best when any scale can be had."""
        return least(self._room.like("error", self.loss).copy_(self.loss))

    def errors(self, d: Tensor, limits: tuple[int, int]) -> Tensor:
        """(k, s, n) when the scale is d (n,) times the nearest integer; gone with the next call."""
        s = torch.mul(self.scale, inverse(d), out=self._room.like("error", self.scale))
        s.round_().clamp_(*limits).mul_(d)
        return s.sub_(self.scale).square_().mul_(self.energy).add_(self.loss)


def _plain(pool: _Pool) -> Scales:
    d = half(pool.scale)
    error = (d.to(torch.float32) - pool.scale).square_().mul_(pool.energy).add_(pool.loss)
    return Scales(d.gather(0, least(error)).view(-1))


def _nested(pool: _Pool, limits: tuple[int, int], plan: Plan) -> Scales:
    own = pool.scale.gather(0, pool.best())[0]
    top, bottom = own.amax(0), own.amin(0)
    full = torch.where(top > -bottom, top, bottom) / limits[0]
    starts = [half(full * factor).to(torch.float32) for factor in plan.starts]
    d = best_of([(pool.errors(d, limits).amin(0).sum(0), d) for d in starts])[1]
    found = []
    for left in range(plan.rounds, -1, -1):
        error = pool.errors(d, limits)
        total = error.amin(0).sum(0)
        k = least(error)
        scale, energy = pool.scale.gather(0, k)[0], pool.energy.gather(0, k)[0]
        sub = (scale * inverse(d)).round_().clamp_(*limits)
        found.append((total, d.expand_as(sub), sub))
        if left:
            weighted = sub * energy
            d = half((weighted * scale).sum(0) / (weighted * sub).sum(0).clamp_(min=TINY)).to(torch.float32)
    _, best_d, sub = best_of(found)
    return Scales(half(best_d[0]), sub.to(torch.int8).T.contiguous())
