"""Random statistics and quantized tensors for tests, and the comparison that tells them apart."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics, update, zero
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedTensor

ALL_NEEDS = Need.SQUARES | Need.ABSMAX | Need.ABSSUM | Need.GRAM | Need.SAMPLE


def activations(width: int, tokens: int, rng: torch.Generator) -> Tensor:
    """(tokens, width) correlated activations whose channels differ in size by two orders of magnitude."""
    mix = torch.randn(width, width, generator=rng) / width**0.5 + torch.eye(width)
    size = torch.logspace(-1, 1, width)[torch.randperm(width, generator=rng)]
    return torch.randn(tokens, width, generator=rng) @ mix * size


def statistics_of(x: Tensor, need: Need = ALL_NEEDS) -> Statistics:
    """What a site would know after seeing x (tokens, in)."""
    return update(zero(x.shape[1], need, x.device), x)


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
