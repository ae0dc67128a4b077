"""llama.cpp through its C interface: what it computes from a file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

llama_cpp: Any = pytest.importorskip("llama_cpp")

_F32 = 0  # GGML_TYPE_F32
_OFF = 0  # LLAMA_LOAD_MODE_NONE, LLAMA_FLASH_ATTN_TYPE_DISABLED
_LOG: list[str] = []


def _note(level: int, text: bytes, user_data: Any) -> None:
    _LOG.append(text.decode("utf-8", "replace"))


_COLLECT: Any = llama_cpp.llama_log_callback(_note)  # kept: C holds no reference to it


@dataclass(frozen=True, slots=True)
class Llama:
    """A file that llama.cpp has loaded, and one sequence of at most `length` tokens of it."""

    model: Any
    context: Any
    vocabulary: Any
    length: int

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), vocabulary) fp32: what follows each of `ids`, read from an empty sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            if code := llama_cpp.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {code}: {_tail()}")
            found = llama_cpp.llama_get_logits(self.context)
            shape = (len(ids), llama_cpp.llama_vocab_n_tokens(self.vocabulary))
            return torch.from_numpy(np.ctypeslib.as_array(found, shape).copy())
        finally:
            llama_cpp.llama_batch_free(batch)

    def losses(self, ids: Sequence[int]) -> Tensor:
        """(len(ids) − 1,) fp64: nats that each token after the first costs."""
        logprobs = self.logits(ids).double().log_softmax(-1)
        following = torch.as_tensor(ids[1:], dtype=torch.int64)
        return -logprobs[:-1].gather(1, following[:, None])[:, 0]

    def tokenize(self, text: str, *, start: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; `start` puts the token in front that the file asks for."""
        raw = text.encode("utf-8")
        room = (llama_cpp.llama_token * (len(raw) + 2))()
        count = llama_cpp.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), start, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize needs {-count} places: {_tail()}")
        return list(room[:count])


@contextmanager
def opened(path: Path, length: int = 512, *, vocabulary_only: bool = False) -> Iterator[Llama]:
    """`path` loaded on the CPU with one thread; keys and values stay fp32, and flash attention is off.

    Weights are not repacked for the processor: the repacked kernels round activations otherwise.
    """
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_COLLECT, ctypes.c_void_p(0))
    _LOG.clear()
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers, wanted.load_mode, wanted.use_extra_bufts = 0, _OFF, False
    wanted.vocab_only = vocabulary_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), wanted)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path.name}: {_tail()}")
    context = None
    try:
        if not vocabulary_only:
            context = llama_cpp.llama_init_from_model(model, _context(length))
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {path.name}: {_tail()}")
        yield Llama(model, context, llama_cpp.llama_model_get_vocab(model), length)
    finally:
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def logits(path: Path, ids: Sequence[int]) -> Tensor:
    """(len(ids), vocabulary) fp32, with a context as long as `ids`."""
    with opened(path, len(ids)) as llama:
        return llama.logits(ids)


def perplexity(path: Path, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss over all rows, each read on its own."""
    with opened(path, max(len(row) for row in rows)) as llama:
        return float(torch.cat([llama.losses(row) for row in rows]).mean().exp())


def _context(length: int) -> Any:
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = length
    wanted.n_threads = wanted.n_threads_batch = 1
    wanted.type_k = wanted.type_v = _F32
    wanted.flash_attn_type = _OFF
    wanted.no_perf = True
    return wanted


def _tail() -> str:
    return "".join(_LOG[-6:]).strip()
