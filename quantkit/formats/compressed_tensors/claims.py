"""Where the config of a compressed-tensors file says something else than its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from quantkit.formats.compressed_tensors.targets import groups_of, names
from quantkit.model.stored import Difference, StoredModel, StoredWeight, told

_LOADERS = "vLLM, SGLang and transformers"
# what of a weight is stored, and its dtype → the names of layouts that are so, the one that is written first
_LAYOUTS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("weight_packed", "I32"): ("pack-quantized",),
        ("weight_packed", "U8"): ("mxfp4-pack-quantized", "nvfp4-pack-quantized"),
        ("weight", "I8"): ("int-quantized", "naive-quantized"),
        ("weight", "F8_E4M3"): ("float-quantized", "naive-quantized", "mxfp8-quantized"),
    }
)
_KNOWN = frozenset(name for found in _LAYOUTS.values() for name in found)


def disagreements(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each, of keys that are there."""
    yield from told(d for weight in stored.weights for d in _of_weight(weight, config))
    yield from told(d for weight in stored.weights for d in _unasked(weight, config))
    kept = (d for module, path in stored.kept.items() for d in _asked(module, path, config))
    yield from told(kept)
    status = config.get("quantization_status")
    if stored.weights and isinstance(status, str) and status != "compressed":
        yield (
            f"`quantization_status` is '{status}', but the weights are compressed: "
            "transformers would make up random ones"
        )
    yield from _cache(stored, config)


def _of_weight(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    """What the group of a weight says of it."""
    group = next(iter(groups_of(weight.module, config)), None) or _by_path(weight, config)
    if group is None:
        return
    args = group["weights"]
    for claim, holds, harm in (
        *_layout(weight, group, config),
        *_numbers(weight, args),
        *_scales(weight, args),
        *_extras(weight, group),
    ):
        yield Difference(weight.name, claim, holds, harm)


_Found = Iterator[tuple[str, str, str]]


def _layout(weight: StoredWeight, group: Mapping[str, Any], config: Mapping[str, Any]) -> _Found:
    ending, dtype = _codes(weight)
    fitting = _LAYOUTS.get((ending, dtype))
    if fitting is None:
        claim = f"`type` is '{group['weights'].get('type', 'int')}'"
        yield claim, f"is stored as {dtype}, which no layout is", f"{_LOADERS} would misread it"
        return
    if "weight_packed" in weight.parts and dtype == "U8":
        fitting = fitting[1:] if "weight_global_scale" in weight.parts else fitting[:1]
    for where, says in (("`format` of its group", group.get("format")), ("`format`", config.get("format"))):
        if says in _KNOWN and says not in fitting:
            yield f"{where} is '{says}'", f"is stored as '{fitting[0]}'", _readers_of(where)


def _readers_of(where: str) -> str:
    readers = "transformers and vLLM" if "group" in where else "vLLM and SGLang"
    return f"{readers} would look for other tensors"


def _numbers(weight: StoredWeight, args: Mapping[str, Any]) -> _Found:
    ending, dtype = _codes(weight)
    kind = "int" if dtype in ("I8", "I32") else "float"
    says = str(args.get("type") or "int").lower()
    if says != kind:
        yield f"`type` is '{says}'", f"holds {kind}s", f"{_LOADERS} choose by it how codes are read"
    bits = int(args["num_bits"])
    low, high = weight.codes or (0, 0)
    limit = 1 << (bits - 1)
    if ending == "weight" and dtype == "I8" and bits < 8:
        # narrow codes may lie one to a byte
        signed = (low, high) if weight.zero_points is None else (low - 128, high - 128)
        if signed[0] < -limit or signed[1] >= limit:
            holds = f"has codes from {signed[0]} to {signed[1]}"
            yield f"`num_bits` is {bits}", holds, "vLLM and SGLang would look for packed ones"
    elif bits != weight.bits:
        yield f"`num_bits` is {bits}", f"has {weight.bits}", f"{_LOADERS} would misread its codes"


def _scales(weight: StoredWeight, args: Mapping[str, Any]) -> _Found:
    stored = weight.parts.get("weight_scale")
    strategy = str(args.get("strategy") or "").lower()
    size = int(args.get("group_size") or 0)
    if stored is None:
        return
    (out, width), count = weight.shape, math.prod(stored.shape)
    expected = {"tensor": 1, "channel": out}.get(strategy)
    if strategy in ("group", "tensor_group") or (not strategy and size > 0):
        expected = out * -(-width // size) if size > 0 else None
    elif strategy == "block" and args.get("block_structure"):
        rows, columns = (int(n) for n in args["block_structure"])
        expected = -(-out // rows) * -(-width // columns)
    if expected is not None and expected != count:
        said = f"`strategy` is '{strategy}'" if strategy else f"`group_size` is {size}"
        said += f" with groups of {size}" if strategy and size > 0 else ""
        holds = {1: "has one scale", out: "has one scale for each row"}
        fallback = f"has scales for {weight.group[0]:,} × {weight.group[1]:,} weights each"
        harm = f"{_LOADERS} would stop, or read scales that belong to other weights"
        yield said, holds.get(count, fallback), harm


def _extras(weight: StoredWeight, group: Mapping[str, Any]) -> _Found:
    """Tensors that the config promises, or does not mention."""
    args, inputs = group["weights"], group.get("input_activations") or {}
    zeros = "weight_zero_point" in weight.parts
    if args.get("symmetric") is False and not zeros:
        yield (
            "`symmetric` is false",
            "has no weight_zero_point",
            f"{_LOADERS} would look for one and find none",
        )
    middle = 1 << (weight.bits - 1)
    if args.get("symmetric", True) is True and zeros and weight.zero_points != (middle, middle):
        yield (
            "`symmetric` is true",
            "has zero points that matter",
            f"{_LOADERS} do not look at zero points then",
        )
    order = str(args.get("actorder") or "").lower()
    if weight.reordered and order not in ("group", "dynamic", "true"):
        claim = "`actorder` does not say 'group'"
        yield claim, "has groups whose columns lie apart", "vLLM and SGLang would mix up the scales"
    if order in ("group", "dynamic") and weight.groups > 1 and "weight_g_idx" not in weight.parts:
        claim = f"`actorder` is '{order}'"
        yield claim, "has no weight_g_idx", "vLLM would look for one and find none"
    static = bool(inputs) and inputs.get("dynamic") in (False, None)
    if static and not {"input_scale", "input_global_scale"} & weight.parts.keys():
        claim = "`input_activations` are static"
        yield claim, "has no input_scale", "vLLM and SGLang would look for one and find none"


def _unasked(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    """A quantized weight that the config leaves out."""
    floats = f"{_LOADERS} would look for floats there"
    ignoring = [t for t in config.get("ignore") or () if all(names(t, module) for module in weight.modules)]
    if ignoring:
        yield Difference(weight.name, f"`ignore` names '{ignoring[0]}'", "is quantized", floats)
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    classes = any(target[:1].isupper() and target != "Linear" for target in targets)
    aimed = [group for module in weight.modules for group in groups_of(module, config)]
    # classes may be those of modules that hold it
    if not aimed and not classes and not ignoring:
        yield Difference(weight.name, "no `targets` name it", "is quantized", floats)


def _asked(module: str, path: str, config: Mapping[str, Any]) -> Iterator[Difference]:
    """A linear layer of floats that the config says is quantized; files may name it by another prefix."""
    both = (module.split("."), path.split("."))
    variants = {".".join(parts[i:]) for parts in both for i in range(len(parts))}
    # what is capital is a class, maybe of what holds it
    ignored = any(t[:1].isupper() or names(t, v) for t in config.get("ignore") or () for v in variants)
    if not ignored and groups_of(path, config) and groups_of(module, config):
        harm = f"{_LOADERS} would look for its codes, and transformers makes up what is missing"
        yield Difference(module, "`ignore` does not name it and `targets` do", "is stored as floats", harm)


def _cache(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    scheme = config.get("kv_cache_scheme")
    if not scheme or scheme.get("dynamic") not in (False, None):
        return
    if not any(name.endswith((".k_scale", "k_proj.output_scale")) for name in stored.tensors):
        yield (
            "`kv_cache_scheme` is static, but no file holds scales of a cache: "
            "vLLM and SGLang would take 1 for each"
        )


def _by_path(weight: StoredWeight, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = (group for module in weight.modules for group in groups_of(module, config))
    return next(found, None)


def _codes(weight: StoredWeight) -> tuple[str, str]:
    """Ending and dtype of the tensor that holds the codes."""
    ending = "weight_packed" if "weight_packed" in weight.parts else "weight"
    return ending, weight.parts[ending].dtype
