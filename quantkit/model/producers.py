"""Which vector scaled what a product multiplies: where a transform may put a scale.

Watched together with the products (`observe.Observer`), call by call. What is not understood makes a
vector unusable, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantkit.model.observe import PRODUCTS, Argument, identity, storage

_LEFT, _RIGHT = Argument(0, ("input", "self")), Argument(1, ("other",))
_WEIGHT, _BIAS = Argument(2, ("weight",)), Argument(3, ("bias",))
_FACTORS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_NORMS = (torch.layer_norm, torch.rms_norm, nn.functional.layer_norm, nn.functional.rms_norm)
_SCALINGS = (*_FACTORS, *_NORMS)
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")
_SUMS = ("add", "__add__", "__radd__")
_JOINS = ("view", "reshape", "flatten")
_CARRIES = (*_JOINS, "contiguous", "mul", "__mul__", *_CASTS)
_VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "size", "dim", "__get__")


@dataclass(frozen=True, slots=True)
class Producer:
    """What made an activation: ``x = (vector + offset) · normed + bias``, by names of vector parameters.

    offset   1 where a norm multiplies by 1 + w (Gemma), else 0
    """

    vector: str
    offset: float = 0.0
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class _Vector:
    """A vector parameter, or what was computed from it alone, with its number of elements."""

    producer: Producer
    size: int


class Producers:
    """Which vector (a norm's weight) scaled an activation, if only matrix products use the result.

    A transform may fold a scale into such a vector; any other consumer would notice, so it spoils it,
    and so does a second use of the vector.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        vectors = {name: p for name, p in parameters.items() if p.dim() == 1}
        self._vectors = {storage(v): _Vector(Producer(name), v.numel()) for name, v in vectors.items()}
        self._made: dict[tuple[int, int, int], Producer] = {}
        self._alive: list[Tensor] = []
        self._used: set[str] = set()
        self._spoiled: set[str] = set()

    def of(self, x: Tensor) -> Producer | None:
        """What made `x`, as far as is known while the block still runs."""
        return self._made.get(identity(x))

    def unspoiled(self, producer: Producer | None) -> Producer | None:
        """The producer, or None when something besides products has noticed it."""
        if producer is None or {producer.vector, producer.bias} & self._spoiled:
            return None
        return producer

    def returned(self, leaves: Iterable[Any]) -> None:
        """Note what leaves the block: whoever takes it is not seen."""
        made = (self.of(t) for t in leaves if isinstance(t, Tensor) and t.dim() > 0)
        self._spoiled.update(producer.vector for producer in made if producer is not None)

    def after(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Note a call that has run."""
        leaves = tree_leaves((args, dict(kwargs)))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
        vectors = [v for t in tensors if (v := self._vector(t)) is not None]
        made = [m for t in tensors if (m := self.of(t)) is not None]
        if vectors and len(vectors) == len(tensors):
            self._derive(func.__name__, vectors, leaves, out)
        elif (vectors or made) and func.__name__ not in _VIEWS:
            new = self._new(func, args, kwargs, out) if isinstance(out, Tensor) and out.dim() > 0 else None
            if new is not None:
                self._alive.append(out)
                self._made[identity(out)] = new
            if func not in PRODUCTS and (new is None or func in _SCALINGS):
                self._spoiled.update(producer.vector for producer in made)
            if func.__name__ not in _CASTS:
                names = {vector.producer.vector for vector in vectors}
                self._spoiled |= names & self._used
                self._used |= names

    def _vector(self, tensor: Any) -> _Vector | None:
        """The vector that `tensor` is, lying along its last dimension."""
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            return None
        found = self._vectors.get(storage(tensor))
        return found if found is not None and tensor.shape[-1] == tensor.numel() == found.size else None

    def _derive(self, name: str, vectors: Sequence[_Vector], leaves: Iterable[Any], out: Any) -> None:
        """Something was computed from vectors alone: casts and 1 + w are understood, anything else spoils."""
        if not isinstance(out, Tensor):
            return
        producer = vectors[0].producer
        numbers = [n for n in leaves if isinstance(n, (int, float)) and not isinstance(n, bool)]
        if name in _SUMS and len(vectors) == len(numbers) == 1:
            producer = replace(producer, offset=producer.offset + numbers[0])
        elif name not in _CASTS and name not in _VIEWS:
            self._spoiled.update(vector.producer.vector for vector in vectors)
            return
        self._alive.append(out)
        self._vectors[storage(out)] = _Vector(producer, out.numel())

    def _new(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
    ) -> Producer | None:
        """What has made `out`: a vector by scaling, or what made something that is now cast, shifted or
        picked from."""
        if func.__name__ in _CASTS or _picks_rows(func, args):
            return self.of(args[0])
        if func in _NORMS:
            shift = _BIAS.of(args, kwargs)
            weight, bias = self._vector(_WEIGHT.of(args, kwargs)), self._vector(shift)
            if weight is None or (isinstance(shift, Tensor) and bias is None):
                return None
            return replace(weight.producer, bias=None if bias is None else bias.producer.vector)
        if (func not in _FACTORS and func.__name__ not in _SUMS) or "alpha" in kwargs:
            return None
        operands = [t for t in (_LEFT.of(args, kwargs), _RIGHT.of(args, kwargs)) if isinstance(t, Tensor)]
        vector = next((v for t in operands if (v := self._vector(t)) is not None), None)
        if vector is None or vector.size != out.shape[-1]:
            return None
        if func in _FACTORS:
            return vector.producer
        scaled = next((m for t in operands if t.dim() > 0 and (m := self.of(t)) is not None), None)
        if scaled is None or scaled.bias is not None or vector.producer.offset != 0:
            return None
        return replace(scaled, bias=vector.producer.vector)


def _picks_rows(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a call picks tokens out of a tensor, as experts get theirs, and leaves their channels alone."""
    if func is not torch.Tensor.__getitem__:
        return False
    x, index = args
    places = index if isinstance(index, tuple) else (index,)
    # an index of k dimensions of truth values stands for k dimensions
    used = sum(p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else p is not None for p in places)
    return isinstance(x, Tensor) and Ellipsis not in _plain(places) and used < x.dim()


def _plain(places: Sequence[Any]) -> list[Any]:
    """Without tensors, which cannot be searched for a value."""
    return [place for place in places if not isinstance(place, Tensor)]


class Heads:
    """Which activations are heads set side by side, and how many of which width.

    Known from the reshape that joins them, so it does not matter how attention was computed.
    """

    def __init__(self) -> None:
        self._joined: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._alive: list[Tensor] = []

    def of(self, x: Tensor) -> tuple[int, int] | None:
        """(heads, width of a head), None when `x` was not put together from heads."""
        return self._joined.get(identity(x))

    def after(self, func: Callable[..., Any], args: Sequence[Any], out: Any) -> None:
        """Note a call that has run."""
        if not isinstance(out, Tensor) or out.dim() == 0 or not args or not isinstance(args[0], Tensor):
            return
        x, heads = args[0], None
        if func.__name__ in _JOINS and x.dim() > out.dim() and x.shape[-2:].numel() == out.shape[-1]:
            heads = (x.shape[-2], x.shape[-1])
        elif func.__name__ in _CARRIES and x.shape == out.shape:
            heads = self.of(x)
        if heads is not None:
            self._alive.append(out)
            self._joined[identity(out)] = heads
