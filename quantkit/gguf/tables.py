"""The tables that ggml's types index into, from the `gguf` package."""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError

# what the stored points are multiplied by so that every scale reads d · (s + ½)
_FACTORS = MappingProxyType(
    {
        **{"iq2_xxs": 0.25, "iq2_xs": 0.25, "iq2_s": 0.25},
        **{"iq3_xxs": 0.5, "iq3_s": 2.0, "iq1_s": 2.0, "iq1_m": 2.0},
    }
)


def library() -> Any:
    """The `gguf` package, imported when it is first needed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "GGUF needs the package gguf", remedy="pip install 'quantkit[gguf]'"
        ) from error
    return gguf


@cache
def grid(name: str) -> Tensor:
    """(entries, length) fp32 points of a lattice type, times the constant factor of its decoding.

    Shared by all callers, on the CPU, not to be changed. UnsupportedError for a type that has no lattice.
    """
    if name not in _FACTORS:
        raise UnsupportedError(f"{name} has no table of vectors; {', '.join(_FACTORS)} have")
    owner = getattr(library().quants, name.upper())
    owner.init_grid()
    points = torch.from_numpy(owner.grid.reshape(owner.grid_shape).copy())
    return points.to(torch.float32) * _FACTORS[name]
