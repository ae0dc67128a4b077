"""SmoothQuant: large inputs are made smaller and their weights larger, so that both round well.

Inputs of a site are divided by s and the columns of its weights multiplied by it:
    s_j = max|x_j|^α / max_r |W_rj|^(1−α)          (Xiao et al. 2023, equation 4)
α is chosen per site by the error of its outputs on recorded inputs, with inputs and weights really
rounded, and the site is left alone where no α proves itself on inputs that did not choose it.
Shapes: x and sample (tokens, in), weight (out, in), factors (in,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import RecipeError
from quantkit.numerics.inputs import input_scale, round_inputs
from quantkit.numerics.nearest import nearest
from quantkit.numerics.rescale import balanced, finite, known, spaced
from quantkit.protocols import Quantizer
from quantkit.schemes import Scheme
from quantkit.tensors import dequantize

SUMMARY = "large inputs are scaled down and their weights up, where that lowers the error; for 8-bit inputs"

_PUBLISHED = 0.5
_STRENGTHS = tuple(step / 10 for step in range(10))
# Rows of the weights that a trial rounds: all trials see the same, so few are enough to rank them.
_ROWS = 128
# A smaller gain is noise of the sample, not worth rewriting a norm.
_WORTH = 0.99


@dataclass(frozen=True, slots=True)
class Params:
    """How strongly inputs are scaled down. Once made, exactly one of the two decides."""

    alpha: Annotated[
        float | None, "strength at every site, 0 (by weights alone) to 1 (by inputs alone); null: search"
    ] = None
    search: Annotated[
        bool | None, "choose the strength per site by the error of its outputs; null: unless alpha is given"
    ] = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must lie between 0 and 1, not {self.alpha}")
        if self.alpha is not None and self.search:
            raise RecipeError("search would replace the strength alpha", remedy="leave out one of them")
        if self.search is False and self.alpha is None:
            object.__setattr__(self, "alpha", _PUBLISHED)
        object.__setattr__(self, "search", self.alpha is None)


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """Transform."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.ABSMAX | Need.SAMPLE if self.params.search else Need.ABSMAX

    def accepts(self, scheme: Scheme) -> str | None:
        if scheme.activations is None:
            return "weights alone gain nothing from SmoothQuant; use a scheme that rounds inputs, as w8a8"
        if scheme.activations.outliers is not None:
            return "LLM.int8 keeps outlier columns in 16 bits by their size, which rescaling would change"
        if scheme.axis == 0:
            return "groups along the outputs follow any rescaling of the inputs and gain nothing"
        return None

    def factors(
        self,
        weight: Tensor,
        stats: Statistics,
        scheme: Scheme,
        quantizer: Quantizer[Any],
        ties: Tensor | None,
    ) -> Tensor | None:
        """None where no token was seen, nothing can be scaled, or no strength proves itself.

        Rounded inputs are most of the error, so weights are rounded to nearest on trial, whatever follows.
        Raises NumericsError for non-finite values.
        """
        if stats.tokens == 0:
            return None
        inputs = known(stats.absmax, "largest magnitudes", "smoothquant")
        columns = finite(torch.maximum(weight.amax(0), -weight.amin(0)), "the weights")
        if self.params.alpha is not None:
            found: Tensor | None = smoothing(inputs, columns, self.params.alpha, ties)
        else:
            sample = known(stats.sample, "a sample", "smoothquant")
            trials = Trials(spaced(weight, _ROWS), columns, inputs, sample, scheme)
            found = _searched(trials, columns, inputs, ties)
        return None if found is None or bool((found == 1).all()) else found


def transform(params: Params) -> SmoothQuant:
    """The transform with these parameters."""
    return SmoothQuant(params)


def smoothing(inputs: Tensor, columns: Tensor, alpha: float, ties: Tensor | None = None) -> Tensor:
    """(in,) fp32 factors inputs^α / columns^(1−α), balanced.

    inputs (in,) max |x_j|, columns (in,) max |W_rj|. Where either is zero there is nothing to balance,
    and the factor is 1: an input unseen so far may yet come.
    """
    logs = alpha * inputs.double().log() - (1 - alpha) * columns.double().log()
    return balanced(logs, (inputs > 0) & (columns > 0), ties)


def _searched(trials: Trials, columns: Tensor, inputs: Tensor, ties: Tensor | None) -> Tensor | None:
    """The factors of smallest error; None unless they also win on the rows of the sample that had no say.

    Rows of the sample take turns: even ones choose the strength, odd ones accept or refuse.
    """
    plain = trials.errors(torch.ones_like(inputs))
    best, least = None, plain
    for alpha in _STRENGTHS:
        trial = smoothing(inputs, columns, alpha, ties)
        errors = trials.errors(trial)
        if errors[0::2].sum() < least[0::2].sum():
            best, least = trial, errors
    return best if bool(least[1::2].sum() < _WORTH * plain[1::2].sum()) else None


class Trials:
    """Rounds a site's inputs and some rows of its weights as its scheme says, under trial factors.

    rows    (n, in) weights to round
    columns (in,) max |W_rj| over all rows of the site
    inputs  (in,) max |x_j| over all tokens, from which a static scale follows
    sample  (tokens, in) inputs to round
    """

    def __init__(self, rows: Tensor, columns: Tensor, inputs: Tensor, sample: Tensor, scheme: Scheme) -> None:
        self._rows, self._columns, self._inputs = rows, columns, inputs
        self._sample, self._scheme = sample, scheme
        self._outputs = sample @ rows.T

    def errors(self, factors: Tensor) -> Tensor:
        """(tokens,) fp64 squared error of the outputs of each input."""
        found = self._rounded_inputs(factors) @ self._rounded_rows(factors).T
        return (found - self._outputs).square().sum(1, dtype=torch.float64)

    def _rounded_inputs(self, factors: Tensor) -> Tensor:
        activations = self._scheme.activations
        static = activations is not None and not activations.dynamic
        scale = input_scale(self._inputs / factors, self._scheme) if static else None
        return round_inputs(self._sample / factors, self._scheme, scale)

    def _rounded_rows(self, factors: Tensor) -> Tensor:
        scaled = self._rows * factors
        if self._scheme.per_tensor:
            # the one scale is that of all rows: the largest of each column stand in for those left out
            scaled = torch.cat((scaled, (self._columns * factors)[None]))
        return dequantize(nearest(scaled, self._scheme, "absmax"))[: self._rows.shape[0]]
