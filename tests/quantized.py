"""Random statistics and quantized tensors for tests, and the comparison that tells them apart."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics, update, zero
from quantkit.methods import llm_int8
from quantkit.numerics.grids import span
from quantkit.numerics.levels import Integers
from quantkit.numerics.nearest import nearest
from quantkit.numerics.stored import Plain
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, QuantizedTensor

ALL_NEEDS = Need.SQUARES | Need.ABSMAX | Need.ABSSUM | Need.GRAM | Need.SAMPLE


def activations(width: int, tokens: int, rng: torch.Generator) -> Tensor:
    """(tokens, width) correlated activations whose channels differ in size by two orders of magnitude."""
    mix = torch.randn(width, width, generator=rng) / width**0.5 + torch.eye(width)
    size = torch.logspace(-1, 1, width)[torch.randperm(width, generator=rng)]
    return torch.randn(tokens, width, generator=rng) @ mix * size


def statistics_of(x: Tensor, need: Need = ALL_NEEDS) -> Statistics:
    """What a site would know after seeing x (tokens, in)."""
    return update(zero(x.shape[1], need, x.device), x)


def steps(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes of w on a grid of integers, which are signed without a zero point."""
    return Integers(bits, zero is None).codes(w, scale, zero)


def absmax(w: Tensor, bits: int, zero: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (…, 1) of integers that span each row of w (…, g), not rounded to any dtype."""
    return span(w, Integers(bits, not zero), Plain(torch.float32), "absmax")


def restore(code: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What integer codes stand for."""
    return scale * (code if zero is None else code - zero)


def random_affine(shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> Affine:
    """A quantized weight of `shape` whose codes, scales and zero points are all random."""
    group = scheme.group(shape)
    groups = (shape[0] // group[0], shape[1] // group[1])
    low = -(1 << (scheme.bits - 1)) if scheme.sym else 0
    codes = torch.randint(low, low + (1 << scheme.bits), shape, generator=rng)
    scale = torch.rand(groups, generator=rng) + 0.01
    zeros = torch.randint(0, 1 << scheme.bits, groups, generator=rng).to(torch.uint8)
    return Affine(
        codes=codes.to(torch.int8 if scheme.sym else torch.uint8),
        bits=scheme.bits,
        scale=scale.to(getattr(torch, scheme.scale_dtype)),
        group=group,
        zero_point=None if scheme.sym else zeros,
    )


def random_quantized(shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> QuantizedTensor:
    """A quantized weight of `shape` on any grid: random codes of plain integers, else rounded random weights.

    Their scales are searched, so they are negative where the grid and its file allow it.
    """
    inputs = scheme.activations
    if inputs is not None and inputs.outliers is not None:
        method = llm_int8.quantizer(llm_int8.Params(report_outliers=False))
        return method.quantize(torch.randn(shape, generator=rng) * 0.05, None, scheme).weight
    if scheme.numbers == "int" and not scheme.fractional and scheme.axis == 1:
        return random_affine(shape, scheme, rng)
    return nearest(torch.randn(shape, generator=rng) * 0.05, scheme, "mse")


def random_linear(name: str, shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> QuantizedLinear:
    """`random_quantized` with a name, and a random scale of its inputs where they are static."""
    static = scheme.activations is not None and not scheme.activations.dynamic
    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    inputs = (torch.rand(1, generator=rng) + 0.1).to(dtype) if static else None
    return QuantizedLinear(name, random_quantized(shape, scheme, rng), inputs)


def same(a: QuantizedTensor | Tensor | None, b: QuantizedTensor | Tensor | None) -> bool:
    """Equal in every bit, dtype and shape, nested values included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if a is None or b is None or isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    return all(_field_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def _field_same(a: object, b: object) -> bool:
    if isinstance(a, int | tuple):
        return a == b
    return same(a, b)  # type: ignore[arg-type]


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
