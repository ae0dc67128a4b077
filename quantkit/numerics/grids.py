"""Choosing scales and zero points of integer grids.

Every function takes weights as (…, g), one grid per leading index, and returns scales and zero
points as (…, 1) fp32, the scale already rounded to the dtype its file stores, so that codes are
chosen with the value the engine will multiply by.

Conventions of the symmetric scale (b = bits):
    absmax     max|w| / (2^(b−1) − 1): the code −2^(b−1) is used by nothing but rounding
    searched   starts at max|w| / (2^(b−1) − ½), both signs, shrunk and refitted by least squares
The search maximises the gain F(q) = (Σ v·q·w)² / Σ v·q², because for fixed codes q the best scale
is s* = Σ v·q·w / Σ v·q² and leaves the error Σ v·w² − F(q). v is the importance of an input
(mean square of its activation) or 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import affine

Scales = Literal["absmax", "mse", "weighted"]

# 40 factors in [.35, 1.1]: within .1 % of 57 in [.35, 1.05] and of the exact sweep at 2 to 4 bits. The few
# below serve groups whose largest weight meets an input that hardly matters.
_SHRINK = (0.06, 0.12, 0.18, 0.24, 0.3, *(0.35 + 0.75 * i / 39 for i in range(40)))
# fp16 keeps scales below its smallest normal number with fewer digits; engines compute with them all the same
_SMALLEST = {torch.float16: 2.0**-24}
# An input that calibration never excited would leave its weights unconstrained; keep a floor.
_IMPORTANCE_FLOOR = 1e-3
# Elements handled at once: the working set of the search then stays in the processor's cache.
_CHUNK = 1 << 18


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their stored dtype; zeros become 1 and underflow the smallest number there is.

    Raises NumericsError when a scale exceeds what `dtype` can hold.
    """
    stored = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"a scale of {float(scale.abs().max()):.3g} does not fit {str(dtype).removeprefix('torch.')}",
            remedy="store scales in bfloat16 or float32, or keep the weight with a rule",
        )
    tiny = _SMALLEST.get(dtype, torch.finfo(dtype).tiny)
    small = stored.abs() < tiny
    return torch.where(small, torch.full_like(stored, tiny).copysign(scale.to(dtype)), stored).float()


def absmax(w: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Symmetric scale max|w| / (2^(bits−1) − 1)."""
    return round_scale(w.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1), dtype)


def minmax(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Asymmetric scale (max − min) / (2^bits − 1) over a range that includes 0, and its zero point."""
    low = w.amin(-1, keepdim=True).clamp(max=0)
    high = w.amax(-1, keepdim=True).clamp(min=0)
    scale = round_scale((high - low) / ((1 << bits) - 1), dtype)
    return scale, torch.round(-low / scale).clamp_(0, (1 << bits) - 1)


def choose(
    w: Tensor, bits: int, sym: bool, scales: Scales, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point or None) of each grid.

    w (…, g) fp32; importance broadcastable to w, used by ``weighted`` only, which requires it. Raises
    NumericsError when either holds non-finite values, which no comparison of errors would notice.
    """
    if not bool(torch.isfinite(w).all()):
        raise NumericsError("the weights hold non-finite values")
    if scales == "absmax":
        return (absmax(w, bits, dtype), None) if sym else minmax(w, bits, dtype)
    if scales == "weighted":
        if importance is None:
            raise NumericsError("weighted scales need the importance of the inputs, and there is none")
        if not bool(torch.isfinite(importance).all()):
            raise NumericsError("the importance of the inputs holds non-finite values")
        importance = _floored(importance)
    else:
        importance = None
    width = w.shape[-1]
    flat = w.reshape(-1, width)
    weights = None if importance is None else importance.expand(w.shape).reshape(-1, width)
    rows = max(1, _CHUNK // width)
    parts = [
        _search(flat[at : at + rows], None if weights is None else weights[at : at + rows], bits, sym, dtype)
        for at in range(0, flat.shape[0], rows)
    ]
    lead = (*w.shape[:-1], 1)
    scale = torch.cat([p[0] for p in parts]).view(lead)
    return scale, None if sym else torch.cat([p[1] for p in parts if p[1] is not None]).view(lead)


def _floored(importance: Tensor) -> Tensor:
    return importance.clamp(
        min=_IMPORTANCE_FLOOR * float(importance.mean()) + torch.finfo(torch.float32).tiny
    )


def _search(
    w: Tensor, v: Tensor | None, bits: int, sym: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Best grid per row of w (rows, g) by v-weighted squared error: a list of candidates, one refit each.

    The plain scale is the last candidate, compared as stored: neither the spacing of the list nor the
    rounding of the refit can make the search worse than it.
    """
    vw = w if v is None else v * w
    best_gain = torch.full((w.shape[0], 1), -1.0, device=w.device)
    best_scale = torch.ones_like(best_gain)
    best_zero = None if sym else torch.zeros_like(best_gain)
    for scale, zero in _candidates(w, bits, sym):
        q = affine.steps(w, scale, zero, bits)
        if zero is not None:
            q -= zero
        cross = (q * vw).sum(-1, keepdim=True)
        energy = (q * q if v is None else q * q * v).sum(-1, keepdim=True)
        refit = cross / energy.clamp(min=torch.finfo(torch.float32).tiny)
        gain = cross * refit
        # a zero point ties the sign: a refit that changes it would move the codes to the other side
        better = (gain > best_gain) & (energy > 0) & (refit * scale > 0)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, refit, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    found = round_scale(best_scale, dtype)
    plain, plain_zero = (absmax(w, bits, dtype), None) if sym else minmax(w, bits, dtype)
    worse = _error(w, v, found, best_zero, bits) > _error(w, v, plain, plain_zero, bits)
    if best_zero is not None and plain_zero is not None:
        best_zero = torch.where(worse, plain_zero, best_zero)
    return torch.where(worse, plain, found), best_zero


def _error(w: Tensor, v: Tensor | None, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    square = (affine.restore(affine.steps(w, scale, zero, bits), scale, zero) - w).square_()
    return (square if v is None else square.mul_(v)).sum(-1, keepdim=True)


def _candidates(w: Tensor, bits: int, sym: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(scale, zero point or None) trial grids for each row of w."""
    tiny = torch.finfo(torch.float32).tiny
    if sym:
        full = (w.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 0.5)).clamp(min=tiny)
        for factor in _SHRINK:
            # the grid is lopsided (−8 … 7): the mirrored one fits about half of all groups better
            yield full * factor, None
            yield full * -factor, None
        return
    low = w.amin(-1, keepdim=True).clamp(max=0)
    full = ((w.amax(-1, keepdim=True).clamp(min=0) - low) / ((1 << bits) - 1)).clamp(min=tiny)
    for factor in _SHRINK:
        scale = full * factor
        centre = torch.round(-low / full)
        for shift in (-1, 0, 1):
            yield scale, (centre + shift).clamp_(0, (1 << bits) - 1)
