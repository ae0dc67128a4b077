"""GPTQ: rounding with error feedback, on importance-weighted scales, then coordinate descent.

Per site: one damped factor of the gram, shared by all its weights. Per weight: scales searched with
the mean square of each input as importance, feedback in a sensible column order, a polish that revisits
codes with scales fixed, and scales refitted to the codes. What refines must prove itself first, on some
rows of the weights and on tokens that had no say. `plain: true` is what most tools do (absmax scales,
columns in file order, no polish), kept by name because people compare and reproduce.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.gguf import rounding
from quantkit.numerics import cholesky, feedback
from quantkit.numerics.corrected import correction, loss
from quantkit.numerics.curvature import curvature
from quantkit.numerics.grids import SCALES, Scales
from quantkit.numerics.nearest import Grid, assemble, fit_groups, nearest
from quantkit.numerics.solve import Order, Seen, Solver, Steps
from quantkit.numerics.stored import stored_of
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedTensor, dequantize, stacked

T = TypeVar("T")

SUMMARY = "error feedback on searched scales, calibrated; the default for 2 to 4 bits"

# Elements of a weight worked on at once; rows are independent, so this bounds memory, not quality.
# On a GPU every column step is a few kernel launches whatever the rows: larger pieces, fewer launches.
_PIECE = {"cpu": 1 << 23, "cuda": 1 << 28}
# Rows on which refinements are tried: the loss is a sum over rows, so a few of them rank alternatives.
_TRIAL_ROWS = 128
# Fewer held-out tokens (of an expert) prove nothing.
_JUDGED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of GPTQ.

    damp       fraction of the mean diagonal added to the gram before it is factorised
    scales     `weighted` (searched by importance), `mse` (searched), or a convention as `absmax`
    act_order  column order: `group_aware` important groups first, important columns first inside them;
               `static` important columns first on scales fixed beforehand; `free` important columns
               first, groups cut in that order, which the file must record (`g_idx`); `off` file order
    polish     passes of coordinate descent after the feedback
    refit      times that scales are refitted to the codes, through the gram, with one more pass after each
    corrected  share of the way to weights that repair what the blocks before have done to the inputs, taken
               where it lowers the loss on held-out tokens; 0.25 is a good one, and needs `feedback: true`
    accept     take each refinement only where it lowers the loss on held-out tokens, judged on some rows
    plain      GPTQ as first published: absmax scales, file order, no shrinkage, no refinement
    """

    damp: float = 0.01
    scales: Scales = "weighted"
    act_order: Order = "group_aware"
    polish: int = 2
    refit: int = 2
    corrected: float = 0.0
    accept: bool = True
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
        if self.refit < 0:
            raise RecipeError(f"gptq: refit must be 0 or more times, not {self.refit}")
        if not 0 <= self.corrected <= 1:
            raise RecipeError(f"gptq: corrected must lie between 0 and 1, not {self.corrected}")
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


_PLAIN: dict[str, str | float | bool] = {
    "scales": "absmax",
    "act_order": "off",
    "polish": 0,
    "refit": 0,
    "corrected": 0.0,
    "accept": False,
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the weights of a site share.

    whole       solves with everything that was seen
    correction  (in, in) what corrected targets add to a weight, multiplied by it; None: nothing
    stats       from which a trial takes what is not held out; None: nothing is judged
    """

    whole: Seen
    correction: Tensor | None = None
    stats: Statistics | None = None


@dataclass(frozen=True, slots=True)
class Gptq:
    """Quantizer[Prepared]."""

    params: Params

    @property
    def needs(self) -> Need:
        held = Need.HELDOUT if self._judges else Need.NOTHING
        return Need.GRAM | held | (Need.CROSS if self.params.corrected else Need.NOTHING)

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
        if scheme.ggml and rounding.solvable(scheme) and self.params.scales != "weighted":
            return f"{scheme.numbers} has scales of its own kind, searched by importance: use scales weighted"
        if scheme.ggml and self.params.act_order == "static":
            return f"scales of {scheme.numbers} are searched on the way; use act_order group_aware or off"
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Prepared:
        if stats is None or stats.gram is None or stats.tokens == 0:
            raise NumericsError("gptq needs calibration, and no token reached this site")
        if scheme.ggml and not rounding.solvable(scheme):
            seen = curvature(stats.gram, stats.tokens, shrink=False)
            return Prepared(Seen(seen, None, stats.importance(), None))
        judges = self._judges and stats.held is not None and stats.held.tokens >= _JUDGED_TOKENS
        return replace(self._prepared(stats, scheme), stats=stats if judges else None)

    def quantize(self, weight: Tensor, prepared: Prepared, scheme: Scheme) -> Outcome:
        whole = prepared.whole
        if whole.factor is None and scheme.ggml:
            return Outcome(rounding.nearest(weight, scheme, whole.importance), whole.note)
        if whole.factor is None:
            return Outcome(nearest(weight, scheme, self.params.scales, whole.importance), whole.note)
        share, stages = self._decided(weight, prepared, scheme)
        facts = {} if prepared.stats is None else {"refinements": float(stages - 1)}
        if prepared.correction is not None:
            facts["corrected"] = share
        return Outcome(self._solved(weight, prepared, scheme, share, stages), whole.note, facts)

    def _solved(
        self, weight: Tensor, prepared: Prepared, scheme: Scheme, share: float, stages: int
    ) -> QuantizedTensor:
        """The result of stage number `stages` for all rows."""
        whole = prepared.whole
        if scheme.ggml:
            target = _corrected(weight, prepared, share)
            runs = (rounding.stages(target[rows], scheme, whole, self._steps) for rows in _pieces(weight))
            return stacked([_nth(run, stages) for run in runs])
        solver, target, fixed = self._set_up(weight, prepared, scheme, share)
        pieces = []
        for rows in _pieces(weight):
            found = solver.stages(target[rows], self._steps, _cut(fixed, rows))
            pieces.append(_nth(found, stages))
        scale = torch.cat([p.scale for p in pieces])
        zeros = [p.zero for p in pieces if p.zero is not None]
        kept = solver.stored.build(scale) if fixed is None or not scheme.nested else fixed.kept
        codes = torch.cat([p.codes for p in pieces])
        result = assemble(codes, kept, torch.cat(zeros) if zeros else None, scheme)
        if self.params.act_order == "free" and isinstance(result, Affine):
            result = replace(result, column_group=_column_group(whole.curvature.order, scheme))
        return result

    @property
    def _steps(self) -> Steps:
        return Steps(self.params.polish, self.params.refit)

    @property
    def _judges(self) -> bool:
        return self.params.accept and self.params.polish > 0

    def _seen(self, stats: Statistics, scheme: Scheme) -> Seen:
        if stats.gram is None:
            raise ValueError("a site without a gram")
        seen = curvature(stats.gram, stats.tokens, shrink=not self.params.plain)
        ordered = seen.ordered(self._order(seen.diagonal, scheme))
        importance = stats.gram.diagonal() / stats.tokens
        try:
            found = cholesky.factor(ordered, self.params.damp)
        except NumericsError as error:
            return Seen(ordered, None, importance, f"rounded to nearest: {error.message}")
        return Seen(ordered, found, importance, found.note)

    def _prepared(self, stats: Statistics, scheme: Scheme) -> Prepared:
        whole = self._seen(stats, scheme)
        if stats.gram is None or stats.cross is None or whole.factor is None:
            return Prepared(whole)
        return Prepared(whole, correction(stats.gram, stats.cross))

    def _set_up(
        self, weight: Tensor, prepared: Prepared, scheme: Scheme, share: float
    ) -> tuple[Solver, Tensor, Grid | None]:
        """What solves, what it solves for, and grids that are fitted before it starts.

        One group per row has the same grid whether it is fitted before or when its first column is met.
        """
        seen, width = prepared.whole, weight.shape[1]
        weight = _corrected(weight, prepared, share)
        solver = Solver(seen, scheme, stored_of(scheme, weight), self.params.act_order, self.params.scales)
        fixed = None
        if self.params.act_order == "static" or scheme.nested or (scheme.group_size or width) == width:
            fixed = fit_groups(weight, scheme, self.params.scales, solver.stored, seen.importance)
        return solver, weight, fixed

    def _decided(self, weight: Tensor, prepared: Prepared, scheme: Scheme) -> tuple[float, int]:
        """(share of the correction, stages) of smallest loss on the held-out tokens, tried on some rows."""
        wanted = self.params.corrected if prepared.correction is not None else 0.0
        if prepared.stats is None:
            return wanted, self._steps.stages
        rest, held = prepared.stats.split()
        trial = self._prepared(rest, scheme)
        if held.gram is None or trial.whole.factor is None:
            return wanted, self._steps.stages
        chosen = weight[:: -(-weight.shape[0] // _TRIAL_ROWS)].contiguous()
        best, decided = torch.inf, (0.0, 1)
        for share in dict.fromkeys((0.0, wanted)):
            for number, values in enumerate(self._tried(chosen, trial, scheme, share), 1):
                found = loss(chosen, values, held.gram, held.cross)
                if found < best:
                    best, decided = found, (share, number)
        return decided

    def _tried(self, weight: Tensor, prepared: Prepared, scheme: Scheme, share: float) -> Iterator[Tensor]:
        """(rows, in) fp32 values after every stage."""
        if scheme.ggml:
            target = _corrected(weight, prepared, share)
            found = rounding.stages(target, scheme, prepared.whole, self._steps)
            return (dequantize(q) for q in found)
        solver, target, fixed = self._set_up(weight, prepared, scheme, share)
        return (stage.values for stage in solver.stages(target, self._steps, fixed))

    def _order(self, diagonal: Tensor, scheme: Scheme) -> Tensor:
        if scheme.ggml and self.params.act_order != "off":
            return rounding.order(scheme, diagonal)
        match self.params.act_order:
            case "off":
                return feedback.natural(diagonal.shape[0], diagonal.device)
            case "group_aware":
                return feedback.group_aware(diagonal, scheme.group_size or diagonal.shape[0])
            case "static" | "free":
                return feedback.descending(diagonal)


def quantizer(params: Params) -> Gptq:
    """The method with these parameters."""
    return Gptq(params)


def _pieces(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _PIECE[weight.device.type] // weight.shape[1])
    for at in range(0, weight.shape[0], rows):
        yield slice(at, at + rows)


def _corrected(weight: Tensor, prepared: Prepared, share: float) -> Tensor:
    """What is rounded in place of `weight`, see `Params.corrected`."""
    if not share or prepared.correction is None:
        return weight
    return weight + share * (weight @ prepared.correction)


def _cut(grid: Grid | None, rows: slice) -> Grid | None:
    """The grids of some rows; their stored form stays that of all."""
    if grid is None:
        return None
    return replace(grid, scale=grid.scale[rows], zero=None if grid.zero is None else grid.zero[rows])


def _nth(stages: Iterator[T], number: int) -> T:
    """The result of stage `number`, counted from 1, or of the last one there is."""
    return list(itertools.islice(stages, number))[-1]


def _column_group(order: Tensor, scheme: Scheme) -> Tensor | None:
    """(in,) group of each column in file order, when groups were cut in processing order."""
    width = order.shape[0]
    columns = scheme.group_size or width
    if columns == width:
        return None
    found = torch.empty(width, dtype=torch.int32, device=order.device)
    found[order] = (torch.arange(width, device=order.device) // columns).to(torch.int32)
    return found
