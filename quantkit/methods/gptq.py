"""GPTQ: rounding with error feedback, on importance-weighted scales, then coordinate descent.

Per site: one damped factor of the gram, shared by all its weights. Per weight: scales searched with
the mean square of each input as importance, feedback in a sensible column order, and a polish that
revisits codes with scales fixed. `plain: true` is what most tools do (absmax scales, columns in file
order, no polish), kept by name because people compare and reproduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.numerics import affine, cholesky, feedback, grids
from quantkit.numerics.feedback import DynamicGroups, StaticGroups
from quantkit.numerics.grids import Scales
from quantkit.numerics.nearest import fit_groups, nearest
from quantkit.numerics.polish import polish
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme
from quantkit.tensors import Affine

SUMMARY = "error feedback on searched scales, calibrated; the default for 2 to 4 bits"

Order = Literal["off", "group_aware", "static", "free"]
# Elements of a weight worked on at once; rows are independent, so this bounds memory, not quality.
# On a GPU every column step is a few kernel launches whatever the rows: larger pieces, fewer launches.
_PIECE = {"cpu": 1 << 23, "cuda": 1 << 28}
_BATCH_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of GPTQ.

    damp       fraction of the mean diagonal added to the gram before it is factorised
    scales     `weighted` (searched by importance), `mse` (searched), `absmax`
    act_order  column order: `off` file order; `group_aware` important groups first, important columns
               first inside them; `static` important columns first on scales fixed beforehand; `free`
               the same with groups cut in that order, which the file must record (`g_idx`)
    polish     passes of coordinate descent after the feedback
    plain      GPTQ as first published: absmax scales, file order, no shrinkage, no polish
    """

    damp: float = 0.01
    scales: Scales = "weighted"
    act_order: Order = "static"
    polish: int = 3
    plain: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise RecipeError(f"gptq: damp must lie between 0 and 1, not {self.damp}")
        if self.scales not in ("absmax", "mse", "weighted"):
            raise RecipeError(f"gptq: scales must be absmax, mse or weighted, not {self.scales!r}")
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
    """What the weights of a site share.

    order       (in,) processing order of the columns
    upper       (in, in) factor in that order, or None when every weight is rounded by itself
    gram        (in, in) gram / tokens, shrunk, in that order
    importance  (in,) mean square of each input, in file order
    """

    order: Tensor
    upper: Tensor | None
    gram: Tensor
    importance: Tensor
    note: str | None


@dataclass(frozen=True, slots=True)
class Gptq:
    """Quantizer[Prepared]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.GRAM

    @property
    def regroups_columns(self) -> bool:
        return self.params.act_order == "free"

    def accepts(self, scheme: Scheme) -> str | None:
        return "gptq solves rows separately; one scale per tensor ties them" if scheme.per_tensor else None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Prepared:
        if stats is None or stats.gram is None or stats.tokens == 0:
            raise NumericsError("gptq needs calibration, and no token reached this site")
        gram = stats.gram / stats.tokens
        importance = gram.diagonal().clone()
        if not bool(torch.isfinite(importance).all()):
            raise NumericsError("the gram of this site holds non-finite values")
        cholesky.revive_(gram)
        if not self.params.plain:
            cholesky.shrink_(gram, stats.tokens)
        order = self._order(gram.diagonal(), scheme)
        try:
            found = cholesky.factor(gram, order, self.params.damp)
        except NumericsError as error:
            return Prepared(order, None, gram, importance, f"rounded to nearest: {error.message}")
        if self.params.polish:
            gram = gram.index_select(0, order).index_select(1, order)
        return Prepared(order, found.upper, gram, importance, found.note)

    def quantize(self, weight: Tensor, prepared: Prepared, scheme: Scheme) -> Outcome:
        if prepared.upper is None:
            return Outcome(nearest(weight, scheme, self.params.scales, prepared.importance), prepared.note)
        pieces = [self._solve(rows, prepared, prepared.upper, scheme) for rows in _pieces(weight)]
        zeros = [p.zero_point for p in pieces if p.zero_point is not None]
        scales = [p.scale for p in pieces if isinstance(p.scale, Tensor)]
        whole = Affine(
            codes=torch.cat([p.codes for p in pieces]),
            bits=scheme.bits,
            scale=torch.cat(scales),
            group=scheme.group((weight.shape[0], weight.shape[1])),
            zero_point=torch.cat(zeros) if zeros else None,
            column_group=pieces[0].column_group,
        )
        return Outcome(whole, prepared.note)

    def _order(self, diagonal: Tensor, scheme: Scheme) -> Tensor:
        match self.params.act_order:
            case "off":
                return feedback.natural(diagonal.shape[0], diagonal.device)
            case "group_aware":
                return feedback.group_aware(diagonal, scheme.group_size or diagonal.shape[0])
            case "static" | "free":
                return feedback.descending(diagonal)

    def _solve(self, weight: Tensor, site: Prepared, upper: Tensor, scheme: Scheme) -> Affine:
        width = weight.shape[1]
        columns = scheme.group_size or width
        work = weight.T[site.order].contiguous()
        position = torch.arange(width, device=weight.device) // columns
        column_group = None
        if self.params.act_order == "static":
            scale, zero = fit_groups(weight, scheme, self.params.scales, site.importance)
            fixed = StaticGroups(scale, zero, position[site.order])
            codes = self._feedback(work, upper, fixed, scheme)
        else:
            dynamic = DynamicGroups(self._fit(site, scheme), columns)
            codes = self._feedback(work, upper, dynamic, scheme)
            scale, zero = dynamic.tables()
            fixed = StaticGroups(scale, zero, position)
            if self.params.act_order == "free" and columns < width:
                column_group = torch.empty(width, dtype=torch.int32, device=weight.device)
                column_group[site.order] = position.to(torch.int32)
            elif self.params.act_order == "group_aware":
                met = torch.argsort(site.order[::columns] // columns)
                scale, zero = scale[:, met], None if zero is None else zero[:, met]
        if self.params.polish:
            original = weight.T[site.order].contiguous()
            polish(codes, original, site.gram, fixed, scheme.bits, self.params.polish, _BATCH_COLUMNS)
        unordered = torch.empty(
            width, weight.shape[0], dtype=affine.code_dtype(scheme.sym), device=weight.device
        )
        unordered[site.order] = codes.to(unordered.dtype)
        return Affine(
            codes=unordered.T.contiguous(),
            bits=scheme.bits,
            scale=scale.to(getattr(torch, scheme.scale_dtype)).contiguous(),
            group=(1, columns),
            zero_point=None if zero is None else zero.to(torch.uint8).contiguous(),
            column_group=column_group,
        )

    def _feedback(
        self, work: Tensor, upper: Tensor, on: DynamicGroups | StaticGroups, scheme: Scheme
    ) -> Tensor:
        columns = scheme.group_size or work.shape[0]
        batch = _BATCH_COLUMNS
        if isinstance(on, DynamicGroups):
            batch = feedback.batch_width(columns, batch)
        return feedback.round_with_feedback(work, upper, on, scheme.bits, batch).codes_io

    def _fit(self, site: Prepared, scheme: Scheme) -> feedback.Fit:
        in_order = site.importance[site.order]
        dtype = getattr(torch, scheme.scale_dtype)

        def fit(w: Tensor, members: slice) -> tuple[Tensor, Tensor | None]:
            return grids.choose(w, scheme.bits, scheme.sym, self.params.scales, dtype, in_order[members])

        return fit


def quantizer(params: Params) -> Gptq:
    """The method with these parameters."""
    return Gptq(params)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    rows = max(1, _PIECE[weight.device.type] // weight.shape[1])
    for at in range(0, weight.shape[0], rows):
        yield weight[at : at + rows]
