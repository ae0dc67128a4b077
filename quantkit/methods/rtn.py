"""Round to nearest: every weight to the closest point of its grid, each on its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.numerics.grids import Scales
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme

SUMMARY = "round to nearest; data-free unless scales are weighted"


@dataclass(frozen=True, slots=True)
class Params:
    """scales: `absmax` (what most tools do), `mse` (searched), `weighted` (searched, by importance)."""

    scales: Scales = "absmax"

    def __post_init__(self) -> None:
        if self.scales not in ("absmax", "mse", "weighted"):
            raise RecipeError(f"rtn: scales must be absmax, mse or weighted, not {self.scales!r}")


@dataclass(frozen=True, slots=True)
class Rtn:
    """Quantizer[importance (in,) or None]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.SQUARES if self.params.scales == "weighted" else Need.NOTHING

    @property
    def regroups_columns(self) -> bool:
        return False

    def accepts(self, scheme: Scheme) -> str | None:
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Tensor | None:
        if self.needs is Need.NOTHING:
            return None
        if stats is None or stats.tokens == 0:
            raise NumericsError("weighted scales need statistics, and no token reached this site")
        return stats.importance()

    def quantize(self, weight: Tensor, prepared: Tensor | None, scheme: Scheme) -> Outcome:
        return Outcome(nearest(weight, scheme, self.params.scales, prepared))


def quantizer(params: Params) -> Rtn:
    """The method with these parameters."""
    return Rtn(params)
