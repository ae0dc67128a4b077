"""What a saved checkpoint does to activations while it runs: inputs of products, keys and values.

Its config says so, and engines do it; a forward pass without it would flatter the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import SourceError, UnsupportedError
from quantkit.formats.compressed_tensors.targets import groups_of
from quantkit.model.emulate import CacheRounding
from quantkit.model.fused import attention_of
from quantkit.model.graph import Block
from quantkit.numerics.inputs import InputRounding, cache_round
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.schemes import OUTLIERS, SCALE_DTYPES, Activations, CacheDtype, Numbers, Scheme


@dataclass(frozen=True, slots=True)
class Runs:
    """How a checkpoint runs beside its weights.

    roundings  of the inputs of weights, by checkpoint name
    cache      what keys and values are rounded to, with the scales of each attention module by name
    """

    roundings: Mapping[str, InputRounding] = field(default_factory=dict)
    cache: CacheDtype | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def roundings_of(self, block: Block) -> dict[str, InputRounding] | None:
        """What happens to the inputs of the weights of a block."""
        return {w.key: self.roundings[w.key] for w in block.weights() if w.key in self.roundings} or None

    def cache_of(self, block: Block) -> CacheRounding | None:
        """What happens to keys and values of a block."""
        attention, dtype = attention_of(block), self.cache
        if dtype is None or attention is None:
            return None
        k, v = (_known(self.scales, f"{attention}.{part}") for part in ("k_scale", "v_scale"))
        return lambda keys, values: (cache_round(keys, dtype, k), cache_round(values, dtype, v))


def runs_of(quantized: QuantizedCheckpoint) -> Runs:
    """How `quantized` runs. UnsupportedError for what quantkit cannot emulate, with the reason."""
    config = quantized.config
    match quantized.format_name:
        case "bitsandbytes" if config.get("load_in_8bit"):
            outliers = float(config.get("llm_int8_threshold", OUTLIERS))
            mixed = InputRounding(Scheme(8, activations=Activations(outliers=outliers)))
            return Runs({name: mixed for name in quantized.parts})
        case "compressed_tensors":
            roundings = {name: _inputs(name, quantized) for name in quantized.parts}
            kind = _cache(config.get("kv_cache_scheme"))
            scales = {} if kind is None else _cache_scales(quantized)
            return Runs({name: r for name, r in roundings.items() if r is not None}, kind, scales)
        case _:
            return Runs()


def _inputs(name: str, quantized: QuantizedCheckpoint) -> InputRounding | None:
    base = name.removesuffix(".weight")
    group: Mapping[str, Any] = next(iter(groups_of(base, quantized.config)), {})
    if group.get("output_activations"):
        raise _beyond(name, "its outputs are rounded")
    inputs = group.get("input_activations")
    if not inputs:
        return None
    dynamic, strategy = inputs.get("dynamic"), inputs.get("strategy")
    kind: Numbers = "fp8" if inputs.get("type") == "float" else "int"
    by_token = dynamic is True and strategy in ("token", "group")
    if inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
        what = "symmetric" if inputs.get("symmetric", True) else "asymmetric"
        raise _beyond(name, f"its inputs are rounded to {inputs.get('num_bits')} bits, {what}")
    if not by_token and (dynamic is not False or strategy != "tensor"):
        raise _beyond(name, f"its inputs are rounded by {strategy}, dynamic {dynamic}")
    if by_token:
        size = inputs.get("group_size") if strategy == "group" else None
        return InputRounding(Scheme(8, numbers=kind, activations=Activations(group_size=size)))
    if f"{base}.input_scale" not in quantized.checkpoint.tensors:
        raise SourceError(
            f"the config says that the inputs of `{name}` have one scale, and no file holds it",
            remedy="its quantization config belongs to another file: download both again",
        )
    scale = quantized.checkpoint.read(f"{base}.input_scale")
    dtype = str(scale.dtype).removeprefix("torch.")
    if scale.numel() != 1 or dtype not in SCALE_DTYPES:
        raise _beyond(name, f"the scale of its inputs is {dtype} {tuple(scale.shape)}")
    static = Scheme(8, numbers=kind, activations=Activations(dynamic=False), scale_dtype=dtype)
    return InputRounding(static, float(scale))


def _cache(scheme: Mapping[str, Any] | None) -> CacheDtype | None:
    if not scheme:
        return None
    static = scheme.get("dynamic") in (False, None) and scheme.get("strategy") in ("tensor", None)
    if scheme.get("num_bits") != 8 or not scheme.get("symmetric", True) or not static:
        raise _beyond("the key-value cache", f"it is rounded as {dict(scheme)}")
    return "fp8" if scheme.get("type") == "float" else "int8"


def _cache_scales(quantized: QuantizedCheckpoint) -> dict[str, Tensor]:
    names = [n for n in quantized.checkpoint.tensors if n.endswith((".k_scale", ".v_scale"))]
    return {n: quantized.checkpoint.read(n).to(torch.float32).view(-1) for n in names}


def _known(scales: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in scales:
        raise SourceError(
            f"the config names scales of the cache that no file holds: `{name}`",
            remedy="remove kv_cache_scheme from the quantization config, or download the files again",
        )
    return scales[name]


def _beyond(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"`{name}` cannot be run as engines do: {what}, which quantkit does not emulate",
        remedy="measure it with the engine it is for",
    )
