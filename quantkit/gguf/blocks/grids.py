"""Whether a weight lies on the grid of a type: it is made as an empty super-block of the type is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from quantkit.tensors import Affine, Float, Lattice, QuantizedTensor, shape


def misfit(
    q: QuantizedTensor, decode: Callable[[Tensor], QuantizedTensor], elements: int, nbytes: int
) -> str | None:
    """What of `q` cannot be stored in super-blocks that `decode` reads, None when nothing."""
    like = decode(torch.zeros((1, 1, nbytes), dtype=torch.uint8))
    if type(q) is not type(like):
        return f"it is made of {type(q).__name__}, not {type(like).__name__}"
    out, width = shape(q)
    if isinstance(q, Float) and isinstance(like, Float):
        return _floats_misfit(q, like)
    if width % elements or not width:
        return f"rows of {width:,} weights are no whole super-blocks of {elements}"
    return _differs(q, like, (out, width // elements))


def _floats_misfit(q: Float, like: Float) -> str | None:
    if q.values.dtype != like.values.dtype:
        return f"values are {_said(q.values)}, not {_said(like.values)}"
    if not isinstance(q.scale, Tensor) or bool((q.scale != 1).any()):
        return "there are scales"
    return None if bool(q.values.isfinite().all()) else "a value is not finite"


def _differs(q: QuantizedTensor, like: QuantizedTensor, blocks: tuple[int, int]) -> str | None:
    """`blocks` is (out, super-blocks of a row); `like` is one."""
    if type(q) is not type(like) or (q.bits, q.group) != (like.bits, like.group):
        return f"{_made(q)} instead of {_made(like)}"
    for field in fields(q):
        mine, theirs = getattr(q, field.name), getattr(like, field.name)
        if not isinstance(theirs, Tensor | Affine):
            if mine != theirs:
                return f"{field.name} is {'missing' if mine is None else 'given'}"
        elif isinstance(theirs, Affine):
            problem = "it is plain" if isinstance(mine, Tensor | None) else _differs(mine, theirs, blocks)
            if problem is not None:
                return f"{field.name}: {problem}"
        elif not isinstance(mine, Tensor):
            return f"{field.name} is no tensor"
        elif problem := _tensor_differs(field.name, mine, theirs, blocks):
            return problem
    return _out_of_range(q)


def _tensor_differs(name: str, mine: Tensor, like: Tensor, blocks: tuple[int, int]) -> str | None:
    out, count = blocks
    if name == "table":
        same = mine.dtype == like.dtype and torch.equal(mine.cpu(), like)
        return None if same else "the table is another"
    if name == "zero_point":
        fits = mine.numel() == out * count and bool((mine == like.item()).all())
        return None if fits else f"zero points are not {like.item()}"
    expected = (out, like.shape[1] * count)
    if mine.dtype != like.dtype or tuple(mine.shape) != expected:
        return f"{name} is {tuple(mine.shape)} {_said(mine)}, not {expected} {_said(like)}"
    if name == "scale" and not bool(mine.to(torch.float32).isfinite().all()):
        return "a scale is not finite"
    return None


def _out_of_range(q: QuantizedTensor) -> str | None:
    if isinstance(q, Float) or not q.codes.numel():
        return None
    signed = q.codes.dtype == torch.int8
    low = -(1 << (q.bits - 1)) if signed else 0
    # three values in two bits
    low = -1 if signed and q.bits == 2 else low
    high = (1 << (q.bits - 1)) - 1 if signed else (1 << q.bits) - 1
    least, most = (int(end) for end in q.codes.aminmax())
    if least < low or most > high:
        return f"codes reach from {least} to {most}, which is outside of {low} to {high}"
    return None


def _made(q: QuantizedTensor) -> str:
    length = f" of {q.table.shape[1]}" if isinstance(q, Lattice) else ""
    return f"{type(q).__name__}{length}, {q.bits} bits, groups {q.group}"


def _said(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
