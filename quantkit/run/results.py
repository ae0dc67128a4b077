"""Results of a block as flat safetensors bytes for the run store, and back.

Codes are packed densely, so the store costs about one quantized copy of the model. Nesting is kept
in one JSON document in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantkit.numerics.bits import pack, signed, unpack, unsigned
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor

_META = "quantkit"
_E8M0 = torch.float8_e8m0fnu
# a prefix that no checkpoint name has
_TENSOR = "|tensor|"


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What one target made of one block.

    linears  its quantized weights
    tensors  file tensors beside them: rewritten ones of the source by their name, scales of a cache
    """

    linears: Sequence[QuantizedLinear]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def by_name(self) -> dict[str, QuantizedLinear]:
        return {linear.name: linear for linear in self.linears}


def to_bytes(result: BlockResult, extra: Mapping[str, Any]) -> bytes:
    """One block of one target; `extra` is JSON that travels along (metrics)."""
    tensors: dict[str, Tensor] = {}
    layout = {linear.name: _linear_form(linear, tensors) for linear in result.linears}
    for name, tensor in result.tensors.items():
        _flatten(_TENSOR + name, tensor, tensors)
    return save(tensors, {_META: json.dumps({"weights": layout, "extra": extra})})


def from_bytes(data: bytes) -> BlockResult:
    """The result that `to_bytes` was given, equal in every bit."""
    tensors = load(data)
    layout = _metadata(data)["weights"]
    linears = [
        QuantizedLinear(name, _rebuild(name, form, tensors), tensors.get(f"{name}|input_scale"))
        for name, form in layout.items()
    ]
    beside = {n.removeprefix(_TENSOR): t for n, t in tensors.items() if n.startswith(_TENSOR)}
    return BlockResult(linears, beside)


def extra(path: Path) -> Mapping[str, Any]:
    """The JSON that `to_bytes` was given, from the header of a file of such bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: Mapping[str, Any] = json.loads(header["__metadata__"][_META])["extra"]
    return found


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found: dict[str, Any] = json.loads(header["__metadata__"][_META])
    return found


def _linear_form(linear: QuantizedLinear, tensors: dict[str, Tensor]) -> Any:
    _flatten(f"{linear.name}|input_scale", linear.input_scale, tensors)
    return _flatten(linear.name, linear.weight, tensors)


def _flatten(name: str, value: QuantizedTensor | Tensor | None, tensors: dict[str, Tensor]) -> Any:
    match value:
        case None:
            return None
        case Tensor():
            # weights of one site may share a tensor (a column order), which the library refuses to write
            tensors[name] = value.contiguous().cpu().clone()
            if value.dtype == _E8M0:
                # the library writes this dtype and cannot read it
                tensors[name] = tensors[name].view(torch.uint8)
                return "e8m0"
            return "tensor"
        case Float():
            _flatten(f"{name}|values", value.values, tensors)
            form: dict[str, Any] = {"type": "float"}
        case Affine() | Codebook():
            is_signed = value.codes.dtype == torch.int8
            tensors[f"{name}|codes"] = pack(unsigned(value.codes, value.bits), value.bits).cpu()
            form = {"type": "affine" if isinstance(value, Affine) else "codebook", "signed": is_signed}
            fields = ("table", "offset") if isinstance(value, Codebook) else _AFFINE
            for part in fields:
                form[part] = _flatten(f"{name}|{part}", getattr(value, part), tensors)
            form["columns"] = value.codes.shape[1]
        case _:
            assert_never(value)
    form |= {
        "bits": value.bits,
        "group": value.group,
        "scale": _flatten(f"{name}|scale", value.scale, tensors),
    }
    return form


_AFFINE = ("zero_point", "offset", "column_group", "row_group")


def _rebuild(name: str, form: Any, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    bits, group = form["bits"], (form["group"][0], form["group"][1])
    scale = _value(f"{name}|scale", form["scale"], tensors)
    if form["type"] == "float":
        return Float(tensors[f"{name}|values"], bits, scale, group)
    codes = unpack(tensors[f"{name}|codes"], bits, form["columns"])
    if form["signed"]:
        codes = signed(codes, bits)
    if form["type"] == "codebook":
        offset = tensors[f"{name}|offset"] if form["offset"] else None
        return Codebook(codes, bits, tensors[f"{name}|table"], scale, group, offset)
    return Affine(
        codes,
        bits,
        scale,
        group,
        tensors[f"{name}|zero_point"] if form["zero_point"] else None,
        None if form["offset"] is None else _value(f"{name}|offset", form["offset"], tensors),
        tensors[f"{name}|column_group"] if form["column_group"] else None,
        tensors[f"{name}|row_group"] if form["row_group"] else None,
    )


def _value(name: str, form: Any, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedTensor:
    match form:
        case "tensor":
            return tensors[name]
        case "e8m0":
            return tensors[name].view(_E8M0)
        case _:
            return _rebuild(name, form, tensors)
