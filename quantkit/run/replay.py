"""A block as a target leaves it: quantized weights, rewritten vectors, rounded inputs, rounded cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from quantkit.model.graph import Block
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.numerics.inputs import InputRounding, cache_round, cache_scale
from quantkit.recipe.plan import TargetPlan
from quantkit.run.advance import Forward
from quantkit.run.folded import matrix_of
from quantkit.run.results import BlockResult
from quantkit.schemes import CacheDtype
from quantkit.tensors import QuantizedLinear, dequantize


class CacheRange:
    """Largest magnitudes of the keys and values that attention was given."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Look at (rows, heads, length, width) keys and values, and leave them as they are."""
        k, v = keys.abs().amax().float(), values.abs().amax().float()
        self._keys = k if self._keys is None else torch.maximum(self._keys, k)
        self._values = v if self._values is None else torch.maximum(self._values, v)
        return keys, values

    def scales(self, names: tuple[str, str], dtype: CacheDtype, stored: str) -> dict[str, Tensor]:
        """(1,) scales of keys and values by file name, in the dtype `stored`."""
        if self._keys is None or self._values is None:
            raise ValueError("no attention was seen")
        held: torch.dtype = getattr(torch, stored)
        ranges = zip(names, (self._keys, self._values), strict=True)
        return {name: cache_scale(largest, dtype).to(held).view(1).cpu() for name, largest in ranges}


class QuantizedBlock:
    """One block of one target, to be run in place of the source's."""

    def __init__(self, target: TargetPlan, block: Block, result: BlockResult) -> None:
        self._target, self._block, self._result = target, block, result
        self._linears = result.by_name()

    @contextmanager
    def within(self, loaded: LoadedBlock, runtime: Runtime) -> Iterator[Forward]:
        """The forward pass of `loaded` with everything replaced, which is undone afterwards."""
        kept, tensors = set(self._block.kept), self._result.tensors
        others = {name: t for name, t in tensors.items() if name in kept}
        weights = _Values(self._linears, self._rewritten(), runtime.dtype, runtime.device)
        rounding, cache = self._rounding(), self._cache(runtime.device)
        with loaded.replaced(weights, tensors=others) as replaced:
            yield partial(replaced.run, rounding=rounding or None, cache=cache)

    def _rewritten(self) -> dict[str, Tensor]:
        """Weights that the target keeps and a transform has scaled, by key."""
        tensors = self._result.tensors
        own = (w for w in self._block.weights() if self._target.scheme_of(w) is None)
        return {w.key: matrix_of(w, tensors[w.name]) for w in own if w.name in tensors}

    def _rounding(self) -> dict[str, InputRounding]:
        """How the inputs of each weight are rounded, by weight key."""
        found: dict[str, InputRounding] = {}
        for weight in self._block.weights():
            scheme = self._target.scheme_of(weight)
            if scheme is not None and scheme.activations is not None:
                scale = self._linears[weight.key].input_scale
                found[weight.key] = InputRounding(scheme, None if scale is None else float(scale))
        return found

    def _cache(self, device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        names, dtype = self._target.cache_names(self._block), self._target.target.kv_cache
        if names is None or dtype is None:
            return None
        k, v = (self._result.tensors[name].to(device) for name in names)
        return lambda keys, values: (cache_round(keys, dtype, k), cache_round(values, dtype, v))


class _Values(Mapping[str, Tensor]):
    """Weight key → its matrix: `kept` ones as they are, the others dequantized when asked for, so that never
    more than one is in memory."""

    def __init__(
        self,
        linears: Mapping[str, QuantizedLinear],
        kept: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._linears, self._kept, self._dtype, self._device = linears, kept, dtype, device

    def __getitem__(self, key: str) -> Tensor:
        found = self._kept.get(key)
        value = dequantize(self._linears[key].weight) if found is None else found
        return value.to(self._device, self._dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._linears
        yield from self._kept

    def __len__(self) -> int:
        return len(self._linears) + len(self._kept)
