"""Whether what a checkpoint does not quantize is what its source has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, first_nonfinite
from quantkit.run.gguf_source.view import GgufCheckpoint
from quantkit.run.verification import Verification

# elements that are compared at once
_AT_ONCE = 2**24
# what adding a constant in fp32 and taking it off again may leave
_SHIFTED = 2.0**-22


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of it, by name.

    changed  has other values
    told     has another shape, or values that are not finite, which is told elsewhere
    """

    changed: tuple[str, ...]
    told: tuple[str, ...]


def compare_kept(
    report: Verification,
    view: Checkpoint,
    source: Checkpoint,
    pairs: Iterable[tuple[str, str]],
    *,
    cast: bool,
) -> Kept:
    """Tensors of `view` beside those of `source`, one pair in memory at a time.

    pairs  names in one and in the other
    cast   values may have gone through another dtype of 16 bits
    """
    changed: list[str] = []
    told: list[str] = []
    count = 0
    for name, twin in pairs:
        count += 1
        found, wanted = view.tensors[name].shape, source.tensors[twin].shape
        if found != wanted:
            told.append(name)
            report.problems.append(f"`{name}` is {found}, the source has {wanted}")
            continue
        values = view.read(name)
        if not _alike(values, source.read(twin), cast=cast, slack=_slack(view)):
            (changed if first_nonfinite(values) is None else told).append(name)
    same = count - len(changed) - len(told)
    report.checks["against"] = f"{same:,} of {count:,} tensors equal the source's"
    return Kept(tuple(changed), tuple(told))


def _slack(view: Checkpoint) -> float:
    """A GGUF file holds the vectors of some norms with a constant added."""
    return _SHIFTED if isinstance(view, GgufCheckpoint) else 0.0


def _alike(found: Tensor, wanted: Tensor, *, cast: bool, slack: float) -> bool:
    """Equal, but for a cast to the dtype it has."""
    if not found.is_floating_point() or not wanted.is_floating_point():
        return torch.equal(found, wanted)
    ways = (wanted.dtype, torch.float16, torch.bfloat16) if cast else (wanted.dtype,)
    return any(_equal(found, wanted, way, slack) for way in ways)


def _equal(found: Tensor, wanted: Tensor, way: torch.dtype, slack: float) -> bool:
    """Equal to what `wanted` is once it was of the dtype `way`."""
    own, other = found.reshape(-1), wanted.reshape(-1)
    for begin in range(0, own.numel(), _AT_ONCE):
        part = own[begin : begin + _AT_ONCE]
        cast = other[begin : begin + _AT_ONCE].to(way).to(own.dtype)
        near = slack and torch.allclose(part.float(), cast.float(), rtol=slack, atol=slack)
        if not near and not torch.equal(part, cast):
            return False
    return True
