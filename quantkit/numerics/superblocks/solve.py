"""Codes and scales of super-blocks by error feedback: what ggml's k-quants can hold, chosen as GPTQ does.

Super-blocks are met by falling importance, as the file's layout allows; when one is reached, its scales are
searched on the weights that the errors so far have moved, and its columns follow, important ones first. Then
everything is revisited in turn: codes and sub-scales by coordinate descent, all d and dmin of a row at once
by least squares through the gram. Rows are independent. Shape suffixes: o out, i in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.numerics import feedback
from quantkit.numerics.feedback import Compensated, StaticGroups, round_with_feedback
from quantkit.numerics.polish import polish
from quantkit.numerics.refit import refit
from quantkit.numerics.solve import Seen, Steps
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, Superblock, assemble, half
from quantkit.numerics.superblocks.points import Points
from quantkit.numerics.superblocks.rescale import rescale
from quantkit.numerics.superblocks.search import search
from quantkit.tensors import QuantizedTensor


def order(kind: str, diagonal: Tensor) -> Tensor:
    """(in,) processing order: super-blocks by falling largest diagonal, and columns inside them likewise."""
    return feedback.group_aware(diagonal, SUPERBLOCKS[kind].columns)


def stages(kind: str, weight: Tensor, seen: Seen, steps: Steps) -> Iterator[QuantizedTensor]:
    """weight (out, in) fp32 after every stage of `steps`, each better on the gram than the one before.

    `seen` is in the order that `order` gives; its factor is there.
    """
    if seen.factor is None:
        raise ValueError("there is no factor to solve with")
    block = SUPERBLOCKS[kind]
    curvature, levels = seen.curvature, Points(block)
    w_io = weight.T[curvature.order].contiguous()
    groups = _Groups(block, curvature.order, seen.importance)
    batch = feedback.batch_width(block.columns, block.columns if block.columns > 32 else 128)
    codes_io = round_with_feedback(w_io, seen.factor, groups, levels, batch).codes_io
    scales = groups.scales()
    group_of = curvature.order // block.group
    yield _assembled(kind, codes_io, scales, curvature.order)
    if steps.polish == 0:
        return
    polish(codes_io, w_io, curvature, _tables(kind, scales, group_of), levels, steps.polish)
    yield _assembled(kind, codes_io, scales, curvature.order)
    if steps.refits == 0:
        return
    for _ in range(steps.refits):
        scales = rescale(kind, codes_io, w_io, scales, curvature)
        scales = _refitted(block, codes_io, w_io, scales, seen)
        polish(codes_io, w_io, curvature, _tables(kind, scales, group_of), levels, 1)
    yield _assembled(kind, codes_io, scales, curvature.order)


def _tables(kind: str, scales: Scales, group_of: Tensor) -> StaticGroups:
    """Effective scales and offsets of all columns; `scales` of all super-blocks, row by row."""
    per_row = group_of.numel() // SUPERBLOCKS[kind].group
    offset = scales.offset(kind)
    return StaticGroups(
        scales.scale(kind).view(-1, per_row), None if offset is None else offset.view(-1, per_row), group_of
    )


def _assembled(kind: str, codes_io: Tensor, scales: Scales, order: Tensor) -> QuantizedTensor:
    in_file = torch.empty_like(codes_io)
    in_file[order] = codes_io
    return assemble(kind, in_file.T.contiguous().to(SUPERBLOCKS[kind].code_dtype), scales)


class _Groups:
    """`Grids` whose scales are searched when the first column of a super-block is reached."""

    def __init__(self, block: Superblock, order: Tensor, importance: Tensor) -> None:
        self._block, self._order, self._importance = block, order, importance
        self._found: dict[int, Scales] = {}
        self._scale: list[Tensor] = []
        self._offset: list[Tensor] | None = None
        self._part: list[int] = []

    @property
    def period(self) -> int:
        return self._block.columns

    def at(self, column: int, compensated: Compensated) -> tuple[Tensor, Tensor | None]:
        columns = self._block.columns
        if column % columns == 0:
            self._search(slice(column, column + columns), compensated)
        part = self._part[column % columns]
        return self._scale[part], None if self._offset is None else self._offset[part]

    def _search(self, members: slice, compensated: Compensated) -> None:
        columns = self._block.columns
        number = int(self._order[members.start]) // columns
        place = self._order[members] - number * columns
        moved = compensated(members)
        in_file = torch.empty_like(moved)
        in_file[place] = moved
        own = self._importance[number * columns : (number + 1) * columns]
        found = search(self._block.name, in_file.T, own[None])
        offset = found.offset(self._block.name)
        self._found[number] = found
        self._scale = list(found.scale(self._block.name).T.contiguous())
        self._offset = None if offset is None else list(offset.T.contiguous())
        self._part = (place // self._block.group).tolist()

    def scales(self) -> Scales:
        """Of all super-blocks, row by row as the file has them."""
        in_file = [self._found[number] for number in range(len(self._found))]

        def joined(name: str) -> Tensor | None:
            parts = [getattr(scales, name) for scales in in_file]
            return None if parts[0] is None else torch.stack(parts, 1).flatten(0, 1)

        d = joined("d")
        if d is None:
            raise ValueError("no super-block was met")
        return Scales(d, joined("sub"), joined("dmin"), joined("submin"))


@dataclass(frozen=True, slots=True)
class _Half:
    """float16 scales of super-blocks, in which a zero stays a zero."""

    def round(self, scale: Tensor) -> Tensor:
        return half(scale).to(torch.float32)


def _refitted(block: Superblock, codes_io: Tensor, w_io: Tensor, scales: Scales, seen: Seen) -> Scales:
    """d and dmin by least squares through the gram, everything else as it is."""
    curvature = seen.curvature
    width, out = w_io.shape
    per_row = width // block.columns
    part_of = curvature.order // block.group
    units = Points(block).units(codes_io, None)
    if scales.sub is not None:
        units = units * scales.sub.view(out, -1).T[part_of]
    bases, known = [units], [scales.d.view(out, per_row).to(torch.float32)]
    if scales.dmin is not None:
        if scales.submin is None:
            bases.append(torch.ones_like(w_io))
        else:
            bases.append(-scales.submin.view(out, -1).T[part_of].to(torch.float32))
        known.append(scales.dmin.view(out, per_row).to(torch.float32))
    found = refit(bases, w_io, torch.cat(known, 1), curvature.order // block.columns, curvature, _Half())
    d, dmin = found[:, :per_row].reshape(-1), found[:, per_row:].reshape(-1)
    return replace(
        scales,
        d=d.to(torch.float16),
        dmin=None if scales.dmin is None else dmin.to(torch.float16),
    )
