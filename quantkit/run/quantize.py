"""Quantizing the weights of one site for every target, and how large the error became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError
from quantkit.model.graph import Site, Weight
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Outcome, Quantizer
from quantkit.recipe.plan import TargetPlan
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize, shape

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
    """

    name: str
    scheme: str
    tokens: int
    error: float
    metric: str
    note: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Made:
    """What one target made of one weight."""

    linear: QuantizedLinear
    metrics: TensorMetrics


def quantize_site(
    site: Site, stats: Statistics | None, weight_of: Callable[[Weight], Tensor], targets: Sequence[TargetPlan]
) -> dict[str, list[Made]]:
    """Codes for every weight of a site, by target name.

    Weights of one scheme are stacked and solved together: rows are independent. What a site prepares
    is shared by targets that ask for the same thing.
    """
    prepared: dict[tuple[Quantizer[Any], Scheme], Any] = {}
    made: dict[str, list[Made]] = {}
    for target in targets:
        by_scheme: dict[Scheme, list[Weight]] = {}
        for weight in site.weights:
            scheme = target.scheme_of(weight)
            if scheme is not None:
                by_scheme.setdefault(scheme, []).append(weight)
        for scheme, weights in by_scheme.items():
            key = (target.quantizer, scheme)
            if key not in prepared:
                prepared[key] = _prepare(site, stats, target.quantizer, scheme)
            for stack in [[w] for w in weights] if scheme.per_tensor else [weights]:
                made.setdefault(target.name, []).extend(
                    _solve(stack, stats, weight_of, target.quantizer, scheme, prepared[key])
                )
    return made


def _prepare(site: Site, stats: Statistics | None, quantizer: Quantizer[Any], scheme: Scheme) -> Any:
    starved = quantizer.needs is not Need.NOTHING and (stats is None or stats.tokens == 0)
    if not starved:
        return quantizer.prepare(stats, scheme)
    if ".experts." in site.weights[0].name or site.weights[0].part is not None:
        return None
    raise NumericsError(
        f"no calibration token reached `{site.id}`, which `{site.weights[0].name}` needs",
        remedy="this is a fault of the observation, not of the text: please report it",
    )


def _solve(
    weights: Sequence[Weight],
    stats: Statistics | None,
    weight_of: Callable[[Weight], Tensor],
    quantizer: Quantizer[Any],
    scheme: Scheme,
    prepared: Any,
) -> list[Made]:
    stacked = torch.cat([weight_of(w).to(torch.float32) for w in weights])
    if prepared is None and quantizer.needs is not Need.NOTHING:
        outcome = _starved(stacked, scheme)
    else:
        outcome = quantizer.quantize(stacked, prepared, scheme)
    made, row = [], 0
    for weight in weights:
        own = slice(row, row + weight.shape[0])
        part = rows(outcome.weight, own)
        row = own.stop
        error, metric = relative_error(stacked[own], part, stats)
        tokens = 0 if stats is None else stats.tokens
        metrics = TensorMetrics(weight.key, scheme.name, tokens, error, metric, outcome.note)
        made.append(Made(QuantizedLinear(weight.key, _on_cpu(part)), metrics))
    return made


def _starved(weight: Tensor, scheme: Scheme) -> Outcome:
    """An expert that no calibration token reached is rounded with searched scales, and said to be."""
    return Outcome(
        nearest(weight, scheme, "mse"), "no calibration token reached this expert: rounded to nearest"
    )


def rows(q: QuantizedTensor, chosen: slice) -> QuantizedTensor:
    """Some rows of a quantized tensor; groups span one row or all of them."""

    def cut(v: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        if q.group[0] != 1:
            return v
        return v[chosen] if isinstance(v, Tensor) else rows(v, chosen)

    count = len(range(*chosen.indices(shape(q)[0])))
    group = (1 if q.group[0] == 1 else count, q.group[1])
    match q:
        case Affine():
            zero = q.zero_point
            return replace(
                q,
                codes=q.codes[chosen],
                scale=cut(q.scale),
                group=group,
                zero_point=None if zero is None else zero if q.group[0] != 1 else zero[chosen],
                offset=None if q.offset is None else cut(q.offset),
            )
        case Float():
            return replace(q, values=q.values[chosen], scale=cut(q.scale), group=group)
        case Codebook():
            return replace(q, codes=q.codes[chosen], scale=cut(q.scale), group=group)


def _on_cpu(q: QuantizedTensor) -> QuantizedTensor:
    """A copy whose tensors are in main memory, contiguous and shared with nothing."""

    def moved(value: Any) -> Any:
        match value:
            case Tensor():
                # a slice of a stack would keep the whole stack alive
                return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            case Affine() | Float() | Codebook():
                return _on_cpu(value)
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
    delta = dequantize(rows(q, chosen)).to(w.device) - part

    def power(x: Tensor) -> float:
        if gram is not None:
            return float(((x @ gram) * x).sum())
        return float((x.square() @ importance).sum()) if importance is not None else float(x.square().sum())

    error, whole = power(delta), power(part)
    metric = "output" if gram is not None else "weighted" if importance is not None else "weights"
    return (error / whole if whole > 0 else 0.0), metric
