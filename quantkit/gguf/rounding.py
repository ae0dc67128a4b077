"""Weights on ggml's grids: which numerics serve which type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.gguf.tables import grid
from quantkit.numerics import lattices
from quantkit.numerics.nearest import nearest as plain_nearest
from quantkit.numerics.solve import Seen, Steps
from quantkit.numerics.superblocks import grids, search, solve
from quantkit.numerics.superblocks.plans import Effort
from quantkit.numerics.superblocks.reference import REFERENCES, reference
from quantkit.schemes import Scheme
from quantkit.tensors import Float, QuantizedTensor

# without knowing which inputs matter these are worse than useless, and llama.cpp refuses to make them
STARVED = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Least squares shrinks what is rounded coarsely, and a model minds that more than the error: d is made larger
# where weights are rounded by themselves. Mean KL of whole files of the reference checkpoint: iq2_xs −9 %,
# iq2_xxs −7 %, iq1_m −14 %; iq3_xxs gains nothing, and feedback needs none of it.
_STRETCH = {"iq2_xs": 1.06, "iq2_xxs": 1.06, "iq1_m": 1.1}
# nothing is to be won by a search
EXACT = (*_FLOATS, "q8_0", "tq1_0", "tq2_0")


def solvable(scheme: Scheme) -> bool:
    """Whether codes of this type can be chosen by error feedback."""
    return scheme.numbers in lattices.KINDS or (
        scheme.numbers in grids.SUPERBLOCKS and scheme.numbers not in EXACT
    )


def convention(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight (out, in) fp32 as llama.cpp rounds it knowing nothing of inputs; searched where it searches."""
    if scheme.numbers in _FLOATS:
        return _float(weight, scheme)
    if scheme.numbers in REFERENCES:
        return reference(scheme.numbers, weight)
    if scheme.numbers == "mxfp4":
        return plain_nearest(weight, scheme, "absmax")
    return nearest(weight, scheme, None)


def nearest(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, effort: Effort = "best"
) -> QuantizedTensor:
    """weight (out, in) fp32 on searched scales; importance (in,): mean square of each input, or None."""
    name = scheme.numbers
    if name in EXACT:
        return convention(weight, scheme)
    if name in grids.SUPERBLOCKS:
        return search.nearest(name, weight, importance, effort)
    if name in lattices.KINDS:
        kind = replace(lattices.KINDS[name], gamma=_STRETCH.get(name, 1.0))
        return lattices.nearest(kind, grid(name).to(weight.device), weight, importance)
    return plain_nearest(weight, scheme, "mse" if importance is None else "weighted", importance)


def order(scheme: Scheme, diagonal: Tensor) -> Tensor:
    """(in,) the order in which `stages` wants columns, from the diagonal of the curvature."""
    if scheme.numbers in lattices.KINDS:
        return lattices.order(lattices.KINDS[scheme.numbers], diagonal)
    return solve.order(scheme.numbers, diagonal)


def stages(weight: Tensor, scheme: Scheme, seen: Seen, steps: Steps) -> Iterator[QuantizedTensor]:
    """What becomes of weight (out, in) fp32 after feedback, polish and refit, see `numerics.solve`."""
    name = scheme.numbers
    if name in lattices.KINDS:
        table = grid(name).to(weight.device)
        return lattices.solve(lattices.KINDS[name], table, weight, seen, steps.polish + steps.refits)
    return solve.stages(name, weight, seen, steps)


def _float(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    dtype = _FLOATS[scheme.numbers]
    one = torch.ones(1, 1, device=weight.device)
    return Float(weight.to(dtype), scheme.bits, one, (weight.shape[0], weight.shape[1]))
