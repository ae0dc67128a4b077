"""Factors by which the inputs of a site are divided and the columns of its weights multiplied.

The product stays what it was, and a factor common to all inputs means nothing, because scales absorb it: the
geometric mean of factors is 1. Inputs that are *tied* read copies of one channel (a key-value head that
several query heads share), which can be divided by one number only: they get the geometric mean of what
each would want.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.errors import NumericsError

# What is divided is stored in 16 bits and takes the division.
_LARGEST = 2.0**8


def balanced(logs: Tensor, live: Tensor, ties: Tensor | None = None, largest: float = _LARGEST) -> Tensor:
    """(in,) fp32 factors exp(logs) over their geometric mean, held within [1/largest, largest].

    logs (in,) fp64, read where live (in,) bool; elsewhere there is nothing to balance and the factor is 1,
    unless an input tied to it is live. ties (in,) int64: inputs of equal number get one factor, to the bit.
    """
    logs = torch.where(live, logs, torch.zeros_like(logs))
    if ties is not None:
        logs, live = _tied(logs, live, ties)
    if not bool(live.any()):
        return torch.ones_like(logs, dtype=torch.float32)
    reach = math.log(largest)
    centred = (logs - logs[live].mean()).clamp(-reach, reach)
    return torch.where(live, centred, torch.zeros_like(centred)).exp().float()


def _tied(logs: Tensor, live: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of logs over the live inputs of each tie, and which ties have any."""
    total = torch.zeros(int(ties.max()) + 1, dtype=logs.dtype, device=logs.device)
    count = torch.zeros_like(total).index_add_(0, ties, live.to(logs.dtype))
    total.index_add_(0, ties, logs)
    return (total / count.clamp(min=1))[ties], (count > 0)[ties]


def spaced(weight: Tensor, rows: int) -> Tensor:
    """At most `rows` evenly spaced rows of weight (out, in), on which trials are compared."""
    out = weight.shape[0]
    count = min(out, rows)
    return weight[torch.arange(count, device=weight.device) * out // count]


def known(value: Tensor | None, what: str, transform: str) -> Tensor:
    """A statistic that a transform asked for; NumericsError when it is missing or not finite."""
    if value is None:
        raise NumericsError(f"{transform} needs {what} of the inputs, and there are none")
    return finite(value, f"the {what} of the inputs")


def finite(value: Tensor, what: str) -> Tensor:
    """`value`; NumericsError when it shows that `what` hold non-finite values."""
    if not bool(torch.isfinite(value).all()):
        raise NumericsError(f"{what} hold non-finite values")
    return value
