"""Rounding to an integer grid whose scales are given, and its inverse.

Shapes: w is (…, g) with scale and zero_point broadcastable to it, usually (…, 1). All fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def limits(bits: int, sym: bool) -> tuple[int, int]:
    """Lowest and highest code: signed when symmetric, [0, 2^bits − 1] otherwise."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if sym else (0, (1 << bits) - 1)


def steps(w: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """``clip(round(w / scale) + zero_point)`` as fp32; ties to even, as torch and IEEE do."""
    low, high = limits(bits, zero_point is None)
    code = torch.round(w / scale)
    if zero_point is not None:
        code += zero_point
    return code.clamp_(low, high)


def restore(code: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``scale · (code − zero_point)``, the value a code stands for."""
    return scale * (code if zero_point is None else code - zero_point)


def code_dtype(sym: bool) -> torch.dtype:
    """dtype that holds unpacked codes of every supported width."""
    return torch.int8 if sym else torch.uint8
