"""A model as one GGUF file, or the shards of one: what is in it, how large it is, and writing it.

Where values come from is another matter (`Origin`): results of a sweep, or a checkpoint that was quantized
before. Every tensor is written once, in file order, and read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import VerifyError
from quantkit.gguf import container
from quantkit.gguf.architectures import Model, Placed
from quantkit.gguf.blocks import TYPES, BlockType
from quantkit.gguf.container import Stored, Value
from quantkit.model.graph import ModelGraph, Weight
from quantkit.run.folded import matrix_of
from quantkit.schemes import Scheme


class Origin(Protocol):
    """Where the values of a file come from."""

    def packed(self, key: str, kind: BlockType) -> Tensor:
        """(out, row bytes) uint8 of a quantized matrix, by `Weight.key`."""
        ...

    def plain(self, name: str) -> Tensor:
        """Any other tensor by its name in the checkpoint, as the result has it."""
        ...


@dataclass(frozen=True)
class GgufFile:
    """One planned file.

    types     name of ggml's type by `Weight.key`, of the matrices that are quantized
    metadata  all of it
    stem      name of the file without its ending and the numbers of shards
    """

    view: Checkpoint
    model: Model
    placed: tuple[Placed, ...]
    weights: Mapping[str, Weight]
    types: Mapping[str, str]
    metadata: Mapping[str, Value]
    stem: str
    shard_bytes: int

    @classmethod
    def plan(
        cls,
        view: Checkpoint,
        graph: ModelGraph,
        scheme_of: Callable[[Weight], Scheme | None],
        metadata: Mapping[str, Value],
        stem: str,
        shard_bytes: int,
    ) -> GgufFile:
        """`metadata` beside what the architecture says. UnsupportedError with what stands in the way."""
        model = Model.of(view.config)
        placed = model.placements(graph, {name: info.shape for name, info in view.tensors.items()})
        weights = {w.key: w for w in (*graph.weights(), *graph.outer)}
        types = {key: s.numbers for key, w in weights.items() if (s := scheme_of(w)) is not None}
        return cls(view, model, placed, weights, types, {**metadata, **model.metadata()}, stem, shard_bytes)

    @cached_property
    def tensors(self) -> tuple[Stored, ...]:
        """The directory of the file, in file order."""
        generated = (Stored(name, tuple(t.shape), "f32") for name, t in self.model.generated().items())
        placed = (Stored(p.name, p.shape, self._type(p)) for p in self.placed)
        return (*generated, *placed)

    @cached_property
    def shards(self) -> list[list[Stored]]:
        return container.plan_shards(self.tensors, self.shard_bytes)

    @property
    def names(self) -> list[str]:
        """Names of the files, the one to load first."""
        return container.shard_names(self.stem, len(self.shards))

    @cached_property
    def total_bytes(self) -> int:
        """Of all files, to the byte."""
        return sum(container.shard_bytes(self.model.architecture, self.metadata, self.shards))

    def write(self, folder: Path, origin: Origin) -> None:
        """Write the files into `folder` and read every tensor back; VerifyError when one is not what was
        written."""
        written: dict[str, str] = {}

        def contents() -> Iterator[Tensor]:
            for stored, data in zip(self.tensors, self._contents(origin), strict=True):
                written[stored.name] = _digest(data)
                yield data

        container.write_shards(
            folder, self.stem, self.model.architecture, self.metadata, self.shards, contents()
        )
        opened = container.open_file(folder / self.names[0])
        for name, digest in written.items():
            if _digest(opened.read_bytes(name)) != digest:
                raise VerifyError(
                    f"`{name}` in `{folder / self.names[0]}` does not read back as it was written",
                    remedy="check the disk, and run again",
                )

    def _type(self, placed: Placed) -> str:
        """Of a matrix, what its sources have in common; all else is fp32."""
        if not placed.matrix:
            return "f32"
        key = placed.sources[0].key
        own = self.types.get(key)
        if own is not None:
            return own
        kept = self.view.tensors[self.weights[key].name]
        return Stored.plain(placed.name, placed.shape, kept.torch_dtype).kind

    def _contents(self, origin: Origin) -> Iterator[Tensor]:
        for tensor in self.model.generated().values():
            yield container.as_bytes(tensor)
        for placed in self.placed:
            yield self._matrix(placed, origin) if placed.matrix else self._plain(placed, origin)

    def _plain(self, placed: Placed, origin: Origin) -> Tensor:
        (source,) = placed.sources
        values = origin.plain(source.key).to(torch.float32)
        if source.rows is not None:
            values = values[source.rows]
        return container.as_bytes((values + placed.add).reshape(placed.shape))

    def _matrix(self, placed: Placed, origin: Origin) -> Tensor:
        kind = TYPES[self._type(placed)]
        parts = []
        for source in placed.sources:
            weight = self.weights[source.key]
            if source.key in self.types:
                data = origin.packed(source.key, kind)
            else:
                data = container.as_bytes(matrix_of(weight, origin.plain(weight.name)))
            parts.append(data if source.rows is None else data[source.rows])
        return parts[0] if len(placed.shape) == 2 else torch.stack(parts)


def _digest(data: Tensor) -> str:
    return hashlib.sha256(data.contiguous().numpy().data).hexdigest()
