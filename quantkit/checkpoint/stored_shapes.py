"""Shapes of weights that some formats keep in small tensors beside their codes."""

from __future__ import annotations

from torch import Tensor

from quantkit.checkpoint.strict_json import parse_object

_STATE = ".quant_state."  # bitsandbytes' JSON; others store the numbers


def states_shape(part: str) -> bool:
    """Whether a tensor of this name holds the shape of a weight: what has to be read to plan."""
    return _STATE in part or part.endswith("shape")


def shape_in(part: str, stored: Tensor) -> tuple[int, int]:
    """(out, in) that such a tensor holds; ValueError, KeyError or TypeError when it holds something else."""
    content = stored.tolist()
    out, width = parse_object(bytes(content))["shape"] if _STATE in part else content
    return int(out), int(width)
