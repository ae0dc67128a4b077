"""d and sub-scales of super-blocks, searched on the true points of the table by weighted error.

Steps start where rounding to the levels alone, which is cheap, errs least. The rows of the table near the
weights at these steps then give the error at all steps not far away: several d are tried, two sub-scales for
each, then d is refitted by least squares and rounded to f16, and both are done once more from there.

Shape suffixes: n super-blocks, s sub-blocks, c codes of a super-block, l weights of a code, h shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.lattices.codebook import Candidates, Codebook, argmin, codebook
from quantkit.numerics.lattices.kinds import LARGEST, PARITY, SHIFT, LatticeKind

# first guesses of a step: the largest magnitude of a sub-block falls on so much of the largest level
_GUESSES = (0.6, 0.75, 0.9, 1.1, 1.3, 1.6, 1.9, 2.3)
# steps tried around the first guess, and d around that which just reaches the largest step
_AROUND = (1.0, 0.8, 0.9, 1.1, 1.22)
_STARTS = (1.0, 0.85, 0.92, 1.08, 1.17, 1.27)
# super-blocks solved at once: temporaries of some 16 KiB each; fewer, and calls cost more than what they do
ROWS = {"cpu": 512, "cuda": 1 << 14}


@dataclass(frozen=True, slots=True)
class Scales:
    """Of n super-blocks: d (n,) f16, sub (n, s) uint8, shift (n, s) ±0.25 fp32 where sub-blocks share one."""

    d: Tensor
    sub: Tensor
    shift: Tensor | None = None

    def steps(self) -> Tensor:
        """(n, s) fp32 d·(sub + ½)."""
        return self.d.float()[:, None] * (self.sub + 0.5)


@dataclass(frozen=True, slots=True)
class Points:
    """Codes (n, c) int32 and shifts (n, c) or None; the sums of w·a·point and w·point² (n, c) there."""

    code: Tensor
    shift: Tensor | None
    crossed: Tensor
    squared: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """n super-blocks ready to be searched: a (n·c, l) their magnitudes where signs are stored, w weights."""

    kind: LatticeKind
    book: Codebook
    a_ml: Tensor
    w_ml: Tensor

    @classmethod
    def of(cls, kind: LatticeKind, book: Codebook, w: Tensor, v: Tensor) -> Target:
        """Of super-blocks w (n, 256) fp32 with weights v (256,).

        Where the number of negative weights is odd a sign has to turn: for the search, that of the weight
        of smallest v·|w|.
        """
        a = w if kind.signs == "none" else w.abs()
        if kind.signs == "parity":
            a = a.view(-1, PARITY)
            cheapest = (a * v.view(-1, PARITY).repeat(len(w), 1)).argmin(1, keepdim=True)
            turned = torch.where(odd(w)[:, None], -a.gather(1, cheapest), a.gather(1, cheapest))
            a = a.scatter(1, cheapest, turned)
        weights = v.view(-1, kind.length).repeat(len(w), 1)
        return cls(kind, book, a.reshape(-1, kind.length), weights)

    def candidates(self, steps_ns: Tensor) -> Candidates:
        """The rows of the table near these weights at these steps."""
        shifts = (0.0,) if self.kind.run is None else (SHIFT, -SHIFT)
        found = self.book.candidates(self.a_ml, self.w_ml, self.per_code(steps_ns), shifts)
        return found.merged() if self.kind.run == self.kind.length else found

    def per_code(self, of_ns: Tensor) -> Tensor:
        """(n·c,) from (n, s)."""
        return of_ns.repeat_interleave(self.kind.group // self.kind.length, 1).flatten()

    def per_sub(self, of_m: Tensor) -> Tensor:
        """(n, s, ...) sums of (n·c, ...)."""
        per = self.kind.group // self.kind.length
        return of_m.view(-1, self.kind.subs, per, *of_m.shape[1:]).sum(2)

    def errors(self, near: Candidates, steps_ns: Tensor) -> Tensor:
        """(n, s) weighted error of each sub-block with its best codes, short of that of zeros."""
        found = self.per_sub(near.errors(self.per_code(steps_ns)))
        first, *others = found.unbind(2)
        return torch.minimum(first, others[0]) if others else first

    def points(self, near: Candidates, steps_ns: Tensor) -> Points:
        """The best points with these steps."""
        least, at_mh = argmin(near.each(self.per_code(steps_ns)))
        at = at_mh[:, 0].long()
        chosen = torch.zeros_like(at)
        if least.shape[1] > 1:
            other = self.per_sub(least)
            chosen = self.per_code(other[:, :, 1] < other[:, :, 0]).long()
            at = torch.where(chosen > 0, at_mh[:, 1], at)
        every = torch.arange(len(at), device=at.device)
        crossed, squared = near.linear_mhk[every, chosen, at] / -2, near.square_mhk[every, chosen, at]
        neighbours = near.book.neighbours.shape[1]
        code = near.book.neighbours[near.cell, at % neighbours]
        shift = None
        if self.kind.run is not None:
            shift = torch.where(chosen + at // neighbours > 0, -SHIFT, SHIFT).view(-1, self.kind.codes)
        shape = (-1, self.kind.codes)
        return Points(code.view(shape), shift, crossed.view(shape), squared.view(shape))


def search(kind: LatticeKind, table: Tensor, w: Tensor, v: Tensor | None) -> Scales:
    """Scales of super-blocks w (n, 256) fp32, for example compensated ones, by weighted error; v (1, 256)."""
    weights = torch.ones_like(w[0]) if v is None else v.flatten()
    book = codebook(table, kind.neighbours)
    found = [_scales(kind, book, some, weights) for some in torch.split(w, ROWS[w.device.type])]
    shifts = [each.shift for each in found if each.shift is not None]
    return Scales(
        torch.cat([each.d for each in found]),
        torch.cat([each.sub for each in found]),
        torch.cat(shifts) if shifts else None,
    )


def _scales(kind: LatticeKind, book: Codebook, w: Tensor, v: Tensor) -> Scales:
    scales, points = searched(Target.of(kind, book, w, v))
    if points.shift is None or kind.run == kind.length:
        return scales
    return Scales(scales.d, scales.sub, points.shift[:, :: kind.group // kind.length].contiguous())


def searched(aimed: Target) -> tuple[Scales, Points]:
    """Scales, and the best points with them."""
    first = _first(aimed)
    near = aimed.candidates(first)
    steps = _best(aimed, near, [first * ratio for ratio in _AROUND])
    scales = _refitted(aimed, near, _started(aimed, near, steps))
    # half a sub-scale above what they are: so that the floor is not a matter of rounding errors
    middle = scales.steps() + scales.d.float()[:, None] / 2
    scales, _ = _windowed(aimed, near, scales.d, middle, (-1, 0, 1))
    scales = _refitted(aimed, near, scales, aimed.kind.gamma)
    return scales, aimed.points(near, scales.steps())


def odd(w: Tensor) -> Tensor:
    """(n · units,) whether the number of negative weights of a unit of 8 is odd, of w (n, 256)."""
    return (w < 0).view(-1, PARITY).sum(1) % 2 == 1


def _first(aimed: Target) -> Tensor:
    """(n, s) steps for which rounding each weight to the levels alone errs least."""
    levels, kind = aimed.book.levels, aimed.kind
    low, high = levels[0], levels[-1]
    between = (high - low) / (len(levels) - 1)
    a, w = aimed.a_ml.view(-1, kind.group), aimed.w_ml.view(-1, kind.group)
    peak = a.abs().amax(1)
    best, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for guess in _GUESSES:
        step = peak / (high * guess)
        y = a * torch.where(step > 0, 1 / step, 0.0)[:, None]
        level = ((y - low) * (1 / between)).round_().clamp_(0, len(levels) - 1).mul_(between).add_(low)
        error = ((level - y).square_() * w).sum(1) * step.square()
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best.view(-1, kind.subs)


def _best(aimed: Target, near: Candidates, tried: list[Tensor]) -> Tensor:
    """(n, s) of the steps tried those of least error."""
    best, least = tried[0], aimed.errors(near, tried[0])
    for steps in tried[1:]:
        error = aimed.errors(near, steps)
        best = torch.where(error < least, steps, best)
        least = torch.minimum(error, least)
    return best


def _started(aimed: Target, near: Candidates, steps: Tensor) -> Scales:
    """Scales of least error, of a few d around that which just reaches the largest of `steps` (n, s)."""
    reach = steps.amax(1) / (aimed.kind.top + 0.5)
    best, least = _windowed(aimed, near, _rounded(reach), steps, (0, 1))
    for start in _STARTS[1:]:
        scales, error = _windowed(aimed, near, _rounded(reach * start), steps, (0, 1))
        better = error < least
        sub = torch.where(better[:, None], scales.sub, best.sub)
        best = Scales(torch.where(better, scales.d, best.d), sub)
        least = torch.minimum(error, least)
    return best


def _windowed(
    aimed: Target, near: Candidates, d: Tensor, steps: Tensor, window: tuple[int, ...]
) -> tuple[Scales, Tensor]:
    """The best sub-scales of a window, 0 just below `steps` (n, s), for d (n,), and their error (n,)."""
    below = (torch.where(d > 0, 1 / d.float(), 0.0)[:, None] * steps - 0.5).floor()
    subs = [(below + offset).clamp(0, aimed.kind.top) for offset in window]
    best, least = subs[0], aimed.errors(near, d.float()[:, None] * (subs[0] + 0.5))
    for sub in subs[1:]:
        error = aimed.errors(near, d.float()[:, None] * (sub + 0.5))
        best = torch.where(error < least, sub, best)
        least = torch.minimum(error, least)
    return Scales(d, best.to(torch.uint8)), least.sum(1)


def _refitted(aimed: Target, near: Candidates, scales: Scales, gamma: float = 1.0) -> Scales:
    """The same with d of least squares for the best points, times gamma."""
    points = aimed.points(near, scales.steps())
    factor = aimed.per_code(scales.sub + 0.5).view(-1, aimed.kind.codes)
    over, under = (points.crossed * factor).sum(1), (points.squared * factor.square()).sum(1)
    fits = (over > 0) & (under > 0)
    return Scales(torch.where(fits, _rounded(over / under * gamma), scales.d), scales.sub)


def _rounded(d: Tensor) -> Tensor:
    return d.clamp(max=LARGEST).to(torch.float16)
