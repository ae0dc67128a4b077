"""Scales of super-blocks that minimise Σ v·(w − y)²."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.superblocks import affine, symmetric
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, Superblock, assemble, codes, joined
from quantkit.numerics.superblocks.plans import PLANS, Effort
from quantkit.numerics.superblocks.room import Room
from quantkit.numerics.superblocks.trials import TINY, Chunk
from quantkit.tensors import QuantizedTensor

# Weights worked on at once: many enough that a call costs little beside its work, few enough for the caches,
# which a GPU does without.
_CHUNK = 1 << 18
_CHUNK_OF_GPU = 1 << 23
# An input that calibration never excited would leave its weights unconstrained; keep a floor.
_FLOOR = 1e-3
# No weight beyond this can be held, nor would the squares of much larger ones be numbers.
_LARGEST = 2.0**40


def search(kind: str, w: Tensor, v: Tensor | None, effort: Effort = "best") -> Scales:
    """Scales of super-blocks w (n, columns) fp32 under v, what their squared errors count.

    v is (columns,), (1, columns) or (n, columns), or None: all count alike. Super-blocks do not influence one
    another. w may be a transposed view: then it is not copied twice. Raises NumericsError when w or v holds
    non-finite values.
    """
    block = SUPERBLOCKS[kind]
    weights = _floored(v, block, w.device)
    room = Room(w.device)
    step = max(1, at_once(w.device) // block.columns)
    parts = []
    for at in range(0, w.shape[0], step):
        some = weights if weights.shape[0] == 1 else weights[at : at + step]
        parts.append(_fit(block, w[at : at + step], _laid_out("v", some, block, room), effort, room))
    return joined(parts)


def nearest(kind: str, weight: Tensor, importance: Tensor | None, effort: Effort = "best") -> QuantizedTensor:
    """weight (out, in) fp32 on the grid of `kind`, searched under the importance (in,) of its inputs."""
    block = SUPERBLOCKS[kind]
    out, width = weight.shape
    room = Room(weight.device)
    rows = min(max(1, at_once(weight.device) // width), out)
    shared = importance is None
    weights = _floored(importance, block, weight.device).repeat(1 if shared else rows, 1)
    v_sgn = _laid_out("v", weights, block, room)
    found, places = [], []
    for at in range(0, out, rows):
        part = weight[at : at + rows].reshape(-1, block.columns)
        scales = _fit(block, part, v_sgn if shared else v_sgn[..., : part.shape[0]], effort, room)
        found.append(scales)
        places.append(codes(kind, part, scales).view(-1, width))
    return assemble(kind, torch.cat(places), joined(found))


def at_once(device: torch.device) -> int:
    """Weights to work on at once."""
    return _CHUNK if device.type == "cpu" else _CHUNK_OF_GPU


def _floored(v: Tensor | None, block: Superblock, device: torch.device) -> Tensor:
    """(n | 1, columns) fp32 weights of mean 1, none of them below the floor."""
    if v is None:
        return torch.ones(1, block.columns, device=device)
    flat = v.reshape(-1, block.columns).to(torch.float32)
    mean = flat.mean(1, keepdim=True)
    if not bool(torch.isfinite(mean).all()):
        raise NumericsError("the importance of the inputs holds non-finite values")
    return torch.where(mean > TINY, flat / mean.clamp(min=TINY), torch.ones_like(flat)).clamp_(min=_FLOOR)


def _laid_out(name: str, flat: Tensor, block: Superblock, room: Room) -> Tensor:
    """(n, columns) as (sub-blocks, group, n), in a buffer."""
    n = flat.shape[0]
    return room.take(name, block.columns, n).copy_(flat.T).view(block.parts, block.group, n)


def _fit(block: Superblock, w: Tensor, v_sgn: Tensor, effort: Effort, room: Room) -> Scales:
    x_sgn = _laid_out("x", w, block, room)
    largest = float(torch.maximum(x_sgn.amax(), -x_sgn.amin()))
    if not largest < float("inf"):
        raise NumericsError("the weights hold non-finite values")
    if largest > _LARGEST:
        x_sgn.clamp_(-_LARGEST, _LARGEST)
    chunk = Chunk(block, x_sgn, v_sgn, room)
    plan = PLANS[effort][block.name]
    return affine.fit(chunk, plan) if isinstance(plan, affine.Plan) else symmetric.fit(chunk, plan)
