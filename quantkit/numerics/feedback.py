"""Rounding with error feedback: the GPTQ loop (Frantar et al. 2022, algorithm 1; equal to LDLQ).

For columns j in processing order: q_j = Q(w_j), e = (w_j − q_j)/U_jj, w_k −= e·U_jk for k > j, where
U is the upper factor of the inverse gram in that order. The loss Σ e² equals tr(Δ·H·Δᵀ), H = (UᵀU)⁻¹.

Weights are held transposed, one contiguous row per input: the same codes, two to three times faster
than strided columns. Shape suffixes: o out, i in, g groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.numerics import affine

# (out, g) compensated weights and their positions in processing order → (scale, zero point) as (out, 1)
Fit = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]


class Grids(Protocol):
    """Which grid a column is rounded on."""

    def at(self, column: int, work_io: Tensor) -> tuple[Tensor, Tensor | None]:
        """(out,) scale and zero point for processing position `column`; `work_io` is compensated so far."""
        ...


class DynamicGroups:
    """Groups of consecutive processing positions; each is fitted, compensated, when it is reached."""

    def __init__(self, fit: Fit, group_size: int) -> None:
        self._fit, self._group_size = fit, group_size
        self.fitted: list[tuple[Tensor, Tensor | None]] = []

    def at(self, column: int, work_io: Tensor) -> tuple[Tensor, Tensor | None]:
        if column % self._group_size == 0:
            members = slice(column, column + self._group_size)
            scale, zero = self._fit(work_io[members].T, members)
            self.fitted.append((scale.flatten(), None if zero is None else zero.flatten()))
        return self.fitted[-1]

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """(out, groups) scales and zero points in the order the groups were met."""
        zeros = [z for _, z in self.fitted if z is not None]
        return torch.stack([s for s, _ in self.fitted], 1), torch.stack(zeros, 1) if zeros else None


class StaticGroups:
    """Grids fixed beforehand: (out, groups) tables and the group of each processing position."""

    def __init__(self, scale_og: Tensor, zero_og: Tensor | None, group_of: Tensor) -> None:
        self._scale_go = scale_og.T.contiguous()
        self._zero_go = None if zero_og is None else zero_og.T.contiguous()
        self._group_of = group_of.tolist()

    def at(self, column: int, work_io: Tensor) -> tuple[Tensor, Tensor | None]:
        group = self._group_of[column]
        return self._scale_go[group], None if self._zero_go is None else self._zero_go[group]


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes_io (in, out) fp32 in processing order; loss_o (out,) is Σ e² of each row."""

    codes_io: Tensor
    loss_o: Tensor


def natural(width: int, device: torch.device) -> Tensor:
    """Columns in the order of the file."""
    return torch.arange(width, device=device)


def descending(diagonal: Tensor) -> Tensor:
    """Act-order: columns by falling diagonal of the gram; ties keep the order of the file."""
    return torch.argsort(diagonal, descending=True, stable=True)


def group_aware(diagonal: Tensor, group_size: int) -> Tensor:
    """Groups by falling largest diagonal, columns inside a group likewise; no group is torn apart."""
    by_group = diagonal.view(-1, group_size)
    groups = torch.argsort(by_group.amax(1), descending=True, stable=True)
    inside = torch.argsort(by_group, dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside[groups]).flatten()


def batch_width(group_size: int, batch_columns: int) -> int:
    """Columns per lazy update: a multiple or a divisor of the group, so that no group starts mid-batch."""
    if group_size >= batch_columns:
        return batch_columns if group_size % batch_columns == 0 else group_size
    return batch_columns - batch_columns % group_size


def round_with_feedback(
    work_io: Tensor, upper_ii: Tensor, grids: Grids, bits: int, batch_columns: int = 128
) -> Rounded:
    """Round weights (in, out) fp32, row by row in processing order, feeding each error to the rest.

    `upper_ii` (in, in) fp32 is the factor in that same order. `work_io` is overwritten with the
    compensated weights. `batch_columns` positions share one lazy update of all that follow; groups
    must not start inside a batch and reach past it (see `batch_width`).
    """
    width, out = work_io.shape
    codes_io = torch.empty_like(work_io)
    loss_o = work_io.new_zeros(out)
    diagonal = upper_ii.diagonal().tolist()
    for start in range(0, width, batch_columns):
        end = min(start + batch_columns, width)
        errors = torch.empty_like(work_io[start:end])
        for j in range(start, end):
            scale, zero = grids.at(j, work_io)
            code = affine.steps(work_io[j], scale, zero, bits)
            error = (work_io[j] - affine.restore(code, scale, zero)).div_(diagonal[j])
            codes_io[j] = code
            errors[j - start] = error
            if j + 1 < end:
                work_io[j + 1 : end].addr_(upper_ii[j, j + 1 : end], error, alpha=-1)
        loss_o += errors.square().sum(0)
        if end < width:
            work_io[end:].addmm_(upper_ii[start:end, end:].T, errors, alpha=-1)
    return Rounded(codes_io, loss_o)
