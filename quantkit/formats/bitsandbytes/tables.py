"""NF4 and FP4: two codes per byte, one scale per group, and a JSON that says what they are.

The length of that JSON depends on how its numbers print. It is padded with spaces, which every reader of
JSON skips, so that the size of a file is known before anything is quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.strict_json import parse_object
from quantkit.errors import SourceError, UnsupportedError
from quantkit.numerics.levels import FP4, NF4
from quantkit.numerics.stored import NESTED_GROUP
from quantkit.tensors import Codebook, QuantizedTensor

TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4)}
STATE = "weight.quant_state.bitsandbytes__"
PARTS = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(STATE + kind for kind in TABLES),
)

_LONGEST_DTYPE = "bfloat16"
# a float32 prints no longer than this: a sign, 17 digits, a point, an exponent of two digits
_LONGEST_NUMBER = len("-1.2345678901234567e-38")


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON says of a weight.

    offset        the mean of doubly quantized scales, else None
    nested_group  how many of those share an outer scale
    """

    shape: tuple[int, int]
    group: int
    offset: float | None
    nested_group: int


def state_length(kind: str, group: int, shape: tuple[int, int], nested: bool) -> int:
    """Bytes of the JSON of a weight (out, in), whatever its offset."""
    text = _state_text(kind, group, shape, _LONGEST_DTYPE, 0.0 if nested else None)
    return len(text) + (_LONGEST_NUMBER - len("0.0") if nested else 0)


def encode(q: Codebook, dtype: str) -> dict[str, Tensor] | None:
    """File tensors by the end of their name, or None when `q` is not what the library stores."""
    kind = next((kind for kind, table in TABLES.items() if torch.equal(table, q.table)), None)
    out, width = q.codes.shape
    if kind is None or q.offset is not None or q.group[0] != 1 or width % 2 or width % q.group[1]:
        return None
    nested: dict[str, Tensor] = {}
    mean: float | None = None
    match q.scale:
        case Tensor(dtype=torch.float32):
            absmax = q.scale.flatten()
        case Codebook(scale=Tensor() as outer, offset=Tensor() as offset) if q.scale.group[1] == NESTED_GROUP:
            absmax = q.scale.codes.flatten()
            nested = {"weight.nested_absmax": outer.flatten(), "weight.nested_quant_map": q.scale.table}
            mean = float(offset)
        case _:
            return None
    pairs = q.codes.reshape(-1, 2)
    length = state_length(kind, q.group[1], (out, width), mean is not None)
    text = _state_text(kind, q.group[1], (out, width), dtype, mean).ljust(length)
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": absmax,
        "weight.quant_map": q.table,
        **nested,
        f"{STATE}{kind}": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }


def decode(name: str, parts: Mapping[str, Tensor]) -> Codebook:
    """Inverse of `encode`, also for what the library wrote. Raises SourceError when parts are missing or
    malformed, UnsupportedError for groups that cross rows."""
    found = [part for kind in TABLES if (part := f"{STATE}{kind}") in parts]
    missing = {"weight", "weight.absmax", "weight.quant_map"} - parts.keys()
    if len(found) != 1 or missing:
        what = ", ".join(sorted(missing)) or f"{STATE}nf4 or fp4"
        raise SourceError(f"`{name}` is stored in 4 bits without `{what}`")
    state = _read_state(name, parts[found[0]])
    out, width = state.shape
    # files that hold the bytes as another dtype hold the same bytes
    packed = parts["weight"].contiguous().view(-1).view(torch.uint8)
    if packed.numel() * 2 != out * width or width % state.group:
        raise UnsupportedError(
            f"`{name}`, {out:,} × {width:,} in groups of {state.group}, is not whole groups in every row",
            remedy="start from the 16-bit checkpoint",
        )
    return Codebook(
        codes=torch.stack((packed >> 4, packed & 15), 1).view(out, width),
        bits=4,
        table=parts["weight.quant_map"],
        scale=_scale(parts, state),
        group=(1, state.group),
    )


def _scale(parts: Mapping[str, Tensor], state: _State) -> Tensor | QuantizedTensor:
    absmax = parts["weight.absmax"]
    if state.offset is None:
        return absmax.to(torch.float32).view(state.shape[0], -1)
    return Codebook(
        codes=absmax.view(1, -1),
        bits=8,
        table=parts["weight.nested_quant_map"],
        scale=parts["weight.nested_absmax"].view(1, -1),
        group=(1, state.nested_group),
        offset=torch.tensor([state.offset], dtype=torch.float32),
    )


def _state_text(kind: str, group: int, shape: tuple[int, int], dtype: str, offset: float | None) -> str:
    state: dict[str, Any] = {"quant_type": kind, "blocksize": group, "dtype": dtype, "shape": list(shape)}
    if offset is not None:
        state |= {"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state)


def _read_state(name: str, stored: Tensor) -> _State:
    try:
        state = parse_object(bytes(stored.tolist()))
        out, width = (int(n) for n in state["shape"])
        group = int(state["blocksize"])
        nested_group = int(state.get("nested_blocksize", NESTED_GROUP))
        offset = float(state["nested_offset"]) if "nested_offset" in state else None
        if min(out, width, group, nested_group) < 1:
            raise ValueError("sizes must be positive")
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"`quant_state` of `{name}` is not what bitsandbytes writes: {error}") from error
    return _State((out, width), group, offset, nested_group)
