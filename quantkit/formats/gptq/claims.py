"""Where the config of a GPTQ file says something else than its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.model.stored import Difference, StoredModel, StoredWeight, told

_SCALES = "vLLM, SGLang and gptqmodel would read scales that belong to other columns"
_V1, _V2 = "gptq", "gptq_v2"
# so many equal zero points are no accident
_MANY = 64


def disagreements(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each.

    Only of keys that are there. Tensors do not tell v1 from v2 zero points but where all of a weight are one
    beside the middle, nor a symmetric weight from an asymmetric one whose zero points are all the middle.
    """
    for look in (_numbers, _order, _zero_points, _left_out):
        yield from told(d for weight in stored.weights for d in look(weight, config))
    yield from told(_unnamed(stored, config))
    yield from _needless_order(stored, config)
    yield from _head(stored, config)
    yield from _unlisted(stored, config)


def override(module: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `dynamic` says of a module, by the first pattern that matches; None: it is left alone."""
    for pattern, own in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return None if pattern.startswith("-:") else dict(own or {})
    return {}


def _stated(weight: StoredWeight, key: str, config: Mapping[str, Any]) -> Any:
    """What the config says of a weight under `key`, None when it says nothing."""
    return (override(weight.module, config) or {}).get(key, config.get(key))


def _numbers(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    bits, size = _stated(weight, "bits", config), _stated(weight, "group_size", config)
    if bits is not None and int(bits) != weight.bits:
        yield Difference(
            weight.name,
            f"`bits` is {bits}",
            f"has {weight.bits}",
            "vLLM, SGLang and gptqmodel would cut its words at other places",
        )
    if size is None:
        return
    columns = int(size) if int(size) > 0 else weight.shape[1]
    if -(-weight.shape[1] // columns) != weight.groups:
        yield Difference(weight.name, f"`group_size` is {size}", f"has groups of {weight.group[1]}", _SCALES)


def _order(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    if weight.reordered and config.get("desc_act") is False:
        harm = "vLLM and SGLang do not look at g_idx then and would mix up the scales"
        yield Difference(weight.name, "`desc_act` is false", "has groups whose columns lie apart", harm)


def _needless_order(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """With static groups columns are ordered while they are rounded, and lie side by side in the file."""
    grouped = [weight for weight in stored.weights if weight.groups > 1]
    ordered = any(weight.reordered for weight in grouped)
    if config.get("desc_act") is True and grouped and not ordered and not config.get("static_groups"):
        yield (
            "`desc_act` is true, but in every weight the columns of a group lie side by side: "
            "vLLM would refuse the file for nothing"
        )


def _zero_points(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    if weight.zero_points is None:
        return
    low, high = weight.zero_points
    middle = 1 << (weight.bits - 1)
    version = config.get("checkpoint_format") or config.get("format") or _V1
    sym = _stated(weight, "sym", config) is True
    shifted = middle - 1 if version == _V2 else middle + 1
    if low == high == shifted and (sym or weight.shape[0] * weight.groups >= _MANY):
        other = _V1 if version == _V2 else _V2
        yield Difference(
            weight.name,
            f"the format is '{version}' (`checkpoint_format`)",
            f"has zero points that are all {shifted:.0f}, which '{other}' writes for {middle}",
            "vLLM and gptqmodel would move every weight by one step",
        )
    elif sym and not low == high == middle:
        yield Difference(
            weight.name,
            "`sym` is true",
            f"has zero points other than {middle}",
            "vLLM and SGLang do not look at zero points then",
        )


def _left_out(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    if all(override(module, config) is None for module in weight.modules):
        harm = "gptqmodel, vLLM and SGLang would look for floats there"
        yield Difference(weight.name, "`dynamic` leaves it out", "is quantized", harm)


def _unnamed(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[Difference]:
    """A head is in no block."""
    listed = _listed(config)
    for weight in stored.weights:
        if listed is None or weight.module.endswith(listed) or not stored.heads.isdisjoint(weight.modules):
            continue
        harm = "transformers would look for floats there"
        yield Difference(weight.name, "`modules_in_block_to_quantize` does not name it", "is quantized", harm)


def _head(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    quantized = any(not stored.heads.isdisjoint(weight.modules) for weight in stored.weights)
    says = config.get("lm_head")
    if says is True and not quantized:
        yield "`lm_head` is true, but the head is not quantized: vLLM and gptqmodel would look for its codes"
    if says is False and quantized:
        yield "`lm_head` is false, but the head is quantized: vLLM and SGLang would look for floats there"


def _unlisted(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """Floats where other blocks are quantized, of which no key tells."""
    listed = _listed(config)
    if "extra_config" in config or not stored.weights:
        return
    silent = [
        module
        for module, path in stored.odd_ones().items()
        if override(module, config) is not None
        and override(path, config) is not None
        and (listed is None or module.endswith(listed))
    ]
    claim = "neither `dynamic` nor `modules_in_block_to_quantize` leaves it out"
    yield from told(
        Difference(module, claim, "is stored as floats", "gptqmodel and transformers would look for codes")
        for module in silent
    )


def _listed(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Endings of the modules that transformers shall quantize in a block; None: all of them."""
    found = config.get("modules_in_block_to_quantize")
    if not found:
        return None
    return tuple(name for part in found for name in ([part] if isinstance(part, str) else part))
