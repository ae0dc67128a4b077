"""HQQ: zero points by half-quadratic splitting, without data (Badri and Shaji 2023).

The scale is that of min and max; the zero point minimises Σ|e|^p, p < 1, over the errors e = W − Ŵ of a
group by turns of
    q  = round(W/s + z), within the codes
    e' = sign(e)·max(0, |e| − |e|^(p−1)/β)
    z  = mean of q − (W − e')/s
until the mean |e| of the whole matrix no longer falls. Where |e| ≤ β^(−1/(2−p)), 0.17 at p = 0.7 and β = 10,
e' is 0 and the turn is one of plain least squares: so it is for the weights of nearly all models. Every
operation is that of the hqq library on a CPU, and so are scales and zero points, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.levels import Integers

# a group that is narrower than this gets the scale 1, and no scale is smaller than 1/_LARGEST
_NARROW = 1e-4
_LARGEST = 2e4
# rounding apart: errors smaller than this share of the threshold are shrunk to 0 for certain
_SAFE = 0.99
# elements handled at once: the temporaries then stay in the processor's cache
_CHUNK = 1 << 18
_LANES = 64


def solve(
    w: Tensor, bits: int, axis: int, iterations: int = 20, p: float = 0.7, beta: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of w, a row (axis 1) or a column (axis 0) of a 2-D fp32 matrix.

    Both fp32, (groups, 1) or (1, groups), not yet rounded to what a file stores. Beside w a second matrix of
    its size holds |e|. Raises NumericsError when w holds non-finite values.
    """
    if not bool(torch.isfinite(w).all()):
        raise NumericsError("the weights hold non-finite values")
    last = (1 << bits) - 1
    low = w.amin(axis, keepdim=True)
    span = w.amax(axis, keepdim=True) - low
    inverse = torch.where(span <= _NARROW, torch.ones_like(span), last / span).clamp_(max=_LARGEST)
    zero = -low * inverse
    if bits == 4:
        zero.round_()
    error = torch.empty_like(w)
    best = torch.tensor(torch.inf, device=w.device)
    for _ in range(iterations):
        moved = torch.empty_like(zero)
        for at in _pieces(w, axis):
            steps, q = _errors(w[at], inverse[at], zero[at], last, error[at])
            if float(error[at].amax()) >= _SAFE * beta ** (-1 / (2 - p)):
                steps = (w[at] - _shrunk(w[at] - (q - zero[at]) / inverse[at], p, beta)) * inverse[at]
            moved[at] = (q - steps).mean(axis, keepdim=True)
        zero = moved
        # fp32 as the library has it: near the end only its rounding decides when to stop
        mean = error.mean()
        if not bool(mean < best):
            break
        best = mean
    return 1.0 / inverse, zero


def codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int, axis: int) -> Tensor:
    """uint8 codes of the points nearest to w; scale and zero point as `solve` gives them, or as stored."""
    levels = Integers(bits, sym=False, fractional=True)
    found = torch.empty_like(w, dtype=torch.uint8)
    for at in _pieces(w, axis):
        found[at] = levels.codes(w[at], scale[at], zero[at]).to(torch.uint8)
    return found


def _errors(w: Tensor, inverse: Tensor, zero: Tensor, last: int, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """(w·inverse, codes); |e| goes to `magnitude`."""
    steps = w * inverse
    q = (steps + zero).round_().clamp_(0, last)
    torch.sub(w, (q - zero).div_(inverse), out=magnitude).abs_()
    return steps, q


def _shrunk(e: Tensor, p: float, beta: float) -> Tensor:
    """sign(e)·max(0, |e| − |e|^(p−1)/β), 0 at 0."""
    size = e.abs()
    return size.sub_((1.0 / beta) * size.pow(p - 1)).clamp_(min=0.0).mul_(e.sign())


def _pieces(w: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """Whole groups of w, some at a time; the same index serves what holds one number for each group."""
    groups = w.shape[1 - axis]
    # a multiple of what vector instructions take at once: sums and powers of the rest round differently
    size = max(1, _CHUNK // w.shape[axis] // _LANES) * _LANES
    for at in range(0, groups, size):
        own, every = slice(at, at + size), slice(None)
        yield (own, every) if axis == 1 else (every, own)
