"""Codes of some rows of a site: error feedback, then coordinate descent and refitted scales in turn.

Rows are independent of one another. Shape suffixes: o out, i in, g groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.numerics import feedback, grids
from quantkit.numerics.cholesky import Factor
from quantkit.numerics.curvature import Curvature
from quantkit.numerics.feedback import DynamicGroups, Fit, StaticGroups, round_with_feedback
from quantkit.numerics.grids import Scales
from quantkit.numerics.levels import Levels, levels_of
from quantkit.numerics.nearest import Grid
from quantkit.numerics.polish import polish
from quantkit.numerics.refit import refit
from quantkit.numerics.stored import Stored
from quantkit.schemes import Scheme

Order = Literal["off", "group_aware", "static", "free"]
_BATCH_COLUMNS = 128
# With fewer inputs to a scale the systems of a refit are as large as the gram, row by row.
_COUPLED = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of the inputs of a site, ready to solve with.

    curvature   of its gram, in processing order
    factor      of the damped curvature; None when there is none: weights are rounded by themselves
    importance  (in,) mean square of each input, in file order
    note        a raised damping, or why there is no factor
    """

    curvature: Curvature
    factor: Factor | None
    importance: Tensor
    note: str | None


@dataclass(frozen=True, slots=True)
class Steps:
    """polish: passes of coordinate descent after the feedback; refits: times that scales are refitted to
    the codes and codes, in one more pass, to the scales."""

    polish: int
    refits: int

    @property
    def stages(self) -> int:
        """How many results there are on the way: feedback, polished, refitted."""
        return 1 + (self.polish > 0) + (self.polish > 0 and self.refits > 0)


@dataclass(frozen=True, slots=True)
class Solved:
    """Some rows in file order: stored codes (rows, in), fp32 scales and zero points (rows, groups), and the
    fp32 weights (rows, in) that they stand for."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    values: Tensor


@dataclass(frozen=True, slots=True)
class Solver:
    """How rows of weights of one scheme are solved with what was seen of their inputs."""

    seen: Seen
    scheme: Scheme
    stored: Stored
    order: Order
    scales: Scales

    def stages(self, weight: Tensor, steps: Steps, fixed: Grid | None) -> Iterator[Solved]:
        """Codes of weight (rows, in) fp32 after every stage of `steps`, each better on the gram than before.

        `fixed`: grids that are not to be fitted on the way, their scales still refitted where the file keeps
        each by itself.
        """
        if self.seen.factor is None:
            raise ValueError("there is no factor to solve with")
        levels = levels_of(self.scheme)
        order, curvature = self.seen.curvature.order, self.seen.curvature
        w_io = weight.T[order].contiguous()
        columns = self.scheme.group_size or weight.shape[1]
        position = torch.arange(weight.shape[1], device=weight.device) // columns
        if fixed is not None:
            group_of = position[order]
            known = StaticGroups(fixed.scale, fixed.zero, group_of)
            codes_io = round_with_feedback(w_io, self.seen.factor, known, levels, _BATCH_COLUMNS).codes_io
            scale, zero = fixed.scale, fixed.zero
        else:
            group_of = position
            dynamic = DynamicGroups(self._fit(levels), columns)
            batch = feedback.batch_width(columns, _BATCH_COLUMNS)
            codes_io = round_with_feedback(w_io, self.seen.factor, dynamic, levels, batch).codes_io
            scale, zero = dynamic.tables()
        back = self._met(columns) if fixed is None and self.order == "group_aware" else None
        yield self._in_file_order(codes_io, scale, zero, group_of, back)
        if steps.polish == 0:
            return
        polish(codes_io, w_io, curvature, StaticGroups(scale, zero, group_of), levels, steps.polish)
        yield self._in_file_order(codes_io, scale, zero, group_of, back)
        if steps.refits == 0 or self.scheme.nested or columns < _COUPLED:
            return
        for _ in range(steps.refits):
            units = levels.units(codes_io, None if zero is None else zero.T[group_of])
            scale = refit([units], w_io, scale, group_of, curvature, self.stored)
            polish(codes_io, w_io, curvature, StaticGroups(scale, zero, group_of), levels, 1)
        yield self._in_file_order(codes_io, scale, zero, group_of, back)

    def _fit(self, levels: Levels) -> Fit:
        in_order = self.seen.importance[self.seen.curvature.order]

        def fit(w: Tensor, members: slice) -> tuple[Tensor, Tensor | None]:
            return grids.choose(w, levels, self.stored, self.scales, in_order[members])

        return fit

    def _met(self, columns: int) -> Tensor:
        """(groups,) at which place each group of the file was met."""
        return torch.argsort(self.seen.curvature.order[::columns] // columns)

    def _in_file_order(
        self, codes_io: Tensor, scale: Tensor, zero: Tensor | None, group_of: Tensor, back: Tensor | None
    ) -> Solved:
        levels, order = levels_of(self.scheme), self.seen.curvature.order
        units = levels.units(codes_io, None if zero is None else zero.T[group_of])
        both = []
        for in_order in (levels.stored(codes_io), units * scale.T[group_of]):
            in_file = torch.empty_like(in_order)
            in_file[order] = in_order
            both.append(in_file.T.contiguous())
        if back is not None:
            scale, zero = scale[:, back], None if zero is None else zero[:, back]
        return Solved(both[0], scale.contiguous(), None if zero is None else zero.contiguous(), both[1])
