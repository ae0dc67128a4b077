"""What a solver holds of some rows of a weight, in processing order, and what is stored of it.

Shape suffixes: n rows, i inputs, c codes along a row, b super-blocks, s sub-blocks of a super-block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.lattices.codebook import Codebook
from quantkit.numerics.lattices.kinds import COLUMNS, LatticeKind
from quantkit.numerics.lattices.parts import Parts, assemble, runs_of, signs_of
from quantkit.numerics.lattices.units import Chosen, choose
from quantkit.tensors import Lattice


@dataclass(frozen=True, slots=True)
class Places:
    """Where the columns of each super-block are: `order` (in,) processing order with whole super-blocks."""

    kind: LatticeKind
    order: Tensor

    def local(self, block: int) -> Tensor:
        """(256,) place in the file's super-block of each column of the block-th one processed."""
        return self.order[block * COLUMNS : (block + 1) * COLUMNS] % COLUMNS

    def subs(self, block: int) -> Tensor:
        """(256,) its sub-block."""
        return self.local(block) // self.kind.group


@dataclass(frozen=True, slots=True)
class State:
    """points_in sign·(table + shift), code_cn int32, shift_cn (fp32, a number per code) or None,
    d_bn f16, sub_bsn fp32; all in processing order, sub-blocks within a super-block as in the file."""

    places: Places
    points_in: Tensor
    code_cn: Tensor
    shift_cn: Tensor | None
    d_bn: Tensor
    sub_bsn: Tensor

    @classmethod
    def empty(cls, places: Places, w_in: Tensor) -> State:
        kind, (width, n) = places.kind, w_in.shape
        blocks, codes = width // COLUMNS, width // kind.length
        return cls(
            places,
            torch.zeros_like(w_in),
            torch.zeros(codes, n, dtype=torch.int32, device=w_in.device),
            None if kind.run is None else torch.zeros(codes, n, device=w_in.device),
            torch.zeros(blocks, n, dtype=torch.float16, device=w_in.device),
            torch.zeros(blocks, kind.subs, n, device=w_in.device),
        )

    def steps(self, block: int) -> Tensor:
        """(s, n) d·(sub + ½) of the block-th super-block processed."""
        return self.d_bn[block].float() * (self.sub_bsn[block] + 0.5)

    def wide(self, block: int, of_sn: Tensor) -> Tensor:
        """(256, n) in processing order, from a number per sub-block (s, n)."""
        return of_sn[self.places.subs(block)]

    def values(self, block: int) -> Tensor:
        """(256, n) weights that the block-th super-block processed stands for."""
        own = slice(block * COLUMNS, (block + 1) * COLUMNS)
        return self.wide(block, self.steps(block)) * self.points_in[own]

    def proposed(self, book: Codebook, first: int, aim_un: Tensor, upper: Tensor, step: Tensor) -> Chosen:
        """The best points found for the unit at column `first`, its target (u, n) and steps (n,) given."""
        kind = self.places.kind
        inverse = torch.where(step > 0, 1 / step, 0.0)
        shared = None
        if self.shift_cn is not None and kind.run != kind.length:
            shared = self.shift_cn[first // kind.length]
        return choose(kind, book, (aim_un * inverse).T.contiguous(), upper, shared)

    def put(self, first: int, chosen: Chosen) -> None:
        """Keep the points of the unit at column `first`."""
        kind = self.places.kind
        self.points_in[first : first + kind.unit] = chosen.value_nu.T
        at = first // kind.length
        self.code_cn[at : at + chosen.code.shape[1]] = chosen.code.T
        if self.shift_cn is not None and chosen.shift is not None:
            self.shift_cn[at] = chosen.shift[:, 0]

    def unit(self, first: int) -> Chosen:
        """The points of the unit at column `first` as they are."""
        kind = self.places.kind
        at = first // kind.length
        value = self.points_in[first : first + kind.unit].T
        shift = None if self.shift_cn is None else self.shift_cn[at][:, None]
        code = self.code_cn[at : at + kind.unit // kind.length].T
        return Chosen(code, value, shift, torch.zeros_like(value[:, 0]))

    def lattice(self, table: Tensor) -> Lattice:
        """What is stored of it, in file order."""
        kind, order = self.places.kind, self.places.order
        by_code, by_block = order[:: kind.length] // kind.length, order[::COLUMNS] // COLUMNS
        signs = None if kind.signs == "none" else signs_of(_in_file(self.points_in, order) < 0)
        shift = None
        if self.shift_cn is not None and kind.run is not None:
            shift = runs_of(kind, _in_file(self.shift_cn, by_code))
        sub = _in_file(self.sub_bsn, by_block).flatten(1)
        codes = _in_file(self.code_cn, by_code).to(torch.int16)
        parts = Parts(codes, _in_file(self.d_bn, by_block), sub.to(torch.uint8), signs, shift)
        return assemble(kind, table, parts)


def _in_file(of_xn: Tensor, places: Tensor) -> Tensor:
    """(n, x) in file order, or (n, x, s) from (x, s, n), of what is in processing order."""
    found = torch.empty_like(of_xn)
    found[places] = of_xn
    return found.movedim(-1, 0).contiguous()
