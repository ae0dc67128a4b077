"""The points of a grid before scaling, and rounding to the nearest of them.

A weight w on a grid with scale s and, for integers, zero point z stands for
    integers   s · (code − z)        code a whole number of `bits` bits
    tables     s · table[code]       NF4, FP4 (bitsandbytes), e2m1 (MX, NV)
    e4m3       s · code              code is itself a float of 8 bits
Solvers hold codes as fp32, whatever the file does. Shapes: w is (…, g) or (out,), with scale and zero
point broadcastable to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.schemes import Scheme

# NormalFloat (Dettmers et al. 2023) as bitsandbytes holds it: quantiles of a normal distribution
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4 = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
)
# bitsandbytes' own: sign bit, then three bits in this order. Not e2m1
FP4 = (*_FP4, *(-v for v in _FP4))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1, *(-v for v in _E2M1))
E4M3_MAX = 448.0
# bins from zero to the largest point of a table
_BINS = 1024
# elements that are searched rather than looked up
_FEW = 4096


class Levels(Protocol):
    """Codes of the nearest points, and what codes stand for. All tensors fp32."""

    @property
    def lopsided(self) -> bool:
        """The points of a negative scale are others than those of a positive one."""
        ...

    @property
    def reach(self) -> float:
        """The largest magnitude of a point, to which a scale maps the largest weight."""
        ...

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the points nearest to w."""
        ...

    def nearest_units(self, w: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        """The units of the points nearest to w, in `out` where that saves memory; a search calls it dozens of
        times and only compares what it makes."""
        ...

    def units(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        """What the scale multiplies: code − zero, or the table's value."""
        ...

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The weights that codes stand for."""
        ...

    def stored(self, codes: Tensor) -> Tensor:
        """Codes as a `QuantizedTensor` holds them: integers of 8 bits, places in the file's table, floats."""
        ...


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers of `bits` bits, signed when `sym`; ties to even.

    With a fractional zero point the code is round(w/s + z), with an integer one round(w/s) + z.
    """

    bits: int
    sym: bool
    fractional: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code: signed when symmetric, [0, 2^bits − 1] otherwise."""
        middle = 1 << (self.bits - 1)
        return (-middle, middle - 1) if self.sym else (0, 2 * middle - 1)

    @property
    def lopsided(self) -> bool:
        return self.sym

    @property
    def reach(self) -> float:
        # half a step past the last code on either side is still its nearest point
        return (1 << (self.bits - 1)) - 0.5

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        code = w / scale
        if zero is not None and self.fractional:
            code += zero
        code = torch.round(code)
        if zero is not None and not self.fractional:
            code += zero
        return code.clamp_(*self.limits)

    def nearest_units(self, w: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        q = torch.mul(w, scale.reciprocal(), out=out).round_()
        if zero is None:
            return q.clamp_(*self.limits)
        return q.add_(zero).clamp_(*self.limits).sub_(zero)

    def units(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        return codes if zero is None else codes - zero

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.units(codes, zero) * scale

    def stored(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8 if self.sym else torch.uint8)


class Table:
    """A table of up to 256 values. Codes are places in the table sorted by value; `in_file` maps them.

    A value in the middle of two points takes the smaller, or, `even`, the one with the even code in the file.
    """

    def __init__(self, table: tuple[float, ...], *, even: bool = False) -> None:
        values = torch.tensor(table, dtype=torch.float32)
        # of two zeros the first stands for both in e2m1; bitsandbytes uses the second for what is above zero
        places = [n for n in range(len(table)) if not (even and table[n] == 0 and 0.0 in table[:n])]
        ordered = torch.tensor(sorted(places, key=lambda n: table[n]))
        self.table = values
        self.in_file = ordered.to(torch.uint8)
        self.points = values[ordered]
        middles = ((self.points[1:].double() + self.points[:-1].double()) / 2).float()
        if even:
            upper_even = self.in_file[1:] % 2 == 0
            below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
            middles = torch.where(upper_even, below, middles)
        self._middles = middles
        # The range is cut into bins so narrow that none holds two middles: a look-up gives the point nearest
        # to all of a bin but one side of its middle. 20 times faster than searching the middles.
        self._bins = 1 << math.floor(math.log2(_BINS / self.reach))
        self._last = math.ceil(self.reach * self._bins) + 1
        edges = torch.arange(-self._last, self._last + 1, dtype=torch.float32) / self._bins
        self._place = torch.bucketize(edges, middles, out_int32=True)
        self._next = torch.cat((middles, torch.tensor([torch.inf])))[self._place]
        self._unit = self.points[torch.bucketize(edges + 0.5 / self._bins, middles)]
        mirrored = self.points.flip(0).neg()
        self._lopsided = not bool((mirrored == self.points).all())

    @property
    def lopsided(self) -> bool:
        return self._lopsided

    @property
    def reach(self) -> float:
        return float(self.points.abs().max())

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        # by the reciprocal, as bitsandbytes does: ties are real where weights have few digits. A group of
        # zeros may have a scale of zero: 0 · ∞ is to be 0
        x = (w * scale.reciprocal()).nan_to_num_(0.0)
        if x.numel() <= _FEW:
            # a column of a solver: one slow operation costs less than ten quick ones
            return torch.bucketize(x, self._middles.to(w.device), out_int32=True).to(torch.float32)
        at = self._bin(x.clone())
        place = torch.index_select(self._place.to(w.device), 0, at).view(w.shape)
        beyond = torch.index_select(self._next.to(w.device), 0, at).view(w.shape)
        return (place + (x > beyond)).to(torch.float32)

    def nearest_units(self, w: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        at = self._bin(torch.mul(w, scale.reciprocal(), out=out))
        return torch.index_select(self._unit.to(w.device), 0, at, out=out.view(-1)).view(w.shape)

    def units(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        return self.points.to(codes.device)[codes.to(torch.int32)]

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.units(codes, zero) * scale

    def stored(self, codes: Tensor) -> Tensor:
        return self.in_file.to(codes.device)[codes.to(torch.int32)]

    def _bin(self, x: Tensor) -> Tensor:
        """Flat int32 bins of x, which is overwritten; exact, because a unit has a power of two of bins."""
        x.mul_(self._bins).floor_().clamp_(-self._last, self._last).add_(self._last)
        return x.to(torch.int32).view(-1)


class E4M3:
    """Floats of 8 bits (OCP e4m3, finite only). A code is its own value; casts saturate, ties to even."""

    lopsided = False
    reach = E4M3_MAX

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (w / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)

    def nearest_units(self, w: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        return self.codes(w, scale, zero)

    def units(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        return codes

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.units(codes, zero) * scale

    def stored(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float8_e4m3fn)


_TABLES = {"nf4": Table(NF4), "fp4": Table(FP4), "mxfp4": Table(E2M1, even=True)}
_E4M3 = E4M3()


def levels_of(scheme: Scheme) -> Levels:
    """The points that `scheme` rounds to."""
    match scheme.numbers:
        case "int":
            return Integers(scheme.bits, scheme.sym, scheme.fractional)
        case "fp8":
            return _E4M3
        case "nf4" | "fp4":
            return _TABLES[scheme.numbers]
        case "mxfp4" | "nvfp4":
            return _TABLES["mxfp4"]
        case _:
            raise ValueError(f"{scheme.name} has points of its own: see numerics.superblocks and lattices")


def table_of(scheme: Scheme) -> Table:
    """The table of a scheme that has one."""
    found = levels_of(scheme)
    if not isinstance(found, Table):
        raise ValueError(f"{scheme.name} has no table")
    return found
