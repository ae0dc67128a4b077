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

Arguments = tuple[Sequence[Any], Mapping[str, Any]]
Called = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any], Any], None]


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


@dataclass(frozen=True, slots=True)
class Argument:
    """Where a function takes an argument: by position, or under one of some names."""

    position: int
    names: tuple[str, ...]

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument; None when it is left out."""
        if len(args) > self.position:
            return args[self.position]
        return next((kwargs[name] for name in self.names if name in kwargs), None)

    def put(self, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Arguments:
        """The same arguments with another value for this one."""
        if len(args) > self.position:
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        name = next(name for name in self.names if name in kwargs)
        return args, {**kwargs, name: value}


@dataclass(frozen=True, slots=True)
class _Form:
    """Which arguments a function multiplies; `linear`: the right one lies (out, in)."""

    left: Argument
    right: Argument
    linear: bool = False


_PLAIN = _Form(Argument(0, ("input", "self")), Argument(1, ("other", "mat2", "mat_b")))
_ADDED = _Form(Argument(1, ("mat1", "batch1")), Argument(2, ("mat2", "batch2")))
_GROUPED = (torch._grouped_mm, nn.functional.grouped_mm)
PRODUCTS: Mapping[Callable[..., Any], _Form] = {
    nn.functional.linear: _Form(Argument(0, ("input",)), Argument(1, ("weight",)), linear=True),
    torch.matmul: _PLAIN,
    torch.mm: _PLAIN,
    torch.bmm: _PLAIN,
    torch.Tensor.matmul: _PLAIN,
    torch.Tensor.mm: _PLAIN,
    torch.Tensor.bmm: _PLAIN,
    torch.Tensor.__matmul__: _PLAIN,
    torch.Tensor.__rmatmul__: _Form(Argument(1, ("other",)), Argument(0, ("self",))),
    torch.addmm: _ADDED,
    torch.baddbmm: _ADDED,
    torch.Tensor.addmm: _ADDED,
    torch.Tensor.baddbmm: _ADDED,
    **dict.fromkeys(_GROUPED, _PLAIN),
}
ATTENTION = nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Multiplication:
    """A call that multiplies matrices of one known parameter.

    products   one per matrix
    x          (…, in) what it multiplies them with
    """

    products: tuple[Product, ...]
    x: Tensor
    _args: Sequence[Any]
    _kwargs: Mapping[str, Any]
    _operand: Argument
    _turned: bool

    @property
    def apart(self) -> bool:
        """Every matrix has its own slice of x, not the whole."""
        return self.products[0].x is not self.x

    def fed(self, x: Tensor) -> Arguments:
        """The arguments of the call with another x of the same shape."""
        return self._operand.put(self._args, self._kwargs, x.mT if self._turned else x)


class Multiplications:
    """Recognises calls that multiply one of `parameters`, by the storage a view shares with its parameter."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        # the handle of a storage is valid on meta too
        self._known = {storage(p): (name, p) for name, p in parameters.items() if p.dim() >= 2}

    def find(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Multiplication | None:
        """What a call multiplies, None when no known parameter, or nothing but those, is in it."""
        form = PRODUCTS.get(func)
        if form is None:
            return None
        left, right = form.left.of(args, kwargs), form.right.of(args, kwargs)
        by_left, by_right = self._known.get(storage(left)), self._known.get(storage(right))
        if by_right is not None and by_left is None:
            m = right.mT if form.linear else right
            products = tuple(_matrices(*by_right, left, m))
            return Multiplication(products, left, args, kwargs, form.left, _turned=False)
        if by_left is not None and by_right is None and left.dim() >= 2 and right.dim() >= 2:
            # (W m)ᵀ = mᵀ Wᵀ: the activation is what stands on the right
            x = right if form.linear else right.mT
            products = tuple(_matrices(*by_left, x, left.mT))
            return Multiplication(products, x, args, kwargs, form.right, _turned=not form.linear)
        return None


class Observer(TorchFunctionMode):
    """Calls `seen` for every product of a known parameter with an activation, before it is computed.

    `called` is told every call of a function after it has run: function, arguments, result.
    `attentions` counts the calls of scaled dot-product attention.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seen: Callable[[Product], None],
        called: Called | None = None,
    ) -> None:
        super().__init__()
        self.attentions = 0
        self._called = called
        self._multiplications = Multiplications(parameters)
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        found = self._multiplications.find(func, args, named)
        for product in found.products if found is not None else ():
            self._seen(product)
        if func in _GROUPED and args[0].is_meta:
            # The meta kernel takes bf16 only; the real ones take what the model has.
            x, m = args[:2]
            return x.new_empty(x.shape[0], m.shape[-1])
        self.attentions += func is ATTENTION
        result = func(*args, **named)
        if self._called is not None:
            self._called(func, args, named, result)
        return result


def storage(tensor: Tensor) -> int:
    """Handle of a tensor's storage, which its views share; of live tensors only."""
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
    return storage(x), int(x.storage_offset()), x.shape[-1]
