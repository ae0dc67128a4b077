"""Choosing scales and zero points.

Every function takes weights as (…, g), one grid per leading index, and returns scales and zero points
as (…, 1) fp32, the scale already as its file stores it, so that codes are chosen with the value the
engine will multiply by.

Conventions of a scale that spans the largest weight, m = max|w|, b bits:
    absmax      m / (2^(b−1) − 1)          the code −2^(b−1) is used by nothing but rounding
    half_step   m / (2^(b−1) − ½)          both ends are used, the largest weight moves half a step
    full_range  −w_m / 2^(b−1)             w_m the largest weight with its sign: the scale may be negative
    min and max, of a grid with a zero point, over a range that includes 0
    m / largest point of the table; a power of two at or below that, or (half_step) at most 7/6 of it
The search starts there, tries both signs where the grid is lopsided, and refits by least squares. It
maximises the gain G(q, s) = 2·s·Σ v·q·w − s²·Σ v·q², what codes q with scale s take off the error
Σ v·w²; the best scale for fixed codes is s* = Σ v·q·w / Σ v·q². v is the importance of an input (mean
square of its activation) or 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import offsets
from quantkit.numerics.levels import Integers, Levels
from quantkit.numerics.stored import Plain, PowersOfTwo, Stored

Scales = Literal["absmax", "half_step", "full_range", "mse", "weighted"]
SCALES: tuple[Scales, ...] = ("absmax", "half_step", "full_range", "mse", "weighted")

# Trial scales as factors of the one that spans the largest weight, then steps around the best of them: with
# one refit each within .1 % of 45 evenly spaced ones. The lowest serve groups whose largest weight meets
# an input that hardly matters. Tables have wide gaps at their ends, so more than the span can be better.
_COARSE = (0.06, 0.14, 0.22, 0.3, *(0.38 + 0.06 * i for i in range(13)))
_WIDER = tuple(1.16 + 0.06 * i for i in range(7))
_FINE = (-0.04, -0.02, 0.02, 0.04)
# An input that calibration never excited would leave its weights unconstrained; keep a floor.
_IMPORTANCE_FLOOR = 1e-3
# Elements handled at once: the working set of the search then stays in the processor's cache.
_CHUNK = 1 << 18


def choose(
    w: Tensor, levels: Levels, stored: Stored, scales: Scales, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point or None) of each grid.

    w (…, g) fp32; importance broadcastable to w, used by ``weighted`` only, which requires it. Raises
    NumericsError when either holds non-finite values, which no comparison of errors would notice.
    """
    if not bool(torch.isfinite(_largest(w)).all()):
        raise NumericsError("the weights hold non-finite values")
    if scales not in ("mse", "weighted"):
        return span(w, levels, stored, scales)
    if scales == "weighted":
        if importance is None:
            raise NumericsError("weighted scales need the importance of the inputs, and there is none")
        if not bool(torch.isfinite(importance).all()):
            raise NumericsError("the importance of the inputs holds non-finite values")
        importance = _floored(importance)
    else:
        importance = None
    if isinstance(levels, Integers) and levels.fractional:
        return offsets.fit(w, levels.bits, _dtype(stored), importance)
    width = w.shape[-1]
    flat = w.reshape(-1, width)
    weights = None if importance is None else importance.expand(w.shape).reshape(-1, width)
    rows = max(1, _CHUNK // width)
    parts = [
        _search(flat[at : at + rows], None if weights is None else weights[at : at + rows], levels, stored)
        for at in range(0, flat.shape[0], rows)
    ]
    lead = (*w.shape[:-1], 1)
    scale = torch.cat([p[0] for p in parts]).view(lead)
    zeros = [p[1] for p in parts if p[1] is not None]
    return scale, torch.cat(zeros).view(lead) if zeros else None


def span(w: Tensor, levels: Levels, stored: Stored, convention: Scales) -> tuple[Tensor, Tensor | None]:
    """The scale by which the grid reaches the largest weight of each row of w (…, g), and its zero point."""
    if isinstance(levels, Integers) and levels.fractional:
        return offsets.minmax(w, levels.bits, _dtype(stored))
    if isinstance(levels, Integers) and not levels.sym:
        return minmax(w, levels.bits, stored)
    largest = _largest(w)
    if isinstance(stored, PowersOfTwo):
        return _power_of_two(largest, convention), None
    if not isinstance(levels, Integers):
        return stored.round(largest / levels.reach), None
    middle = 1 << (levels.bits - 1)
    match convention:
        case "full_range":
            signed = w.gather(-1, w.abs().argmax(-1, keepdim=True))
            return stored.round(-signed / middle), None
        case "half_step":
            return stored.round(largest / (middle - 0.5)), None
        case _:
            return stored.round(largest / (middle - 1)), None


def _power_of_two(largest: Tensor, convention: Scales) -> Tensor:
    """OCP's rule puts the largest weight into [4, 8), `half_step` into [3.5, 7); the largest point is 6."""
    low = 3.5 if convention == "half_step" else 4.0
    exponent = torch.floor(torch.log2(largest.clamp(min=2.0**-120) / low)).clamp_(-126, 127)
    return torch.where(largest == 0, torch.ones_like(largest), torch.exp2(exponent))


def minmax(w: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
    """Asymmetric scale (max − min) / (2^bits − 1) over a range that includes 0, and its zero point."""
    low = w.amin(-1, keepdim=True).clamp(max=0)
    high = w.amax(-1, keepdim=True).clamp(min=0)
    scale = stored.round((high - low) / ((1 << bits) - 1))
    return scale, torch.round(-low / scale).clamp_(0, (1 << bits) - 1)


def _largest(w: Tensor) -> Tensor:
    """(…, 1) largest magnitude; NaN where there is one. No copy of w, as its magnitudes would be."""
    return torch.maximum(w.amax(-1, keepdim=True), w.amin(-1, keepdim=True).neg_())


def _dtype(stored: Stored) -> torch.dtype:
    if not isinstance(stored, Plain):
        raise ValueError("a fractional zero point is stored beside plain scales")
    return stored.dtype


def _floored(importance: Tensor) -> Tensor:
    return importance.clamp(
        min=_IMPORTANCE_FLOOR * float(importance.mean()) + torch.finfo(torch.float32).tiny
    )


def _search(w: Tensor, v: Tensor | None, levels: Levels, stored: Stored) -> tuple[Tensor, Tensor | None]:
    """Best grid per row of w (rows, g) by v-weighted squared error: coarse candidates, then their neighbours.

    The scales that span the row by convention are compared last, as stored: neither the spacing of the
    candidates nor the rounding of the refit can make the search worse than any of them.
    """
    full, zeros = _extent(w, levels)
    best = _Best(w, v, levels, stored)
    mirrored = levels.lopsided and stored.signed
    for factor in _COARSE if isinstance(levels, Integers) else (*_COARSE, *_WIDER):
        for zero in zeros:
            best.offer(full * factor, zero)
            if mirrored:
                # the grid is lopsided (−8 … 7): the mirrored one fits about half of all groups better
                best.offer(full * -factor, zero)
    centre, zero = best.trial, best.zero
    for offset in _FINE:
        best.offer(centre + full * offset * centre.sign(), zero)
    scale, zero = stored.round(best.scale), best.zero
    error = _error(w, v, scale, zero, levels)
    for convention in _conventions(levels, stored):
        plain, plain_zero = span(w, levels, stored, convention)
        other = _error(w, v, plain, plain_zero, levels)
        # a group of zeros has nothing to search for
        better = (other < error) | (_largest(w) == 0)
        scale, error = torch.where(better, plain, scale), torch.where(better, other, error)
        if zero is not None and plain_zero is not None:
            zero = torch.where(better, plain_zero, zero)
    return scale, zero


def _conventions(levels: Levels, stored: Stored) -> tuple[Scales, ...]:
    """Those that differ on this grid."""
    if isinstance(stored, PowersOfTwo):
        return ("absmax", "half_step")
    signed = isinstance(levels, Integers) and levels.sym
    return ("absmax", "half_step", "full_range") if signed else ("absmax",)


class _Best:
    """The best grid so far of every row: its refitted scale, its zero point, and the trial that led to it."""

    def __init__(self, w: Tensor, v: Tensor | None, levels: Levels, stored: Stored) -> None:
        self._w, self._v, self._levels, self._stored = w, v, levels, stored
        self._units, self._weighted = torch.empty_like(w), torch.empty_like(w)
        # at 8 bits the gains of good grids agree to six digits: their sums need more
        self._gain = w.new_full((w.shape[0], 1), -1.0, dtype=torch.float64)
        self.scale = w.new_ones(w.shape[0], 1)
        self.trial = w.new_ones(w.shape[0], 1)
        self.zero: Tensor | None = None

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Round on a trial grid, refit its scale, keep it where it gains."""
        q = self._levels.nearest_units(self._w, scale, zero, self._units)
        qv = q if self._v is None else torch.mul(q, self._v, out=self._weighted)
        cross = (qv * self._w).sum(-1, keepdim=True, dtype=torch.float64)
        energy = (qv * q).sum(-1, keepdim=True, dtype=torch.float64)
        refit = cross / energy.clamp(min=torch.finfo(torch.float32).tiny)
        if self._stored.coarse:
            kept = self._stored.round(refit.float()).double()
            gain = (2 * cross - kept * energy) * kept
        else:
            kept, gain = refit, cross * refit
        # a refit of the other sign would move the codes to the other side of the zero point
        better = (gain > self._gain) & (energy > 0) & (refit * scale > 0)
        self._gain = torch.where(better, gain, self._gain)
        self.scale = torch.where(better, kept.float(), self.scale)
        self.trial = torch.where(better, scale, self.trial)
        if zero is not None:
            self.zero = zero if self.zero is None else torch.where(better, zero, self.zero)


def _error(w: Tensor, v: Tensor | None, scale: Tensor, zero: Tensor | None, levels: Levels) -> Tensor:
    square = (levels.units(levels.codes(w, scale, zero), zero) * scale - w).square_()
    return (square if v is None else square.mul_(v)).sum(-1, keepdim=True)


def _extent(w: Tensor, levels: Levels) -> tuple[Tensor, list[Tensor | None]]:
    """The scale that spans all of a row (factor 1), and the zero points to try with it."""
    # any smaller, and the reciprocal of a trial would be infinite, which times a zero is no number
    tiny = 2.0**-120
    if not isinstance(levels, Integers) or levels.sym:
        return (_largest(w) / levels.reach).clamp(min=tiny), [None]
    low = w.amin(-1, keepdim=True).clamp(max=0)
    last = (1 << levels.bits) - 1
    full = ((w.amax(-1, keepdim=True).clamp(min=0) - low) / last).clamp(min=tiny)
    centre = torch.round(-low / full)
    return full, [(centre + shift).clamp_(0, last) for shift in (-1, 0, 1)]
