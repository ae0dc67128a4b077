"""`Runtime`: the real model, one decoder block in memory at a time.

Transformers' own code computes everything: its forward, run over stubs, gives the hidden states that
enter the first block, the arguments of every block, and the logits. Weights come straight from the
checkpoint into place (`names.Tile`), so loading a block needs the block and one tensor more.
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantkit.checkpoint.reader import Checkpoint, first_nonfinite
from quantkit.errors import NumericsError, UnsupportedError
from quantkit.model.blocks import Call, check_independent
from quantkit.model.emulate import CacheRounding, Emulator, Place, Rounding, Roundings
from quantkit.model.graph import Block, ModelGraph, Part, Weight
from quantkit.model.observe import Observer, Product
from quantkit.model.skeleton import Skeleton, restore_buffers
from quantkit.model.tiles import Tile, element

Record = Callable[[str, Tensor], None]

_KEPT_SHAPES = 4
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Runtime:
    """Runs the model of `checkpoint` block by block in `dtype` on `device`.

    Nothing of the blocks is in memory until `load`; embedding and head come when they are used and
    stay until released. The same rows in the same micro-batch give the same bits.
    """

    def __init__(
        self, checkpoint: Checkpoint, graph: ModelGraph, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self.device = device
        self.skeleton = Skeleton.open(checkpoint, dtype)
        self.skeleton.use_eager_experts()
        self._source = _Source(checkpoint, self.skeleton, device)
        self._ends: dict[int, tuple[str, Tensor]] = {}
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._checked = False
        model = self.skeleton.model
        small = (n for n, _ in _state(model) if n not in self.skeleton.ends)
        for name, tensor in self._source.tensors(small).items():
            _assign(model, name, tensor)
        restore_buffers(model, model, device)

    def embed(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """(rows, length, hidden) states entering block 0, from (rows, length) token ids.

        table: (vocabulary, width) rows to take in place of the checkpoint's, in the runtime's dtype.
        UnsupportedError when blocks are given more about the tokens than their hidden states.
        """
        self._open_end(0)
        states: list[Tensor] = []
        calls: list[Call] = []

        def visit(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index == 0:
                states.append(hidden)
            calls.append(call)
            return hidden

        with torch.no_grad(), self._in_place(0, table):
            self.skeleton.forward(visit, head=False, input_ids=tokens.to(self.device, torch.int64))
        if not self._checked:
            check_independent(calls, self._calls_for(*tokens.shape))
            self._checked = True
        return states[0]

    def release_embed(self) -> None:
        """Drop the embedding; the next `embed` reads it again."""
        self._close_end(0)

    def load(self, index: int) -> LoadedBlock:
        """Block `index` with its weights; drop the result to free it.

        NumericsError when a tensor holds NaN or infinity, naming the tensor and the place.
        """
        prefix = f"{self.skeleton.prefix}.{index}."
        original = self.skeleton.blocks[index]
        configs = {
            id(v): v for m in original.modules() for v in vars(m).values() if isinstance(v, PretrainedConfig)
        }
        module = copy.deepcopy(original, configs)
        for name, tensor in self._source.tensors(prefix + n for n, _ in _state(module)).items():
            _assign(module, name.removeprefix(prefix), tensor)
        restore_buffers(self.skeleton.owner(), module, self.device)
        left = [n for n, t in _everything(module) if t.is_meta]
        if left:
            raise UnsupportedError(f"block {index} has tensors that no file fills: {left}")
        return LoadedBlock(self, index, module)

    def read(self, weight: Weight) -> Tensor:
        """(out, in) fp32 values of `weight` exactly as the checkpoint has them, whatever the runtime's dtype.

        NumericsError when it holds NaN or infinity.
        """
        return self._source.matrix(weight).to(self.device, torch.float32)

    def read_tensor(self, name: str) -> Tensor:
        """A checkpoint tensor that is in no site (a norm's vector), as it is in the file.

        NumericsError when it holds NaN or infinity.
        """
        return self._source.read(name).to(self.device)

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """(rows, length, vocabulary) logits from the (rows, length, hidden) states after the last block.

        head: (vocabulary, hidden) weights to use in place of the checkpoint's, in the runtime's dtype.
        """
        self._open_end(1)
        with self._in_place(1, head):
            logits: Tensor = self._after_blocks(hidden, head=True).logits
        return logits

    def final(self, hidden: Tensor) -> Tensor:
        """(rows, length, hidden) states entering the head, from those after the last block."""
        states: Tensor = self._after_blocks(hidden, head=False).last_hidden_state
        return states

    def _after_blocks(self, hidden: Tensor, *, head: bool) -> Any:
        last = len(self.skeleton.blocks) - 1

        def visit(index: int, passing: Tensor, _call: Call) -> Tensor:
            return hidden if index == last else passing

        with torch.no_grad():
            return self.skeleton.forward(visit, head=head, inputs_embeds=self._zeros(*hidden.shape[:2]))

    def release_head(self) -> None:
        """Drop the head; the next `logits` reads it again."""
        self._close_end(1)

    def _calls_for(self, rows: int, length: int) -> list[Call]:
        """What the model passes to each block besides hidden states, for a micro-batch of this shape."""
        if (rows, length) not in self._calls:
            calls: list[Call] = []

            def visit(_index: int, hidden: Tensor, call: Call) -> Tensor:
                calls.append(call)
                return hidden

            with torch.no_grad():
                self.skeleton.forward(visit, head=False, inputs_embeds=self._zeros(rows, length))
            while len(self._calls) >= _KEPT_SHAPES:
                del self._calls[next(iter(self._calls))]
            self._calls[rows, length] = calls
        return self._calls[rows, length]

    def _zeros(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, length, self.skeleton.width, dtype=self.dtype, device=self.device)

    @contextmanager
    def _in_place(self, end: int, other: Tensor | None) -> Iterator[None]:
        """`other` as the weights of an end that is open; None: its own."""
        name = self.skeleton.ends[end]
        if other is None or name is None:
            yield
            return
        _assign(self.skeleton.model, name, other)
        try:
            yield
        finally:
            _assign(self.skeleton.model, name, self._ends[end][1])

    def _open_end(self, end: int) -> None:
        """Give the embedding (0) or the head (1) its weights; tied ones share them."""
        name = self.skeleton.ends[end]
        if name is None or end in self._ends:
            return
        filled = self.skeleton.layout.tied.get(name, name)
        twin = self._ends.get(1 - end)
        tensor = twin[1] if twin is not None and twin[0] == filled else self._source.tensors([name])[name]
        _assign(self.skeleton.model, name, tensor)
        self._ends[end] = (filled, tensor)

    def _close_end(self, end: int) -> None:
        name = self.skeleton.ends[end]
        if name is not None and end in self._ends:
            _assign(self.skeleton.model, name, self._ends.pop(end)[1].to("meta"))


class LoadedBlock:
    """One decoder block with its weights. Made by `Runtime.load`; frees its memory when dropped."""

    def __init__(self, runtime: Runtime, index: int, module: nn.Module) -> None:
        self.index = index
        self._runtime = runtime
        self._module = module
        self._prefix = f"{runtime.skeleton.prefix}.{index}."
        self._values = dict(_everything(module))
        self._weights = {weight.key: weight for weight in self.block.weights()}
        self._tiles = runtime.skeleton.layout.by_source(self._prefix)
        self._leads = self._find_leads()
        # keys of weights and names of kept tensors whose values are not the checkpoint's
        self._changed: set[str] = set()
        self._meant: set[str] | None = None  # inside `replaced`: those that shall not be

    @property
    def block(self) -> Block:
        """The block's part of the graph."""
        return self._runtime.graph.blocks[self.index]

    def run(
        self,
        hidden: Tensor,
        record: Record | None = None,
        *,
        rounding: Mapping[str, Rounding] | None = None,
        cache: CacheRounding | None = None,
    ) -> Tensor:
        """(rows, length, hidden) states after the block, from those before it.

        `record` is called with every site's id and its (tokens, in) activations as they are used, before they
        are rounded: once per run for most sites; a site of an expert gets that expert's tokens, or no call
        without any.

        `rounding` gives by `Weight.key` what the input of a weight goes through before the product, see
        `emulate.Emulator`; weights it leaves out see their input as it is. `cache` gets the keys and values
        of attention, after rotary embedding, and returns what attention uses.

        UnsupportedError when weights that the model multiplies at once have different roundings, or when the
        block computes attention in a way that hides keys and values from `cache` (`Block.attentions` is 0).
        """
        self._restore(self._changed)
        shape = hidden.shape[0], hidden.shape[1]
        call = self._runtime._calls_for(*shape)[self.index]
        parameters = dict(self._module.named_parameters())
        emulator = None
        with torch.no_grad(), ExitStack() as modes:
            if rounding is not None or cache is not None:
                roundings = Roundings(self._places, rounding or {})
                emulator = modes.enter_context(Emulator(parameters, roundings, cache, shape))
            if record is not None:
                # entered last, so it sees a call first
                modes.enter_context(Observer(parameters, self._recorder(record)))
            out = self._module(hidden, *call.args, **call.kwargs)
        if cache is not None and emulator is not None and emulator.attentions == 0:
            raise UnsupportedError(
                f"block {self.index} hides its keys and values: it calls no scaled dot-product attention",
                remedy="leave out the kv_cache of the recipe",
            )
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states

    def differentiable(self, hidden: Tensor, new: Mapping[str, Tensor]) -> Tensor:
        """(rows, length, hidden) states after the block, from which gradients reach `hidden` and `new`.

        `new` are (out, in) weights by `Weight.key` and tensors of `Block.kept` by checkpoint name, for this
        run alone; what it leaves out has the values it would have in `run`, within `replaced` too.
        """
        self._restore(self._changed)
        call = self._runtime._calls_for(hidden.shape[0], hidden.shape[1])[self.index]
        parameters: dict[str, Tensor] = {}
        for key, value in new.items():
            for tile, piece in self._placed(key, value):
                name, now = tile.target.removeprefix(self._prefix), self._value(tile)
                if tile.axes == tuple(range(now.dim())) and piece.shape == now.shape:
                    parameters[name] = piece.to(now.dtype)
                    continue
                if name not in parameters:
                    parameters[name] = now.detach().clone()
                tile.at_runtime(parameters[name]).copy_(piece)
        out = torch.func.functional_call(self._module, parameters, (hidden, *call.args), dict(call.kwargs))
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states

    def weight(self, weight: Weight) -> Tensor:
        """(out, in) values of `weight` in the runtime's dtype: a view where it lies in one piece.

        These are the checkpoint's values, or within `replaced` what was written; do not write to them.
        """
        self._restore({weight.key} & self._changed)
        tiles = self._pieces(weight)
        if len(tiles) == 1:
            on_disk = self._region(tiles[0])
        else:
            rows, columns = weight.shape[::-1] if _transposed(weight) else weight.shape
            on_disk = self._region(tiles[0]).new_empty(rows, columns)
            for tile in tiles:
                on_disk[_cut(tile)] = self._region(tile)
        return on_disk.mT if _transposed(weight) else on_disk

    @contextmanager
    def replaced(
        self, new: Mapping[str, Tensor], tensors: Mapping[str, Tensor] = _NOTHING
    ) -> Iterator[LoadedBlock]:
        """Run with other values: `Weight.key` → (out, in) tensor, written in place one by one.

        `new` is gone through once, so a mapping that makes each value when asked needs no memory for all.
        `tensors` are values of other tensors of the block (`Block.kept`), by checkpoint name.

        Afterwards the block has the checkpoint's values again. They are read back only when they are
        next needed, so the last replacement of a block costs no reading. Does not nest.
        """
        if self._meant is not None:
            raise RuntimeError("replaced() does not nest")
        self._meant = set()
        try:
            for key, value in new.items():
                self._write(key, value)
            for name, value in tensors.items():
                if name in self._weights:
                    raise ValueError(f"`{name}` is not a tensor that block {self.index} keeps")
                self._write(name, value)
            yield self
        finally:
            self._meant = None

    def _restore(self, keys: Iterable[str]) -> None:
        """Put the checkpoint's values back into `keys`, except where others are meant to be."""
        restored = set(keys).difference(self._meant or ())
        pieces: dict[str, list[Tile]] = {}
        for key in sorted(restored):
            weight = self._weights.get(key)
            name, tiles = (key, self._tiles[key]) if weight is None else (weight.name, self._pieces(weight))
            pieces.setdefault(name, []).extend(tiles)
        for name, tiles in pieces.items():
            tensor = self._runtime._source.read(name)
            for tile in tiles:
                tile.at_runtime(self._value(tile)).copy_(tile.on_disk(tensor))
        self._changed -= restored

    def _write(self, key: str, value: Tensor) -> None:
        placed = self._placed(key, value)
        self._changed.add(key)
        for tile, piece in placed:
            tile.at_runtime(self._value(tile)).copy_(piece)
        if self._meant is not None:
            self._meant.add(key)

    def _placed(self, key: str, value: Tensor) -> list[tuple[Tile, Tensor]]:
        """Where a weight (out, in) or a kept tensor goes: tiles, and what belongs there, as on disk."""
        weight = self._weights.get(key)
        if weight is None and key not in self.block.kept:
            raise ValueError(f"`{key}` is not a tensor that block {self.index} keeps, nor one of its weights")
        expected = self._runtime._source.shape(key) if weight is None else weight.shape
        if tuple(value.shape) != expected:
            raise ValueError(f"`{key}` has shape {expected}, not {tuple(value.shape)}")
        if weight is None:
            return [(tile, tile.on_disk(value)) for tile in self._tiles[key]]
        on_disk = value.mT if _transposed(weight) else value
        return [(tile, on_disk[_cut(tile)]) for tile in self._pieces(weight)]

    def _pieces(self, weight: Weight) -> list[Tile]:
        return [tile.of(weight.part) for tile in self._tiles[weight.name]]

    def _value(self, tile: Tile) -> Tensor:
        return self._values[tile.target.removeprefix(self._prefix)]

    def _region(self, tile: Tile) -> Tensor:
        """(rows, columns) view of the tile in the parameter, as on disk."""
        region = tile.at_runtime(self._value(tile))
        return region.squeeze(0) if region.dim() == 3 else region

    def _find_leads(self) -> dict[str, list[tuple[int, int, str]]]:
        """Parameter → sorted (element, stride of in, site): a product over the element feeds the site.

        One element per site, of its first weight, so that an activation is recorded once.
        """
        leads: dict[str, list[tuple[int, int, str]]] = {}
        for site in self.block.sites:
            name, place = self._place(site.weights[0], self._pieces(site.weights[0])[0])
            leads.setdefault(name, []).append((place.first, place.stride_in, site.id))
        return {name: sorted(found) for name, found in leads.items()}

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        """Parameter → the places of its weights, in storage order."""
        places: dict[str, list[Place]] = {}
        for weight in self._weights.values():
            for tile in self._pieces(weight):
                name, place = self._place(weight, tile)
                places.setdefault(name, []).append(place)
        return {name: sorted(found, key=lambda place: place.first) for name, found in places.items()}

    def _place(self, weight: Weight, tile: Tile) -> tuple[str, Place]:
        """The parameter that a piece of a weight lies in, and where."""
        shape = self._value(tile).shape
        first = element(shape, [begin for begin, _ in tile.put])
        last = element(shape, [end - 1 for _, end in tile.put])
        stride = self._region(tile).stride(0 if _transposed(weight) else 1)
        return tile.target.removeprefix(self._prefix), Place(first, last, stride, weight.key)

    def _recorder(self, record: Record) -> Callable[[Product], None]:
        def seen(product: Product) -> None:
            leads = self._leads.get(product.parameter, [])
            inside = bisect_left(leads, product.first, key=lambda lead: lead[0])
            for begin, stride, site in itertools.islice(leads, inside, None):
                if begin > product.last:
                    break
                if stride == product.stride_in:
                    record(site, product.x.reshape(-1, product.x.shape[-1]))

        return seen


class _Source:
    """Reads parameters of the skeleton from the checkpoint, in the dtype each has at run time."""

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._layout = skeleton.layout
        self._device = device
        self._dtypes = skeleton.dtypes

    def read(self, name: str) -> Tensor:
        """A checkpoint tensor as stored; NumericsError when it holds NaN or infinity."""
        tensor = self._checkpoint.read(name)
        _check_finite(tensor, name, "")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a checkpoint tensor."""
        return self._checkpoint.tensors[name].shape

    def matrix(self, weight: Weight) -> Tensor:
        """(out, in) matrix of a weight in its stored dtype; of a stack of experts only the one asked for."""
        part = weight.part or Part()
        if part.expert is None:
            tensor = self.read(weight.name)
        else:
            tensor = self._checkpoint.read(weight.name, rows=slice(part.expert, part.expert + 1))[0]
            _check_finite(tensor, weight.key, "")
        return tensor.mT if part.transposed else tensor

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Runtime tensors by name, filled one checkpoint tensor at a time."""
        made: dict[str, Tensor] = {}
        tiles: dict[str, list[tuple[Tile, Tensor]]] = {}
        for name in names:
            shape, dtype = self._dtypes[name]
            made[name] = torch.empty(shape, dtype=dtype, device=self._device)
            for tile in self._layout.tiles[self._layout.tied.get(name, name)]:
                tiles.setdefault(tile.source, []).append((tile, made[name]))
        for source, places in tiles.items():
            tensor = self.read(source)
            for tile, parameter in places:
                region = tile.at_runtime(parameter)
                region.copy_(tile.on_disk(tensor))
                if parameter.dtype == torch.float16 and tensor.dtype != torch.float16:
                    _check_finite(region, source, " in float16")
        return made


def _check_finite(tensor: Tensor, name: str, where: str) -> None:
    place = first_nonfinite(tensor)
    if place is not None:
        raise NumericsError(
            f"`{name}` is {tensor[place].item()}{where} at index {list(place)}",
            remedy="choose bfloat16 or float32" if where else "the checkpoint is damaged; fetch it again",
        )


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of `module`: parameters and persistent buffers."""
    yield from module.state_dict(keep_vars=True).items()


def _everything(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from itertools.chain(module.named_parameters(), module.named_buffers())


def _assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    is_parameter = leaf in dict(module.named_parameters(recurse=False, remove_duplicate=False))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _transposed(weight: Weight) -> bool:
    return weight.part is not None and weight.part.transposed


def _cut(tile: Tile) -> tuple[slice, slice]:
    rows, columns = tile.take[-2:]
    return slice(*rows), slice(*columns)
