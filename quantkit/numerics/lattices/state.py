"""What a solver holds of some rows of a weight, in processing order, and what is stored of it.

Shape suffixes: n rows, i inputs, c codes along a row, b super-blocks, s sub-blocks of a super-block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.numerics.lattices.kinds import COLUMNS, LARGEST, LatticeKind
from quantkit.numerics.lattices.parts import Parts, assemble, runs_of, signs_of
from quantkit.numerics.lattices.units import Chosen
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
class Factors:
    """What the points of a super-block of each row have in common: d (n,) f16, sub_sn fp32, and shift_cn of
    each code in processing order, or None where they have no shift or each its own."""

    d: Tensor
    sub_sn: Tensor
    shift_cn: Tensor | None

    def steps(self) -> Tensor:
        """(s, n) d·(sub + ½)."""
        return self.d.float() * (self.sub_sn + 0.5)

    @staticmethod
    def beside(all_of: Sequence[Factors]) -> Factors:
        """As many times more rows."""
        shifts = [each.shift_cn for each in all_of if each.shift_cn is not None]
        return Factors(
            torch.cat([each.d for each in all_of]),
            torch.cat([each.sub_sn for each in all_of], 1),
            torch.cat(shifts, 1) if shifts else None,
        )

    def stretched(self, ratio: float) -> Factors:
        """With d so many times as large."""
        return replace(self, d=(self.d.float() * ratio).clamp(max=LARGEST).to(torch.float16))

    def rows(self, chosen: Tensor) -> Factors:
        """Some rows."""
        shift = None if self.shift_cn is None else self.shift_cn[:, chosen]
        return Factors(self.d[chosen], self.sub_sn[:, chosen], shift)


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
        return self.factors(block).steps()

    def wide(self, block: int, of_sn: Tensor) -> Tensor:
        """(256, n) in processing order, from a number per sub-block (s, n)."""
        return of_sn[self.places.subs(block)]

    def values(self, block: int) -> Tensor:
        """(256, n) weights that the block-th super-block processed stands for."""
        own = slice(block * COLUMNS, (block + 1) * COLUMNS)
        return self.wide(block, self.steps(block)) * self.points_in[own]

    def factors(self, block: int) -> Factors:
        """Those of the block-th super-block processed."""
        kind, shift = self.places.kind, None
        if kind.shares_shift and self.shift_cn is not None:
            shift = self.shift_cn[block * kind.codes : (block + 1) * kind.codes]
        return Factors(self.d_bn[block], self.sub_bsn[block], shift)

    def put(self, block: int, at: Tensor, factors: Factors, chosen: Chosen) -> None:
        """Keep factors of a super-block and points of its columns `at` (u,), whole units."""
        length = self.places.kind.length
        column = block * COLUMNS + at
        code = column[::length] // length
        self.d_bn[block], self.sub_bsn[block] = factors.d, factors.sub_sn
        self.points_in[column] = chosen.value_nu.T
        self.code_cn[code] = chosen.code.T
        if self.shift_cn is not None and chosen.shift is not None:
            self.shift_cn[code] = chosen.shift.T

    def chosen(self, block: int, at: Tensor) -> Chosen:
        """The points of columns `at` (u,) as they are."""
        length = self.places.kind.length
        column = block * COLUMNS + at
        code, value = column[::length] // length, self.points_in[column].T
        shift = None if self.shift_cn is None else self.shift_cn[code].T
        return Chosen(self.code_cn[code].T, value, shift, torch.zeros_like(value[:, 0]))

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
