"""Quantizing the weights of one site for every target, and how large the error became."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError
from quantkit.gguf import rounding
from quantkit.model.fused import fused_sets
from quantkit.model.graph import Site, Weight
from quantkit.numerics.inputs import input_scale
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Outcome, Quantizer
from quantkit.recipe.plan import TargetPlan
from quantkit.schemes import Scheme
from quantkit.tensors import (
    Affine,
    Codebook,
    Float,
    Lattice,
    QuantizedLinear,
    QuantizedTensor,
    dequantize,
    rows,
    shape,
)

# An error is measured on at most so many evenly spaced rows: within a few percent of all of them, and
# measuring does not cost more than solving.
_MEASURED_ROWS = 256


@dataclass(frozen=True, slots=True)
class TensorMetrics:
    """One row of the report.

    error   relative error: of the output, ‖(Ŵ−W)Xᵀ‖²/‖WXᵀ‖², when a gram was collected; with inputs
            weighted by mean square when only those are known; of the weights otherwise; on at most
            _MEASURED_ROWS evenly spaced rows
    metric  which of the three: `output`, `weighted`, `weights`
    note    a fallback, a raised damping, a transform that was not applied
    facts   other numbers by name (`outlier_columns`)
    """

    name: str
    scheme: str
    tokens: int
    error: float
    metric: str
    note: str | None
    facts: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Made:
    """What one target made of one weight."""

    linear: QuantizedLinear
    metrics: TensorMetrics


@dataclass(frozen=True, slots=True)
class Rescaled:
    """The inputs of a site as a target sees them: divided by `factors` (in,), or as they are (None).

    note  why a transform was not applied
    """

    factors: Tensor | None = None
    note: str | None = None

    def told(self, made: Made) -> Made:
        """`made` with this in its metrics: a reason, or the largest factor beside the smallest."""
        metrics = made.metrics
        if self.note is not None:
            both = self.note if metrics.note is None else f"{metrics.note}; {self.note}"
            metrics = replace(metrics, note=both)
        if self.factors is not None:
            spread = float(self.factors.max() / self.factors.min())
            metrics = replace(metrics, facts={**metrics.facts, "rescaled_spread": spread})
        return replace(made, metrics=metrics)


def quantize_site(
    site: Site,
    stats: Statistics | None,
    weight_of: Callable[[Weight], Tensor],
    targets: Sequence[TargetPlan],
    rescaled: Mapping[str, Rescaled],
) -> dict[str, list[Made]]:
    """Codes for every weight of a site, by target name.

    Weights of one scheme are stacked and solved together: rows are independent. What a site prepares
    is shared by targets that ask for the same thing, and only one such thing is held at a time: it may be
    as large as the gram. `rescaled` holds what transforms did, by target name.
    """
    jobs: dict[tuple[Quantizer[Any], Scheme, str | None], list[tuple[TargetPlan, list[Weight]]]] = {}
    for target in targets:
        own = rescaled.get(target.name, Rescaled())
        apart = None if own.factors is None else target.name
        for scheme, weights in _by_scheme(site, target).items():
            jobs.setdefault((target.quantizer, scheme, apart), []).append((target, weights))
    made: dict[str, list[Made]] = {}
    untouched = _Source(site, stats, weight_of)
    for (quantizer, scheme, apart), alike in jobs.items():
        source = untouched if apart is None else untouched.through(rescaled[apart].factors)
        with naming(alike[0][1]):
            prepared = source.prepare(quantizer, scheme)
        for target, weights in alike:
            own = rescaled.get(target.name, Rescaled())
            for stack in _stacks(weights, scheme, quantizer):
                with naming(stack):
                    results = source.solve(stack, quantizer, scheme, prepared)
                made.setdefault(target.name, []).extend(own.told(m) for m in results)
    place = {weight.key: number for number, weight in enumerate(site.weights)}
    return {name: sorted(found, key=lambda m: place[m.linear.name]) for name, found in made.items()}


@contextmanager
def naming(weights: Sequence[Weight]) -> Iterator[None]:
    """Errors of what is done to these weights say which they are: methods do not know."""
    try:
        yield
    except NumericsError as error:
        if any(weight.name in error.message for weight in weights):
            raise
        names = ", ".join(f"`{weight.key}`" for weight in weights)
        raise NumericsError(f"{names}: {error.message}", remedy=error.remedy) from error


def _by_scheme(site: Site, target: TargetPlan) -> dict[Scheme, list[Weight]]:
    found: dict[Scheme, list[Weight]] = {}
    for weight in site.weights:
        scheme = target.scheme_of(weight)
        if scheme is not None:
            found.setdefault(scheme, []).append(weight)
    return found


def _stacks(
    weights: Sequence[Weight], scheme: Scheme, quantizer: Quantizer[Any]
) -> Iterator[Sequence[Weight]]:
    """Weights that are solved together: those that engines fuse, where these must share the scale of the
    tensor; one by one where rows share scales, or where nothing is gained by it; else all."""
    if scheme.numbers == "nvfp4":
        yield from fused_sets(weights)
    elif scheme.ties_rows or quantizer.ties_rows or quantizer.needs is Need.NOTHING:
        yield from ([weight] for weight in weights)
    else:
        yield weights


@dataclass(frozen=True, slots=True)
class _Source:
    """The weights of a site and what was seen there, as one target sees them."""

    site: Site
    stats: Statistics | None
    weight_of: Callable[[Weight], Tensor]

    def through(self, factors: Tensor | None) -> _Source:
        """Inputs divided by `factors` (in,), columns of weights multiplied."""
        if factors is None:
            return self
        read = self.weight_of
        stats = None if self.stats is None else self.stats.through(factors)
        return _Source(self.site, stats, lambda weight: read(weight).to(torch.float32) * factors)

    @property
    def tokens(self) -> int:
        """Tokens that were seen here, none of them by other experts."""
        return 0 if self.stats is None else self.stats.tokens - self.stats.prior

    def prepare(self, quantizer: Quantizer[Any], scheme: Scheme) -> Any:
        if quantizer.needs is Need.NOTHING or (self.stats is not None and self.stats.tokens):
            return quantizer.prepare(self.stats, scheme)
        if self.site.experts:
            return None
        raise NumericsError(
            f"no calibration token reached `{self.site.id}`",
            remedy="this is a fault of the observation, not of the text: please report it",
        )

    def solve(
        self, weights: Sequence[Weight], quantizer: Quantizer[Any], scheme: Scheme, prepared: Any
    ) -> list[Made]:
        """Codes of weights of one scheme, stacked."""
        read = [self.weight_of(w).to(torch.float32) for w in weights]
        stacked = read.pop() if len(read) == 1 else torch.cat(read)
        del read
        if prepared is None and quantizer.needs is not Need.NOTHING:
            outcome = _starved(stacked, scheme)
        else:
            outcome = quantizer.quantize(stacked, prepared, scheme)
            if self.tokens == 0 and quantizer.needs is not Need.NOTHING:
                unseen = "no calibration token reached this expert: it was rounded by what the others saw"
                note = unseen if outcome.note is None else f"{outcome.note}; {unseen}"
                outcome = replace(outcome, note=note)
        inputs = self._input_scale(scheme)
        made, row = [], 0
        for weight in weights:
            own = slice(row, row + weight.shape[0])
            part = outcome.weight if len(weights) == 1 else rows(outcome.weight, own)
            row = own.stop
            error, metric = relative_error(stacked[own], part, self.stats)
            metrics = TensorMetrics(
                weight.key, scheme.name, self.tokens, error, metric, outcome.note, outcome.facts
            )
            made.append(
                Made(QuantizedLinear(weight.key, on_device(part, torch.device("cpu")), inputs), metrics)
            )
        return made

    def _input_scale(self, scheme: Scheme) -> Tensor | None:
        """The one scale of static inputs, (1,) in the dtype of scales."""
        if scheme.activations is None or scheme.activations.dynamic:
            return None
        if self.stats is None or self.stats.absmax is None:
            raise NumericsError(f"static inputs of `{self.site.id}` need statistics, and none were taken")
        return input_scale(self.stats.absmax, scheme).cpu()


def _starved(weight: Tensor, scheme: Scheme) -> Outcome:
    """An expert that no calibration token reached is rounded with searched scales, and said to be."""
    rounded = rounding.nearest(weight, scheme, None) if scheme.ggml else nearest(weight, scheme, "mse")
    return Outcome(rounded, "no calibration token reached this expert: rounded to nearest")


def _row_by_row(q: QuantizedTensor) -> bool:
    """Whether `rows` can cut it: groups span one row or all, and so do those of its scales."""
    flat = not isinstance(q.scale, Tensor) and shape(q.scale)[0] == 1 and shape(q)[0] != 1
    apart = isinstance(q, Affine) and q.row_group is not None
    nested = isinstance(q.scale, Tensor) or _row_by_row(q.scale)
    return q.group[0] in (1, shape(q)[0]) and not flat and not apart and nested


def on_device(q: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """A copy whose tensors are on `device`, contiguous and shared with nothing."""

    def moved(value: Any) -> Any:
        match value:
            case Tensor():
                # a slice of a stack would keep the whole stack alive
                return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
            case Affine() | Float() | Codebook() | Lattice():
                return on_device(value, device)
            case _:
                return value

    return type(q)(**{f.name: moved(getattr(q, f.name)) for f in fields(q)})


def relative_error(w: Tensor, q: QuantizedTensor, stats: Statistics | None) -> tuple[float, str]:
    """(error, metric) of a quantized weight, see `TensorMetrics`; w (out, in) fp32."""
    seen = stats if stats is not None and stats.tokens > 0 else None
    gram = None if seen is None else seen.gram
    known = seen is not None and (gram is not None or seen.squares is not None)
    importance = seen.importance() if seen is not None and known else None
    chosen = slice(None, None, -(-w.shape[0] // _MEASURED_ROWS))
    part = w[chosen]
    found = dequantize(rows(q, chosen)) if _row_by_row(q) else dequantize(q)[chosen]
    delta = found.to(w.device) - part

    def power(x: Tensor) -> float:
        if gram is not None:
            return float(((x @ gram) * x).sum())
        return float((x.square() @ importance).sum()) if importance is not None else float(x.square().sum())

    error, whole = power(delta), power(part)
    metric = "output" if gram is not None else "weighted" if importance is not None else "weights"
    return (error / whole if whole > 0 else 0.0), metric
