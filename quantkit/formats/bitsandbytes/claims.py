"""Where the config of a bitsandbytes file says something else than its tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from quantkit.formats.bitsandbytes.tables import STATE
from quantkit.model.selection import excludes, names_part
from quantkit.model.stored import Difference, StoredModel, StoredWeight, told

_SKIPPED = "llm_int8_skip_modules"
_NESTED = "weight.nested_absmax"
_CODES = "transformers would look for codes there"


def disagreements(stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each, of keys that are there.

    A file says of every 4-bit weight what it is, and may mix them: the config is wrong where none is so.
    """
    yield from told(d for weight in stored.weights for d in _of_weight(weight, config))
    four = [weight for weight in stored.weights if not _is_int8(weight)]
    kinds = {ending.removeprefix(STATE) for w in four for ending in w.parts if ending.startswith(STATE)}
    nested = {_NESTED in weight.parts for weight in four}
    yield from _whole("bnb_4bit_quant_type", config, kinds)
    yield from _whole("bnb_4bit_use_double_quant", config, nested)
    skipped = config.get(_SKIPPED) or []
    if skipped:
        yield from told(
            Difference(module, f"`{_SKIPPED}` does not name it", "is stored as floats", _CODES)
            for module, path in stored.odd_ones().items()
            if not any(entry in name or excludes(entry, name) for entry in skipped for name in (module, path))
        )


def _of_weight(weight: StoredWeight, config: Mapping[str, Any]) -> Iterator[Difference]:
    bits = 8 if _is_int8(weight) else 4
    for key, says in (("load_in_8bit", 8), ("load_in_4bit", 4)):
        if config.get(key) is not None and bool(config[key]) != (bits == says):
            harm = "transformers would look for others"
            claim = f"`{key}` is {json.dumps(config[key])}"
            yield Difference(weight.name, claim, f"is stored in {bits} bits", harm)
    for entry in config.get(_SKIPPED) or ():
        if all(names_part(entry, module) for module in weight.modules):
            harm = "transformers and SGLang would look for floats there"
            yield Difference(weight.name, f"`{_SKIPPED}` names '{entry}'", "is quantized", harm)


def _whole(key: str, config: Mapping[str, Any], found: Collection[object]) -> Iterator[str]:
    """Of 4-bit weights, by the kinds of them that there are."""
    says = config.get(key)
    if says is not None and found and says not in found:
        held = " and ".join(sorted(json.dumps(value) for value in found))
        yield (
            f"`{key}` is {json.dumps(says)}, but of the weights it is {held}: "
            "engines go by the weights, so this config belongs to other files"
        )


def _is_int8(weight: StoredWeight) -> bool:
    return "SCB" in weight.parts
