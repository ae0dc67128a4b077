"""llama.cpp's quantizer on whole files, called in this process; needs `llama-cpp-python` (`make interop`).

Used by `benchmarks.gguf_quality` and `benchmarks.gguf_speed`. Its functions for single matrices, and running a
file, are those of the tests: `tests.interop.ggml` and `tests.interop.llama`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import torch

from quantkit.gguf.imatrix import Imatrix
from quantkit.gguf.mixes import Mix
from tests.interop import llama

NAME = "llamacpp"
VERSIONS = {NAME: {"llama-cpp-python": version("llama-cpp-python")}}


def _say_nothing(level: int, text: bytes, user_data: Any) -> None:
    pass


_SILENT: Any = llama_cpp.llama_log_callback(_say_nothing)  # kept: C holds no reference to it


def quantize(source: Path, out: Path, mix: Mix, imatrix: Imatrix | None = None, threads: int = 1) -> None:
    """Write `out` from a GGUF file of floats, as `llama-quantize --imatrix` does."""
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = mix.file_type, threads
    kept: list[Any] = []
    if imatrix is not None:
        params.imatrix = _entries(imatrix, params, kept)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize of {mix.name} returned {code}")


def _entries(imatrix: Imatrix, params: Any, kept: list[Any]) -> Any:
    """Mean squares by name, ended by an entry without one; `kept` is what C does not own."""
    array = (type(params.imatrix)._type_ * (len(imatrix.entries) + 1))()
    for place, (name, entry) in zip(array, imatrix.entries.items(), strict=False):
        values = entry.importance().flatten().contiguous()
        kept.append(values)
        place.name, place.size = name.encode(), values.numel()
        place.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
    kept.append(array)
    return array


def perplexity(file: Path, rows: Sequence[Sequence[int]], score_from: int) -> float:
    """What llama.cpp computes from a file: exp of the mean loss over positions from `score_from` on."""
    with llama.opened(file, max(len(row) for row in rows)) as opened:
        return float(torch.cat([opened.losses(row)[score_from:] for row in rows]).mean().exp())
