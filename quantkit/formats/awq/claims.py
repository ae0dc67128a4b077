"""Where the config of an AWQ file says something else than its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.formats.awq.layouts import MIDDLE
from quantkit.model.selection import excludes, names_part
from quantkit.model.stored import Difference, StoredModel, StoredWeight, told

_ALL = "vLLM, SGLang and transformers"
_CODES = f"{_ALL} would look for codes there"


def disagreements(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each, of keys that are there.

    Zero points of 8 everywhere are those of a symmetric weight and of an asymmetric one: both claims hold.
    """
    for look in (_numbers, _zero_points, _left_out):
        yield from told(d for weight in stored.weights for d in look(weight, config))
    skipped = config.get("modules_to_not_convert") or []
    if skipped:
        yield from told(
            Difference(module, "`modules_to_not_convert` does not name it", "is stored as floats", _CODES)
            for module, path in stored.odd_ones().items()
            if not any(entry in name or excludes(entry, name) for entry in skipped for name in (module, path))
        )


def _numbers(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    key = "group_size" if "group_size" in config else "q_group_size"
    bits, size = config.get("bits"), config.get(key)
    if bits is not None and int(bits) != weight.bits:
        yield Difference(
            weight.name, f"`bits` is {bits}", f"has {weight.bits}", f"{_ALL} would misread its words"
        )
    if size is not None and (int(size) if int(size) > 0 else weight.shape[1]) != weight.group[1]:
        harm = f"{_ALL} would read scales that belong to other columns, or stop at their shape"
        yield Difference(weight.name, f"`{key}` is {size}", f"has groups of {weight.group[1]}", harm)


def _zero_points(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    if weight.zero_points in (None, (MIDDLE, MIDDLE)):
        return
    holds = f"has zero points other than {MIDDLE}"
    if config.get("zero_point") is False:
        harm = "vLLM, SGLang and gptqmodel choose a kernel by it, and not all of them look at zero points"
        yield Difference(weight.name, "`zero_point` is false", holds, harm)
    if config.get("sym") is True:
        harm = "gptqmodel chooses a kernel by it, and not all of them look at zero points"
        yield Difference(weight.name, "`sym` is true", holds, harm)


def _left_out(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    for entry in config.get("modules_to_not_convert") or ():
        if all(names_part(entry, module) for module in weight.modules):
            claim = f"`modules_to_not_convert` names '{entry}'"
            yield Difference(weight.name, claim, "is quantized", f"{_ALL} would look for floats there")
