"""The `quantization_config` of config.json.

transformers reads the layout of each group, vLLM and SGLang the one at the top too. Keys that the schema
does not know are refused, and a status other than "compressed" makes transformers run random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.formats.compressed_tensors.layouts import layout_of
from quantkit.formats.compressed_tensors.targets import patterns
from quantkit.protocols import FormatFacts
from quantkit.schemes import Activations, CacheDtype, Scheme

# the library version whose schema is written; readers use it to pick the dense packing of odd widths
_SCHEMA = "0.20.0"
# dtype of the scales, which readers of 4-bit floats need; no zero points, no dtype of them
_SCALES = {"mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}


def config_of(facts: FormatFacts) -> Mapping[str, Any]:
    """One group per scheme; weights that stay float are listed under `ignore`."""
    by_scheme: dict[Scheme, list[str]] = {}
    # a linear layer that is targeted and stored float is filled with random values
    heads = (w.module for w in facts.outer if w.role == "head")
    ignore = list(dict.fromkeys([*heads, *facts.linears]))
    for a in facts.assigned:
        if a.scheme is None:
            ignore.append(a.weight.module)
        else:
            by_scheme.setdefault(a.scheme, []).append(a.weight.module)
    single = len(by_scheme) == 1
    groups = {
        f"group_{n}": _group(scheme, ["Linear"] if single else patterns(modules))
        for n, (scheme, modules) in enumerate(by_scheme.items())
    }
    layouts = {layout_of(s) for s in by_scheme}
    return {
        "quant_method": "compressed-tensors",
        "version": _SCHEMA,
        "format": "mixed-precision" if len(layouts) > 1 else "".join(layouts) or "dense",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if facts.kv_cache is None else _cache(facts.kv_cache),
        "ignore": ignore,
        "config_groups": groups,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": layout_of(scheme),
        "weights": _weights(scheme),
        "input_activations": None if scheme.activations is None else _inputs(scheme, scheme.activations),
        "output_activations": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    args = {
        "num_bits": scheme.bits,
        "type": _type(scheme),
        "symmetric": scheme.sym,
        "strategy": _strategy(scheme),
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None if scheme.tile is None else [scheme.tile, scheme.tile],
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scales = _SCALES.get(scheme.numbers)
    return args if scales is None else {**args, "scale_dtype": scales, "zp_dtype": None}


def _inputs(scheme: Scheme, inputs: Activations) -> dict[str, Any]:
    """Integers beside integers, e4m3 beside e4m3."""
    by_token = "token" if inputs.group_size is None else "group"
    return {
        "num_bits": 8,
        "type": _type(scheme),
        "symmetric": True,
        "strategy": by_token if inputs.dynamic else "tensor",
        "group_size": inputs.group_size,
        "dynamic": inputs.dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if inputs.dynamic else "minmax",
        "observer_kwargs": {},
    }


def _cache(dtype: CacheDtype) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float" if dtype == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _type(scheme: Scheme) -> str:
    return "int" if scheme.numbers == "int" else "float"


def _strategy(scheme: Scheme) -> str:
    if scheme.numbers == "nvfp4":
        return "tensor_group"
    if scheme.tile is not None:
        return "block"
    return "tensor" if scheme.per_tensor else "channel" if scheme.group_size is None else "group"
