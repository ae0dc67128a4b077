"""AWQ: columns of weights are rescaled before they are rounded, where that lowers the error of the outputs.

Inputs of a site are divided by s and the columns of its weights multiplied by it:
    s_j = (E|x_j|)^α / (rms_r W_rj)^β
(Lin et al. 2023 have β = 0, or with "duo scaling" β = 1 − α). Groups share a scale, so a column that matters
more than its neighbours, or is smaller, gains from being larger. Exponents are tried on evenly spaced rows
with the rounding that really follows, and judged by the outputs it gives for inputs that had no say in the
codes: tr(Δ·A·Δᵀ) with Δ = Q(W·s)/s − W and A the gram of the tokens held out. No forward pass is needed.
Searched scales and error feedback leave less to gain than rounding to nearest, and at smaller α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import RecipeError
from quantkit.numerics.nearest import nearest
from quantkit.numerics.rescale import balanced, finite, known, spaced
from quantkit.protocols import Quantizer
from quantkit.schemes import Scheme
from quantkit.tensors import dequantize

SUMMARY = "columns of weights are rescaled, where the rounding that follows then errs less; for weights alone"

# (α, β) that are tried from the first on while they gain; where that gains nothing, one gentler pair. What is
# found is within 2 % of the best of many pairs, whatever rounds: docs/methods.md. Without β α must be larger.
_DUO = ((0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 0.5))
_PLAIN = ((0.1, 0.0), (0.2, 0.0), (0.3, 0.0), (0.4, 0.0), (0.5, 0.0))
_GENTLE = {True: (0.0, 0.5), False: (0.05, 0.0)}
# Rows on which trials are compared; with twice as many the choice gains .1 % more.
_ROWS = 128
# A smaller gain on those rows is noise, not worth rewriting what comes before.
_WORTH = 0.995


@dataclass(frozen=True, slots=True)
class Params:
    """Which factors are tried, and by what they are judged."""

    duo: Annotated[bool, "even out the sizes of the columns, too: published as duo scaling"] = True
    alpha: Annotated[
        float | None, "strength at every site, 0 to 1, with 1 − alpha for the columns; null: search"
    ] = None
    grid: Annotated[
        int | None, "try this many even steps of alpha instead of the few that pay; AutoAWQ has 20"
    ] = None
    judge: Annotated[
        Literal["method", "rtn"], "round trials by the method of the target, or to nearest on weighted scales"
    ] = "method"
    spread: Annotated[float, "largest factor over the smallest, which a search does not exceed"] = 16.0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must lie between 0 and 1, not {self.alpha}")
        if self.grid is not None and self.grid < 1:
            raise RecipeError(f"grid must be at least 1 step, not {self.grid}")
        if self.alpha is not None and self.grid is not None:
            raise RecipeError("grid would replace the strength alpha", remedy="leave out one of them")
        if self.spread <= 1:
            raise RecipeError(f"spread must be larger than 1, not {self.spread}")

    def exponents(self) -> tuple[tuple[float, float], ...]:
        """(α, β) in the order in which they are tried."""
        if self.alpha is not None:
            alphas = [self.alpha]
        elif self.grid is not None:
            alphas = [step / self.grid for step in range(self.grid)]
        else:
            return _DUO if self.duo else _PLAIN
        return tuple((alpha, 1 - alpha if self.duo else 0.0) for alpha in alphas)


@dataclass(frozen=True, slots=True)
class Awq:
    """Transform."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.ABSSUM if self.params.alpha is not None else Need.ABSSUM | Need.GRAM | Need.HELDOUT

    def accepts(self, scheme: Scheme) -> str | None:
        if scheme.activations is not None and scheme.activations.outliers is not None:
            return "LLM.int8 keeps outlier columns in 16 bits by their size, which rescaling would change"
        if scheme.activations is not None:
            return "AWQ makes columns of weights larger whatever rounded inputs lose by it; use smoothquant"
        if scheme.axis == 0:
            return "groups along the outputs follow any rescaling of the inputs and gain nothing"
        if scheme.ggml:
            return f"factors are not folded into the rows of ggml's types, as {scheme.numbers}; leave it out"
        if scheme.numbers == "fp8":
            return "8-bit floats round each weight by its own size, whatever its column is multiplied by"
        if scheme.per_tensor:
            return "one scale for all rows cannot be judged by some of them; use groups or one scale per row"
        return None

    def factors(
        self,
        weight: Tensor,
        stats: Statistics,
        scheme: Scheme,
        quantizer: Quantizer[Any],
        ties: Tensor | None,
    ) -> Tensor | None:
        """None where no token was seen, nothing can be scaled, or no trial proves itself.

        Raises NumericsError for non-finite values.
        """
        if stats.tokens == 0:
            return None
        train, held = stats.split()
        inputs = known(train.abssum, "summed magnitudes", "awq")
        columns = finite(torch.linalg.vector_norm(weight, dim=0), "the weights")
        if self.params.alpha is not None:
            (exponents,) = self.params.exponents()
            found: Tensor | None = strengthening(inputs, columns, exponents, ties)
        else:
            follows = quantizer if self.params.judge == "method" else None
            trials = Trials(spaced(weight, _ROWS), train, held, scheme, follows)
            found = self._searched(trials, inputs, columns, ties)
        return None if found is None or bool((found == 1).all()) else found

    def _searched(
        self, trials: Trials, inputs: Tensor, columns: Tensor, ties: Tensor | None
    ) -> Tensor | None:
        """The factors of smallest loss; None when leaving the site alone is as good."""

        def tried(exponents: tuple[float, float]) -> tuple[float, Tensor]:
            factors = strengthening(inputs, columns, exponents, ties, self.params.spread**0.5)
            return trials.loss(factors), factors

        climbing = self.params.grid is None
        plain = torch.ones_like(inputs)
        found = [(trials.loss(plain), plain)]
        for exponents in self.params.exponents():
            found.append(tried(exponents))
            if climbing and found[-1][0] >= found[-2][0]:
                break
        if climbing and len(found) == 2:
            found.append(tried(_GENTLE[self.params.duo]))
        loss, best = min(found, key=lambda pair: pair[0])
        return best if loss < _WORTH * found[0][0] else None


def transform(params: Params) -> Awq:
    """The transform with these parameters."""
    return Awq(params)


def strengthening(
    inputs: Tensor,
    columns: Tensor,
    exponents: tuple[float, float],
    ties: Tensor | None = None,
    largest: float = 2.0**8,
) -> Tensor:
    """(in,) fp32 factors inputs^α / columns^β, balanced, each within [1/largest, largest].

    inputs (in,) mean |x_j|, columns (in,) root mean square of W_rj, both up to a constant. Where either is
    zero the factor is 1.
    """
    alpha, beta = exponents
    logs = alpha * inputs.double().log() - beta * columns.double().log()
    return balanced(logs, (inputs > 0) & (columns > 0), ties, largest)


@dataclass(frozen=True, slots=True)
class Trials:
    """Rounds some rows of a site's weights under trial factors, and says what that does to their outputs.

    rows       (n, in) fp32 weights to round
    train      what codes are chosen from
    held       whose gram judges them
    quantizer  what chooses the codes, or None: the nearest on scales weighted by importance
    """

    rows: Tensor
    train: Statistics
    held: Statistics
    scheme: Scheme
    quantizer: Quantizer[Any] | None

    def loss(self, factors: Tensor) -> float:
        """Σ_r Δ_r·A·Δ_rᵀ with Δ = Q(W·s)/s − W."""
        gram = known(self.held.gram, "gram entries", "awq")
        delta = self._rounded(self.rows * factors, factors) / factors - self.rows
        return float(torch.sum((delta @ gram) * delta, dtype=torch.float64))

    def _rounded(self, scaled: Tensor, factors: Tensor) -> Tensor:
        if self.quantizer is None:
            importance = self.train.importance() / factors / factors
            return dequantize(nearest(scaled, self.scheme, "weighted", importance))
        prepared = self.quantizer.prepare(self.train.through(factors), self.scheme)
        return dequantize(self.quantizer.quantize(scaled, prepared, self.scheme).weight)
