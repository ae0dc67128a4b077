"""Checkpoints whose weights are quantized already, whoever wrote them: decoded, or seen as floats.

`open_quantized` says what the folder holds; `dequantized` shows it as the checkpoint of an unquantized model:
the same names, every weight made when it is read, so all that works on a Checkpoint works on it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit import registry
from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint, TensorInfo, usual_dtype
from quantkit.checkpoint.stored_shapes import shape_in, states_shape
from quantkit.errors import SourceError
from quantkit.model.names import Match, match_names
from quantkit.model.skeleton import config_of, meta_model
from quantkit.protocols import Format
from quantkit.run.dialects import CONFIG_KEYS, find_config, read_config
from quantkit.run.gguf_source import find_gguf, open_gguf
from quantkit.tensors import Affine, QuantizedLinear, QuantizedTensor, dequantize, shape

_DAMAGED = "the file is damaged, or its quantization config belongs to another: download both again"
_CACHE_SCALE = re.compile(r"\.[qkv]_(scale|zero_point)$")


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """A checkpoint with quantized weights.

    format_name  registry name of the format that reads it
    config       its quantization config as that format understands it
    parts        checkpoint name of a weight ("….weight") → names of the file tensors it is made of
    """

    checkpoint: Checkpoint
    format_name: str
    config: Mapping[str, Any]
    parts: Mapping[str, tuple[str, ...]]

    @property
    def reader(self) -> Format:
        found: Format = registry.load("formats", self.format_name).FORMAT
        return found

    def linear(self, name: str) -> QuantizedLinear:
        """One weight, decoded. SourceError names file and tensor when its parts do not fit each other."""
        if name not in self.parts:
            close = difflib.get_close_matches(name, self.parts, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise SourceError(f"`{self.checkpoint.path}` has no quantized weight `{name}`{hint}")
        tensors = {part: self.checkpoint.read(part) for part in self.parts[name]}
        try:
            linear = self.reader.decode(name, tensors, self.config)
            fault = _fault(linear.weight)
        except KeyError as error:
            fault = f"it lacks {error}"
        except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            fault = f"its tensors do not fit each other: {error}"
        if fault is not None:
            raise SourceError(f"{self._place(name)} cannot be decoded: {fault}", remedy=_DAMAGED)
        return linear

    def measure(self, name: str) -> tuple[tuple[int, int], int]:
        """((out, in), bits) of one weight; reads no codes. SourceError when headers do not tell."""
        infos = {part: self.checkpoint.tensors[part] for part in self.parts[name]}
        try:
            measured, bits = self.reader.measure(name, infos, self.config)
            stated = self._stated_shape(name)
        except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise SourceError(f"{self._place(name)} is incomplete: {error!r}", remedy=_DAMAGED) from error
        return stated or measured, bits

    def _stated_shape(self, name: str) -> tuple[int, int] | None:
        """(out, in) where a small tensor of the weight holds it, as packing loses it."""
        part = next((part for part in self.parts[name] if states_shape(part)), None)
        return None if part is None else shape_in(part, self.checkpoint.read(part))

    def _place(self, name: str) -> str:
        return f"`{name}` in `{self.checkpoint.tensors[self.parts[name][0]].file}`"


def open_quantized(checkpoint: Checkpoint) -> QuantizedCheckpoint | None:
    """What is quantized in `checkpoint`, None when nothing is; reads headers and configs only.

    UnsupportedError names a method that nothing here reads, SourceError a config without weights.
    """
    stated = find_config(checkpoint.path, checkpoint.config)
    if stated is None:
        return None
    format_name, config = read_config(stated)
    reader: Format = registry.load("formats", format_name).FORMAT
    parts: dict[str, list[str]] = {}
    for tensor in checkpoint.tensors:
        if (weight := reader.base_name(tensor)) is not None:
            parts.setdefault(weight, []).append(tensor)
    for weight, found in parts.items():
        if weight in checkpoint.tensors and weight not in found:
            found.append(weight)
    # one tensor that is called as a part would be, `scale`, is a parameter of the model
    whole = {weight: tuple(found) for weight, found in parts.items() if len(found) > 1}
    if not whole and config.get("kv_cache_scheme") is None:
        raise SourceError(
            f"`{checkpoint.path}` says that it is quantized ({format_name}), but none of its tensors is",
            remedy="remove the quantization_config from config.json if the weights are floats",
        )
    return QuantizedCheckpoint(checkpoint, format_name, config, MappingProxyType(whole))


@dataclass(frozen=True, slots=True)
class Dequantized(Checkpoint):
    """A quantized checkpoint seen as floats: quantized weights are fp32, and made whenever they are read.

    transposed   weights that the model keeps as (in, out)
    dropped      tensor of the files that is left out → why
    """

    quantized: QuantizedCheckpoint
    transposed: frozenset[str]
    dropped: Mapping[str, str]

    def read(self, name: str, *, rows: slice | None = None) -> Tensor:
        if name not in self.quantized.parts:
            return self.quantized.checkpoint.read(name, rows=rows)
        weight = dequantize(self.quantized.linear(name).weight)
        if name in self.transposed:
            weight = weight.T.contiguous()
        if tuple(weight.shape) != self.tensors[name].shape:
            raise SourceError(
                f"`{name}` of `{self.path}` decodes to {tuple(weight.shape)}, its headers say "
                f"{self.tensors[name].shape}",
                remedy=_DAMAGED,
            )
        return weight if rows is None else weight[rows].clone()

    def fingerprint(self) -> str:
        return self.quantized.checkpoint.fingerprint()

    @property
    def dtype(self) -> str:
        """That of the tensors that are not quantized."""
        return usual_dtype(info for name, info in self.tensors.items() if name not in self.quantized.parts)

    @property
    def size_bytes(self) -> int:
        return self.quantized.checkpoint.size_bytes


def dequantized(quantized: QuantizedCheckpoint) -> Dequantized:
    """`quantized` as a checkpoint of floats.

    Tensors that only make sense beside quantized weights are left out and reported in `dropped`: scales of
    a cache, zero biases of linears that have none in this architecture, divisors of one. Reads those only.
    """
    found = matched(quantized)
    dropped = {name: why for name in found.match.orphans if (why := _idle(name, quantized)) is not None}
    transposed = _transposed(found.model, quantized)
    shown = {
        name: _float_info(name, info.shape[::-1], info) if name in transposed else info
        for name, info in found.tensors.items()
        if name not in dropped
    }
    view = _view(quantized, shown)
    return replace(view, transposed=transposed, dropped=dropped)


@dataclass(frozen=True, slots=True)
class Matched:
    """The architecture of a checkpoint on the meta device, and which tensor, seen as floats, fills what."""

    tensors: Mapping[str, TensorInfo]
    model: PreTrainedModel
    match: Match


def matched(quantized: QuantizedCheckpoint) -> Matched:
    """UnsupportedError for an architecture that Transformers does not know."""
    infos = _float_infos(quantized)
    model = meta_model(config_of(_view(quantized, infos)), torch.float32)
    return Matched(infos, model, match_names(model, {name: info.shape for name, info in infos.items()}))


def _view(quantized: QuantizedCheckpoint, tensors: Mapping[str, TensorInfo]) -> Dequantized:
    stored = quantized.checkpoint
    config = {key: value for key, value in stored.config.items() if key not in CONFIG_KEYS}
    return Dequantized(
        stored.path, MappingProxyType(config), MappingProxyType(dict(tensors)), quantized, frozenset(), {}
    )


def open_floats(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself, or as floats where it is quantized."""
    quantized = open_quantized(checkpoint)
    return checkpoint if quantized is None else dequantized(quantized)


def open_source(path: Path) -> Checkpoint:
    """A model as floats, whatever it is stored as: a folder of safetensors, or GGUF, a file or its folder."""
    file = find_gguf(path)
    return open_floats(Checkpoint.open(path)) if file is None else open_gguf(file)


def _float_infos(quantized: QuantizedCheckpoint) -> dict[str, TensorInfo]:
    """Every tensor of the files, those that a weight is made of replaced by it."""
    inside = {part: weight for weight, found in quantized.parts.items() for part in found}
    infos: dict[str, TensorInfo] = {}
    for name, info in quantized.checkpoint.tensors.items():
        weight = inside.get(name)
        if weight is None:
            infos[name] = info
        elif weight not in infos:
            infos[weight] = _float_info(weight, quantized.measure(weight)[0], info)
    return infos


def _float_info(name: str, found: tuple[int, ...], part: TensorInfo) -> TensorInfo:
    """What a header would say of the weight; its bytes are in no file."""
    return TensorInfo(name, "F32", found, part.file, 0, 4 * found[0] * found[1])


def _transposed(model: PreTrainedModel, quantized: QuantizedCheckpoint) -> frozenset[str]:
    """Quantized weights of modules that keep them as (in, out)."""
    paths = {path for path, module in model.named_modules() if isinstance(module, Conv1D)}
    paths |= {path.removeprefix(f"{model.base_model_prefix}.") for path in paths}
    return frozenset(weight for weight in quantized.parts if weight.removesuffix(".weight") in paths)


def _idle(name: str, quantized: QuantizedCheckpoint) -> str | None:
    """Why a tensor that the model has no place for changes nothing, or None when it might."""
    base, _, part = name.rpartition(".")
    if _CACHE_SCALE.search(name) and quantized.format_name == "compressed_tensors":
        return "a scale of the key-value cache"
    if part == "bias" and f"{base}.weight" in quantized.parts:
        return _idle_values(name, quantized, 0, "a bias of zeros that the model does not have")
    if part == "scales":
        return _idle_values(name, quantized, 1, "divisors that are all 1")
    return None


def _idle_values(name: str, quantized: QuantizedCheckpoint, value: int, why: str) -> str | None:
    """`why` when all of a tensor is `value`, which is believed of one that was not downloaded."""
    try:
        stored = quantized.checkpoint.read(name)
    except NotDownloaded:
        return f"{why}, as far as headers tell"
    return why if bool((stored == value).all()) else None


def _fault(q: QuantizedTensor) -> str | None:
    """What is wrong with the groups of `q`, None when nothing is."""
    out, width = shape(q)
    grid = (-(-out // q.group[0]), -(-width // q.group[1]))
    per_group = {"scales": q.scale}
    if isinstance(q, Affine) and q.zero_point is not None:
        per_group["zero points"] = q.zero_point
    for what, values in per_group.items():
        found = tuple(values.shape) if isinstance(values, Tensor) else shape(values)
        if found != grid and found != (1, grid[0] * grid[1]):
            return f"{found[0]:,} × {found[1]:,} {what} for {grid[0]:,} × {grid[1]:,} groups"
    if isinstance(q, Affine) and q.column_group is not None:
        if q.column_group.shape != (width,):
            return f"{q.column_group.numel():,} group numbers for {width:,} columns"
        low, high = (int(end) for end in q.column_group.aminmax())
        if low < 0 or high >= grid[1]:
            return f"group numbers from {low} to {high} where there are {grid[1]} groups"
    return None
