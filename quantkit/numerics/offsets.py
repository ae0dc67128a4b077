"""Integer grids whose zero point may be fractional: scale and zero point by (weighted) least squares.

A weight w stands for s·(q − z), q a whole number of `bits` bits. For fixed codes q the best grid is the
line through the points (q, w), each counted v times (the importance of its input, or 1):
    s* = Σ v·q·c / D    z* = q̄ − w̄/s*    c = w − w̄    D = Σ v·q² − (Σ v·q)²/Σ v
with weighted means w̄ and q̄; it takes the gain G = (Σ v·q·c)² / D off the error Σ v·c² that one level at w̄
leaves. The search maximises G over trial ranges [w̄ + a·(min − w̄), w̄ + b·(max − w̄)], rounds and refits
each, and compares what it found as a file stores it. HQQ fits z alone, to the scale of min and max; the
scale is worth more (14 % less squared error at 4 bits in groups of 64, 45 % at 2).

Weights are (…, g), one grid per leading index; scales and zero points (…, 1) fp32, both already rounded
to the dtype that stores them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.numerics.stored import round_scale

# Trial ends of the range as factors of the distance from the mean to the smallest and the largest weight, in
# every combination, then steps around the best pair: within 1 % of 28 × 28 trials at 2 to 4 bits in groups of
# 64. The lowest serves groups whose largest weight meets an input that hardly matters.
_COARSE = (0.25, 0.5, 0.75, 1.0)
_FINE = (0.1, 0.07, 0.04, 0.02)
_AROUND = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)
# Refits of the best grid at the end, each with codes rounded anew.
_REFITS = 2
# D that is less than this of Σ v·q² is rounding noise: all codes are equal.
_FLAT = 1e-6
# Elements handled at once: the working set of the search then stays in the processor's cache.
_CHUNK = 1 << 18


def minmax(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale = (max − min)/(2^bits − 1) and zero = −min/scale of each row of w (…, g).

    A row whose zero point would not fit `dtype`, its values being equal or nearly so, gets one level.
    Raises NumericsError when a scale does not fit.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = round_scale((high - low) / ((1 << bits) - 1), dtype)
    zero = -low / scale
    level, level_zero = _one_level((low + high) / 2, dtype)
    lost = (high == low) | (zero.abs() > torch.finfo(dtype).max)
    return torch.where(lost, level, scale), torch.where(lost, level_zero, zero.to(dtype).float())


def fit(w: Tensor, bits: int, dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of least squared error for each row of w (…, g), at most that of `minmax`.

    importance is broadcastable to w, positive; None counts every weight alike. Raises NumericsError when
    a scale of `minmax` does not fit `dtype`.
    """
    parts = [_search(rows, weights, bits, dtype) for rows, weights in _pieces(w, importance)]
    lead = (*w.shape[:-1], 1)
    return torch.cat([scale for scale, _ in parts]).view(lead), torch.cat([z for _, z in parts]).view(lead)


def _pieces(w: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some rows (n, g) at a time with their importance, which is never spread over all of w."""
    whole = w if w.dim() > 1 else w.unsqueeze(0)
    size = max(1, _CHUNK // max(1, whole[0].numel()))
    width = w.shape[-1]
    for at in range(0, whole.shape[0], size):
        own = whole[at : at + size]
        if importance is None:
            yield own.reshape(-1, width), None
        else:
            spread = importance.expand(whole.shape)[at : at + size]
            yield own.reshape(-1, width), spread.reshape(-1, width)


def _search(w: Tensor, v: Tensor | None, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best grid of each row of w (rows, g): coarse trials, their neighbours, refits; then as stored."""
    best = _Best(w, v, bits)
    low, high = best.ends()
    for a in _COARSE:
        for b in _COARSE:
            best.offer(low * a, high * b)
    for radius in _FINE:
        first, last = best.trial
        for a, b in _AROUND:
            best.offer(first + low * (a * radius), last + high * (b * radius))
    for _ in range(_REFITS):
        best.refit()
    chosen = minmax(w, bits, dtype)
    error = _error(w, v, chosen, bits)
    # the range of min and max stays where neither is better, however scales and zero points were rounded
    for grid in (best.stored(dtype), _one_level(best.mean, dtype)):
        other = _error(w, v, grid, bits)
        better = other < error
        error = torch.where(better, other, error)
        chosen = torch.where(better, grid[0], chosen[0]), torch.where(better, grid[1], chosen[1])
    return chosen


class _Best:
    """The grid of largest gain so far of every row of w (rows, g), and the trial range that led to it.

    Ranges and grids are relative to the mean of a row: a code q stands for mean + start + step·q.
    """

    def __init__(self, w: Tensor, v: Tensor | None, bits: int) -> None:
        self._v, self._last = v, (1 << bits) - 1
        tiny = torch.finfo(torch.float32).tiny
        count = torch.full_like(w[:, :1], w.shape[1], dtype=torch.float64)
        self._total = count if v is None else _sum(v).clamp(min=tiny)
        self.mean = (_sum(w if v is None else w * v) / self._total).float()
        self._c = w - self.mean
        self._codes, self._weighted, self._product = (torch.empty_like(w) for _ in range(3))
        # at 8 bits the gains of good grids agree to six digits: their sums need more
        self._gain = torch.full_like(count, -1.0)
        self._step, self._start = torch.ones_like(self.mean), torch.zeros_like(self.mean)
        self.trial = self.ends()

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each row, less its mean."""
        return self._c.amin(-1, keepdim=True), self._c.amax(-1, keepdim=True)

    def offer(self, first: Tensor, last: Tensor) -> None:
        """Try the range [first, last]."""
        step = ((last - first) / self._last).clamp(min=torch.finfo(torch.float32).tiny)
        better = self._improve(step, first)
        self.trial = torch.where(better, first, self.trial[0]), torch.where(better, last, self.trial[1])

    def refit(self) -> None:
        """Try the best grid itself, which its refit has moved away from the codes it was made of."""
        self._improve(self._step, self._start)

    def _improve(self, step: Tensor, start: Tensor) -> Tensor:
        """Round, fit the line through codes and weights, keep it where it gains; (rows, 1) where it does."""
        q = torch.mul(self._c, step.reciprocal(), out=self._codes).sub_(start / step)
        q.round_().clamp_(0, self._last)
        qv = q if self._v is None else torch.mul(q, self._v, out=self._weighted)
        mean = _sum(qv) / self._total
        square = _sum(torch.mul(qv, q, out=self._product))
        cross = _sum(torch.mul(qv, self._c, out=self._product))
        spread = square - mean * mean * self._total
        fitted = cross / spread.clamp(min=torch.finfo(torch.float32).tiny)
        gain = cross * fitted
        better = (gain > self._gain) & (spread > _FLAT * square) & (fitted > 0)
        self._gain = torch.where(better, gain, self._gain)
        self._step = torch.where(better, fitted.float(), self._step)
        self._start = torch.where(better, (-fitted * mean).float(), self._start)
        return better

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of the best grids rounded to `dtype`, the zero point for the rounded scale."""
        limit = torch.finfo(dtype).max
        scale = round_scale(self._step.clamp(max=limit), dtype)
        zero = -(self._start / self._step) - self.mean / scale
        return scale, zero.clamp_(-limit, limit).to(dtype).float()


def _one_level(level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A grid whose code 0 stands for `level` with all digits of `dtype`: the scale is a power of two."""
    exponent = torch.log2(level.abs().clamp(min=torch.finfo(torch.float32).tiny)).floor_()
    lowest, highest = (-24, 15) if dtype is torch.float16 else (-126, 127)
    scale = torch.where(level == 0, torch.ones_like(level), torch.exp2(exponent.clamp_(lowest, highest)))
    limit = torch.finfo(dtype).max
    return scale, (-level / scale).clamp_(-limit, limit).to(dtype).float()


def _error(w: Tensor, v: Tensor | None, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """(rows, 1) squared error of w rounded to the nearest point of stored grids, weighted by v."""
    scale, zero = grid
    q = torch.round(w / scale + zero).clamp_(0, (1 << bits) - 1)
    square = q.sub_(zero).mul_(scale).sub_(w).square_()
    return _sum(square if v is None else square.mul_(v))


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True, dtype=torch.float64)
