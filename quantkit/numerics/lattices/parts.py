"""What is stored of super-blocks, put together into a `Lattice`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.lattices.kinds import COLUMNS, LatticeKind
from quantkit.tensors import Affine, Lattice


@dataclass(frozen=True, slots=True)
class Parts:
    """Of some rows and some super-blocks of theirs, in file order; each has the rows first.

    codes int16, d f16, sub uint8, signs int8 or None, shift fp32 or None
    """

    codes: Tensor
    d: Tensor
    sub: Tensor
    signs: Tensor | None
    shift: Tensor | None

    @staticmethod
    def beside(parts: Sequence[Parts]) -> Parts:
        """Super-blocks of the same rows."""
        return Parts._joined(parts, lambda found: torch.cat(found, 1))

    @staticmethod
    def below(parts: Sequence[Parts]) -> Parts:
        """Rows."""
        return Parts._joined(parts, lambda found: torch.cat(found, 0))

    @staticmethod
    def _joined(parts: Sequence[Parts], join: Callable[[list[Tensor]], Tensor]) -> Parts:
        signs = [p.signs for p in parts if p.signs is not None]
        shift = [p.shift for p in parts if p.shift is not None]
        return Parts(
            join([p.codes for p in parts]),
            join([p.d for p in parts]),
            join([p.sub for p in parts]),
            join(signs) if signs else None,
            join(shift) if shift else None,
        )


def assemble(kind: LatticeKind, table: Tensor, parts: Parts) -> Lattice:
    """The weight that `parts` of all its rows and super-blocks stand for."""
    zero = torch.full_like(parts.d, -0.5, dtype=torch.float32)
    scale = Affine(parts.sub, kind.scale_bits, parts.d, (1, kind.subs), zero)
    return Lattice(parts.codes, kind.bits, table, scale, (1, kind.group), parts.signs, parts.shift)


def signs_of(negative: Tensor) -> Tensor:
    """int8 −1 where `negative`, else 1."""
    return torch.where(negative, -1, 1).to(torch.int8)


def runs_of(kind: LatticeKind, shift_nc: Tensor) -> Tensor:
    """(n, runs) shifts from those of each code (n, c)."""
    return shift_nc[:, :: (kind.run or COLUMNS) // kind.length].contiguous()
