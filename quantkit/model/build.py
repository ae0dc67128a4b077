"""`build_graph`: from headers and Transformers' own code to a `ModelGraph`, for any architecture.

The blocks run on the meta device while products are watched (`observe.py`); the tiles of `names.py`
say which checkpoint matrix each product used. Weights that met the same activation form a site.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.model.blocks import Use
from quantkit.model.graph import Block, ModelGraph, Part, Role, Site, Vector, Weight
from quantkit.model.names import Layout, role_of
from quantkit.model.producers import Producer
from quantkit.model.rows import propose_rows
from quantkit.model.skeleton import Skeleton
from quantkit.model.tiles import Tile, element, strides

Shapes = Mapping[str, tuple[int, ...]]
_Feed = tuple[int, int, Producer | None]  # activation, matrix of a batched product, producer


def build_graph(checkpoint: Checkpoint) -> ModelGraph:
    """The graph of `checkpoint`; no weights are read, except to compare two copies of a tied embedding.

    SourceError when tensors and config do not fit each other, UnsupportedError when Transformers
    does not know the model or it cannot be run block by block.
    """
    # fp32: casts inside the model are then no-ops and products of cast parameters stay visible.
    return graph_of(Skeleton.open(checkpoint, torch.float32), checkpoint)


def graph_of(skeleton: Skeleton, checkpoint: Checkpoint) -> ModelGraph:
    """The graph of an opened skeleton."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    home = _homes(skeleton, shapes)
    reasons: dict[str, str] = {}
    blocks = []
    for index, trace in enumerate(skeleton.traces):
        names = [name for name, block in home.items() if block == index]
        sites = _sites(_block_tiles(skeleton, index), trace.uses, names, shapes)
        used = {weight.name for site in sites for weight in site.weights}
        kept = tuple(name for name in names if name not in used)
        reasons |= {name: _why_kept(name, shapes[name]) for name in kept if len(shapes[name]) > 1}
        blocks.append(Block(index, sites, kept, trace.attentions))
    outer = _outer(skeleton, shapes)
    outside = {weight.name for weight in outer}
    copied = tuple(name for name, block in home.items() if block is None and name not in outside)
    layout = skeleton.layout
    inside = {weight.name for block in blocks for weight in block.weights()}
    linears = _linears(skeleton, inside, reasons)
    return ModelGraph(tuple(blocks), outer, _tied(layout), copied, dict(layout.dropped), reasons, linears)


def _linears(skeleton: Skeleton, inside: set[str], reasons: Mapping[str, str]) -> tuple[str, ...]:
    """Paths of linear modules whose weight is in no site, then of routers, which engines make linear."""
    modules = dict(skeleton.model.named_modules())
    for index, block in enumerate(skeleton.blocks):
        modules |= {f"{skeleton.prefix}.{index}.{name}": module for name, module in block.named_modules()}
    found: dict[str, None] = {}
    for path, module in modules.items():
        tiles = skeleton.layout.tiles.get(f"{path}.weight", ())
        if isinstance(module, nn.Linear) and not any(tile.source in inside for tile in tiles):
            found[path] = None
    routers = (name.removesuffix(".weight") for name, why in reasons.items() if why == "router")
    return tuple(found | dict.fromkeys(routers))


def _tied(layout: Layout) -> dict[str, str]:
    tied = {name: layout.tiles[other][0].source for name, other in layout.tied.items()}
    return {**tied, **layout.duplicates}


def _homes(skeleton: Skeleton, shapes: Shapes) -> dict[str, int | None]:
    """Checkpoint name → index of its block, or None outside, for all that is carried over, in file order."""
    found: dict[str, set[int | None]] = {}
    for target, tiles in skeleton.layout.tiles.items():
        for tile in tiles:
            found.setdefault(tile.source, set()).add(skeleton.block_of(target))
    for name, blocks in found.items():
        if len(blocks) > 1:
            raise UnsupportedError(f"`{name}` holds weights of several blocks, which quantkit cannot split")
    return {name: next(iter(found[name])) for name in shapes if name in found}


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles of one parameter, ordered by their first element; shape is the parameter's."""

    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]
    begins: tuple[int, ...]

    def overlapping(self, first: int, last: int) -> list[Tile]:
        """Tiles that share elements with [first, last]; tiles never overlap one another."""
        found = []
        for place in range(bisect_right(self.begins, last) - 1, -1, -1):
            tile = self.tiles[place]
            if element(self.shape, [end - 1 for _, end in tile.put]) < first:
                break
            found.append(tile)
        return found[::-1]


def _block_tiles(skeleton: Skeleton, index: int) -> dict[str, _Tiles]:
    """Parameter name within the block → its tiles."""
    made = {}
    for name, parameter in skeleton.blocks[index].named_parameters():
        shape = tuple(parameter.shape)
        tiles = skeleton.layout.tiles[f"{skeleton.prefix}.{index}.{name}"]
        begun = sorted(((element(shape, [b for b, _ in t.put]), t) for t in tiles), key=lambda item: item[0])
        made[name] = _Tiles(shape, tuple(t for _, t in begun), tuple(b for b, _ in begun))
    return made


@dataclass(slots=True)
class _Group:
    """Weights that met the same activations, and what made those."""

    weights: list[Weight]
    producers: set[Producer | None]
    heads: tuple[int, int] | None

    @property
    def usable(self) -> tuple[Weight, ...]:
        return tuple(weight for weight in self.weights if weight.role != "router")


def _sites(
    block: Mapping[str, _Tiles], uses: Iterable[Use], names: Iterable[str], shapes: Shapes
) -> tuple[Site, ...]:
    """Group the weights of a block by what fed them, in order of use.

    The matrices of a batched product (experts) are fed apart even though one tensor holds all inputs.
    `names` are the block's tensors.
    """
    weights: dict[str, Weight] = {}
    fed: dict[str, list[Use]] = {}
    unknown: set[str] = set()
    for use in uses:
        met = list(_weights(block[use.parameter], use, shapes))
        for weight in met:
            weights.setdefault(weight.key, weight)
            fed.setdefault(weight.key, []).append(use)
        if not met and use.producer is not None:
            unknown.add(use.producer.vector)
    groups: dict[frozenset[_Feed], _Group] = {}
    for key, weight in weights.items():
        feeds = frozenset((use.activation, use.index, use.producer) for use in fed[key])
        made = {use.producer for use in fed[key]}
        groups.setdefault(feeds, _Group([], made, fed[key][0].heads)).weights.append(weight)
    readers = _readers(groups.values(), unknown)
    sites = {weight.key: weight for group in groups.values() for weight in group.usable}
    vectors = {name: shapes[name] for name in names if len(shapes[name]) == 1}
    return tuple(_site(g, readers, block, sites, vectors) for g in groups.values() if g.usable)


def _site(
    group: _Group,
    readers: Mapping[Producer, tuple[str, ...]],
    block: Mapping[str, _Tiles],
    weights: Mapping[str, Weight],
    vectors: Shapes,
) -> Site:
    usable, producer = group.usable, next(iter(group.producers))
    if producer is not None and producer in readers:
        vector, bias = (
            None if name is None else block[name].tiles[0].source for name in (producer.vector, producer.bias)
        )
        if vector is not None:
            made = Vector(vector, bias, producer.offset)
            return Site(_site_id(usable), usable, made, readers[producer])
    rows = propose_rows(usable[0], weights, vectors, group.heads) if len(group.weights) == 1 else None
    return Site(_site_id(usable), usable, rows)


def _readers(groups: Iterable[_Group], unknown: set[str]) -> dict[Producer, tuple[str, ...]]:
    """What made activations and can be changed → the routers that notice, which can be changed along.

    A vector cannot be changed when a matrix that it feeds has other inputs too, or is not known.
    """
    found: dict[Producer, dict[str, None]] = {}
    fixed = set(unknown)
    for group in groups:
        producers = [producer for producer in group.producers if producer is not None]
        routers = [weight for weight in group.weights if weight.role == "router"]
        if len(group.producers) > 1 or any(router.part is not None for router in routers):
            fixed.update(producer.vector for producer in producers)
        for producer in producers:
            found.setdefault(producer, {}).update((router.name, None) for router in routers)
    by_vector = Counter(producer.vector for producer in found)
    return {
        p: tuple(names) for p, names in found.items() if p.vector not in fixed and by_vector[p.vector] == 1
    }


def _weights(tiles: _Tiles, use: Use, shapes: Shapes) -> Iterator[Weight]:
    steps = strides(tiles.shape)
    for tile in tiles.overlapping(use.first, use.last):
        disk = shapes[tile.source]
        rows, columns = (steps[tile.axes.index(len(disk) - 2 + d)] for d in range(2))
        if use.stride_in not in (rows, columns):
            continue  # another view of the elements, not this matrix
        expert = None
        if len(disk) == 3:
            axis = tile.axes.index(0)
            along = use.first // steps[axis] % tiles.shape[axis]
            expert = along - tile.put[axis][0] + tile.take[0][0]
        transposed = use.stride_in != columns
        part = Part(expert, transposed) if expert is not None or transposed else None
        shape = (disk[-1], disk[-2]) if transposed else (disk[-2], disk[-1])
        plain = Weight(tile.source, shape, part=part)
        yield Weight(tile.source, shape, role_of(plain.module), part)


def _site_id(weights: Sequence[Weight]) -> str:
    """``model.layers.3.self_attn.q_proj+k_proj+v_proj``: the common path, then what differs."""
    paths = [weight.module.split(".") for weight in weights]
    if len(paths) == 1:
        return ".".join(paths[0])
    columns = zip(*(path[:-1] for path in paths), strict=False)  # paths may differ in depth
    same = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)]
    return ".".join([*same, "+".join(".".join(path[len(same) :]) for path in paths)])


def _why_kept(name: str, shape: tuple[int, ...]) -> str:
    module = name.removesuffix(".weight")
    if role_of(module) == "router":
        return "router"
    if name.endswith("bias"):
        return "bias"
    if len(shape) > 2 and "conv" in module:
        return "convolution kernel"
    return "not a matrix product"


def _outer(skeleton: Skeleton, shapes: Shapes) -> tuple[Weight, ...]:
    """Embedding and head, as far as the checkpoint has them."""
    found = []
    roles: tuple[Role, Role] = ("embed", "head")
    for role, name in zip(roles, skeleton.ends, strict=True):
        for tile in skeleton.layout.tiles.get(name or "", ()):
            rows, columns = shapes[tile.source]
            found.append(Weight(tile.source, (rows, columns), role))
    return tuple(found)
