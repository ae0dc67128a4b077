"""The reference quantizers of llama.cpp, called as the C library that its Python package carries.

`Ggml.load()` skips the test where the package is missing. Names are quantkit's: ``q4_k``, ``iq2_xs``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.gguf.blocks import TYPES, BlockType

# the library ends the process when these are quantized without importances
NEED_IMATRIX = ("iq2_xxs", "iq2_xs", "iq1_s")


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@dataclass(frozen=True, slots=True)
class Ggml:
    """`quantize` and `dequantize` of whole matrices, on one thread."""

    library: ctypes.CDLL

    @classmethod
    @cache
    def load(cls) -> Ggml:
        """The library with its tables filled; skips where `llama_cpp` is not installed."""
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            pytest.skip("llama_cpp is not installed")
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / f"libggml-base{suffix}"))
        library.ggml_init.restype = ctypes.c_void_p
        library.ggml_init.argtypes = (_InitParams,)
        # the conversions of float16 read tables that the first context fills
        library.ggml_init(_InitParams(1 << 20, None, True))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        )
        return cls(library)

    def quantize(self, name: str, rows: Tensor, imatrix: Tensor | None = None) -> Tensor:
        """(out, row bytes) uint8 of `rows` (out, in), weighed by `imatrix` (in,) where given."""
        if imatrix is None and name in NEED_IMATRIX:
            raise ValueError(f"{name} needs an imatrix")
        kind = TYPES[name]
        source = rows.to(torch.float32).contiguous()
        out, width = source.shape
        packed = torch.empty(out, kind.row_bytes(width), dtype=torch.uint8)
        weights = None if imatrix is None else imatrix.to(torch.float32).contiguous()
        written = self.library.ggml_quantize_chunk(
            kind.id,
            source.data_ptr(),
            packed.data_ptr(),
            *(0, out, width),
            None if weights is None else weights.data_ptr(),
        )
        if written != packed.numel():
            raise ValueError(f"{name}: {written} bytes written, {packed.numel()} expected")
        return packed

    def dequantize(self, name: str, rows: Tensor, width: int) -> Tensor:
        """(out, width) fp32 of `rows` (out, row bytes) uint8."""
        kind = TYPES[name]
        blocks = rows.contiguous()
        if blocks.dtype != torch.uint8 or blocks.shape[-1] != kind.row_bytes(width):
            raise ValueError(f"{name}: rows of {width} weights have {kind.row_bytes(width)} bytes")
        values = torch.empty(blocks.shape[0], width, dtype=torch.float32)
        if name == "f32":
            return values.copy_(blocks.view(torch.float32))
        self._decoder(kind)(blocks.data_ptr(), values.data_ptr(), values.numel())
        return values

    def _decoder(self, kind: BlockType) -> Callable[[int, int, int], None]:
        floats = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}
        # dequantize_row_q4_K, but dequantize_row_iq4_xs
        name = kind.name.removesuffix("_k") + "_K" if kind.name.endswith("_k") else kind.name
        function = self.library[floats.get(kind.name, f"dequantize_row_{name}")]
        function.restype = None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        decode: Callable[[int, int, int], None] = function
        return decode
