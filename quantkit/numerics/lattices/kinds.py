"""The grids of ggml whose codes choose rows of a table: what shares a scale, where signs and shifts are.

A weight is d·(s + ½)·sign·(table[code] + shift): d per super-block of 256, s per sub-block of 16 or 32,
a code per `length` weights. Tables are given with their factor, 0.25·G for the IQ2 types and so on, so
that this one formula holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

COLUMNS = 256
# weights over which the parity types count signs
PARITY = 8
SHIFT = 0.25
# of d, in f16
LARGEST = 65504.0

Signs = Literal["parity", "free", "none"]


@dataclass(frozen=True, slots=True)
class LatticeKind:
    """One of these grids.

    name        as in the file, lower case
    length      weights of a row of the table
    bits        of a code
    group       weights that share a sub-scale
    scale_bits  of a sub-scale
    signs       `parity`: an even number of −1 per 8 weights; `free`: any; `none`: the table has them
    run         weights that share a shift of ±0.25, or None
    gamma       what the least-squares d of a super-block is multiplied by. Least squares shrinks the norm
                of a weight, 1 keeps the error smallest, more keeps the norm.
    """

    name: str
    length: int
    bits: int
    group: int
    scale_bits: int
    signs: Signs
    run: int | None = None
    gamma: float = 1.0

    @property
    def subs(self) -> int:
        """Sub-scales of a super-block."""
        return COLUMNS // self.group

    @property
    def codes(self) -> int:
        """Codes of a super-block."""
        return COLUMNS // self.length

    @property
    def unit(self) -> int:
        """Weights that must be rounded together: those of a code, or those whose signs are counted."""
        return PARITY if self.signs == "parity" else self.length

    @property
    def shares_shift(self) -> bool:
        """Whether several codes have one shift, so that it cannot be chosen with each."""
        return self.run is not None and self.run > self.length

    @property
    def neighbours(self) -> int:
        """Rows of the table compared for a weight vector. Of signs that are counted the search need only find
        scales: their codes are then chosen among all rows."""
        return 16 if self.signs == "parity" else 32

    @property
    def top(self) -> int:
        """The largest sub-scale."""
        return int(2**self.scale_bits) - 1


_ALL = (
    LatticeKind("iq2_xxs", 8, 8, 32, 4, "parity"),
    LatticeKind("iq2_xs", 8, 9, 16, 4, "parity"),
    LatticeKind("iq2_s", 8, 10, 16, 4, "free"),
    LatticeKind("iq3_xxs", 4, 8, 32, 4, "parity"),
    LatticeKind("iq3_s", 4, 9, 32, 4, "free"),
    LatticeKind("iq1_s", 8, 11, 32, 3, "none", 32),
    LatticeKind("iq1_m", 8, 11, 16, 3, "none", 8),
)
KINDS: Mapping[str, LatticeKind] = MappingProxyType({kind.name: kind for kind in _ALL})


def order(kind: LatticeKind, diagonal: Tensor) -> Tensor:
    """(in,) processing order for block feedback, from the diagonal of the gram (in,) in file order.

    Super-blocks by falling mean, inside them groups that share a code (parity types: signs) likewise;
    inside a group the order of the file.
    """
    width = kind.unit
    groups = diagonal.view(-1, COLUMNS // width, width).mean(2)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    blocks = torch.argsort(groups.mean(1), descending=True, stable=True)
    first = inside[blocks] * width + blocks[:, None] * COLUMNS
    return (first[:, :, None] + torch.arange(width, device=diagonal.device)).flatten()
