"""HQQ checkpoints, as the layers of the hqq library save themselves.

A linear X with weight (out, in), b bits and groups of g becomes
    X.W_q         codes of the grouped matrix, packed; uint8, for 3 bits int32
    X.scale       float16 (N, 1), axis 0: (1, N), N = out·in/g
    X.zero        the same of the zero point, in units of codes and fractional
    X.shape …     what the layer is, as scalars and text in tensors of their own
The grouped matrix is the weight read as (N, g), axis 0: (g, N). Codes are packed along its rows in parts:
row r shares a byte with row r + R/2 (4 bits), r + R/4 … (2), r + R/8 … (1), or an int32 with nine others
at distances of ⌈R/10⌉ (3); the earlier row has the higher bits. 5 and 6 bits take a byte each.

Who loads it: hqq alone. transformers 5 knows the name "hqq" and would fill every quantized layer with random
numbers, without an error. It stops at a quantization_config that lacks `skip_modules`, and so it is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.checkpoint.writer import TensorSpec
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.graph import Weight
from quantkit.model.stored import Difference, StoredModel, StoredWeight, told
from quantkit.protocols import Container, FormatFacts
from quantkit.schemes import CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear

SUMMARY = "integer weights, 1 to 6 and 8 bits, with fractional zero points, for the hqq library"
DEFAULT_SCHEME = "w4g64_asymf"
PRESETS = (
    *("w1g32_asymf", "w2g16_asymf", "w2g32_asymf", "w3g64_asymf", "w4g64_asymf", "w4g128_asymf"),
    *("w4g64_asymf_axis0", "w8g64_asymf", "w8g128_asymf"),
)

# rows of the grouped matrix in one element, and the name of that packing
_PACKING = {
    1: (8, "1bit_u8"),
    2: (4, "2bit_u8"),
    3: (10, "3bit_32"),
    4: (2, "4bit_u8"),
    5: (1, "8bit_u8"),
    6: (1, "8bit_u8"),
    8: (1, "8bit_u8"),
}
_FLAGS = {
    **{"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0},
    **{"encoded_state_dict": 1, "stores_quant_config": 1, "channel_wise": 1, "optimize": 1},
}
_NUMBERS = ("nbits", "group_size", "axis")
_TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
_PARTS = frozenset(("W_q", "scale", "zero", "shape", *_NUMBERS, *_TEXTS, "round_zero", *_FLAGS))
# what hqq evaluates as Python while it loads
_DTYPES = frozenset(
    f"torch.{name}"
    for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int32", "half", "float")
)
_LONGEST = 80
# what the library reads as soon as a weight says that it stores how it was quantized
_STATED = ("channel_wise", "optimize", "round_zero", "view_as_float")
_PLAIN_NAME = re.compile(r"(w\d+(?:g\d+)?)(_axis0)?")
_NOTE = "load with the layers of the hqq library; without skip_modules, transformers refuses this file"


def default_method(scheme: Scheme) -> str:
    """What the library itself does."""
    return "hqq" if scheme.fractional else "rtn"


def parse(text: str) -> Scheme:
    """``w4g64`` means fractional zero points here; everything else as it is written."""
    found = _PLAIN_NAME.fullmatch(text.strip().lower())
    return parse_scheme(text if found is None else f"{found[1]}_asymf{found[2] or ''}")


@dataclass(frozen=True, slots=True)
class Hqq:
    """The format; it has no parameters."""

    @property
    def container(self) -> Container:
        return "safetensors"

    def scale_dtype(self, source_dtype: str) -> str:
        # the loader's default, whatever the source: bfloat16 has 8 digits for a zero point of 5.37 or 130.4
        return "float16"

    def convention(self, scheme: Scheme) -> Convention:
        return "absmax"

    def holds_column_groups(self) -> bool:
        return False

    def cache_scales(self, attention: str, dtype: CacheDtype) -> tuple[str, str] | None:
        return None

    def accepts(self, scheme: Scheme, weight: Weight) -> str | None:
        if scheme.numbers != "int" or not scheme.fractional:
            return f"hqq stores integers with fractional zero points, not {scheme.name}; write w4g64_asymf"
        if scheme.bits not in _PACKING:
            return f"hqq stores 1 to 6 and 8 bits, not {scheme.bits}"
        if scheme.per_tensor:
            return "hqq stores one scale per row or group, not per tensor"
        if weight.part is not None:
            stored = "in a stack of experts" if weight.part.expert is not None else "transposed (Conv1D)"
            return f"hqq replaces nn.Linear, and this is stored {stored}; keep it with a rule"
        misfit = scheme.misfit(weight.shape)
        if misfit is not None:
            return misfit
        rows, per_element = _grouped(weight.shape, scheme)[0], _PACKING[scheme.bits][0]
        if scheme.bits != 3 and rows % per_element:
            what = "values of a group" if scheme.axis == 0 else "groups"
            return (
                f"hqq packs {per_element} {what} of {scheme.bits} bits together, and here are {rows:,}; "
                "use 3 or 8 bits, or keep the weight with a rule"
            )
        return None

    def layout(self, weight: Weight, scheme: Scheme) -> tuple[TensorSpec, ...]:
        base = weight.name.removesuffix(".weight")
        rows, columns = _grouped(weight.shape, scheme)
        dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
        scales = (rows, 1) if scheme.axis == 1 else (1, columns)
        word = torch.int32 if scheme.bits == 3 else torch.uint8
        specs = [
            TensorSpec(f"{base}.W_q", word, (_packed(rows, scheme.bits), columns)),
            TensorSpec(f"{base}.scale", dtype, scales),
            TensorSpec(f"{base}.zero", dtype, scales),
            TensorSpec(f"{base}.shape", torch.int64, (2,)),
        ]
        specs += [TensorSpec(f"{base}.{name}", torch.int32, ()) for name in _NUMBERS]
        for name, text in _texts(scheme).items():
            specs.append(TensorSpec(f"{base}.{name}", torch.uint8, (len(text),)))
        specs += [TensorSpec(f"{base}.{name}", torch.uint8, ()) for name in ("round_zero", *_FLAGS)]
        return tuple(specs)

    def encode(self, linear: QuantizedLinear, scheme: Scheme, dtype: str = "bfloat16") -> dict[str, Tensor]:
        codes, scale, zero = _parts_of(linear, scheme)
        out, width = codes.shape
        rows, columns = _grouped((out, width), scheme)
        scales = (rows, 1) if scheme.axis == 1 else (1, columns)
        words = {
            "W_q": pack(codes.reshape(rows, columns), scheme.bits),
            "scale": scale.reshape(scales).contiguous(),
            "zero": zero.reshape(scales).contiguous(),
            "shape": torch.tensor([out, width]),
        }
        for name, number in zip(
            _NUMBERS, (scheme.bits, scheme.group_size or width, scheme.axis), strict=True
        ):
            words[name] = torch.tensor(number, dtype=torch.int32)
        for name, text in _texts(scheme).items():
            words[name] = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)
        for name, flag in {"round_zero": int(scheme.bits == 4), **_FLAGS}.items():
            words[name] = torch.tensor(flag, dtype=torch.uint8)
        base = linear.name.removesuffix(".weight")
        return {f"{base}.{name}": tensor for name, tensor in words.items()}

    def companions(self, facts: FormatFacts) -> Mapping[str, Tensor]:
        return {}

    def base_name(self, tensor: str) -> str | None:
        base, _, part = tensor.rpartition(".")
        return f"{base}.weight" if part in _PARTS else None

    def measure(
        self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> tuple[tuple[int, int], int]:
        base = name.removesuffix(".weight")
        known = config.get("linears") or {}
        told = known.get(base) or known.get(_tag(base))
        if told is not None:
            return (int(told["shape"][0]), int(told["shape"][1])), int(told["nbits"])
        if f"{base}.W_q" not in tensors:
            # a parameter of the model's own that is called `scale`, as routers have
            found = next(iter(tensors.values()))
            return (1, math.prod(found.shape)), found.torch_dtype.itemsize * 8
        # written by others: the shape is the content of a tensor, so say how many weights there are
        packed, scale = tensors[f"{base}.W_q"], tensors[f"{base}.scale"]
        bits = _bits_of(packed, scale, config)
        return (packed.shape[0] * _PACKING[bits][0], packed.shape[1]), bits

    def decode(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedLinear:
        base = name.removesuffix(".weight")
        bits, size, axis = (_number(base, part, tensors) for part in _NUMBERS)
        out, width = _shape(base, tensors)
        if bits not in _PACKING or axis not in (0, 1) or size < 1 or (width if axis else out) % size:
            raise UnsupportedError(
                f"`{name}` has {bits} bits in groups of {size:,} along axis {axis} of {out:,} × {width:,}: "
                "quantkit does not read that"
            )
        _check_texts(base, bits, tensors)
        scale, zero, packed = (tensors[f"{base}.{part}"] for part in ("scale", "zero", "W_q"))
        if f"{base}.view_as_float" in tensors and _number(base, "view_as_float", tensors):
            packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
        count = out * width // size
        rows, columns = (count, size) if axis == 1 else (size, count)
        if packed.shape != (_packed(rows, bits), columns) or {scale.numel(), zero.numel()} != {count}:
            raise SourceError(
                f"`{base}.W_q` is {tuple(packed.shape)}, with {scale.numel():,} scales and {zero.numel():,} "
                f"zero points: not {bits} bits of {out:,} × {width:,} in groups of {size:,}"
            )
        per_group = (out, width // size) if axis == 1 else (out // size, width)
        return QuantizedLinear(
            name,
            Affine(
                codes=unpack(packed, bits, rows).reshape(out, width),
                bits=bits,
                scale=scale.reshape(per_group),
                group=(1, size) if axis == 1 else (size, 1),
                zero_point=zero.reshape(per_group),
                row_group=None if axis == 1 else _row_group(out, size),
            ),
        )

    def disagreements(self, stored: StoredModel, config: Mapping[str, Any]) -> Iterator[str]:
        yield from told(d for weight in stored.weights for d in _missing(weight))
        own = config.get("linears")
        main = (config.get("quant_config") or {}).get("weight_quant_params") or {}
        found = [list(_claims(weight, main)) for weight in stored.weights]
        if own is not None:
            yield from told(d for weight in stored.weights for d in _claims(weight, _own(weight, own)))
        # of ours, some weights may be others
        if own is None or all(found):
            yield from told(d for differences in found for d in differences)

    def config(self, facts: FormatFacts) -> Mapping[str, Any]:
        linears: dict[str, dict[str, Any]] = {}
        for a in facts.assigned:
            if a.scheme is not None:
                own = {"shape": list(a.weight.shape), **_parameters(a.scheme)}
                # hqq's tag of a module leaves out the numbers of blocks, where all weights are alike
                if linears.setdefault(_tag(a.weight.module), own) != own:
                    linears[a.weight.module] = own
        schemes = [a.scheme for a in facts.assigned if a.scheme is not None] or [facts.default]
        main = facts.default if facts.default in schemes else schemes[0]
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": {
                    **_parameters(main),
                    "channel_wise": True,
                    "optimize": True,
                    "round_zero": main.bits == 4,
                    "view_as_float": False,
                },
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "linears": linears,
            "note": _NOTE,
        }

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def engines(self, facts: FormatFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        schemes = {a.scheme for a in facts.assigned if a.scheme is not None}
        notes = ["transformers 5 cannot load HQQ and refuses the folder: the package hqq loads it"]
        if any(s.bits > 4 for s in schemes):
            notes.append("load it with float16 or float32 as compute_dtype: bfloat16 rounds the zero points")
        if any(s.axis == 0 for s in schemes):
            notes.append("of the fast kernels only hqq's own takes axis 0")
        return ("hqq",), tuple(notes)


FORMAT = Hqq()


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) codes to (⌈rows/n⌉, columns) elements of n codes each, the first rows highest."""
    count = _PACKING[bits][0]
    word = torch.int32 if bits == 3 else torch.uint8
    step = -(-codes.shape[0] // count)
    packed = torch.zeros(step, codes.shape[1], dtype=word)
    for place in range(count):
        part = codes[place * step : (place + 1) * step]
        packed[: part.shape[0]] |= part.to(word) << (bits if count > 1 else 0) * (count - 1 - place)
    return packed


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of `pack`: (rows, columns) uint8 codes."""
    count = _PACKING[bits][0]
    if count == 1:
        return packed.to(torch.uint8)
    mask = (1 << bits) - 1
    parts = [(packed >> bits * (count - 1 - place)) & mask for place in range(count)]
    return torch.cat([part.to(torch.uint8) for part in parts])[:rows].contiguous()


def _packed(rows: int, bits: int) -> int:
    return -(-rows // _PACKING[bits][0])


def _grouped(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int]:
    """(rows, columns) of the grouped matrix."""
    size = scheme.group_size or shape[1]
    groups = shape[0] * shape[1] // size
    return (groups, size) if scheme.axis == 1 else (size, groups)


def _row_group(out: int, size: int) -> Tensor:
    """(out,) group of each row along axis 0, whose members lie out/size rows apart."""
    return torch.arange(out, dtype=torch.int32) % (out // size)


def _texts(scheme: Scheme) -> dict[str, str]:
    return {
        "packing": _PACKING[scheme.bits][1],
        "unpack_view_dtype": "torch.int32" if scheme.bits == 3 else "torch.uint8",
        "compute_dtype": f"torch.{scheme.scale_dtype}",
    }


def _parameters(scheme: Scheme) -> dict[str, Any]:
    return {"nbits": scheme.bits, "group_size": scheme.group_size, "axis": scheme.axis}


def _tag(module: str) -> str:
    """hqq's name for modules that differ in numbers only."""
    return ".".join(n for n in module.split(".") if n not in ("model", "layers") and not n.isnumeric())


def _parts_of(linear: QuantizedLinear, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero point) of what the format can hold; raises UnsupportedError for anything else."""
    q, name = linear.weight, linear.name
    if not isinstance(q, Affine) or not isinstance(q.scale, Tensor) or q.offset is not None:
        raise UnsupportedError(f"hqq cannot store `{name}`: it is not on an integer grid with plain scales")
    if q.zero_point is None or not q.zero_point.is_floating_point():
        raise UnsupportedError(f"hqq cannot store `{name}`: its zero point is not fractional")
    if q.column_group is not None:
        raise UnsupportedError(f"hqq cannot store the column groups of `{name}`")
    out, width = q.codes.shape
    mixed = q.row_group is not None and (
        scheme.axis == 1 or not q.row_group.equal(_row_group(out, q.group[0]))
    )
    missing = scheme.axis == 0 and q.row_group is None
    if mixed or missing or q.group != scheme.group((out, width)) or q.bits != scheme.bits:
        raise UnsupportedError(f"hqq cannot store `{name}` as {scheme.name}: its groups or bits are others")
    return q.codes, q.scale, q.zero_point


def _shape(base: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    found = tensors[f"{base}.shape"].tolist()
    if not isinstance(found, list) or len(found) != 2 or min(found) < 1:
        raise SourceError(f"`{base}.shape` is {found}, not the two sizes of a matrix")
    return int(found[0]), int(found[1])


def _number(base: str, part: str, tensors: Mapping[str, Tensor]) -> int:
    tensor = tensors[f"{base}.{part}"]
    if tensor.numel() != 1 or tensor.is_floating_point():
        what = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UnsupportedError(f"`{base}.{part}` is {what}, and quantkit reads one whole number there")
    return int(tensor)


def _check_texts(base: str, bits: int, tensors: Mapping[str, Tensor]) -> None:
    """SourceError unless the packing is that of the bits and dtypes are dtypes."""
    texts = {part: _text(tensors[f"{base}.{part}"]) for part in _TEXTS if f"{base}.{part}" in tensors}
    expected = _PACKING[bits][1]
    for part, text in texts.items():
        if part == "packing" and text != expected:
            raise SourceError(f"`{base}.packing` is {text!r}, where {bits} bits are packed as {expected!r}")
        if part != "packing" and text not in _DTYPES:
            raise SourceError(f"`{base}.{part}` is {text!r}, which is no dtype: hqq would run it as code")


def _text(stored: Tensor) -> str:
    return bytes(stored.flatten()[:_LONGEST].to(torch.uint8).tolist()).decode("latin-1")


def _missing(weight: StoredWeight) -> Iterator[Difference]:
    wanted = ("packing", *(_STATED if "stores_quant_config" in weight.parts else ()))
    for part in wanted:
        if part not in weight.parts:
            claim = f"hqq loads no weight without its `{part}`"
            yield Difference(weight.name, claim, "has none", "hqq would stop there")


def _own(weight: StoredWeight, linears: Mapping[str, Any]) -> Mapping[str, Any]:
    """What our config says of a weight: by its name, else by hqq's tag."""
    found: Mapping[str, Any] | None = linears.get(weight.module) or linears.get(_tag(weight.module))
    return found or {}


def _claims(weight: StoredWeight, says: Mapping[str, Any]) -> Iterator[Difference]:
    axis = 0 if weight.group[0] > 1 else 1
    size = weight.group[axis]
    groups = (size, None) if size == weight.shape[axis] else (size,)
    harm = "hqq goes by the tensors, other readers by the config"
    holds = {"nbits": (weight.bits,), "group_size": groups, "axis": (axis,), "shape": (list(weight.shape),)}
    for key, fitting in holds.items():
        if key in says and says[key] not in fitting:
            yield Difference(weight.name, f"`{key}` is {says[key]}", f"has {fitting[0]}", harm)


def _bits_of(packed: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]) -> int:
    """Bits from the shapes where they tell, else from the configuration."""
    if packed.dtype == "I32":
        return 3
    if scale.shape[1] == 1:
        shared = scale.shape[0] // packed.shape[0]
        return next((bits for bits in (1, 2, 4) if _PACKING[bits][0] == shared), 8)
    return int(config["quant_config"]["weight_quant_params"]["nbits"])
