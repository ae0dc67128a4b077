"""Quantized weights as a folder of safetensors in one of the formats, moved from another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit import __version__, registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardPlan, plan_shards
from quantkit.errors import VerifyError
from quantkit.hub.manifest import Kept
from quantkit.model.graph import Block, ModelGraph, Weight
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.recipe.spec import Output
from quantkit.run.export import Exporter
from quantkit.run.files import entries
from quantkit.run.manifest import kept_beside
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, open_quantized
from quantkit.run.regrid import regrid
from quantkit.run.results import BlockResult
from quantkit.schemes import Scheme
from quantkit.tensors import dequantize


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """A planned folder: both the `Packing` that lays out its files and the `Results` they are made from."""

    name: str
    format: Format
    default: Scheme
    facts: FormatFacts
    source: QuantizedCheckpoint
    view: Dequantized
    graph: ModelGraph
    schemes: Mapping[str, Scheme]

    @classmethod
    def plan(
        cls,
        format_name: str,
        source: QuantizedCheckpoint,
        view: Dequantized,
        graph: ModelGraph,
        schemes: Mapping[str, Scheme],
        *,
        method: str,
        act_order: bool,
    ) -> PackedFolder:
        """schemes: weight key → the scheme it is moved to; what is missing is kept as it is."""
        fmt: Format = registry.load("formats", format_name).FORMAT
        default = Counter(schemes.values()).most_common(1)[0][0]
        facts = FormatFacts(
            assigned=tuple(Assigned(weight, schemes.get(weight.key)) for weight in graph.weights()),
            default=default,
            outer=graph.outer,
            act_order=act_order,
            method=method,
            version=__version__,
            linears=graph.linears,
            dtype=view.dtype,
            model_type=view.model_type,
        )
        return cls(f"{format_name}-{default.name}", fmt, default, facts, source, view, graph, schemes)

    @property
    def shards(self) -> ShardPlan:
        specs = [spec for entry in entries(self, self.view, self.graph) for spec in entry.specs]
        return plan_shards(specs, Output().shard_bytes(self.format.container))

    @property
    def size_bytes(self) -> int:
        return self.shards.total_bytes

    def scheme_of(self, weight: Weight) -> Scheme | None:
        return self.schemes.get(weight.key)

    def scheme_name(self, key: str) -> str:
        return self.schemes[key].name

    def kept(self) -> tuple[Kept, ...]:
        return kept_beside(self, self.view, self.graph)

    def cache_names(self, block: Block) -> None:
        return None

    def engines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        loads, notes = self.format.engines(self.facts)
        if self.default.scale_dtype != self.format.scale_dtype(self.view.dtype):
            held = f"scales stay {self.default.scale_dtype}, as in the source"
            notes = (*notes, f"{held}: engines that load the model in {self.view.dtype} round them")
        return loads, notes

    def load(self, key: str, block: int) -> BlockResult:
        """The weights of a block on their new grids; `key` tells runs of a sweep apart: unused."""
        moving = (weight.key for weight in self.graph.blocks[block].weights() if weight.key in self.schemes)
        return BlockResult([regrid(self.source.linear(name), self.schemes[name]) for name in moving])

    def write(self, folder: Path) -> None:
        Exporter(self.view, self.graph, self).write(self, "", self.shards, folder)

    def values(self, folder: Path) -> Callable[[str], Tensor]:
        written = Checkpoint.open(folder)
        quantized = open_quantized(written)
        if quantized is None:
            raise VerifyError(f"`{folder}` does not read back as quantized")

        def value(name: str) -> Tensor:
            if name in quantized.parts:
                return dequantize(quantized.linear(name).weight)
            return written.read(name).to(torch.float32)

        return value
