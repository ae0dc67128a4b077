"""What a file can hold of a scale: rounding scales to it, and building the stored form.

plain     a float of the file's dtype
mxfp4     a power of two, e8m0
nvfp4     e4m3 times one fp32 scale of the tensor
nested    8-bit codes of the bitsandbytes dynamic map, blocks of 256, centred by the mean
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.levels import E4M3_MAX
from quantkit.schemes import Scheme
from quantkit.tensors import Codebook, Float, QuantizedTensor, dequantize

# fp16 keeps scales below its smallest normal number with fewer digits; engines compute with them all the same
_SMALLEST = {torch.float16: 2.0**-24}
# e4m3: one below its smallest normal number is rounded with few digits and never useful; zero divides
_E4M3_SMALLEST = 2.0**-9
_E2M1_MAX = 6.0
# below this the reciprocal of a tensor scale overflows
_NEGLIGIBLE = 1e-30
NESTED_GROUP = 256


class Stored(Protocol):
    """How one weight's scales are kept. All scales in and out of `round` are fp32."""

    @property
    def coarse(self) -> bool:
        """Rounding changes a scale by percents: a search must compare scales as stored."""
        ...

    @property
    def signed(self) -> bool: ...

    def round(self, scale: Tensor) -> Tensor:
        """Each scale as the file would give it back; zeros and underflow become something positive."""
        ...

    def build(self, scale: Tensor) -> Tensor | QuantizedTensor:
        """The stored form of rounded scales (out groups, in groups)."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """One float per group; `zeros`: a group of zeros keeps the scale 0, as bitsandbytes writes it."""

    dtype: torch.dtype
    zeros: bool = False
    coarse: bool = False
    signed: bool = True

    def round(self, scale: Tensor) -> Tensor:
        rounded = round_scale(scale, self.dtype)
        return torch.where(scale == 0, scale, rounded) if self.zeros else rounded

    def build(self, scale: Tensor) -> Tensor:
        return scale.to(self.dtype)


@dataclass(frozen=True, slots=True)
class PowersOfTwo:
    """e8m0: 2^(e−127), the nearest in ratio."""

    coarse: bool = True
    signed: bool = False

    def round(self, scale: Tensor) -> Tensor:
        exponent = torch.log2(scale.abs().clamp(min=2.0**-126)).round_().clamp_(-126, 127)
        return torch.where(scale == 0, torch.ones_like(scale), torch.exp2(exponent))

    def build(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class TwoLevels:
    """e4m3 times `tensor_scale` (1, 1) fp32, which one tensor, or a set that engines fuse, has in common."""

    tensor_scale: Tensor
    coarse: bool = True
    signed: bool = False

    def round(self, scale: Tensor) -> Tensor:
        fine = (scale.abs() / self.tensor_scale).clamp(_E4M3_SMALLEST, E4M3_MAX)
        return fine.to(torch.float8_e4m3fn).to(torch.float32) * self.tensor_scale

    def build(self, scale: Tensor) -> QuantizedTensor:
        fine = (scale / self.tensor_scale).clamp(_E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)
        return Float(fine, 8, self.tensor_scale, (scale.shape[0], scale.shape[1]))


def stored_of(scheme: Scheme, weight: Tensor) -> Stored:
    """How a file keeps the scales of `weight` (out, in), the weights of a fused set stacked.

    Nested scales are chosen in fp32, each by itself, and rounded together by `keep`.
    """
    match scheme.numbers:
        case "mxfp4":
            return PowersOfTwo()
        case "nvfp4":
            return TwoLevels(_tensor_scale(weight))
        case "nf4" | "fp4":
            # a 1 among nested scales would take the digits from all others of its group
            return Plain(torch.float32, zeros=True)
        case _:
            dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
            return Plain(dtype)


def keep(scale: Tensor, scheme: Scheme, stored: Stored) -> tuple[Tensor, Tensor | QuantizedTensor]:
    """(scales as the file gives them back, their stored form) of all scales of a weight, (out, in) groups."""
    if scheme.nested:
        kept = nest(scale)
        return dequantize(kept).view(scale.shape), kept
    return scale, stored.build(scale)


def _tensor_scale(weight: Tensor) -> Tensor:
    """(1, 1) the scale that maps the largest weight to the largest e4m3 scale times the largest point.

    Files hold the reciprocal, so the scale is one that survives being inverted twice.
    """
    largest = weight.abs().amax().to(torch.float32).view(1, 1)
    largest = torch.where(largest < _NEGLIGIBLE, torch.ones_like(largest), largest)
    scale = largest / (E4M3_MAX * _E2M1_MAX)
    for _ in range(4):
        again = scale.reciprocal().reciprocal()
        if torch.equal(again, scale):
            break
        scale = again
    return scale


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their stored dtype; zeros become 1 and underflow the smallest number there is.

    Raises NumericsError when a scale exceeds what `dtype` can hold.
    """
    stored = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"a scale of {float(scale.abs().max()):.3g} does not fit {str(dtype).removeprefix('torch.')}",
            remedy="keep the weight with a rule, or use a format that stores scales in bfloat16 or float32",
        )
    tiny = _SMALLEST.get(dtype, torch.finfo(dtype).tiny)
    small = stored.abs() < tiny
    return torch.where(small, torch.full_like(stored, tiny).copysign(scale.to(dtype)), stored).float()


def dynamic_map() -> Tensor:
    """(256,) fp32 sorted values of the signed dynamic 8-bit type of bitsandbytes (Dettmers et al. 2022).

    For e = 0 … 6 the middles of 2^e + 1 points evenly spread over [0.1, 1], times 10^(e−6), with both
    signs; then 0 and 1.
    """
    positive = []
    for e in range(7):
        points = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)
        middles = (points[:-1] + points[1:]) / 2
        positive += (10.0 ** (e - 6) * middles).tolist()
    values = [*(-v for v in positive), 0.0, *positive, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32)


_DYNAMIC = dynamic_map()


def nest(scale: Tensor) -> Codebook:
    """Double quantization: scales, read row by row, as 8-bit codes of c / max|c| with c = scale − mean.

    The result is laid out flat, (1, n): its groups of 256 cross the rows of a weight.
    """
    flat = scale.to(torch.float32).reshape(1, -1)
    offset = flat.mean().view(1)
    centred = flat - offset
    count = centred.shape[1]
    padded = torch.nn.functional.pad(centred, (0, -count % NESTED_GROUP))
    largest = padded.view(-1, NESTED_GROUP).abs().amax(1)
    outer = torch.where(largest == 0, torch.ones_like(largest), largest).view(1, -1)
    table = _DYNAMIC.to(scale.device)
    middles = (table[1:] + table[:-1]) / 2
    per_scale = outer.repeat_interleave(NESTED_GROUP, 1)[:, :count]
    codes = torch.bucketize((centred / per_scale).contiguous(), middles).to(torch.uint8)
    return Codebook(codes, 8, table, outer, (1, NESTED_GROUP), offset)
