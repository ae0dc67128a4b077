"""Trial codes of sub-blocks, and the sums to which each is reduced.

Codes q of a sub-block, whatever scale s and offset o are then paired with them, leave the error
    Σ v·(x − s·q − o)² = Σ v·x² − 2·s·Σ v·q·x + s²·Σ v·q² − 2·o·Σ v·x + 2·s·o·Σ v·q + o²·Σ v
so five sums tell all about them. Codes are made by passes over all weights, as few as can be; everything
about scales is then decided on sums, of which there are 16 or 32 times fewer.

Shape suffixes: g weights of a sub-block, s sub-blocks of a super-block, n super-blocks, k trials. n comes
last, so that sums over weights and over sub-blocks both add long rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.superblocks.grids import Superblock, nearest_points
from quantkit.numerics.superblocks.room import Room

TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Chunk:
    """Super-blocks that are worked on together.

    x_sgn  weights, fp32
    v_sgn  what their squared errors count, with 1 for n where super-blocks share it
    room   buffers
    """

    block: Superblock
    x_sgn: Tensor
    v_sgn: Tensor
    room: Room


def symmetric(chunk: Chunk, inverses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(Σ v·q·x, Σ v·q²), each (k, s, n), of the points q nearest to x · inverse (s, n)."""
    block, x, room = chunk.block, chunk.x_sgn, chunk.room
    q, weighted = room.like("codes", x), room.like("weighted", x)
    cross, energy = (room.take(name, len(inverses), *inverses[0].shape) for name in ("cross", "energy"))
    for k, inverse in enumerate(inverses):
        torch.mul(x, inverse[:, None], out=q)
        if block.table is None:
            q.round_().clamp_(block.low, block.high)
        else:
            nearest_points(q)
        torch.mul(q, chunk.v_sgn, out=weighted)
        torch.sum(q.mul_(weighted), 1, out=energy[k])
        torch.sum(weighted.mul_(x), 1, out=cross[k])
    return cross, energy


def affine(chunk: Chunk, grids: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ v·q, Σ v·q·x, Σ v·q²), each (k, s, n), of the codes q nearest to x · inverse + shift (s, n)."""
    block, x, room = chunk.block, chunk.x_sgn, chunk.room
    q, weighted = room.like("codes", x), room.like("weighted", x)
    plain, cross, energy = (
        room.take(name, len(grids), *grids[0][0].shape) for name in ("plain", "cross", "energy")
    )
    for k, (inverse, shift) in enumerate(grids):
        torch.addcmul(shift[:, None], x, inverse[:, None], out=q)
        q.round_().clamp_(block.low, block.high)
        torch.mul(q, chunk.v_sgn, out=weighted)
        torch.sum(weighted, 1, out=plain[k])
        torch.sum(q.mul_(weighted), 1, out=energy[k])
        torch.sum(weighted.mul_(x), 1, out=cross[k])
    return plain, cross, energy


def least(error_ksn: Tensor) -> Tensor:
    """(1, s, n) index of a trial with the least error; overwrites the errors.

    `argmin` over rows takes twenty times as long.
    """
    count = error_ksn.shape[0]
    place = torch.arange(1, count + 1, dtype=torch.float32, device=error_ksn.device).view(-1, 1, 1)
    hit = torch.eq(error_ksn, error_ksn.amin(0), out=error_ksn).mul_(place)
    return hit.amax(0, keepdim=True).sub_(1).clamp_(min=0).to(torch.int64)


def best_of(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Of tuples that begin with errors (n,) the one with the least, super-block by super-block."""
    best = found[0]
    for other in found[1:]:
        better = other[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
    return best
