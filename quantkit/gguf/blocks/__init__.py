"""Quantized weights as the bytes of ggml's types, and back.

A row is a run of super-blocks of 32 or 256 weights (of 1 where floats are stored as they are), rows
follow each other, everything is little endian. `pack` only moves bits: a weight lies on the grid of a
type or is refused. `unpack` is its inverse, and `tensors.dequantize` of it is what the `gguf` package
and llama.cpp compute, to the last bit. The layouts are described in the modules of the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.blocks import lattices, legacy, plain, superblocks
from quantkit.gguf.blocks.grids import misfit
from quantkit.gguf.blocks.planes import Codec, fold
from quantkit.gguf.types import TYPES, BlockType, type_of
from quantkit.tensors import QuantizedTensor

__all__ = ["Q4_0", "Q4_1", "Q8_0", "TYPES", "WIDTH", "BlockType", "pack", "type_of", "unpack"]

Q4_0, Q4_1, Q8_0 = TYPES["q4_0"], TYPES["q4_1"], TYPES["q8_0"]
WIDTH = legacy.WIDTH

_CODECS: Mapping[str, Codec[Any]] = MappingProxyType(
    {**plain.CODECS, **legacy.CODECS, **superblocks.CODECS, **lattices.CODECS}
)


def pack(q: QuantizedTensor, kind: BlockType) -> Tensor:
    """(out, row bytes) uint8 of a weight that lies on the grid of `kind`; nothing is rounded.

    UnsupportedError for anything else: other groups or dtypes, codes out of range, a scale that is not
    finite, another table, signs that the type cannot say.
    """
    codec = _codec(kind)
    try:
        if problem := misfit(q, codec.decode, kind.elements, kind.nbytes):
            raise UnsupportedError(problem)
        return codec.encode(q).flatten(1)
    except UnsupportedError as error:
        raise UnsupportedError(f"this does not lie on the grid of {kind.ggml}: {error.message}") from None


def unpack(rows: Tensor, kind: BlockType) -> QuantizedTensor:
    """Inverse of `pack`: the weight that (out, row bytes) uint8 stand for.

    pack(unpack(b)) is b for every b with finite scales, but that tq1_0 decodes bytes which no encoder
    writes: those come back as the ones it writes. SourceError when a row holds no whole super-blocks.
    """
    codec = _codec(kind)
    if rows.shape[1] % kind.nbytes or not rows.shape[1]:
        raise SourceError(
            f"rows of {rows.shape[1]:,} bytes are no whole {kind.ggml} super-blocks of {kind.nbytes}"
        )
    unpacked: QuantizedTensor = codec.decode(fold(rows, -1, kind.nbytes))
    return unpacked


def _codec(kind: BlockType) -> Codec[Any]:
    if kind.name not in _CODECS:
        raise UnsupportedError(f"quantkit does not know what {kind.ggml} stores")
    return _CODECS[kind.name]
