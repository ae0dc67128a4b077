"""Rounding to nearest on the lattice grids: scales, codes, signs and shifts by weighted error.

Shape suffixes: n super-blocks (rows, one at a time along the inputs), c groups of columns (a code each),
l weights of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.lattices.codebook import Codebook, codebook, nearest_rows
from quantkit.numerics.lattices.kinds import COLUMNS, PARITY, LatticeKind
from quantkit.numerics.lattices.parts import Parts, assemble, runs_of, signs_of
from quantkit.numerics.lattices.scales import ROWS, Target, odd, searched
from quantkit.tensors import Lattice

# inputs that were never excited still count so much of the mean
_FLOOR = 1e-3


def nearest(kind: LatticeKind, table: Tensor, weight: Tensor, importance: Tensor | None) -> Lattice:
    """weight (out, in) fp32 rounded for Σ importance·(w − ŵ)², importance (in,) or all ones.

    table (entries, length) fp32 with its factor. `in` is a multiple of 256.
    """
    book = codebook(table, kind.neighbours)
    weights = floored(importance, weight)
    pieces = []
    for rows in torch.split(weight, ROWS[weight.device.type]):
        done = []
        for start in range(0, weight.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            done.append(_rounded(kind, book, rows[:, columns].contiguous(), weights[columns]))
        pieces.append(Parts.beside(done))
    return assemble(kind, table, Parts.below(pieces))


def _rounded(kind: LatticeKind, book: Codebook, w: Tensor, v: Tensor) -> Parts:
    """Super-blocks w (n, 256) with weights v (256,)."""
    scales, points = searched(Target.of(kind, book, w, v))
    if kind.signs == "parity":
        code, signs = _even(kind, book, w, v, scales.steps())
        return Parts(code.to(torch.int16), scales.d[:, None], scales.sub, signs, None)
    shift = None if points.shift is None else runs_of(kind, points.shift)
    negative = signs_of(w < 0) if kind.signs == "free" else None
    return Parts(points.code.to(torch.int16), scales.d[:, None], scales.sub, negative, shift)


def _even(kind: LatticeKind, book: Codebook, w: Tensor, v: Tensor, steps_ns: Tensor) -> tuple[Tensor, Tensor]:
    """(n, c) codes and (n, 256) signs of least error with an even number of −1 in each unit of 8.

    Where the number of negative weights is odd one sign has to turn: each is tried, the cheapest first, as
    long as the least it can cost, at the smallest level, leaves it a chance.
    """
    per = PARITY // kind.length
    inverse = torch.where(steps_ns > 0, 1 / steps_ns, 0.0).repeat_interleave(kind.group, 1)
    y = (w.abs() * inverse).view(-1, PARITY)
    weights = v.view(-1, PARITY).repeat(len(w), 1)

    def best(y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        error, code = nearest_rows(book, y.view(-1, kind.length), weights.view(-1, kind.length))
        return error.view(-1, per).sum(1), code.view(-1, per)

    natural, code = best(y, weights)
    turned = torch.full((len(y),), -1, device=w.device)
    cost = 4 * book.levels[0] * weights * y
    uneven = odd(w)
    least = torch.where(uneven, torch.inf, natural)
    for which in cost.argsort(stable=True).unbind(1):
        chance = uneven & (natural + cost.gather(1, which[:, None]).squeeze(1) < least)
        at = chance.nonzero().squeeze(1)
        if at.numel() == 0:
            break
        error, found = best(_negated(y[at], which[at]), weights[at])
        better = error < least[at]
        at = at[better]
        least[at], code[at], turned[at] = error[better], found[better], which[at]
    negative = (w < 0).view(-1, PARITY)
    at = uneven.nonzero().squeeze(1)
    negative[at, turned[at]] ^= True
    return code.view(len(w), -1), signs_of(negative).view(w.shape)


def _negated(of: Tensor, which: Tensor) -> Tensor:
    """`of` (m, 8) with element `which` (m,) negated."""
    return of.scatter(1, which[:, None], -of.gather(1, which[:, None]))


def floored(importance: Tensor | None, weight: Tensor) -> Tensor:
    """(in,) positive weights of mean 1: none given, or all zero, is all equal."""
    if importance is None or not bool(importance.any()):
        return torch.ones_like(weight[0])
    relative = importance.float() / importance.float().mean()
    return relative.clamp(min=_FLOOR)
