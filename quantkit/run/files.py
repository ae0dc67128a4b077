"""Which tensors a target's files hold, in which order: the same list sizes the plan and writes the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import TensorSpec
from quantkit.model.graph import Block, ModelGraph, Weight
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.recipe.plan import TargetPlan
from quantkit.schemes import Scheme


class Packing(Protocol):
    """What of a target decides its files: a `TargetPlan`, or weights that are quantized already."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> Format: ...

    @property
    def default(self) -> Scheme: ...

    @property
    def facts(self) -> FormatFacts: ...

    def scheme_of(self, weight: Weight) -> Scheme | None: ...

    def cache_names(self, block: Block) -> tuple[str, str] | None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A group of file tensors: a source tensor (copied byte for byte unless a transform rewrote it), what a
    quantized weight becomes, or (neither) tensors that were made, by the sweep (the scales of a cache) or by
    the format."""

    specs: tuple[TensorSpec, ...]
    copied: str | None
    assigned: Assigned | None
    block: int | None


def entries(target: Packing, checkpoint: Checkpoint, graph: ModelGraph) -> Iterator[Entry]:
    """Everything the target's files hold, in model order: embeddings, blocks, the rest."""
    outer = {w.name: w for w in graph.outer}
    for name, weight in outer.items():
        if weight.role == "embed":
            yield _copy(checkpoint, name, None)
    for block in graph.blocks:
        copied: dict[str, None] = {}
        for weight in block.weights():
            scheme = target.scheme_of(weight)
            if scheme is None:
                copied[weight.name] = None
            else:
                yield Entry(target.format.layout(weight, scheme), None, Assigned(weight, scheme), block.index)
        for name in (*copied, *block.kept):
            yield _copy(checkpoint, name, block.index)
        names = target.cache_names(block)
        if names is not None:
            dtype: torch.dtype = getattr(torch, target.default.scale_dtype)
            yield Entry(tuple(TensorSpec(n, dtype, (1,)) for n in names), None, None, block.index)
    for name in (*graph.copied, *(n for n, w in outer.items() if w.role != "embed")):
        yield _copy(checkpoint, name, None)
    companions = target.format.companions(target.facts)
    if companions:
        specs = tuple(TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in companions.items())
        yield Entry(specs, None, None, None)


def parameters(checkpoint: Checkpoint, graph: ModelGraph) -> int:
    """Parameters of the source, tied duplicates counted once."""
    total = 0
    for name, info in checkpoint.tensors.items():
        if name not in graph.dropped:
            total += info.nbytes // info.torch_dtype.itemsize
    return total


def quantized_parameters(target: TargetPlan) -> int:
    """Parameters that change their representation."""
    return sum(a.weight.parameters for a in target.quantized())


def _copy(checkpoint: Checkpoint, name: str, block: int | None) -> Entry:
    info = checkpoint.tensors[name]
    return Entry((TensorSpec(name, info.torch_dtype, info.shape),), name, None, block)
