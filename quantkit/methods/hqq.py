"""HQQ: the zero point of every group fitted to the weights alone, in seconds (Badri and Shaji 2023).

Scale and zero point are rounded to what the file stores before the codes are chosen. The hqq library chooses
codes first; the difference is nothing up to 4 bits, .7 % of the squared error at 8 bits in float16 and
39 % in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import RecipeError
from quantkit.numerics import hqq, offsets
from quantkit.numerics.nearest import assemble
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme

SUMMARY = "half-quadratic fit of fractional zero points; data-free"


@dataclass(frozen=True, slots=True)
class Params:
    """iterations  at most so many; fewer when the mean error of the weight no longer falls
    p           norm of the errors, above 0 and at most 1: the smaller, the less outliers count
    beta        weight of the quadratic term; errors up to beta^(−1/(2−p)) count as squares
    """

    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise RecipeError(f"hqq: iterations must be 1 or more, not {self.iterations}")
        if not 0 < self.p <= 1:
            raise RecipeError(f"hqq: p must be above 0 and at most 1, not {self.p}")
        if not 0 < self.beta < float("inf"):
            raise RecipeError(f"hqq: beta must be a positive number, not {self.beta}")


@dataclass(frozen=True, slots=True)
class Hqq:
    """Quantizer[None]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.NOTHING

    @property
    def regroups_columns(self) -> bool:
        return False

    @property
    def ties_rows(self) -> bool:
        """The mean error of all rows says when to stop: other rows beside them can change a result."""
        return True

    def accepts(self, scheme: Scheme) -> str | None:
        if not scheme.fractional:
            return "hqq's gain is in the fractional zero point; rounded it is round-to-nearest"
        return "hqq fits groups or rows, not whole tensors" if scheme.per_tensor else None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> None:
        return None

    def quantize(self, weight: Tensor, prepared: None, scheme: Scheme) -> Outcome:
        out, width = weight.shape
        rows, columns = scheme.group((out, width))
        axis = scheme.axis
        grouped = weight.reshape(-1, columns) if axis == 1 else weight.reshape(rows, -1)
        given = self.params
        found = hqq.solve(grouped, scheme.bits, axis, given.iterations, given.p, given.beta)
        scale, zero = _rounded(*found, grouped, scheme)
        codes = hqq.codes(grouped, scale, zero, scheme.bits, axis)
        groups = (out // rows, width // columns)
        kept = scale.to(getattr(torch, scheme.scale_dtype)).view(groups)
        return Outcome(assemble(codes.view(out, width), kept, zero.view(groups), scheme))


def quantizer(params: Params) -> Hqq:
    """The method with these parameters."""
    return Hqq(params)


def _rounded(scale: Tensor, zero: Tensor, grouped: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point as stored; a group whose numbers do not fit gets those of min and max."""
    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    kept, kept_zero = scale.to(dtype).float(), zero.to(dtype).float()
    lost = ~(torch.isfinite(kept) & torch.isfinite(kept_zero) & (kept > 0))
    if bool(lost.any()):
        along = grouped if scheme.axis == 1 else grouped.T
        other, other_zero = (v.view(kept.shape) for v in offsets.minmax(along, scheme.bits, dtype))
        kept, kept_zero = torch.where(lost, other, kept), torch.where(lost, other_zero, kept_zero)
    return kept, kept_zero
