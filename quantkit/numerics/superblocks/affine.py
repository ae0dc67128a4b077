"""Scales and minima of super-blocks, from the sums of trial codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.superblocks import trials
from quantkit.numerics.superblocks.grids import Scales, half, inverse
from quantkit.numerics.superblocks.trials import TINY, Chunk, best_of, least

# Two codes that tell nothing apart have no scale; rounding must not make one up.
_SINGULAR = 1e-6


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is tried.

    grids   trial grids (factor, shift): the range of the weights is `high · factor` steps wide, and its lower
            end lies at code `shift`
    starts  first (d, dmin), as factors of those by which the largest scale and minimum get the last integer
    rounds  of d and dmin for the integers, then integers for d and dmin
    """

    grids: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    rounds: int = 1


def fit(chunk: Chunk, plan: Plan) -> Scales:
    """Scales and minima that minimise Σ v·(x − y)²."""
    low, high = chunk.x_sgn.amin(1), chunk.x_sgn.amax(1)
    if chunk.block.scales is not None:
        low.clamp_(max=0)
    centre = (low + high) / 2
    # sums of centred weights keep their digits where all weights are much alike
    chunk.x_sgn.sub_(centre[:, None])
    reach = chunk.block.high * inverse(high - low)
    middle = (centre - low) * reach
    pool = _Pool(chunk, centre, [(reach * f, middle * f + shift) for f, shift in plan.grids])
    return _plain(pool) if chunk.block.scales is None else _nested(pool, chunk.block.scales[1], plan)


class _Pool:
    """Trial codes of every sub-block as quadratic forms in the scale s and the offset o:

        error over that of the best trial = energy · (s − scale)² + total · (o − mean + s · slope)² + loss
    with total = Σ v, mean = Σ v·x / total, slope = Σ v·q / total; energy, scale: of q − slope and x − mean.
    """

    def __init__(self, chunk: Chunk, centre: Tensor, grids: list[tuple[Tensor, Tensor]]) -> None:
        s0, s1, s2 = trials.affine(chunk, grids)
        room = self._room = chunk.room
        self.total = chunk.v_sgn.sum(1).expand_as(centre)
        weighted = torch.mul(chunk.x_sgn, chunk.v_sgn, out=room.like("weighted", chunk.x_sgn))
        mean = weighted.sum(1).div_(self.total)
        self.mean = mean + centre
        self.slope = torch.div(s0, self.total, out=room.like("slope", s0))
        self.energy = torch.mul(s2, 1 + _SINGULAR, out=room.like("variance", s0))
        self.energy.addcmul_(s0, self.slope, value=-1).clamp_(min=TINY)
        s1.addcmul_(s0, mean, value=-1)
        self.scale = torch.div(s1, self.energy, out=room.like("scale", s0))
        gain = s1.mul_(self.scale)
        self.loss = torch.sub(gain.amax(0), gain, out=gain)
        # An offset above zero cannot be had; the best scale with none is another.
        beyond = torch.mul(self.scale, self.slope, out=room.like("target", s0)).neg_().add_(self.mean)
        self.target = beyond.clamp_(min=0).mul_(s0).div_(s2.clamp_(min=TINY)).add_(self.scale)

    def best(self) -> Tensor:
        """(1, s, n) trials that are best when any scale and offset can be had."""
        return least(self._room.like("plain", self.loss).copy_(self.loss))

    def errors(self, d: Tensor, dmin: Tensor, top: int) -> Tensor:
        """(k, s, n) when scale and minimum are d and dmin (n,) times integers; gone with the next call."""
        e = torch.mul(self.target, inverse(d), out=self._room.like("plain", self.scale))
        e.round_().clamp_(0, top).mul_(d)
        h = torch.mul(e, self.slope, out=self._room.like("energy", e)).sub_(self.mean)
        m = torch.mul(h, inverse(dmin), out=self._room.like("error", e)).round_().clamp_(0, top).mul_(dmin)
        h.sub_(m).square_().mul_(self.total)
        return e.sub_(self.scale).square_().mul_(self.energy).add_(self.loss).add_(h)

    def form(self, k: Tensor) -> _Form:
        """The quadratic forms of trials k (1, s, n)."""
        energy, scale, slope, target, loss = (
            t.gather(0, k)[0] for t in (self.energy, self.scale, self.slope, self.target, self.loss)
        )
        return _Form(energy, scale, slope, target, loss, self.total, self.mean)


@dataclass(frozen=True, slots=True)
class _Form:
    """One trial of every sub-block, all (s, n); see `_Pool`."""

    energy: Tensor
    scale: Tensor
    slope: Tensor
    target: Tensor
    loss: Tensor
    total: Tensor
    mean: Tensor

    def integers(self, d: Tensor, dmin: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """(error, sub-scales, sub-minima), each (s, n): of the integers on either side of the best scale the
        better, each with the minimum that is best beside it."""
        below = (self.target * inverse(d)).floor_()
        found = []
        for sub in (below.clamp(0, top), (below + 1).clamp_(0, top)):
            e = sub * d
            h = (e * self.slope).sub_(self.mean)
            minimum = (h * inverse(dmin)).round_().clamp_(0, top)
            error = (h - minimum * dmin).square_().mul_(self.total)
            found.append((error.add_((e - self.scale).square_().mul_(self.energy)), sub, minimum))
        error, sub, minimum = best_of(found)
        return error + self.loss, sub, minimum

    def refit(self, sub: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """d and dmin (n,) by least squares over the super-block, as float16 keeps them."""
        lean = sub * self.slope
        weighted, counted = sub * self.energy, minimum * self.total
        a = (weighted * sub + self.total * lean * lean).sum(0)
        b = -(counted * lean).sum(0)
        c = (counted * minimum).sum(0)
        p = (weighted * self.scale + self.total * lean * self.mean).sum(0)
        q = -(counted * self.mean).sum(0)
        det = a * c - b * b
        sound = det > _SINGULAR * a * c
        d = torch.where(sound, (c * p - b * q) / det, p / a.clamp(min=TINY))
        alone = torch.where(a > 0, torch.zeros_like(a), q / c.clamp(min=TINY))
        dmin = torch.where(sound, (a * q - b * p) / det, alone)
        return _kept(d), _kept(dmin)


def _kept(d: Tensor) -> Tensor:
    return half(d.clamp(min=0)).to(torch.float32)


def _plain(pool: _Pool) -> Scales:
    d = half(pool.scale)
    s = d.to(torch.float32)
    best = pool.mean - s * pool.slope
    m = half(best)
    error = (m.to(torch.float32) - best).square_().mul_(pool.total)
    error.add_((s - pool.scale).square_().mul_(pool.energy)).add_(pool.loss)
    k = least(error)
    return Scales(d.gather(0, k).view(-1), dmin=m.gather(0, k).view(-1))


def _nested(pool: _Pool, top: int, plan: Plan) -> Scales:
    own = pool.form(pool.best())
    full = own.target.amax(0) / top
    full_min = (own.target * own.slope - own.mean).amax(0) / top
    starts = [(_kept(full * a), _kept(full_min * b)) for a, b in plan.starts]
    _, d, dmin = best_of([(pool.errors(d, dmin, top).amin(0).sum(0), d, dmin) for d, dmin in starts])
    found = []
    for left in range(plan.rounds, -1, -1):
        form = pool.form(least(pool.errors(d, dmin, top)))
        error, sub, minimum = form.integers(d, dmin, top)
        found.append((error.sum(0), d.expand_as(sub), dmin.expand_as(sub), sub, minimum))
        if left:
            d, dmin = form.refit(sub, minimum)
    _, d, dmin, sub, minimum = best_of(found)
    return Scales(half(d[0]), _integers(sub), half(dmin[0]), _integers(minimum))


def _integers(sub_sn: Tensor) -> Tensor:
    return sub_sn.to(torch.uint8).T.contiguous()
