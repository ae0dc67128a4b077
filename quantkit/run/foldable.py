"""Where factors may be folded into a model: what of its graph a check of weights needs, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from quantkit.checkpoint.reader import Checkpoint, TensorInfo
from quantkit.errors import SourceError
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph, Rows, Vector, Weight
from quantkit.model.skeleton import config_of, meta_model
from quantkit.run.gguf_source.placed import disk_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Foldable:
    """Matrices go by `Weight.key`, all else by its name in the checkpoint.

    parts    name of a tensor → the matrices in it: one, or those of a stack of experts
    vectors  vector that scales the input of matrices → it
    behind   such a vector → the matrices whose columns follow it
    before   matrix → the vector that scales its input
    made     matrix → the rows of another that make its input
    readers  matrix whose rows make inputs → the matrices that read them
    tied     name → the name in the checkpoint that it shares storage with
    dropped  names that are not carried over
    """

    parts: Mapping[str, tuple[Weight, ...]] = field(default_factory=dict)
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Rows] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    @classmethod
    def of(cls, graph: ModelGraph, shapes: Shapes) -> Foldable:
        """`shapes` are those of the checkpoint's tensors."""
        parts: dict[str, list[Weight]] = {}
        for weight in (*graph.weights(), *graph.outer):
            parts.setdefault(weight.name, []).append(weight)
        vectors: dict[str, Vector] = {}
        behind: dict[str, dict[str, None]] = {}
        made: dict[str, Rows] = {}
        readers: dict[str, list[str]] = {}
        for site in (site for block in graph.blocks for site in block.sites):
            if isinstance(site.producer, Rows):
                made |= {weight.key: site.producer for weight in site.weights}
                readers.setdefault(site.producer.weight, []).extend(weight.key for weight in site.weights)
            elif isinstance(site.producer, Vector):
                vectors[site.producer.name] = site.producer
                keys = (*(weight.key for weight in site.weights), *site.readers)
                behind.setdefault(site.producer.name, {}).update(dict.fromkeys(keys))
                for reader in site.readers:
                    parts[reader] = [Weight(reader, (shapes[reader][0], shapes[reader][-1]), "router")]
        for vector, head in _last(graph, shapes, vectors.values()):
            vectors[vector.name] = vector
            behind[vector.name] = {head.key: None}
        return cls(
            parts={name: tuple(found) for name, found in parts.items()},
            vectors=vectors,
            behind={name: tuple(keys) for name, keys in behind.items()},
            before={key: name for name, keys in behind.items() for key in keys},
            made=made,
            readers={name: tuple(keys) for name, keys in readers.items()},
            tied=graph.tied,
            dropped=frozenset(graph.dropped),
        )


def foldable_in(source: Checkpoint) -> Foldable:
    """Where factors may be in a checkpoint. Where it lacks tensors, those that Transformers would save stand
    in; SourceError or UnsupportedError where that does not help."""
    try:
        graph = build_graph(source)
    except SourceError:
        shapes = disk_shapes(meta_model(config_of(source), torch.float32))
        whole = {name: TensorInfo(name, "F32", shape, source.path, 0, 0) for name, shape in shapes.items()}
        shell = Checkpoint(source.path, source.config, whole)
        return Foldable.of(build_graph(shell), shapes)
    return Foldable.of(graph, {name: info.shape for name, info in source.tensors.items()})


def _last(graph: ModelGraph, shapes: Shapes, others: Iterable[Vector]) -> list[tuple[Vector, Weight]]:
    """The norm before a head of its own, which may take its vector in, with the head; nothing where they are
    not one each. It is outside the blocks, where nothing is watched: it adds what other norms add."""
    heads = [weight for weight in graph.outer if weight.role == "head"]
    norms = [n for n in graph.copied if heads and shapes[n] == heads[0].shape[1:] and not n.endswith("bias")]
    if len(heads) != 1 or len(norms) != 1:
        return []
    bias = f"{norms[0].removesuffix('weight')}bias"
    offsets = Counter(vector.offset for vector in others)
    offset = offsets.most_common(1)[0][0] if offsets else 0.0
    return [(Vector(norms[0], bias if bias in shapes else None, offset), heads[0])]
