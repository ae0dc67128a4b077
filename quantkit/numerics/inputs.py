"""Rounding what weights meet, as engines do while the model runs: inputs of products, keys and values.

All of it is fake quantization: what comes out has the dtype of x and holds values that 8 bits hold too.

    int8    q = clamp(round(x / s), −128, 127)   s = max|x| / 127.5 per token, as compressed-tensors does: the
            largest value is half a step past the last code, which is as near as any value is to its code
    e4m3    q = e4m3(clamp(x / s, −448, 448))    s = max|x| / 448 per token or group of inputs
    LLM.int8 (bitsandbytes)   in fp16, columns with an outlier stay as they are, the rest is
            q = round(x · (127 / a)), x̂ = q · a / 127, a the largest magnitude of a token below the threshold

Arithmetic is in the dtype of x, as compressed-tensors does on its emulated path; LLM.int8 in fp32 from fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.levels import E4M3_MAX
from quantkit.numerics.stored import round_scale
from quantkit.schemes import CacheDtype, Scheme

_LOW, _HIGH = -128.0, 127.0
# half a step past the last code on either side is still its nearest point
_REACH: Mapping[CacheDtype, float] = {"int8": 127.5, "fp8": E4M3_MAX}


@dataclass(frozen=True, slots=True)
class InputRounding:
    """`round_inputs` with all but x; those that do the same are equal, and may share a result.

    input_scale   the one scale of the inputs where that is static, as `input_scale` makes it, else None
    """

    scheme: Scheme
    input_scale: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.input_scale is None:
            return round_inputs(x, self.scheme)
        return round_inputs(x, self.scheme, torch.tensor([self.input_scale], dtype=_stored(self.scheme)))


def round_inputs(x: Tensor, scheme: Scheme, input_scale: Tensor | None = None) -> Tensor:
    """x (…, tokens, in) as the products of an engine see it; x itself when the scheme rounds no inputs.

    Outlier columns are those of a (tokens, in) matrix, all tokens of a row of text, so rows do not depend on
    one another; bitsandbytes looks at all rows of a batch at once. ValueError when the scheme's scale is
    static and `input_scale` (1,) is not given.
    """
    inputs = scheme.activations
    if inputs is None or x.numel() == 0:
        return x
    if inputs.outliers is not None:
        return _mixed(x, inputs.outliers)
    kind = _kind(scheme)
    if not inputs.dynamic:
        if input_scale is None:
            raise ValueError(f"{scheme.name} rounds inputs with a scale from calibration, which is missing")
        return _round(x, input_scale.to(x.device), kind)
    grouped = x if inputs.group_size is None else x.reshape(*x.shape[:-1], -1, inputs.group_size)
    largest = torch.maximum(grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True).neg_())
    scale = largest / _REACH[kind]
    # a token of zeros, or of numbers so small that the scale underflows
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return _round(grouped, scale, kind).reshape(x.shape)


def cache_round(x: Tensor, dtype: CacheDtype, scale: Tensor) -> Tensor:
    """Keys or values as a quantized cache gives them back; `scale` (1,) is the tensor's."""
    return _round(x, scale.to(x.device), dtype)


def input_scale(absmax: Tensor, scheme: Scheme) -> Tensor:
    """(1,) static scale of inputs whose largest magnitudes are `absmax`, in the dtype the file stores it.

    Where nothing but zeros were seen it is 1.
    """
    return _static(absmax, _kind(scheme), _stored(scheme)).to(_stored(scheme))


def cache_scale(absmax: Tensor, dtype: CacheDtype) -> Tensor:
    """(1,) fp32 scale of keys or values whose largest magnitudes are `absmax`; 1 where all are zero."""
    return _static(absmax, dtype, torch.float32)


def _static(absmax: Tensor, kind: CacheDtype, stored: torch.dtype) -> Tensor:
    return round_scale(absmax.to(torch.float32).amax().view(1) / _REACH[kind], stored)


def _stored(scheme: Scheme) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    return dtype


def _kind(scheme: Scheme) -> CacheDtype:
    return "fp8" if scheme.numbers == "fp8" else "int8"


def _round(x: Tensor, scale: Tensor, kind: CacheDtype) -> Tensor:
    scaled = x / scale
    if kind == "fp8":
        codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(scaled.dtype)
    else:
        codes = scaled.clamp_(_LOW, _HIGH).round_()
    return codes.mul_(scale).to(x.dtype)


def _mixed(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8: entries that reach the threshold do not count for the scale of their token, and the columns
    they are in are not rounded. A threshold of 0 means that no column is an outlier, as in bitsandbytes."""
    half = x.to(torch.float16)
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(-2, keepdim=True)
        rest = half.to(torch.float32).masked_fill_(outliers, 0)
    else:
        columns = torch.zeros((), dtype=torch.bool, device=x.device)
        rest = half.to(torch.float32)
    largest = rest.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    codes = rest.mul_(127 / largest).round_()
    return torch.where(columns, x, codes.mul_(largest / 127).to(x.dtype))
