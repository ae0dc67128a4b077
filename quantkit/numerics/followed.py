"""Whether a matrix is the source's, up to rounding and up to factors that were folded into it.

With Ŵ what the files hold and W the source's, both (out, in), Ŵ = (W + rounding) · c_j / r_i: columns follow
what was divided out of their inputs, rows were divided by what their outputs' readers take back. Sums of
products tell factors from rounding, which points anywhere: ⟨Ŵ_j, W_j⟩ / ⟨W_j, W_j⟩ is the factor of column j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# elements that are compared at once
_AT_ONCE = 2**22
# A factor that is estimated may be so far from the one that was expected, beside what rounding explains ...
_OFF = 0.25
# ... which is what it leaves in the column, and so many standard deviations of its mean.
_DEVIATIONS = 6.0
# Factors that spread less cannot be told from rounding.
_SPREAD = 0.02
# A slope of 1 says that estimates follow, 0 that they do not; so many of its deviations make it sure.
_SLOPE, _SURE = 0.5, 3.0
# floats that were multiplied and rounded a few times
_ROUNDED = 2.0**-5
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Sums:
    """Over rows or over columns, fp64: Σ Ŵ·W, Σ W², Σ Ŵ², each of `count` products."""

    both: Tensor
    own: Tensor
    found: Tensor
    count: int

    @classmethod
    def of(cls, three: Tensor, count: int) -> Sums:
        """From the three in one tensor."""
        both, own, found = three
        return cls(both, own, found, count)

    def factors(self) -> Tensor:
        """What W was multiplied by, 1 where that cannot be told: nothing is there, or all rounded away."""
        told = (self.own > 0) & (self.both > 0)
        return torch.where(told, self.both / self.own.clamp(min=_TINY), 1.0)

    def slack(self) -> Tensor:
        """How far `factors` may be from the truth by rounding, relative; infinite where nothing tells.

        What is left in few elements is little by chance at times: no less counts than what all leave.
        """
        explained = self._explained()
        left = (self.found - explained).clamp(min=0)
        noise = torch.where(self.own > 0, left / explained.clamp(min=_TINY), torch.inf)
        noise = noise.maximum(self.noise())
        return _OFF + noise + _DEVIATIONS * (noise / max(self.count, 1)).sqrt()

    def noise(self) -> Tensor:
        """What rounding leaves of all together, squared and relative."""
        explained = self._explained()
        return (self.found - explained).clamp(min=0).sum() / explained.sum().clamp(min=_TINY)

    def _explained(self) -> Tensor:
        return self.both.square() / self.own.clamp(min=_TINY)

    def distance(self, divisors: Tensor) -> float:
        """Σ (Ŵ / divisors − W)²."""
        return float((self.found / divisors**2 - 2 * self.both / divisors + self.own).sum().clamp(min=0))


@dataclass(frozen=True, slots=True)
class Compared:
    """A matrix beside the source's, once the factors that its inputs call for are divided out of its columns.

    distance, size  Σ (Ŵ − W)² and Σ W²
    rows, columns   where factors may be; columns once those of the rows are divided out
    odd             floats, of which no rounding is expected, that differ by more than factors
    folded          the distance is that without factors of rows, or what takes them back
    """

    distance: float
    size: float
    rows: Sums | None = None
    columns: Sums | None = None
    odd: int = 0
    folded: bool = False

    @property
    def error(self) -> float:
        """‖Ŵ − W‖ / ‖W‖."""
        return math.sqrt(self.distance / self.size if self.size else self.distance)

    def without(self, distance: float) -> Compared:
        """At this distance once factors that were estimated are taken off; the sums are left out."""
        return replace(self, distance=distance, rows=None, columns=None, folded=True)


def compare_matrices(
    found: Tensor, source: Tensor, columns: Tensor | None, *, by_row: bool, by_column: bool, exact: bool
) -> Compared:
    """Ŵ beside W, both (out, in).

    columns    (in,) what Ŵ's were multiplied by, as far as it is known
    by_row     rows may have been divided by something that is not known
    by_column  sums over columns are wanted
    exact      both are floats: nothing else may differ by more than products round
    """
    step = max(1, _AT_ONCE // max(source.shape[1], 1))
    distance, size, odd = 0.0, 0.0, 0
    over_rows: list[Tensor] = []
    over_columns = torch.zeros(3, source.shape[1], dtype=torch.float64)
    for begin in range(0, source.shape[0], step):
        own, other = (t[begin : begin + step].float() for t in (source, found))
        if columns is not None:
            other = other / columns.to(other.dtype)
        distance += float(torch.linalg.vector_norm(other - own)) ** 2
        size += float(torch.linalg.vector_norm(own)) ** 2
        if by_row:
            sums = _sums(other, own, 1)
            over_rows.append(sums)
            divisors = Sums.of(sums, own.shape[1]).factors()
            other = other / divisors[:, None].float()
        if by_column:
            over_columns += _sums(other, own, 0)
        if exact:
            odd += _odd(other, own)
    rows = Sums.of(torch.cat(over_rows, dim=1), source.shape[1]) if by_row else None
    return Compared(distance, size, rows, Sums.of(over_columns, source.shape[0]) if by_column else None, odd)


def follows(columns: Sums, expected: Tensor, slack: Tensor | float = 0.0) -> bool:
    """Whether columns were multiplied by `expected`, which makes up for what their inputs were divided by.

    slack  how far `expected` itself may be off, relative
    """
    off = (columns.both / columns.own.clamp(min=_TINY) / expected - 1).abs()
    allowed = columns.slack() + slack
    silent = (columns.own == 0) | (columns.found == 0)
    return bool(((off <= allowed) | silent).all())


def goes_along(columns: Sums, expected: Tensor) -> bool:
    """Whether factors of columns rise and fall with `expected`, beyond what rounding can bring about.

    The slope of one over the other, columns counting by their size: 1 where they do, 0 where they do not.
    """
    weight = columns.own / columns.own.sum().clamp(min=_TINY)
    mean = (weight * expected).sum()
    variance = float((weight * (expected - mean).square()).sum())
    if variance < (_SPREAD * mean) ** 2:
        return False
    factors = columns.factors()
    slope = float((weight * (expected - mean) * (factors - (weight * factors).sum())).sum()) / variance
    deviation = (columns.noise() / max(columns.count, 1) * weight.square().sum() / variance).sqrt()
    return slope > _SLOPE + _SURE * float(deviation)


def _sums(found: Tensor, source: Tensor, over: int) -> Tensor:
    """(3, …) fp64 what `Sums` holds, of some rows."""
    pairs = ((found, source), (source, source), (found, found))
    return torch.stack([(a * b).sum(over) for a, b in pairs]).double()


def _odd(found: Tensor, source: Tensor) -> int:
    """Elements that rounding does not explain."""
    least = 1e-6 * float(source.abs().max()) if source.numel() else 0.0
    return int(((found - source).abs() > _ROUNDED * source.abs() + least).sum())
