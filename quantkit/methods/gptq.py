"""GPTQ: rounding with error feedback, on importance-weighted scales, then coordinate descent.

Per site: one damped factor of the gram, shared by all its weights. Per weight: scales searched with
the mean square of each input as importance, feedback in a sensible column order, and a polish that
revisits codes with scales fixed. `plain: true` is what most tools do (absmax scales, columns in file
order, no polish), kept by name because people compare and reproduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.numerics import cholesky, feedback, grids
from quantkit.numerics.cholesky import Factor
from quantkit.numerics.curvature import Curvature, curvature
from quantkit.numerics.feedback import DynamicGroups, Fit, StaticGroups, round_with_feedback
from quantkit.numerics.grids import SCALES, Scales
from quantkit.numerics.levels import levels_of
from quantkit.numerics.nearest import Grid, assemble, fit_groups, nearest
from quantkit.numerics.polish import polish
from quantkit.numerics.stored import Stored, stored_of
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme
from quantkit.tensors import Affine

SUMMARY = "error feedback on searched scales, calibrated; the default for 2 to 4 bits"

_Fixed = tuple[Tensor, Tensor | None]
Order = Literal["off", "group_aware", "static", "free"]
# Elements of a weight worked on at once; rows are independent, so this bounds memory, not quality.
# On a GPU every column step is a few kernel launches whatever the rows: larger pieces, fewer launches.
_PIECE = {"cpu": 1 << 23, "cuda": 1 << 28}
_BATCH_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of GPTQ.

    damp       fraction of the mean diagonal added to the gram before it is factorised
    scales     `weighted` (searched by importance), `mse` (searched), or a convention as `absmax`
    act_order  column order: `group_aware` important groups first, important columns first inside them;
               `static` important columns first on scales fixed beforehand; `free` important columns
               first, groups cut in that order, which the file must record (`g_idx`); `off` file order
    polish     passes of coordinate descent after the feedback
    plain      GPTQ as first published: absmax scales, file order, no shrinkage, no polish
    """

    damp: float = 0.01
    scales: Scales = "weighted"
    act_order: Order = "group_aware"
    polish: int = 3
    plain: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise RecipeError(f"gptq: damp must lie between 0 and 1, not {self.damp}")
        if self.scales not in SCALES:
            raise RecipeError(f"gptq: scales must be one of {', '.join(SCALES)}, not {self.scales!r}")
        if self.act_order not in ("off", "group_aware", "static", "free"):
            raise RecipeError(
                f"gptq: act_order must be off, group_aware, static or free, not {self.act_order!r}"
            )
        if self.polish < 0:
            raise RecipeError(f"gptq: polish must be 0 or more passes, not {self.polish}")
        if self.plain:
            changed = [
                f.name
                for f in fields(self)
                if f.name in _PLAIN and getattr(self, f.name) not in (f.default, _PLAIN[f.name])
            ]
            if changed:
                raise RecipeError(
                    f"gptq: plain fixes {', '.join(_PLAIN)}; it cannot be combined with {', '.join(changed)}",
                    remedy="leave out plain",
                )
            for name, value in _PLAIN.items():
                object.__setattr__(self, name, value)


_PLAIN: dict[str, str | int] = {"scales": "absmax", "act_order": "off", "polish": 0}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the weights of a site share: its curvature in processing order, the factor of that, and the
    mean square of each input (in,) in file order. Without a factor every weight is rounded by itself.
    """

    curvature: Curvature
    factor: Factor | None
    importance: Tensor
    note: str | None


@dataclass(frozen=True, slots=True)
class _Solved:
    """Some rows in file order: stored codes (rows, in), fp32 scales and zero points (rows, groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True)
class Gptq:
    """Quantizer[Prepared]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.GRAM

    @property
    def ties_rows(self) -> bool:
        return False

    @property
    def regroups_columns(self) -> bool:
        return self.params.act_order == "free"

    def accepts(self, scheme: Scheme) -> str | None:
        if scheme.activations is not None and scheme.activations.outliers is not None:
            return "LLM.int8 fixes how weights are rounded; use the method llm_int8"
        if scheme.per_tensor or scheme.tile is not None or scheme.axis == 0:
            shared = "per tensor" if scheme.per_tensor else "per tile" if scheme.tile else "for many rows"
            return f"gptq solves rows separately; one scale {shared} ties them; use the method rtn"
        if self.regroups_columns and not scheme.plain:
            return "act_order free regroups columns of plain integers only"
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Prepared:
        if stats is None or stats.gram is None or stats.tokens == 0:
            raise NumericsError("gptq needs calibration, and no token reached this site")
        seen = curvature(stats.gram, stats.tokens, shrink=not self.params.plain)
        ordered = seen.ordered(self._order(seen.diagonal, scheme))
        importance = stats.gram.diagonal() / stats.tokens
        try:
            found = cholesky.factor(ordered, self.params.damp)
        except NumericsError as error:
            return Prepared(ordered, None, importance, f"rounded to nearest: {error.message}")
        return Prepared(ordered, found, importance, found.note)

    def quantize(self, weight: Tensor, prepared: Prepared, scheme: Scheme) -> Outcome:
        if prepared.factor is None:
            return Outcome(nearest(weight, scheme, self.params.scales, prepared.importance), prepared.note)
        stored = stored_of(scheme, weight)
        width = weight.shape[1]
        fixed: Grid | None = None
        # one group per row has the same grid whether it is fitted before or when its first column is met
        if self.params.act_order == "static" or scheme.nested or (scheme.group_size or width) == width:
            fixed = fit_groups(weight, scheme, self.params.scales, stored, prepared.importance)
        pieces = [
            self._solve(weight[rows], prepared, prepared.factor, scheme, stored, _cut(fixed, rows))
            for rows in _pieces(weight)
        ]
        zeros = [p.zero for p in pieces if p.zero is not None]
        kept = stored.build(torch.cat([p.scale for p in pieces])) if fixed is None else fixed.kept
        codes = torch.cat([p.codes for p in pieces])
        whole = assemble(codes, kept, torch.cat(zeros) if zeros else None, scheme)
        if self.params.act_order == "free" and isinstance(whole, Affine):
            whole = replace(whole, column_group=self._column_group(prepared.curvature.order, scheme))
        return Outcome(whole, prepared.note)

    def _order(self, diagonal: Tensor, scheme: Scheme) -> Tensor:
        match self.params.act_order:
            case "off":
                return feedback.natural(diagonal.shape[0], diagonal.device)
            case "group_aware":
                return feedback.group_aware(diagonal, scheme.group_size or diagonal.shape[0])
            case "static" | "free":
                return feedback.descending(diagonal)

    def _solve(
        self,
        weight: Tensor,
        site: Prepared,
        factor: Factor,
        scheme: Scheme,
        stored: Stored,
        fixed: _Fixed | None,
    ) -> _Solved:
        """Codes of some rows: feedback on fixed or fitted grids, then the polish."""
        width, order, levels = weight.shape[1], site.curvature.order, levels_of(scheme)
        columns = scheme.group_size or width
        w_io = weight.T[order].contiguous()
        position = torch.arange(width, device=weight.device) // columns
        if fixed is not None:
            scale, zero = fixed
            known = StaticGroups(scale, zero, position[order])
            codes_io = round_with_feedback(w_io, factor, known, levels, _BATCH_COLUMNS).codes_io
        else:
            dynamic = DynamicGroups(self._fit(site, scheme, stored), columns)
            batch = feedback.batch_width(columns, _BATCH_COLUMNS)
            codes_io = round_with_feedback(w_io, factor, dynamic, levels, batch).codes_io
            scale, zero = dynamic.tables()
            known = StaticGroups(scale, zero, position)
        if self.params.polish:
            polish(codes_io, w_io, site.curvature, known, levels, self.params.polish, _BATCH_COLUMNS)
        if fixed is None and self.params.act_order == "group_aware":
            met = torch.argsort(order[::columns] // columns)
            scale, zero = scale[:, met], None if zero is None else zero[:, met]
        stored_io = levels.stored(codes_io)
        codes = torch.empty_like(stored_io)
        codes[order] = stored_io
        return _Solved(codes.T.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous())

    def _column_group(self, order: Tensor, scheme: Scheme) -> Tensor | None:
        """(in,) group of each column in file order, when groups were cut in processing order."""
        width = order.shape[0]
        columns = scheme.group_size or width
        if columns == width:
            return None
        found = torch.empty(width, dtype=torch.int32, device=order.device)
        found[order] = (torch.arange(width, device=order.device) // columns).to(torch.int32)
        return found

    def _fit(self, site: Prepared, scheme: Scheme, stored: Stored) -> Fit:
        in_order, levels = site.importance[site.curvature.order], levels_of(scheme)

        def fit(w: Tensor, members: slice) -> tuple[Tensor, Tensor | None]:
            return grids.choose(w, levels, stored, self.params.scales, in_order[members])

        return fit


def quantizer(params: Params) -> Gptq:
    """The method with these parameters."""
    return Gptq(params)


def _pieces(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _PIECE[weight.device.type] // weight.shape[1])
    for at in range(0, weight.shape[0], rows):
        yield slice(at, at + rows)


def _cut(grid: Grid | None, rows: slice) -> _Fixed | None:
    """Scales and zero points of some rows."""
    if grid is None:
        return None
    return grid.scale[rows], None if grid.zero is None else grid.zero[rows]
