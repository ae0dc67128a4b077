"""Codes and scales of one weight as numbers that gradients move.

A code is round(p) for a position p on the grid, counted in steps; a scale is s·m. The gradient of the weight
passes through the rounding as if it were not there (straight through). SignRound (Cheng et al. 2023)
starts p at the weight itself. Here the start's codes come from any solver, which moved weights on purpose:
p starts in the interval that rounds to the start's code, as near as that allows to where the weight lies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numerics.levels import Integers, Levels, Table, levels_of
from quantkit.numerics.stored import Stored, stored_of
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, QuantizedTensor, dequantize, values

# how far from its code a position may start; from 0.5 a breath of noise would change the code
_REACH = 0.4
# A scale moves every weight of its group: its steps, relative, as a share of those of positions
_SCALE_SHARE = 0.1
_FIRST, _SECOND, _TINY = 0.9, 0.95, 1e-20


class Learned:
    """One weight whose codes, and scales where these are plain floats, are being learned."""

    def __init__(self, start: QuantizedTensor, source: Tensor, scheme: Scheme, *, scales: bool) -> None:
        """`start` stands for `source` (out, in) fp32. ValueError for floats of 8 bits: no codes."""
        if not isinstance(start, Affine | Codebook):
            raise ValueError("only codes can be learned")
        self._start = start
        self._levels = levels_of(scheme)
        self._ends = _ends(self._levels)
        place = _places(start, self._levels)
        shift, self._sign = self._lie(place, source)
        self._position = place + shift
        self._toward = _Adam(self._position)
        self._plain: tuple[Tensor, Stored] | None = None
        if scales and isinstance(start.scale, Tensor):
            stored = stored_of(scheme, source)
            self._plain = None if stored.coarse else (start.scale.to(torch.float32), stored)
        if self._plain is not None:
            self._factor = torch.ones_like(self._plain[0])
            self._scaling = _Adam(self._factor)

    def quantized(self) -> QuantizedTensor:
        """What is stored of the present state: laid out like the start, scales rounded as the file does."""
        found = self._at(self._position)
        if self._plain is None:
            return found
        scale, stored = self._plain
        return replace(found, scale=stored.build(stored.round(scale * self._factor)))

    def step(self, gradient: Tensor, rate: float) -> None:
        """Go against the gradient (out, in) of the loss; positions by about `rate` steps of the grid."""
        if self._plain is not None:
            now = self.quantized()
            leaf = values(now.scale).requires_grad_()
            with torch.enable_grad():
                (by_scale,) = torch.autograd.grad(dequantize(replace(now, scale=leaf)), leaf, gradient)
            self._factor -= rate * _SCALE_SHARE * self._scaling.direction(by_scale * self._plain[0])
        low, high = self._ends
        self._position -= rate * self._toward.direction(gradient * self._sign)
        self._position.clamp_(low - _REACH, high + _REACH)

    def _at(self, position: Tensor) -> Affine | Codebook:
        """The start with the codes of other positions."""
        return replace(self._start, codes=self._levels.stored(position.round().clamp_(*self._ends)))

    def _lie(self, place: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """How far from `place` positions start, and whether a weight grows with its position (1, or −1 where
        the scale is negative, 0 where it is zero)."""
        now = dequantize(self._at(place))
        up = dequantize(self._at(place + 1)) - now
        down = now - dequantize(self._at(place - 1))
        sign = (up + down).sign()
        wanted = source - now
        # a share of the gap to the neighbour on the weight's side; past the last point there is none
        share = wanted / torch.where(wanted * sign > 0, up, down)
        return share.nan_to_num_(0.0).clamp_(-_REACH, _REACH), sign


class _Adam:
    """Directions of about unit size, from gradients of any (Kingma and Ba 2015)."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Where to go from, after one more gradient."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _FIRST)
        self._square.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        size = (self._square / (1 - _SECOND**self._steps)).sqrt_().add_(_TINY)
        return self._mean / size.mul_(1 - _FIRST**self._steps)


def _ends(levels: Levels) -> tuple[int, int]:
    match levels:
        case Integers():
            return levels.limits
        case Table():
            return 0, len(levels.points) - 1
        case _:
            raise ValueError("only codes can be learned")


def _places(q: Affine | Codebook, levels: Levels) -> Tensor:
    """The codes as solvers count them: integers, or places in the sorted table."""
    if not isinstance(levels, Table):
        return q.codes.to(torch.float32)
    # codes that solvers never choose (a second zero) take the place of what has their value
    places = torch.searchsorted(levels.points, levels.table)
    places[levels.in_file.long()] = torch.arange(len(levels.points))
    return places.to(q.codes.device)[q.codes.long()].to(torch.float32)
