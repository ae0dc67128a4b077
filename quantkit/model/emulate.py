"""Run a block as an engine would that rounds activations: inputs of products, keys and values.

`Emulator` changes operands on their way into a product, whatever spelling the model uses, so weights
whose inputs stay as they are see exactly what they would have seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantkit.errors import UnsupportedError
from quantkit.model.observe import ATTENTION, Argument, Arguments, Multiplication, Multiplications, Product

Rounding = Callable[[Tensor], Tensor]
CacheRounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_KEYS, _VALUES = Argument(1, ("key",)), Argument(2, ("value",))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight, or a piece of one, lies in a runtime parameter.

    first, last   elements between which it lies, inclusive, in storage order
    stride_in     distance in elements between neighbours along in_features
    key           `Weight.key`
    """

    first: int
    last: int
    stride_in: int
    key: str


class Roundings:
    """Which rounding the input of a product gets: that of the weights its matrix holds.

    `places` gives each runtime parameter's places, sorted by `first`; they do not overlap.
    """

    def __init__(self, places: Mapping[str, Sequence[Place]], by_key: Mapping[str, Rounding]) -> None:
        self._places = places
        self._by_key = by_key

    def of(self, product: Product) -> Rounding | None:
        """None when the input stays as it is; UnsupportedError when the weights disagree."""
        places = self._places.get(product.parameter, ())
        begin = bisect_left(places, product.first, key=lambda place: place.last)
        found: list[tuple[str, Rounding | None]] = []
        for place in places[begin:]:
            if place.first > product.last:
                break
            if place.stride_in == product.stride_in:
                found.append((place.key, self._by_key.get(place.key)))
        for key, rounding in found:
            if rounding != found[0][1]:
                raise UnsupportedError(
                    f"the model multiplies `{found[0][0]}` and `{key}` at once, but their inputs are rounded "
                    "differently",
                    remedy="give both the same scheme",
                )
        return found[0][1] if found else None


class Emulator(TorchFunctionMode):
    """Rounds the inputs of products, and hands keys and values of attention to `cache`, which returns others.

    A rounding gets (rows, length, in) where `shape` = (rows, length) tokens come together, else (tokens, in),
    as for the tokens of one expert. Roundings that are equal round one activation once.
    `attentions` counts the calls of scaled dot-product attention.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        roundings: Roundings,
        cache: CacheRounding | None,
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.attentions = 0
        self._multiplications = Multiplications(parameters)
        self._roundings = roundings
        self._cache = cache
        self._shape = shape
        self._last: tuple[Tensor, int, Rounding, Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given: Arguments = (args, kwargs or {})
        if func is ATTENTION:
            self.attentions += 1
            given = self._attention(*given)
        else:
            found = self._multiplications.find(func, *given)
            if found is not None:
                given = self._product(found, given)
        return func(*given[0], **given[1])

    def _attention(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        if self._cache is None:
            return args, kwargs
        keys, values = self._cache(_KEYS.of(args, kwargs), _VALUES.of(args, kwargs))
        return _VALUES.put(*_KEYS.put(args, kwargs, keys), values)

    def _product(self, found: Multiplication, given: Arguments) -> Arguments:
        roundings = [self._roundings.of(product) for product in found.products]
        if all(rounding is None for rounding in roundings):
            return given
        if found.apart:
            slices = zip(found.products, roundings, strict=True)
            rounded = torch.stack([p.x if r is None else self._rounded(p.x, r) for p, r in slices])
            return found.fed(rounded.view(found.x.shape))
        first = roundings[0]
        if first is None or any(rounding != first for rounding in roundings):
            raise UnsupportedError(
                f"the model multiplies all matrices of `{found.products[0].parameter}` at once, but their "
                "inputs are rounded differently",
                remedy="give all of them the same scheme",
            )
        return found.fed(self._rounded(found.x, first))

    def _rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        """`x` rounded; the last result is kept, because q, k and v follow one another."""
        if self._last is not None:
            before, version, by, result = self._last
            if before is x and version == x._version and by == rounding:
                return result
        tokens = x.reshape(-1, x.shape[-1])
        whole = tokens.shape[0] == self._shape[0] * self._shape[1]
        shaped = tokens.reshape(*self._shape, -1) if whole else tokens
        result = rounding(shaped).reshape(x.shape)
        self._last = (x, x._version, rounding, result)
        return result
