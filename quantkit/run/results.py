"""Results of a block as flat safetensors bytes for the run store, and back.

Codes are packed densely, so the store costs about one quantized copy of the model. Nesting is kept
in one JSON document in the file's metadata. Bytes are made tensor by tensor, as they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor

from quantkit.checkpoint.header import TORCH_DTYPES, build_header
from quantkit.numerics.bits import pack, packed_width, signed, unpack, unsigned
from quantkit.tensors import Affine, Codebook, Float, Lattice, QuantizedLinear, QuantizedTensor

_META = "quantkit"
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


class Results(Protocol):
    """Where the results of blocks come from."""

    def load(self, key: str, block: int) -> BlockResult: ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor of the file, made when its bytes are wanted."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Encoded:
    """The bytes of one block of one target, in pieces; `extra` is JSON that travels along (metrics)."""

    def __init__(self, result: BlockResult, extra: Mapping[str, Any]) -> None:
        self._pieces: list[_Piece] = []
        layout = {linear.name: self._linear(linear) for linear in result.linears}
        for name, tensor in result.tensors.items():
            self._flatten(_TENSOR + name, tensor)
        # wider dtypes first, which keeps every tensor aligned
        self._pieces.sort(key=lambda piece: -piece.dtype.itemsize)
        at, placed = 0, []
        for piece in self._pieces:
            placed.append((piece.name, piece.dtype, piece.shape, at, at + piece.nbytes))
            at += piece.nbytes
        self._header = build_header(placed, {_META: json.dumps({"weights": layout, "extra": extra})})
        self.size = len(self._header) + at

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._header
        for piece in self._pieces:
            flat = piece.make().detach().cpu().contiguous().reshape(-1)
            # one element is contiguous whatever its stride, but cannot be viewed as bytes then
            yield flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data

    def _linear(self, linear: QuantizedLinear) -> Any:
        self._flatten(f"{linear.name}|input_scale", linear.input_scale)
        return self._flatten(linear.name, linear.weight)

    def _flatten(self, name: str, value: QuantizedTensor | Tensor | None) -> Any:
        match value:
            case None:
                return None
            case Tensor():
                held: Tensor = value
                self._pieces.append(_Piece(name, held.dtype, tuple(held.shape), lambda: held))
                return "tensor"
            case Float():
                self._flatten(f"{name}|values", value.values)
                form: dict[str, Any] = {"type": "float"}
            case Lattice():
                form = self._lattice(name, value)
            case Affine() | Codebook():
                self._codes(f"{name}|codes", value.codes, value.bits)
                kind = "affine" if isinstance(value, Affine) else "codebook"
                form = {"type": kind, "signed": value.codes.dtype == torch.int8}
                for part in ("table", "offset") if isinstance(value, Codebook) else _AFFINE:
                    form[part] = self._flatten(f"{name}|{part}", getattr(value, part))
                form["columns"] = value.codes.shape[1]
            case _:
                assert_never(value)
        form |= {
            "bits": value.bits,
            "group": value.group,
            "scale": self._flatten(f"{name}|scale", value.scale),
        }
        return form

    def _lattice(self, name: str, value: Lattice) -> Any:
        self._flatten(f"{name}|codes", value.codes)
        if value.signs is not None:
            self._codes(f"{name}|signs", (value.signs < 0).to(torch.uint8), 1)
        parts = {part: self._flatten(f"{name}|{part}", getattr(value, part)) for part in ("table", "shift")}
        return {"type": "lattice", "signs": value.signs is not None, **parts}

    def _codes(self, name: str, codes: Tensor, bits: int) -> None:
        shape = (codes.shape[0], packed_width(codes.shape[1], bits))
        self._pieces.append(_Piece(name, torch.int32, shape, lambda: pack(unsigned(codes, bits), bits)))


_AFFINE = ("zero_point", "offset", "column_group", "row_group")


def decode(data: bytes) -> BlockResult:
    """The result that was encoded, equal in every bit."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    layout = json.loads(header.pop("__metadata__")[_META])["weights"]
    body = memoryview(data)[8 + length :]
    tensors = {name: _tensor(body, info) for name, info in header.items()}
    linears = [
        QuantizedLinear(name, _rebuild(name, form, tensors), tensors.get(f"{name}|input_scale"))
        for name, form in layout.items()
    ]
    beside = {n.removeprefix(_TENSOR): t for n, t in tensors.items() if n.startswith(_TENSOR)}
    return BlockResult(linears, beside)


def _tensor(body: memoryview, info: Mapping[str, Any]) -> Tensor:
    begin, end = info["data_offsets"]
    dtype = TORCH_DTYPES[info["dtype"]]
    if begin == end:
        return torch.empty(info["shape"], dtype=dtype)
    # a copy: the bytes are not writable, and are given up as a whole
    return torch.frombuffer(bytearray(body[begin:end]), dtype=dtype).view(info["shape"])


def extra(path: Path) -> Mapping[str, Any]:
    """The JSON that was encoded along, from the header of a file of such bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: Mapping[str, Any] = json.loads(header["__metadata__"][_META])["extra"]
    return found


def _rebuild(name: str, form: Any, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    bits, group = form["bits"], (form["group"][0], form["group"][1])
    scale = _value(f"{name}|scale", form["scale"], tensors)
    if form["type"] == "float":
        return Float(tensors[f"{name}|values"], bits, scale, group)
    if form["type"] == "lattice":
        return _lattice(name, form, scale, tensors)
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


def _lattice(name: str, form: Any, scale: Tensor | QuantizedTensor, tensors: Mapping[str, Tensor]) -> Lattice:
    codes, table = tensors[f"{name}|codes"], tensors[f"{name}|table"]
    signs = None
    if form["signs"]:
        negative = unpack(tensors[f"{name}|signs"], 1, codes.shape[1] * table.shape[1])
        signs = 1 - 2 * negative.to(torch.int8)
    shift = tensors[f"{name}|shift"] if form["shift"] else None
    return Lattice(codes, form["bits"], table, scale, (form["group"][0], form["group"][1]), signs, shift)


def _value(name: str, form: Any, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedTensor:
    return tensors[name] if form == "tensor" else _rebuild(name, form, tensors)
