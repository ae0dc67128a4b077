"""LLM.int8 (Dettmers et al. 2022): 8 bits with the largest magnitude of a row as its scale, and which
inputs stay 16-bit is decided while the model runs.

Codes are those of the bitsandbytes library on a CPU: a file leaves no freedom but the scale, and at
8 bits there is next to nothing to gain from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import NumericsError
from quantkit.protocols import Outcome
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Float

SUMMARY = "8 bits per row beside 16-bit outlier inputs; calibration only counts those"

# rows rounded at once: what is made on the way stays in the processor's cache
_ROWS = 64
_MAX_CODE = 127


@dataclass(frozen=True, slots=True)
class Params:
    """report_outliers: count the inputs that reach the threshold on calibration text, for the report."""

    report_outliers: bool = True


@dataclass(frozen=True, slots=True)
class LlmInt8:
    """Quantizer[number of outlier inputs or None]."""

    params: Params

    @property
    def needs(self) -> Need:
        return Need.ABSMAX if self.params.report_outliers else Need.NOTHING

    @property
    def ties_rows(self) -> bool:
        return False

    @property
    def regroups_columns(self) -> bool:
        return False

    def accepts(self, scheme: Scheme) -> str | None:
        if _threshold(scheme) is None:
            return f"llm_int8 is for w8a8_mixed, 8 bits beside 16-bit outlier inputs, not {scheme.name}"
        return None

    def prepare(self, stats: Statistics | None, scheme: Scheme) -> int | None:
        if self.needs is Need.NOTHING:
            return None
        if stats is None or stats.absmax is None or stats.tokens == 0:
            raise NumericsError("outlier inputs cannot be counted: no token reached this site")
        if not bool(torch.isfinite(stats.absmax).all()):
            raise NumericsError("the inputs of this site hold non-finite values")
        threshold = _threshold(scheme)
        # to the runtime 0 means that there are none; it rounds inputs to fp16 before it compares them
        return int((stats.absmax.to(torch.float16) >= threshold).sum()) if threshold else 0

    def quantize(self, weight: Tensor, prepared: int | None, scheme: Scheme) -> Outcome:
        codes, absmax = _rows(weight)
        step = torch.full((1, 1), 1 / _MAX_CODE, dtype=torch.float32, device=weight.device)
        scale = Float(absmax, 32, step, (weight.shape[0], 1))
        facts = {} if prepared is None else {"outlier_columns": float(prepared)}
        return Outcome(Affine(codes, 8, scale, (1, weight.shape[1])), facts=facts)


def quantizer(params: Params) -> LlmInt8:
    """The method with these parameters."""
    return LlmInt8(params)


def _threshold(scheme: Scheme) -> float | None:
    return None if scheme.activations is None else scheme.activations.outliers


def _rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``round(w · (127 / m))`` with w in fp16 and m = max |w| of a row.

    Returns codes (out, in) int8 and m (out, 1) fp32. The order of operations decides ties, and is the
    library's. A row of zeros gets m = 1, where the library divides by zero. Raises NumericsError for
    values that fp16 does not hold.
    """
    half = weight.to(torch.float16)
    absmax = torch.maximum(half.amax(1, keepdim=True), half.amin(1, keepdim=True).neg_()).to(torch.float32)
    if not bool(torch.isfinite(absmax).all()):
        if bool(torch.isfinite(weight).all()):
            raise NumericsError(
                f"a weight of {float(weight.abs().max()):,.0f} is beyond float16, in which LLM.int8 rounds",
                remedy="keep this weight with a rule, or use w8 in compressed_tensors",
            )
        raise NumericsError("the weight holds non-finite values", remedy="keep it with a rule")
    absmax[absmax == 0] = 1
    codes = torch.empty(half.shape, dtype=torch.int8, device=half.device)
    for at in range(0, half.shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        codes[rows] = (half[rows] * (_MAX_CODE / absmax[rows])).round_()
    return codes, absmax
