"""That repacking changed nothing: every value of the source against what is read back from the new files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import VerifyError
from quantkit.hub.manifest import Kept
from quantkit.model.graph import ModelGraph
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.tensors import dequantize, shape


class Made(Protocol):
    """A planned result, named as its target: a folder of safetensors, or one with a GGUF file in it."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    def scheme_name(self, key: str) -> str:
        """How a quantized weight is stored."""
        ...

    def engines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(what loads the result, notes)."""
        ...

    def kept(self) -> tuple[Kept, ...]:
        """What stays floats."""
        ...

    def write(self, folder: Path) -> None: ...

    def values(self, folder: Path) -> Callable[[str], Tensor]:
        """Read back: checkpoint name → fp32 values, of a quantized weight (out, in)."""
        ...


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared: values of the source and of what was read back, in fp32, as sums.

    weights, codes   compared in every bit
    copied           other tensors, compared likewise
    before, after    sha256 of all values in model order; −0 counts as 0
    """

    weights: int
    codes: int
    copied: int
    before: str
    after: str


def prove(
    source: QuantizedCheckpoint, view: Checkpoint, graph: ModelGraph, value: Callable[[str], Tensor]
) -> Proof:
    """Compare everything; VerifyError names the first tensor that is not the same."""
    before, after = hashlib.sha256(), hashlib.sha256()
    weights = codes = copied = 0
    for name in _carried(graph):
        if name in source.parts:
            old = source.linear(name).weight
            codes += shape(old)[0] * shape(old)[1]
            weights += 1
            one, other = dequantize(old), value(name)
            before.update(_bits(one))
            after.update(_bits(other))
        else:
            copied += 1
            one, other = view.read(name).to(torch.float32), value(name)
        if not torch.equal(one, other):
            raise VerifyError(
                f"`{name}` does not read back as the values it had",
                remedy="this is a fault of the format's writer: please report it",
            )
    return Proof(weights, codes, copied, before.hexdigest(), after.hexdigest())


def _carried(graph: ModelGraph) -> Iterator[str]:
    """Names of all tensors that are carried over, each once."""
    names = dict.fromkeys(w.name for w in graph.outer)
    for block in graph.blocks:
        names |= dict.fromkeys(w.name for w in block.weights()) | dict.fromkeys(block.kept)
    yield from names | dict.fromkeys(graph.copied)


def _bits(values: Tensor) -> memoryview:
    # a negative scale times 0 is −0, and an offset that is added makes it 0: the same number
    return (values + 0.0).contiguous().numpy().data
