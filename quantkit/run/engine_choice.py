"""Which engine the files of a model are for, and whether it can run them here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError
from quantkit.evaluate.engines.request import Engine
from quantkit.evaluate.engines.transformers import only_dequantized
from quantkit.hub.manifest import find_manifest
from quantkit.recipe.sizes import format_size
from quantkit.run import budget
from quantkit.run.dialects import method_of
from quantkit.run.gguf_source import GgufCheckpoint
from quantkit.run.quantized import Dequantized

_FLOAT = 4  # bytes of a number that is computed with
# what imports and the tokens of one short text take, whatever the model
_BESIDE = 1_500_000_000


@dataclass(frozen=True, slots=True)
class Fit:
    """An engine for some files.

    name    as manifests and cards call it
    needs   modules that have to be there
    extra   what `pip install` gets them with
    """

    engine: Engine
    name: str
    needs: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A fit that can run here, and how."""

    fit: Fit
    device: torch.device
    dtype: Literal["float32", "stored"]


_LLAMA = Fit("llamacpp", "llama.cpp", ("llama_cpp",), "llama-cpp-python")
_PLAIN = Fit("transformers", "transformers")
_GPTQMODEL = Fit("gptqmodel", "gptqmodel", ("gptqmodel",), "quantkit[gptq]")
_FITS: Mapping[str, Fit] = MappingProxyType(
    {
        "gptq": Fit("transformers", "transformers+gptqmodel", ("gptqmodel", "optimum"), "quantkit[gptq]"),
        "awq": Fit("transformers", "transformers+gptqmodel", ("gptqmodel", "accelerate"), "quantkit[awq]"),
        "auto-round": Fit("transformers", "transformers+auto-round", ("auto_round",), "auto-round"),
        "compressed-tensors": Fit(
            "transformers",
            "transformers",
            ("compressed_tensors", "accelerate"),
            "quantkit[compressed-tensors]",
        ),
        "bitsandbytes": Fit(
            "transformers", "transformers", ("bitsandbytes", "accelerate"), "quantkit[bitsandbytes]"
        ),
        "hqq": Fit("hqq", "hqq", ("hqq", "accelerate"), "quantkit[hqq]"),
    }
)


def choose(checkpoint: Checkpoint, device: torch.device) -> Chosen | str:
    """The engine for `checkpoint`, or why none of them is run."""
    fit = _fit(checkpoint)
    if isinstance(fit, str):
        return fit
    missing = [module for module in fit.needs if find_spec(module) is None]
    if missing:
        return f"{fit.name} was not run: it needs {' and '.join(missing)}; pip install '{fit.extra}'"
    on = torch.device("cpu") if fit.engine == "llamacpp" else device
    free = budget.available(on)
    for dtype in _dtypes(fit):
        if (needed := _needed(checkpoint, fit, dtype)) <= free:
            return Chosen(fit, on, dtype)
    sizes = f"it takes about {format_size(needed)} of memory, {format_size(free)} are free"
    return f"{fit.name} was not run: {sizes}"


def _fit(checkpoint: Checkpoint) -> Fit | str:
    """What is for these files, installed or not; why nothing is."""
    if isinstance(checkpoint, GgufCheckpoint):
        return _LLAMA
    if not isinstance(checkpoint, Dequantized):
        return _PLAIN
    stated = checkpoint.quantized.checkpoint.config.get("quantization_config")
    if not stated:
        return "no engine was run: they look for the quantization in config.json, which does not say it here"
    fit = _FITS.get(method_of(stated))
    if fit is None:
        return f"no engine was run: quantkit knows of none for the method '{method_of(stated)}'"
    told = _told(checkpoint.path)
    if told is None or fit.name in told:
        return fit
    if _GPTQMODEL.name in told:
        return _GPTQMODEL
    others = f"{', '.join(told)} can" if told else "no engine is known that can"
    return f"{fit.name} was not run: it cannot load these weights, as quantkit.json says; {others}"


def _told(path: Path) -> tuple[str, ...] | None:
    """The engines that quantkit named when it wrote the folder; None: it did not write it."""
    try:
        manifest = find_manifest(path)
    except SourceError:
        return None
    return None if manifest is None else manifest.engines


def _dtypes(fit: Fit) -> tuple[Literal["float32", "stored"], ...]:
    """In order of preference. Only Transformers can leave floats as they are stored."""
    return ("float32", "stored") if fit.engine == "transformers" else ("float32",)


def _needed(checkpoint: Checkpoint, fit: Fit, dtype: Literal["float32", "stored"]) -> int:
    """Bytes of memory that the whole model takes in the engine, about."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.size_bytes + _BESIDE
    if not isinstance(checkpoint, Dequantized):
        return _size(checkpoint, (), dtype) + _BESIDE
    quantized = checkpoint.quantized
    config = quantized.checkpoint.config.get("quantization_config") or {}
    weights = [_FLOAT * out * width for (out, width), _ in map(quantized.measure, quantized.parts)]
    inside = {part for found in quantized.parts.values() for part in found}
    stored = quantized.checkpoint
    if fit.engine == "transformers" and only_dequantized(config):
        codes = sum(weights)
    else:
        # one at a time is decoded, and copied on the way
        codes = sum(stored.tensors[part].nbytes for part in inside) + 2 * max(weights, default=0)
    return _size(stored, inside, dtype) + codes + _BESIDE


def _size(checkpoint: Checkpoint, without: Collection[str], dtype: Literal["float32", "stored"]) -> int:
    """Bytes of all tensors but some, in a dtype."""
    infos = (info for name, info in checkpoint.tensors.items() if name not in without)
    return sum(info.nbytes if dtype == "stored" else _FLOAT * math.prod(info.shape) for info in infos)
