"""Rounding with error feedback: GPTQ (Frantar et al. 2022) in its inverse-free form, which is LDLQ.

With H = R·Rᵀ, R upper triangular, and columns k in processing order:

    q_k = Q( w_k + Σ_{j<k} (w_j − q_j)·R_jk / R_kk )

where w are the original weights. Codes, group scales and loss are those of the published loop, which
updates the remaining weights by the factor of H⁻¹ instead. The loss Σ_k (q_k's rounding error · R_kk)²
equals tr(Δ·H·Δᵀ).

Weights are held transposed, one contiguous row per input: the same codes, two to three times faster
than strided columns. Shape suffixes: o out, i in, g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.numerics.cholesky import Factor
from quantkit.numerics.levels import Levels

# (out, g) compensated weights and their positions in processing order → (scale, zero point) as (out, 1)
Fit = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]
# positions in processing order → (g, out) weights with all errors so far fed into them
Compensated = Callable[[slice], Tensor]


# Columns whose errors reach one another by rank-one updates; everything further away is reached by
# matrix products, of these runs inside a batch and of batches among themselves.
RUN = 16


class Grids(Protocol):
    """Which grid a column is rounded on. `period`: grids are fitted every so many columns; None: never."""

    @property
    def period(self) -> int | None: ...

    def at(self, column: int, compensated: Compensated) -> tuple[Tensor, Tensor | None]:
        """(out,) scale and zero point for processing position `column`."""
        ...


class DynamicGroups:
    """Groups of consecutive processing positions; each is fitted, compensated, when it is reached."""

    def __init__(self, fit: Fit, group_size: int) -> None:
        self._fit, self._group_size = fit, group_size
        self._fitted: list[tuple[Tensor, Tensor | None]] = []

    @property
    def period(self) -> int:
        return self._group_size

    def at(self, column: int, compensated: Compensated) -> tuple[Tensor, Tensor | None]:
        if column % self._group_size == 0:
            members = slice(column, column + self._group_size)
            scale, zero = self._fit(compensated(members).T.contiguous(), members)
            self._fitted.append((scale.flatten(), None if zero is None else zero.flatten()))
        return self._fitted[-1]

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """(out, groups) scales and zero points in the order the groups were met."""
        zeros = [z for _, z in self._fitted if z is not None]
        return torch.stack([s for s, _ in self._fitted], 1), torch.stack(zeros, 1) if zeros else None


class StaticGroups:
    """Grids fixed beforehand: (out, groups) tables and the group of each processing position."""

    period = None

    def __init__(self, scale_og: Tensor, zero_og: Tensor | None, group_of: Tensor) -> None:
        self._scale_go = scale_og.T.contiguous()
        self._zero_go = None if zero_og is None else zero_og.T.contiguous()
        self._group_of = group_of.tolist()

    def at(self, column: int, compensated: Compensated | None = None) -> tuple[Tensor, Tensor | None]:
        group = self._group_of[column]
        return self._scale_go[group], None if self._zero_go is None else self._zero_go[group]


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes_io (in, out) fp32 in processing order; loss_o (out,) is tr(Δ·H·Δᵀ) of each row."""

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
    """Columns solved together: whole groups, so that a group's compensated weights are at hand at once."""
    return max(group_size, batch_columns - batch_columns % group_size)


def runs(start: int, end: int, period: int | None) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the runs of a batch; no grid is fitted inside a run, before its errors arrived."""
    step = RUN if period is None or period % RUN == 0 else period
    for first in range(start, end, step):
        yield first, min(first + step, end)


def round_with_feedback(
    w_io: Tensor, factor: Factor, grids: Grids, levels: Levels, batch_columns: int = 128
) -> Rounded:
    """Round weights (in, out) fp32, each output by itself, in processing order; `factor` is in that order.

    Columns are solved in batches: one product brings in the errors of everything before; inside, runs of
    columns do the same on a smaller scale, and rank-one updates serve a run. Groups fitted on the way
    must not reach past a batch (see `batch_width`).
    """
    width, out = w_io.shape
    codes_io = torch.empty_like(w_io)
    error_io = torch.empty_like(w_io)
    loss_o = w_io.new_zeros(out)
    for start in range(0, width, batch_columns):
        end = min(start + batch_columns, width)
        columns = factor.columns(start, end)
        inner = columns[start:]
        pull = columns[:start].T @ error_io[:start]
        pivots = inner.diagonal().tolist()

        def compensated(
            members: slice, first: int = start, inner: Tensor = inner, pull: Tensor = pull
        ) -> Tensor:
            own = slice(members.start - first, members.stop - first)
            moved: Tensor = torch.linalg.solve_triangular(inner[own, own].T, pull[own], upper=False)
            return w_io[members] + moved

        for first, last in runs(start, end, grids.period):
            for j in range(first, last):
                k = j - start
                scale, zero = grids.at(j, compensated)
                target = w_io[j] + pull[k] / pivots[k]
                code = levels.codes(target, scale, zero)
                value = levels.values(code, scale, zero)
                codes_io[j] = code
                torch.sub(w_io[j], value, out=error_io[j])
                loss_o += target.sub_(value).mul_(pivots[k]).square_()
                pull[k + 1 : last - start].addr_(inner[k, k + 1 : last - start], error_io[j])
            done, rest = slice(first - start, last - start), slice(last - start, end - start)
            pull[rest].addmm_(inner[done, rest].T, error_io[first:last])
    return Rounded(codes_io, loss_o)
