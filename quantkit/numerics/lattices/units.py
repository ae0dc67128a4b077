"""The best points for a few columns under a full metric: a step of feedback and of coordinate descent.

Loss of a unit is |Rᵀ(q − t)|² with R upper triangular. Its codes are chosen in turn, the error of one fed
into the next. Candidates are the rows of the table near the target, and the sign patterns one flip away from
the target's own, all compared under the metric of their block.

Shape suffixes: n rows, u columns of a unit, l of a code, k candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.kinds import SHIFT, LatticeKind

_CANDIDATES = 16
_ROWS = {"cpu": 1 << 10, "cuda": 1 << 18}


@dataclass(frozen=True, slots=True)
class Chosen:
    """code (n, codes) int32, value_nu sign·(table + shift), shift (n, codes) or None, loss (n,)."""

    code: Tensor
    value_nu: Tensor
    shift: Tensor | None
    loss: Tensor

    def where(self, better: Tensor, other: Chosen) -> Chosen:
        """`other` where it is better."""
        wide = better[:, None]
        shift = self.shift
        if shift is not None and other.shift is not None:
            shift = torch.where(wide, other.shift, shift)
        return Chosen(
            torch.where(wide, other.code, self.code),
            torch.where(wide, other.value_nu, self.value_nu),
            shift,
            torch.where(better, other.loss, self.loss),
        )

    def rows(self, chosen: Tensor) -> Chosen:
        """Some rows."""
        shift = None if self.shift is None else self.shift[chosen]
        return Chosen(self.code[chosen], self.value_nu[chosen], shift, self.loss[chosen])

    @staticmethod
    def below(first: Chosen, second: Chosen) -> Chosen:
        """Rows of both."""
        shift = None
        if first.shift is not None and second.shift is not None:
            shift = torch.cat((first.shift, second.shift))
        return Chosen(
            torch.cat((first.code, second.code)),
            torch.cat((first.value_nu, second.value_nu)),
            shift,
            torch.cat((first.loss, second.loss)),
        )

    @staticmethod
    def beside(units: Sequence[Chosen]) -> Chosen:
        """Units of the same rows that were chosen in turn."""
        shifts = [each.shift for each in units if each.shift is not None]
        return Chosen(
            torch.cat([each.code for each in units], 1),
            torch.cat([each.value_nu for each in units], 1),
            torch.cat(shifts, 1) if shifts else None,
            torch.stack([each.loss for each in units]).sum(0),
        )


def choose(kind: LatticeKind, book: Codebook, y_nu: Tensor, upper: Tensor, shift: Tensor | None) -> Chosen:
    """Points near y (n, u) for the metric upper·upperᵀ; `shift` (n,) where it is shared and known."""
    pieces = []
    for start in range(0, y_nu.shape[0], _ROWS[y_nu.device.type]):
        rows = slice(start, start + _ROWS[y_nu.device.type])
        found = [_tried(book, y_nu[rows], upper, *how) for how in _ways(kind, y_nu[rows], shift, rows)]
        best = found[0]
        for other in found[1:]:
            best = best.where(other.loss < best.loss, other)
        pieces.append(best)
    shifts = [p.shift for p in pieces if p.shift is not None]
    return Chosen(
        torch.cat([p.code for p in pieces]).int(),
        torch.cat([p.value_nu for p in pieces]),
        torch.cat(shifts) if shifts else None,
        torch.cat([p.loss for p in pieces]),
    )


def _ways(
    kind: LatticeKind, y_nu: Tensor, shift: Tensor | None, rows: slice
) -> Iterator[tuple[LatticeKind, Tensor | None, int]]:
    """(kind, (n, 1) shift, parity of each code's signs) to be tried."""
    if kind.run is None:
        # two codes that share their signs' parity are both even or both odd
        for parity in range(kind.unit // kind.length):
            yield kind, None, parity
    elif shift is not None:
        yield kind, shift[rows, None], 0
    else:
        for each in (SHIFT, -SHIFT):
            yield kind, torch.full_like(y_nu[:, :1], each), 0


def _tried(
    book: Codebook, y_nu: Tensor, upper: Tensor, kind: LatticeKind, shift: Tensor | None, parity: int
) -> Chosen:
    codes, values = [], []
    loss = torch.zeros_like(y_nu[:, 0])
    aim = y_nu
    for start in range(0, kind.unit, kind.length):
        own, rest = slice(start, start + kind.length), slice(start + kind.length, kind.unit)
        block = upper[own, own]
        code, value, found = _best(kind, book, aim[:, own], block @ block.T, shift, parity)
        codes.append(code)
        values.append(value)
        loss = loss + found
        if start + kind.length < kind.unit:
            pull = (aim[:, own] - value) @ upper[own, rest]
            fed = torch.linalg.solve_triangular(upper[rest, rest].T, pull.T, upper=False)
            aim = torch.cat((aim[:, : rest.start], aim[:, rest] + fed.T), 1)
    return Chosen(torch.stack(codes, 1), torch.cat(values, 1), shift, loss)


def _best(
    kind: LatticeKind, book: Codebook, y_nl: Tensor, metric: Tensor, shift: Tensor | None, parity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(code (n,), value (n, l), loss (n,)) of the best candidate."""
    plain = kind.signs == "none"
    aim = y_nl if plain else y_nl.abs()
    if shift is not None:
        aim = aim - shift
    candidates = book.neighbours[book.cells(aim.contiguous())][:, :_CANDIDATES].long()
    value = book.table[candidates]
    if shift is not None:
        value = value + shift[:, :, None]
    sign = None if plain else torch.where(y_nl < 0, -1.0, 1.0)
    if sign is not None:
        value = value * sign[:, None]
    error = value - y_nl[:, None]
    pulled = error @ metric
    loss = (error * pulled).sum(2)
    if sign is None:
        least, at = loss.min(1)
        return _taken(candidates, at), _rows(value, at), least
    change = 4 * value * (value * metric.diagonal() - pulled)
    cheapest = change.amin(2)
    turn = cheapest < 0 if kind.signs == "free" else ((sign < 0).sum(1) % 2 != parity)[:, None]
    least, at = (loss + torch.where(turn, cheapest, 0.0)).min(1)
    turned = torch.where(_taken(turn.expand_as(loss), at), -1.0, 1.0)
    best = _rows(value, at)
    element = _rows(change, at).argmin(1, keepdim=True)
    return _taken(candidates, at), best.scatter(1, element, best.gather(1, element) * turned[:, None]), least


def _taken(of_nk: Tensor, at: Tensor) -> Tensor:
    return of_nk.gather(1, at[:, None]).squeeze(1)


def _rows(of_nkl: Tensor, at: Tensor) -> Tensor:
    return of_nkl[torch.arange(len(at), device=at.device), at]
