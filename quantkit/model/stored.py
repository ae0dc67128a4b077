"""Quantized weights as the files of a model hold them, to be put beside what a config says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.tensors import Affine, QuantizedLinear, shape


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight, without its codes.

    name         checkpoint name
    runs_as      module path in Transformers, where it is known
    shape        (out, in)
    bits         of a code, as decoded
    group        (rows, columns) that share a scale
    codes        lowest and highest code of integers, unsigned where there are zero points; else None
    zero_points  lowest and highest, None where there are none
    reordered    columns of a group do not lie side by side
    parts        ending of its file tensors → header
    """

    name: str
    runs_as: str | None
    shape: tuple[int, int]
    bits: int
    group: tuple[int, int]
    codes: tuple[int, int] | None
    zero_points: tuple[float, float] | None
    reordered: bool
    parts: Mapping[str, TensorInfo]

    @staticmethod
    def of(linear: QuantizedLinear, tensors: Mapping[str, TensorInfo]) -> StoredWeight:
        """What is to be known of a decoded weight once its codes are gone; tensors: those it was made of."""
        q, base = linear.weight, linear.name.removesuffix(".weight")
        codes, zeros, reordered = None, None, False
        if isinstance(q, Affine):
            low, high = q.codes.aminmax()
            codes = int(low), int(high)
            # where there is an offset it stands for zero points, which are not in the file
            zeros = None if q.zero_point is None or q.offset is not None else _span(q.zero_point)
            if q.column_group is not None:
                plain = torch.arange(q.codes.shape[1], device=q.column_group.device) // q.group[1]
                reordered = not torch.equal(q.column_group.long(), plain)
        parts = {name.removeprefix(f"{base}."): info for name, info in tensors.items()}
        return StoredWeight(linear.name, None, shape(q), q.bits, q.group, codes, zeros, reordered, parts)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def modules(self) -> tuple[str, ...]:
        """What engines may call the module."""
        return (self.module,) if self.runs_as in (None, self.module) else (self.module, str(self.runs_as))

    @property
    def groups(self) -> int:
        """Scales along the inputs."""
        return -(-self.shape[1] // self.group[1])


@dataclass(frozen=True, slots=True)
class StoredModel:
    """All weights, and what surrounds them.

    kept     module path in the files of a linear layer that is stored as floats → its path in Transformers
    heads    paths of what makes the logits, in the files and in Transformers
    tensors  names of all tensors
    """

    weights: tuple[StoredWeight, ...]
    kept: Mapping[str, str]
    heads: frozenset[str]
    tensors: frozenset[str]

    def odd_ones(self) -> dict[str, str]:
        """Of `kept`, what is quantized in other blocks: engines expect it here, too, unless they are told."""
        patterns = {_pattern(weight.module) for weight in self.weights}
        return {module: path for module, path in self.kept.items() if _pattern(module) in patterns}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a config and a weight differ.

    name   of the weight
    claim  what the config says, with the key
    holds  what is true of the weight, as the end of a sentence
    harm   what engines make of it
    """

    name: str
    claim: str
    holds: str
    harm: str


def told(differences: Iterable[Difference]) -> Iterator[str]:
    """One sentence for what is the same of many weights."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for d in differences:
        together.setdefault((d.claim, d.holds, d.harm), []).append(d.name)
    for (claim, holds, harm), names in together.items():
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        yield f"{claim}, but `{names[0]}`{more} {holds}: {harm}"


def _pattern(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def _span(values: Tensor) -> tuple[float, float]:
    low, high = values.aminmax()
    return float(low), float(high)
