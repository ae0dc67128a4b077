"""The points of a super-block as solvers see them: one column of weights, its scales and its offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.superblocks.grids import Superblock, inverse, nearest_places, table


@dataclass(frozen=True, slots=True)
class Points:
    """`Levels` of one type; what solvers call the zero point is the offset, which is added: w = s·q + zero.

    Codes are held as fp32. Where a scale is zero, the code is that of the point nearest to zero.
    """

    block: Superblock

    @property
    def lopsided(self) -> bool:
        return self.block.low < 0

    @property
    def reach(self) -> float:
        return float(max(-self.block.low, self.block.high))

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        x = (w if zero is None else w - zero) * inverse(scale)
        if self.block.table is not None:
            return nearest_places(x).to(torch.float32)
        return x.round_().clamp_(self.block.low, self.block.high)

    def nearest_units(self, w: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> Tensor:
        return self.units(self.codes(w, scale, zero), None)

    def units(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        return codes if self.block.table is None else table(codes.device)[codes.to(torch.int32)]

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        value = scale * self.units(codes, None)
        return value if zero is None else value + zero

    def stored(self, codes: Tensor) -> Tensor:
        return codes.to(self.block.code_dtype)
