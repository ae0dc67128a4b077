"""LLM.int8: codes and the largest magnitude of each row, which 127 stands for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.tensors import Affine, Float

PARTS = ("SCB", "weight_format")

_ROW_MAJOR = 0


def encode(q: Affine) -> dict[str, Tensor] | None:
    """File tensors by the end of their name, or None when `q` is not what LLM.int8 stores."""
    scale = q.scale
    shifted = q.zero_point is not None or q.offset is not None or q.row_group is not None
    if q.codes.dtype != torch.int8 or shifted or not isinstance(scale, Float):
        return None
    absmax, step = scale.values, scale.scale
    per_row = absmax.dtype == torch.float32 and absmax.shape == (q.codes.shape[0], 1)
    if not per_row or not isinstance(step, Tensor) or not torch.equal(step, _step(absmax)):
        return None
    return {
        "weight": q.codes,
        "SCB": absmax.flatten(),
        "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8),
    }


def decode(parts: Mapping[str, Tensor]) -> Affine:
    """Inverse of `encode`."""
    codes, absmax = parts["weight"], parts["SCB"].to(torch.float32).view(-1, 1)
    scale = Float(absmax, 32, _step(absmax), (codes.shape[0], 1))
    return Affine(codes, 8, scale, (1, codes.shape[1]))


def _step(absmax: Tensor) -> Tensor:
    return torch.full((1, 1), 1 / 127, dtype=torch.float32, device=absmax.device)
