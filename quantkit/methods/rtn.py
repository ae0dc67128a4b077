"""Round to nearest: every weight to the closest point of its grid, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError, RecipeError
from quantkit.gguf import rounding
from quantkit.numerics.grids import SCALES, Scales
from quantkit.numerics.nearest import nearest
from quantkit.numerics.superblocks.plans import Effort
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme

SUMMARY = "round to nearest; data-free unless scales are weighted"


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of rounding to nearest.

    scales  `container` (the convention of the format's own tools; searched where it has none), `absmax`,
            `half_step` and `full_range` (conventions by name, see `numerics.grids`), `mse` (searched) or
            `weighted` (by importance)
    effort  of a search of ggml's k-quants: `fast` takes half the time, and has 1 to 5 % more weighted error
    """

    scales: Literal[Scales, "container"] = "container"
    effort: Effort = "best"

    def __post_init__(self) -> None:
        if self.scales not in ("container", *SCALES):
            known = ", ".join(("container", *SCALES))
            raise RecipeError(f"rtn: scales must be one of {known}, not {self.scales!r}")


@dataclass(frozen=True, slots=True)
class Rtn:
    """Quantizer[importance (in,) or None]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.SQUARES if self.params.scales == "weighted" else Need.NOTHING

    @property
    def ties_rows(self) -> bool:
        return False

    @property
    def regroups_columns(self) -> bool:
        return False

    def accepts(self, scheme: Scheme) -> str | None:
        if scheme.activations is not None and scheme.activations.outliers is not None:
            return "LLM.int8 fixes how weights are rounded; use the method llm_int8"
        if not scheme.ggml:
            return None
        if self.params.scales not in ("container", "mse", "weighted"):
            return f"{scheme.numbers} has scales of its own kind; use scales container, mse or weighted"
        if scheme.numbers in rounding.STARVED and self.params.scales != "weighted":
            return (
                f"{scheme.numbers} needs to know which inputs matter; use the method gptq, or scales weighted"
            )
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> Tensor | None:
        if self.needs is Need.NOTHING:
            return None
        if stats is None or stats.tokens == 0:
            raise NumericsError("weighted scales need statistics, and no token reached this site")
        return stats.importance()

    def quantize(self, weight: Tensor, prepared: Tensor | None, scheme: Scheme) -> Outcome:
        if scheme.ggml and self.params.scales == "container":
            return Outcome(rounding.convention(weight, scheme))
        if scheme.ggml:
            return Outcome(rounding.nearest(weight, scheme, prepared, self.params.effort))
        scales = scheme.convention if self.params.scales == "container" else self.params.scales
        return Outcome(nearest(weight, scheme, scales, prepared))


def quantizer(params: Params) -> Rtn:
    """The method with these parameters."""
    return Rtn(params)
