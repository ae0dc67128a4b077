"""Made-up tables of the shapes and levels of ggml's, so that these tests need no file of theirs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit.numerics.lattices import LatticeKind

_LEVELS = {
    "iq2": (2.0, 6.25, 10.75),
    "iq3": (2.0, 6.0, 10.0, 14.0, 18.0, 22.0, 26.0, 31.0),
    "iq1": (-2.0, 0.0, 2.0),
}


@cache
def table_of(kind: LatticeKind) -> Tensor:
    """(2^bits, length) different points, the smallest point of all among them."""
    levels = torch.tensor(_LEVELS[kind.name[:3]])
    rng = torch.Generator().manual_seed(kind.bits * kind.length)
    points = torch.cartesian_prod(*[levels] * kind.length)
    chosen = torch.randperm(len(points) - 1, generator=rng)[: 2**kind.bits - 1] + 1
    return torch.cat((points[:1], points[chosen]))
