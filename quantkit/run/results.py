"""Quantized tensors as flat safetensors bytes for the run store, and back.

Codes are packed densely, so the store costs about one quantized copy of the model. Nesting is kept
in one JSON document in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantkit.numerics.bits import pack, unpack
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor

_META = "quantkit"


def to_bytes(linears: Sequence[QuantizedLinear], extra: Mapping[str, Any]) -> bytes:
    """One block of one target; `extra` is JSON that travels along (metrics)."""
    tensors: dict[str, Tensor] = {}
    layout = {linear.name: _flatten(linear.name, linear.weight, tensors) for linear in linears}
    return save(tensors, {_META: json.dumps({"weights": layout, "extra": extra})})


def from_bytes(data: bytes) -> list[QuantizedLinear]:
    """The linears that `to_bytes` was given, equal in every bit."""
    tensors = load(data)
    layout = _metadata(data)["weights"]
    return [QuantizedLinear(name, _rebuild(name, form, tensors)) for name, form in layout.items()]


def extra(data: bytes) -> Mapping[str, Any]:
    """The JSON that `to_bytes` was given."""
    found: Mapping[str, Any] = _metadata(data)["extra"]
    return found


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found: dict[str, Any] = json.loads(header["__metadata__"][_META])
    return found


def _flatten(name: str, value: QuantizedTensor | Tensor | None, tensors: dict[str, Tensor]) -> Any:
    match value:
        case None:
            return None
        case Tensor():
            # weights of one site may share a tensor (a column order), which the library refuses to write
            tensors[name] = value.contiguous().cpu().clone()
            return "tensor"
        case Float():
            _flatten(f"{name}|values", value.values, tensors)
            form: dict[str, Any] = {"type": "float"}
        case Affine() | Codebook():
            signed = value.codes.dtype == torch.int8
            shifted = value.codes.to(torch.int32) + ((1 << (value.bits - 1)) if signed else 0)
            tensors[f"{name}|codes"] = pack(shifted, value.bits).cpu()
            form = {"type": "affine" if isinstance(value, Affine) else "codebook", "signed": signed}
            if isinstance(value, Codebook):
                _flatten(f"{name}|table", value.table, tensors)
            else:
                form["zero_point"] = _flatten(f"{name}|zero_point", value.zero_point, tensors)
                form["offset"] = _flatten(f"{name}|offset", value.offset, tensors)
                form["column_group"] = _flatten(f"{name}|column_group", value.column_group, tensors)
            form["columns"] = value.codes.shape[1]
        case _:
            assert_never(value)
    form |= {
        "bits": value.bits,
        "group": value.group,
        "scale": _flatten(f"{name}|scale", value.scale, tensors),
    }
    return form


def _rebuild(name: str, form: Any, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    bits, group = form["bits"], (form["group"][0], form["group"][1])
    scale = _value(f"{name}|scale", form["scale"], tensors)
    if form["type"] == "float":
        return Float(tensors[f"{name}|values"], bits, scale, group)
    codes = unpack(tensors[f"{name}|codes"], bits, form["columns"])
    if form["signed"]:
        codes = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    if form["type"] == "codebook":
        return Codebook(codes, bits, tensors[f"{name}|table"], scale, group)
    offset = None if form["offset"] is None else _value(f"{name}|offset", form["offset"], tensors)
    return Affine(
        codes,
        bits,
        scale,
        group,
        tensors[f"{name}|zero_point"] if form["zero_point"] else None,
        offset,
        tensors[f"{name}|column_group"] if form["column_group"] else None,
    )


def _value(name: str, form: Any, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedTensor:
    return tensors[name] if form == "tensor" else _rebuild(name, form, tensors)
