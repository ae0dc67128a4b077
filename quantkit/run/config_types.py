"""The types of what quantization configs say, whoever wrote them: what is read further may rely on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.errors import SourceError

_SHOWN = 60


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a value is called, and whether one is that; null always fits."""

    what: str
    fits: Callable[[Any], bool]


def check_types(config: Mapping[str, Any]) -> None:
    """SourceError with the key that holds something else than tools write there."""
    _check(config, _TOP, "")
    for name, group in (config.get("config_groups") or {}).items():
        where = f"config_groups.{name}."
        _check(group, _GROUP, where)
        if group.get("targets") is None:
            raise _wrong(f"{where}targets", None, _NAMES.what)
        for part in ("weights", "input_activations"):
            _check(group.get(part) or {}, _NUMBERS, f"{where}{part}.")
    _check(config.get("kv_cache_scheme") or {}, _NUMBERS, "kv_cache_scheme.")
    for pattern, own in {**(config.get("dynamic") or {}), **(config.get("extra_config") or {})}.items():
        _check(own or {}, _TOP, f"{pattern}.")
    _check(config.get("quant_config") or {}, {"weight_quant_params": _TABLE}, "quant_config.")
    for module, own in (config.get("linears") or {}).items():
        _check(own, _HQQ, f"linears.{module}.")
        if own.get("shape") is None or own.get("nbits") is None:
            raise _wrong(f"linears.{module}", own, "a table with shape and nbits")


def _check(table: Any, kinds: Mapping[str, _Kind], where: str) -> None:
    for key, kind in kinds.items():
        value = table.get(key)
        if value is not None and not kind.fits(value):
            raise _wrong(f"{where}{key}", value, kind.what)


def _wrong(key: str, value: Any, what: str) -> SourceError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return SourceError(
        f"the quantization config is malformed: `{key}` is {shown}, not {what}",
        remedy="download the config again, or mend it by hand",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _compiles(name) for name in value)


def _nested(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) or _named(part) for part in value)


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(own, dict) for own in value.values())


def _rules(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(own, dict | None) for own in value.values()):
        return False
    return all(_compiles(f"re:{rule.removeprefix('-:').removeprefix('+:')}") for rule in value)


def _compiles(name: str) -> bool:
    """Only what is marked as a pattern has to be one."""
    if not name.startswith("re:"):
        return True
    try:
        re.compile(name.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _structure(value: Any) -> bool:
    return _pair(value) or (
        isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", value) is not None
    )


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(n) and n > 0 for n in value)


_BITS = _Kind("a number of bits from 1 to 16", lambda v: _whole(v) and 1 <= v <= 16)
_SIZE = _Kind("a whole number, −1 for all", lambda v: _whole(v) and v >= -1)
_FLAG = _Kind("true or false", lambda v: isinstance(v, bool))
_TEXT = _Kind("a text", lambda v: isinstance(v, str))
_NAMES = _Kind("a list of names and patterns", _named)
_TABLE = _Kind("a table", lambda v: isinstance(v, dict))
_TOP: Mapping[str, _Kind] = MappingProxyType(
    {
        **dict.fromkeys(("group_size", "q_group_size", "act_group_size"), _SIZE),
        **dict.fromkeys(("act_bits",), _BITS),
        **dict.fromkeys(("sym", "desc_act", "zero_point", "lm_head", "static_groups"), _FLAG),
        **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"), _FLAG),
        **dict.fromkeys(("checkpoint_format", "format", "pack_dtype", "bnb_4bit_quant_type"), _TEXT),
        **dict.fromkeys(("ignore", "modules_to_not_convert", "llm_int8_skip_modules"), _NAMES),
        "modules_in_block_to_quantize": _Kind("a list of lists of names", _nested),
        "llm_int8_threshold": _Kind("a number", lambda v: _whole(v) or isinstance(v, float)),
        "config_groups": _Kind("a table of groups", _tables),
        "linears": _Kind("a table of weights", _tables),
        **dict.fromkeys(("dynamic", "extra_config"), _Kind("a table of patterns and their keys", _rules)),
        **dict.fromkeys(("kv_cache_scheme", "sparsity_config", "transform_config", "quant_config"), _TABLE),
    }
)
_GROUP: Mapping[str, _Kind] = MappingProxyType(
    {
        "targets": _NAMES,
        "format": _TEXT,
        **dict.fromkeys(("weights", "input_activations", "output_activations"), _TABLE),
    }
)
_NUMBERS: Mapping[str, _Kind] = MappingProxyType(
    {
        "num_bits": _BITS,
        "group_size": _SIZE,
        "symmetric": _FLAG,
        **dict.fromkeys(("type", "strategy"), _TEXT),
        "dynamic": _Kind("true, false or a text", lambda v: isinstance(v, bool | str)),
        "actorder": _Kind("a text or false", lambda v: isinstance(v, bool | str)),
        "block_structure": _Kind("two whole numbers", _structure),
    }
)
_HQQ: Mapping[str, _Kind] = MappingProxyType(
    {"shape": _Kind("two whole numbers", _pair), "nbits": _BITS, "group_size": _SIZE, "axis": _SIZE}
)
