"""Watch matrix products: which parameter met which activation.

A `torch.overrides.TorchFunctionMode` sees every call before it runs. When one operand of a product
is a view of a known parameter, the other operand is the activation that feeds it. Nothing is
hooked or patched, and it works alike on the meta device (shapes only) and on real tensors.

Every product is put into the form ``x @ m`` with m (…, in, out), whatever was called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Operands = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a parameter and the activation it met.

    parameter   name under which the parameter was announced
    first       element of the parameter at which the matrix begins, counted in storage order
    last        element at which it ends, inclusive
    stride_in   distance in elements between neighbours along in_features
    index       which matrix of a batched product, 0 when there is only one
    x           (…, in) the activation
    """

    parameter: str
    first: int
    last: int
    stride_in: int
    index: int
    x: Tensor


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, *names: str) -> Any:
    if len(args) > place:
        return args[place]
    return next(kwargs[name] for name in names if name in kwargs)


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands:
    return _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight").mT


def _plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands:
    return _argument(args, kwargs, 0, "input", "self"), _argument(args, kwargs, 1, "other", "mat2", "mat_b")


def _reflected(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands:
    return _argument(args, kwargs, 1, "other"), _argument(args, kwargs, 0, "self")


def _added(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands:
    return (
        _argument(args, kwargs, 1, "mat1", "batch1"),
        _argument(args, kwargs, 2, "mat2", "batch2"),
    )


_GROUPED = (torch._grouped_mm, nn.functional.grouped_mm)
_PRODUCTS: Mapping[Callable[..., Any], Callable[[Sequence[Any], Mapping[str, Any]], Operands]] = {
    nn.functional.linear: _linear,
    torch.matmul: _plain,
    torch.mm: _plain,
    torch.bmm: _plain,
    torch.Tensor.matmul: _plain,
    torch.Tensor.mm: _plain,
    torch.Tensor.bmm: _plain,
    torch.Tensor.__matmul__: _plain,
    torch.Tensor.__rmatmul__: _reflected,
    torch.addmm: _added,
    torch.baddbmm: _added,
    torch.Tensor.addmm: _added,
    torch.Tensor.baddbmm: _added,
    **dict.fromkeys(_GROUPED, _plain),
}


class Producers:
    """Which vector (a norm's weight) scaled an activation, if only matrix products use the result.

    A transform may fold a scale into such a vector; any other consumer would notice, so it spoils it.
    """

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        self._vectors = {_storage(vector): name for name, vector in vectors.items() if vector.dim() == 1}
        self._made: dict[tuple[int, int, int], str] = {}
        self._alive: list[Tensor] = []
        self.spoiled: set[str] = set()

    def of(self, x: Tensor) -> str | None:
        """Name of the vector whose product `x` is, spoiled or not."""
        return self._made.get(identity(x))

    def after(self, func: Callable[..., Any], inputs: Sequence[Any], result: Any) -> None:
        """Note a call that has run: `inputs` are its arguments, flattened."""
        tensors = [t for t in inputs if isinstance(t, Tensor) and t.dim() > 0]
        vectors = [self._vectors[_storage(t)] for t in tensors if _storage(t) in self._vectors]
        made = [self._made[identity(t)] for t in tensors if identity(t) in self._made]
        whole = isinstance(result, Tensor) and result.dim() > 0
        if whole and vectors and len(vectors) == len(tensors):
            self._alive.append(result)
            self._vectors[_storage(result)] = vectors[0]  # 1 + w, a cast of w
        elif whole and vectors and func in _SCALINGS:
            self._alive.append(result)
            self._made[identity(result)] = vectors[0]
        elif whole and made and (func.__name__ in _CASTS or (vectors and func.__name__ in _SUMS)):
            self._alive.append(result)
            self._made[identity(result)] = made[0]
        elif made and func not in _PRODUCTS and func.__name__ not in _VIEWS:
            self.spoiled.update(made)


_SCALINGS = (
    torch.mul,
    torch.Tensor.mul,
    torch.Tensor.__mul__,
    torch.Tensor.__rmul__,
    torch.layer_norm,
    torch.rms_norm,
    nn.functional.layer_norm,
    nn.functional.rms_norm,
)
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")
_SUMS = ("add", "__add__", "__radd__")
_VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "size", "dim", "__get__")


class Observer(TorchFunctionMode):
    """Calls `seen` for every product of a known parameter with an activation, before it is computed."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seen: Callable[[Product], None],
        producers: Producers | None = None,
    ) -> None:
        super().__init__()
        self._producers = producers
        # The storage is what a view shares with its parameter; its handle is valid on meta too.
        self._known = {_storage(p): (name, p) for name, p in parameters.items() if p.dim() >= 2}
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        read = _PRODUCTS.get(func)
        if read is not None:
            x, m = read(args, named)
            for product in self._products(x, m):
                self._seen(product)
            if func in _GROUPED and x.is_meta:
                # The meta kernel takes bf16 only; the real ones take what the model has.
                return x.new_empty(x.shape[0], m.shape[-1])
        result = func(*args, **named)
        if self._producers is not None:
            self._producers.after(func, tree_leaves((args, named)), result)
        return result

    def _products(self, x: Tensor, m: Tensor) -> Iterator[Product]:
        found, other = self._known.get(_storage(m)), self._known.get(_storage(x))
        if found is not None and other is None:
            yield from _matrices(*found, x, m)
        elif other is not None and found is None and x.dim() >= 2 and m.dim() >= 2:
            yield from _matrices(*other, m.mT, x.mT)


def _storage(tensor: Tensor) -> int:
    handle: int = tensor.untyped_storage()._cdata
    return handle


def _matrices(name: str, parameter: Tensor, x: Tensor, m: Tensor) -> Iterator[Product]:
    """One Product per matrix of `m`; a batched `x` gives each matrix its own slice."""
    if m.dim() < 2:
        m = m.unsqueeze(-1)
    span = sum((size - 1) * stride for size, stride in zip(m.shape[-2:], m.stride()[-2:], strict=True))
    begin = int(m.storage_offset()) - int(parameter.storage_offset())
    batch = m.shape[:-2]
    for index, place in enumerate(itertools.product(*map(range, batch))):
        first = begin + sum(i * stride for i, stride in zip(place, m.stride()[:-2], strict=True))
        fed = x[place] if batch and x.shape[:-2] == batch else x
        yield Product(name, first, first + span, m.stride(-2), index, fed)


def identity(x: Tensor) -> tuple[int, int, int]:
    """What tells activations apart while they live: storage, offset, width. Models reshape freely."""
    return _storage(x), int(x.storage_offset()), x.shape[-1]
