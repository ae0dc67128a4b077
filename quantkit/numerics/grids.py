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

from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import affine

Scales = Literal["absmax", "mse", "weighted"]

# Trial scales as factors of the one that spans the largest weight, then steps around the best of them: with
# one refit each within .1 % of 45 evenly spaced ones. The lowest serve groups whose largest weight meets
# an input that hardly matters.
_COARSE = (0.06, 0.14, 0.22, 0.3, *(0.38 + 0.06 * i for i in range(13)))
_FINE = (-0.04, -0.02, 0.02, 0.04)
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
    """Best grid per row of w (rows, g) by v-weighted squared error: coarse candidates, then their neighbours.

    The plain scale is compared last, as stored: neither the spacing of the candidates nor the rounding
    of the refit can make the search worse than it.
    """
    full, zeros = _extent(w, bits, sym)
    best = _Best(w, v, bits)
    for factor in _COARSE:
        for zero in zeros:
            best.offer(full * factor, zero)
            if sym:
                # the grid is lopsided (−8 … 7): the mirrored one fits about half of all groups better
                best.offer(full * -factor, zero)
    centre, zero = best.trial, best.zero
    for offset in _FINE:
        best.offer(centre + full * offset * centre.sign(), zero)
    found = round_scale(best.scale, dtype)
    plain, plain_zero = (absmax(w, bits, dtype), None) if sym else minmax(w, bits, dtype)
    worse = _error(w, v, found, best.zero, bits) > _error(w, v, plain, plain_zero, bits)
    if best.zero is None or plain_zero is None:
        return torch.where(worse, plain, found), None
    return torch.where(worse, plain, found), torch.where(worse, plain_zero, best.zero)


class _Best:
    """The best grid so far of every row: its refitted scale, its zero point, and the trial that led to it."""

    def __init__(self, w: Tensor, v: Tensor | None, bits: int) -> None:
        self._w, self._v, self._bits = w, v, bits
        self._codes, self._weighted = torch.empty_like(w), torch.empty_like(w)
        # at 8 bits the gains of good grids agree to six digits: their sums need more
        self._gain = w.new_full((w.shape[0], 1), -1.0, dtype=torch.float64)
        self.scale = w.new_ones(w.shape[0], 1)
        self.trial = w.new_ones(w.shape[0], 1)
        self.zero: Tensor | None = None

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Round on a trial grid, refit its scale, keep it where it gains."""
        low, high = affine.limits(self._bits, zero is None)
        q = torch.mul(self._w, scale.reciprocal(), out=self._codes).round_()
        if zero is None:
            q.clamp_(low, high)
        else:
            q.add_(zero).clamp_(low, high).sub_(zero)
        qv = q if self._v is None else torch.mul(q, self._v, out=self._weighted)
        cross = (qv * self._w).sum(-1, keepdim=True, dtype=torch.float64)
        energy = (qv * q).sum(-1, keepdim=True, dtype=torch.float64)
        refit = cross / energy.clamp(min=torch.finfo(torch.float32).tiny)
        gain = cross * refit
        # a refit of the other sign would move the codes to the other side of the zero point
        better = (gain > self._gain) & (energy > 0) & (refit * scale > 0)
        self._gain = torch.where(better, gain, self._gain)
        self.scale = torch.where(better, refit.float(), self.scale)
        self.trial = torch.where(better, scale, self.trial)
        if zero is not None:
            self.zero = zero if self.zero is None else torch.where(better, zero, self.zero)


def _error(w: Tensor, v: Tensor | None, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    square = (affine.restore(affine.steps(w, scale, zero, bits), scale, zero) - w).square_()
    return (square if v is None else square.mul_(v)).sum(-1, keepdim=True)


def _extent(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The scale that spans all of a row (factor 1), and the zero points to try with it."""
    tiny = torch.finfo(torch.float32).tiny
    if sym:
        return (w.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 0.5)).clamp(min=tiny), [None]
    low = w.amin(-1, keepdim=True).clamp(max=0)
    full = ((w.amax(-1, keepdim=True).clamp(min=0) - low) / ((1 << bits) - 1)).clamp(min=tiny)
    centre = torch.round(-low / full)
    return full, [(centre + shift).clamp_(0, (1 << bits) - 1) for shift in (-1, 0, 1)]
