"""Where every element of a runtime parameter comes from in the checkpoint.

A `Tile` says which region of which checkpoint tensor fills which region of which runtime parameter.
`Traced` finds the tiles: a tensor without data that keeps them through whatever Transformers does
to tensors while loading.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.model.graph import Part

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """A region of a checkpoint tensor and the region of a runtime parameter that it fills.

    take   (begin, end) along every dimension of the tensor on disk
    put    (begin, end) along every dimension of the runtime parameter
    axes   for every dimension of the runtime parameter the dimension on disk it holds, or None
           where tensors were stacked
    """

    source: str
    take: tuple[Range, ...]
    target: str
    put: tuple[Range, ...]
    axes: tuple[int | None, ...]

    def of(self, part: Part | None) -> Tile:
        """The tile narrowed to one expert of a stacked tensor."""
        if part is None or part.expert is None:
            return self
        begin = part.expert - self.take[0][0]
        return narrow(self, self.axes.index(0), (begin, begin + 1))

    def on_disk(self, source: Tensor) -> Tensor:
        """View of the region in the checkpoint tensor."""
        return source[tuple(slice(*r) for r in self.take)]

    def at_runtime(self, parameter: Tensor) -> Tensor:
        """View of the region in the runtime parameter, dimensions in the order they have on disk."""
        region = parameter[tuple(slice(*r) for r in self.put)]
        stacked = tuple(d for d, axis in enumerate(self.axes) if axis is None)
        order = [axis for axis in self.axes if axis is not None]
        return region.squeeze(stacked).permute([order.index(d) for d in range(len(order))])


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


def element(shape: Sequence[int], place: Iterable[int]) -> int:
    """Number of the element at `place` in a contiguous tensor."""
    return sum(i * stride for i, stride in zip(place, strides(shape), strict=True))


class Traced(torch.Tensor):
    """A meta tensor that remembers its tiles through stacking, joining, transposing and splitting."""

    tiles: tuple[Tile, ...] = ()

    @classmethod
    def make(cls, meta: Tensor, tiles: Iterable[Tile]) -> Traced:
        made = meta.as_subclass(cls)
        made.tiles = tuple(tiles)
        return made

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Traced:
        full = tuple((0, size) for size in shape)
        tile = Tile(name, full, "", full, tuple(range(len(shape))))
        return cls.make(torch.empty(shape, device="meta"), [tile])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
        follow = _FOLLOWED.get(func)
        return result if follow is None else follow(result, *args, **named)


def _same(result: Tensor, source: Traced, *_: Any, **__: Any) -> Traced:
    return Traced.make(result, source.tiles)


def _stack(result: Tensor, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    tiles = [
        replace(t, put=_insert(t.put, dim, (i, i + 1)), axes=_insert(t.axes, dim, None))
        for i, tensor in enumerate(tensors)
        for t in tensor.tiles
    ]
    return Traced.make(result, tiles)


def _cat(result: Tensor, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    tiles, offset = [], 0
    for tensor in tensors:
        tiles += [replace(t, put=_shift(t.put, dim, offset)) for t in tensor.tiles]
        offset += tensor.shape[dim]
    return Traced.make(result, tiles)


def _transpose(result: Tensor, source: Traced, dim0: int = 0, dim1: int = 1) -> Traced:
    order = list(range(source.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    tiles = [
        replace(t, put=tuple(t.put[d] for d in order), axes=tuple(t.axes[d] for d in order))
        for t in source.tiles
    ]
    return Traced.make(result, tiles)


def _split(result: Sequence[Tensor], source: Traced, *_: Any, dim: int = 0) -> list[Traced]:
    pieces, begin = [], 0
    for part in result:
        end = begin + part.shape[dim]
        inside = [t for t in source.tiles if t.put[dim][0] < end and begin < t.put[dim][1]]
        cut = [
            narrow(
                t, dim, (max(begin, t.put[dim][0]) - t.put[dim][0], min(end, t.put[dim][1]) - t.put[dim][0])
            )
            for t in inside
        ]
        pieces.append(Traced.make(part, [replace(t, put=_shift(t.put, dim, -begin)) for t in cut]))
        begin = end
    return pieces


def narrow(tile: Tile, dim: int, part: Range) -> Tile:
    """The tile cut to `part` of its own extent along runtime dimension `dim`."""
    axis = tile.axes[dim]
    low = tile.put[dim][0]
    put = _swap(tile.put, dim, (low + part[0], low + part[1]))
    if axis is None:
        return replace(tile, put=put)
    low = tile.take[axis][0]
    return replace(tile, put=put, take=_swap(tile.take, axis, (low + part[0], low + part[1])))


def _insert(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at:])


def _swap(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _shift(put: tuple[Range, ...], dim: int, offset: int) -> tuple[Range, ...]:
    return _swap(put, dim, (put[dim][0] + offset, put[dim][1] + offset))


_FOLLOWED: Mapping[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.chunk: _split,
    torch.split: _split,
    torch.Tensor.chunk: _split,
    torch.Tensor.split: _split,
    torch.Tensor.contiguous: _same,
    torch.Tensor.clone: _same,
}
