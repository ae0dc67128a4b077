"""The rules by which llama.cpp rounds without an importance matrix, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, Scales, Superblock, assemble, inverse, joined
from quantkit.numerics.superblocks.search import at_once
from quantkit.tensors import QuantizedTensor

REFERENCES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0")


def reference(kind: str, weight: Tensor) -> QuantizedTensor:
    """weight (out, in) fp32 rounded by the rule of llama.cpp; packs to the bytes that it writes.

        q8_0         d = max|w| / 127, q = w/d rounded half away from zero
        q4_0  q5_0   d = w_max / −8 (−16), w_max the first weight of the largest magnitude with its sign,
                     q = min(⌊w/d + 8.5⌋, 15) − 8
        q4_1  q5_1   d = (max − min) / 15 (31), m = min, q = min(⌊(w − m)/d + ½⌋, 15)
        tq1_0 tq2_0  d = max|w|, q = w/d rounded half away from zero
    Codes come from the fp32 scale, the file holds it in float16. NumericsError for other kinds.
    """
    if kind not in REFERENCES:
        raise NumericsError(
            f"{kind} has no rule without a search", remedy=f"one of {', '.join(REFERENCES)}, or a search"
        )
    block = SUPERBLOCKS[kind]
    flat = weight.reshape(-1, block.columns)
    step = max(1, at_once(weight.device) // block.columns)
    parts = [_rounded(block, flat[at : at + step]) for at in range(0, flat.shape[0], step)]
    codes = torch.cat([codes for codes, _ in parts])
    return assemble(kind, codes.view(weight.shape), joined([scales for _, scales in parts]))


def _rounded(block: Superblock, w: Tensor) -> tuple[Tensor, Scales]:
    if block.minimum:
        # of two zeros the first, whose sign is kept
        low = w.gather(1, w.argmin(1, keepdim=True))
        d = (w.amax(1, keepdim=True) - low + 0.0) / block.high
        units = ((w - low) * inverse(d)).add_(0.5).floor_().clamp_(max=block.high)
        return units.to(block.code_dtype), Scales(_half(d), dmin=_half(low))
    if block.name in ("q4_0", "q5_0"):
        # a largest weight of −0 counts as 0
        d = (w.gather(1, w.abs().argmax(1, keepdim=True)) + 0.0) / block.low
        middle = -block.low
        units = (w * inverse(d)).add_(middle + 0.5).floor_().clamp_(max=2 * middle - 1).sub_(middle)
        return units.to(block.code_dtype), Scales(_half(d))
    d = w.abs().amax(1, keepdim=True) / (127 if block.name == "q8_0" else 1)
    scaled = w * inverse(d)
    # half away from zero, exactly: adding ½ would carry the largest float below it up
    whole = scaled.trunc()
    units = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()
    return units.to(block.code_dtype), Scales(_half(d))


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).view(-1)
