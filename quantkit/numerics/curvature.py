"""The gram of a site as the solvers see it, without a second copy.

`Curvature` stands for A = Σ x xᵀ / tokens with three changes made on the fly: off-diagonal entries are
shrunk by (1 − ρ), the diagonal of inputs that were never excited is the mean of the others, and rows
and columns are taken in processing order. A gram of width 28,672 is 3 GiB: it is held once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError


@dataclass(frozen=True, slots=True)
class Curvature:
    """A view of a gram.

    gram      (in, in) fp32 Σ x xᵀ, in file order, never modified
    order     (in,) processing order of the columns
    diagonal  (in,) diagonal of A in processing order, positive
    scale     what off-diagonal entries of `gram` are multiplied by: (1 − ρ) / tokens
    """

    gram: Tensor
    order: Tensor
    diagonal: Tensor
    scale: float

    @property
    def width(self) -> int:
        return self.gram.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of A in processing order, (stop − start, in)."""
        return self.chosen(torch.arange(start, stop, device=self.order.device))

    def chosen(self, positions: Tensor) -> Tensor:
        """Rows of A at some positions of the processing order, (positions, in)."""
        found = self.gram.index_select(0, self.order[positions]).index_select(1, self.order).mul_(self.scale)
        found.scatter_(1, positions[:, None], self.diagonal[positions, None])
        return found

    def ordered(self, order: Tensor) -> Curvature:
        """The same matrix in another processing order, given in terms of the file's."""
        in_file = torch.empty_like(self.diagonal)
        in_file[self.order] = self.diagonal
        return Curvature(self.gram, order, in_file[order], self.scale)


def curvature(gram: Tensor, tokens: int, *, shrink: bool) -> Curvature:
    """The curvature of a gram in file order.

    Shrinkage ρ = min(½, in / (4·tokens)): the fewer tokens per input, the less the entries off the
    diagonal are believed. Zero activation in calibration is not proof of uselessness: inputs that
    were never excited get the mean diagonal, so their weights are rounded by themselves, where the
    reference implementation deletes them. Raises NumericsError on non-finite values.
    """
    width = gram.shape[0]
    diagonal = gram.diagonal() / tokens
    if not bool(torch.isfinite(diagonal).all()):
        raise NumericsError("the gram holds non-finite values")
    dead = diagonal == 0
    alive = int((~dead).sum())
    mean = float(diagonal.sum()) / alive if alive else 1.0
    rho = min(0.5, width / (4 * tokens)) if shrink else 0.0
    natural = torch.arange(width, device=gram.device)
    return Curvature(gram, natural, torch.where(dead, mean, diagonal), (1 - rho) / tokens)
