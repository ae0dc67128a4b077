"""Quantization configs of other tools, in the words that our formats read.

AutoGPTQ and AutoAWQ kept theirs in files of their own, auto-round names the layout under `packing_format`,
and what changes the meaning of weights beyond what the formats decode is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit.checkpoint import folder
from quantkit.errors import UnsupportedError
from quantkit.run.config_types import check_types

Config = Mapping[str, Any]

_V1, _V2 = "gptq", "gptq_v2"
CONFIG_KEYS = ("quantization_config", "compression_config")
# packing of auto-round → the format, and whether zero points are stored as they are (gptq_v2)
_PACKINGS: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "auto_round": ("gptq", _V2),
        "auto_round:gptqmodel": ("gptq", _V2),
        "auto_round:auto_gptq": ("gptq", _V1),
        "auto_round:auto_awq": ("awq", None),
        "auto_round:llm_compressor": ("compressed_tensors", None),
    }
)


def find_config(path: Path, config: Config) -> Config | None:
    """What the checkpoint at `path` says about its quantization: in config.json, else in a file beside it."""
    return next((stated for _, stated in stated_configs(path, config)), None)


def stated_configs(path: Path, config: Config) -> Iterator[tuple[str, Config]]:
    """(file, what it says) of all that speak of the quantization, the one that counts first."""
    inside = (config.get(key) for key in CONFIG_KEYS)
    found = next((stated for stated in inside if isinstance(stated, dict) and stated), None)
    if found is not None:
        yield folder.CONFIG, found
    for name in folder.QUANTIZATION_FILES:
        if (path / name).is_file():
            stated = folder.read_json(path / name)
            yield name, {"quant_method": "awq" if name == "quant_config.json" else "gptq", **stated}


def writer(config: Config, metadata: Mapping[str, str]) -> str | None:
    """The tool and its version, where the config or the header of a weight file names them."""
    meta = config.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(quantizers, str | list) and quantizers:
        named = [quantizers] if isinstance(quantizers, str) else quantizers
        return ", ".join(str(name).replace(":", " ") for name in named)
    if "autoround_version" in config:
        return f"auto-round {config['autoround_version']}"
    if "auto_gptq_version" in metadata:
        return f"auto-gptq {metadata['auto_gptq_version']}"
    if method_of(config) == "compressed-tensors" and config.get("version"):
        return f"a tool with compressed-tensors {config['version']}"
    return None


def method_of(config: Config) -> str:
    """The `quant_method`, lower case with hyphens; older bitsandbytes files have only its switches."""
    named = config.get("quant_method")
    if isinstance(named, str):
        return named.lower().replace("_", "-")
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in config else "unknown"


def read_config(config: Config) -> tuple[str, Config]:
    """(format, config as its reader understands it).

    UnsupportedError for what no format here reads, SourceError for a config of which a key is malformed.
    """
    method = method_of(config)
    reader = _READERS.get(method)
    if reader is None:
        known = ", ".join(_READERS)
        raise UnsupportedError(
            f"the quantization method '{method}' is not read by quantkit", remedy=f"it reads {known}"
        )
    check_types(config)
    return reader(config)


def _gptq(config: Config) -> tuple[str, Config]:
    stored = config.get("checkpoint_format") or config.get("format") or _V1
    if config.get("is_marlin_format") or stored not in (_V1, _V2):
        layout = "marlin" if config.get("is_marlin_format") else stored
        raise _unread(f"GPTQ weights laid out as '{layout}'")
    if config.get("pack_dtype", "int32") not in ("int32", None):
        raise _unread(f"GPTQ weights packed into {config['pack_dtype']}")
    return "gptq", {**config, "bits": _bits(config), "checkpoint_format": stored}


def _awq(config: Config) -> tuple[str, Config]:
    version = str(config.get("version") or config.get("backend") or "gemm").lower()
    return "awq", {**config, "bits": _bits(config), "version": version}


def _auto_round(config: Config) -> tuple[str, Config]:
    if config.get("rotation_config"):
        raise _unread("auto-round weights behind rotations that run with the model (`rotation_config`)")
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    name, stored = _PACKINGS.get(packing, (None, None))
    if name is None:
        raise _unread(f"auto-round's packing '{packing}'")
    if name == "compressed_tensors":
        return name, {**config, "config_groups": _config_groups(config)}
    overrides = {
        (f"+:{_pattern(module)}$" if own.get("bits", 4) < 16 else f"-:{_pattern(module)}$"): own
        for module, own in (config.get("extra_config") or {}).items()
    }
    if name == "awq":
        return _awq({**config, "dynamic": overrides})
    return _gptq({**config, "checkpoint_format": stored, "dynamic": overrides})


def _pattern(module: str) -> str:
    """Names are matched as they are; a name with the signs of a pattern is one."""
    return module if re.search(r"[*+^$\\\[(|]", module) else re.escape(module)


def _config_groups(config: Config) -> dict[str, Any]:
    """The one group that auto-round's flat keys stand for."""
    floats = "fp" in str(config.get("data_type", "int"))
    inputs = None
    if (config.get("act_bits") or 16) < 16:
        inputs = {
            "num_bits": config["act_bits"],
            "type": "float" if "fp" in str(config.get("act_data_type", "int")) else "int",
            "strategy": "group" if config.get("act_group_size") else "token",
            "group_size": config.get("act_group_size"),
            "dynamic": config.get("act_dynamic", True),
            "symmetric": config.get("act_sym", True),
        }
    weights = {
        "num_bits": _bits(config),
        "type": "float" if floats else "int",
        "symmetric": config.get("sym", True),
        "group_size": config.get("group_size"),
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}


def _compressed_tensors(config: Config) -> tuple[str, Config]:
    if config.get("transform_config"):
        raise _unread("compressed-tensors weights behind transforms that run with the model")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unread(f"sparse compressed-tensors ('{sparsity}')")
    groups = (config.get("config_groups") or {}).items()
    # a group without weights is about inputs alone
    found = {
        name: {**group, "weights": _arguments(group["weights"])}
        for name, group in groups
        if group.get("weights")
    }
    return "compressed_tensors", {**config, "config_groups": found}


def _arguments(weights: Config) -> Config:
    """With what the library takes where nothing is said, and tiles as it writes them now."""
    tile = weights.get("block_structure")
    if isinstance(tile, str):
        tile = [int(n) for n in tile.split("x")]
    return {**weights, "num_bits": weights.get("num_bits") or 8, "block_structure": tile}


def _as_is(name: str) -> Callable[[Config], tuple[str, Config]]:
    return lambda config: (name, config)


def _bits(config: Config) -> int:
    bits = config.get("bits", config.get("w_bit"))
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise _unread(f"a quantization config of {bits!r} bits")
    return bits


def _unread(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} cannot be read by quantkit", remedy="start from the 16-bit checkpoint it was made from"
    )


_READERS: Mapping[str, Callable[[Config], tuple[str, Config]]] = MappingProxyType(
    {
        "gptq": _gptq,
        "awq": _awq,
        "auto-round": _auto_round,
        "compressed-tensors": _compressed_tensors,
        "bitsandbytes": _as_is("bitsandbytes"),
        "hqq": _as_is("hqq"),
    }
)
