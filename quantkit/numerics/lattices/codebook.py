"""The nearest row of a table, by weighted squared distance, for many vectors at once.

Two ways. All rows: Σ w·(y − g)² = Σ w·y² − 2·(w∘y)·g + w·g² is one matrix product. Neighbours: y is rounded
to the levels of the table coordinate by coordinate, and each of those points knows the rows nearest to it.
Only they are compared, and for all scales of y near the first at once: the two sums that depend on y and
the row are the coefficients of the error as a polynomial in the scale.

Shape suffixes: m vectors, l weights of a code, e rows of the table, k neighbours, h shifts that are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# entries of temporaries: about the second-level cache, and what a GPU likes
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 27}


@dataclass(frozen=True, slots=True)
class Candidates:
    """Error of each neighbour g of each vector a as a polynomial in the scale: Σ w·(a − step·(g + shift))².

    book            whose neighbours these are
    cell            (m,) the point of levels next to the vector
    linear_mhk      −2·Σ w·a·(g + shift)
    square_mhk      Σ w·(g + shift)²
    """

    book: Codebook
    cell: Tensor
    linear_mhk: Tensor
    square_mhk: Tensor

    def errors(self, step_m: Tensor) -> Tensor:
        """(m, h) error of the best neighbour, short of the constant."""
        return self.each(step_m).amin(2).mul_(step_m[:, None])

    def each(self, step_m: Tensor) -> Tensor:
        """(m, h, k) errors short of the constant, divided by the step."""
        return torch.addcmul(self.linear_mhk, self.square_mhk, step_m[:, None, None])

    def merged(self) -> Candidates:
        """Neighbours with each shift as so many more neighbours: h is 1, k times as large."""
        return replace(
            self,
            linear_mhk=self.linear_mhk.flatten(1)[:, None],
            square_mhk=self.square_mhk.flatten(1)[:, None],
        )


@dataclass(frozen=True, slots=True)
class Codebook:
    """A table and the rows near each point of its levels.

    table       (e, l) fp32
    levels      its values, ascending; points are counted with the first coordinate most significant
    neighbours  (levels ** l, k) rows by rising distance from each point of levels
    near        (levels ** l, l·k) f16 those rows, coordinate by coordinate
    """

    table: Tensor
    levels: tuple[float, ...]
    neighbours: Tensor
    near: Tensor

    @property
    def length(self) -> int:
        return self.table.shape[1]

    def cells(self, y_ml: Tensor) -> Tensor:
        """(m,) number of the point of levels next to each y."""
        digits = torch.zeros_like(y_ml)
        for low, high in pairwise(self.levels):
            digits += y_ml > (low + high) / 2
        places = torch.arange(self.length - 1, -1, -1, device=y_ml.device)
        return (digits @ (len(self.levels) ** places).float()).int()

    def candidates(self, a_ml: Tensor, w_ml: Tensor, step_m: Tensor, shifts: Sequence[float]) -> Candidates:
        """The rows near a / step and what is needed of them at steps not far from there."""
        cell = self.cells(a_ml / step_m.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        k = self.neighbours.shape[1]
        linear, square = a_ml.new_empty(2, len(a_ml), len(shifts), k)
        width = max(1, _PIECE[a_ml.device.type] // (2 * self.length * k))
        for start in range(0, len(a_ml), width):
            piece = slice(start, start + width)
            sums = self._sums(cell[piece], a_ml[piece], w_ml[piece], moments=3 if any(shifts) else 2)
            if not any(shifts):
                linear[piece, 0], square[piece, 0] = sums[:, 0], sums[:, 1]
                continue
            total, crossed = w_ml[piece].sum(1)[:, None], (w_ml[piece] * a_ml[piece]).sum(1)[:, None]
            for number, shift in enumerate(shifts):
                torch.sub(sums[:, 0], 2 * shift * crossed, out=linear[piece, number])
                torch.add(sums[:, 1], sums[:, 2], alpha=2 * shift, out=square[piece, number])
                square[piece, number] += shift * shift * total
        return Candidates(self, cell, linear, square)

    def _sums(self, cell: Tensor, a_ml: Tensor, w_ml: Tensor, moments: int) -> Tensor:
        """(m, moments, k) of each vector and neighbour g: −2·Σ w·a·g, Σ w·g², Σ w·g."""
        length, k = self.length, self.neighbours.shape[1]
        features = a_ml.new_empty(len(cell), 2 * length, k)
        features[:, :length] = self.near.index_select(0, cell).view(-1, length, k)
        torch.mul(features[:, :length], features[:, :length], out=features[:, length:])
        product = a_ml.new_zeros(len(cell), moments, 2 * length)
        torch.mul(a_ml, w_ml, out=product[:, 0, :length]).mul_(-2)
        product[:, 1, length:] = w_ml
        if moments > 2:
            product[:, 2, :length] = w_ml
        return torch.bmm(product, features)


@lru_cache(maxsize=16)
def codebook(table: Tensor, k: int) -> Codebook:
    """A table made ready with k neighbours; the last few are kept.

    The best of 32 neighbours errs at most 0.5 % more than the best row, with importances spread by a factor
    e (1 sigma): 0.5 % for 256 rows of 8, 0.1 % for 1024 or 2048.
    """
    levels = torch.unique(table)
    points = torch.cartesian_prod(*[levels] * table.shape[1])
    count = min(k, len(table))
    chosen = torch.cdist(points, table).topk(count, dim=1, largest=False).indices
    near = table[chosen].mT.flatten(1).to(torch.float16)
    return Codebook(table, tuple(levels.tolist()), chosen.to(torch.int32), near)


def nearest_rows(book: Codebook, y_ml: Tensor, w_ml: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) smallest Σ w·(y − g)² over all rows g of the table, and which row that is."""
    weighted = w_ml * y_ml
    constant = (weighted * y_ml).sum(1, keepdim=True)
    product = torch.cat((-2 * weighted, w_ml, constant), 1)
    features = torch.cat((book.table, book.table.square(), torch.ones_like(book.table[:, :1])), 1).T
    width = max(1, _PIECE[y_ml.device.type] // len(book.table))
    found = [argmin(product[at : at + width] @ features) for at in range(0, len(y_ml), width)]
    return torch.cat([least for least, _ in found]), torch.cat([at for _, at in found])


def argmin(error: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest entries of the last dimension, a power of two wide, and where they are.

    The index takes the low bits of the number, so that one vectorised minimum finds both.
    """
    count = error.shape[-1]
    bits = error.view(torch.int32)
    bits.bitwise_and_(-count).bitwise_or_(torch.arange(count, dtype=torch.int32, device=error.device))
    least = bits.view(torch.float32).amin(-1)
    return least, least.view(torch.int32).bitwise_and(count - 1)
