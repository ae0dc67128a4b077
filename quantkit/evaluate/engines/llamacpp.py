"""llama.cpp through its C interface, on the CPU: what it computes from a file, and its tokens of a text."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from quantkit.errors import VerifyError
from quantkit.evaluate.engines.request import Request

_F32 = 0  # GGML_TYPE_F32
_OFF = 0  # LLAMA_LOAD_MODE_NONE, LLAMA_FLASH_ATTN_TYPE_DISABLED
_SAID = 6  # last lines that an error shows
_Log = deque[str]


def _forget(level: int, text: bytes, data: Any) -> None:
    pass


_SILENT: Any = llama_cpp.llama_log_callback(_forget)  # kept: C holds no reference


def begin(_request: Request) -> str:
    return f"{llama_cpp.__version__} (llama-cpp-python)"


def logits(request: Request) -> npt.NDArray[np.float32]:
    """What follows each token."""
    with opened(Path(request.path), len(request.ids), threads=request.threads) as llama:
        return llama.logits(request.ids)


def tokens(request: Request) -> list[list[int]]:
    """Of each text, by the vocabulary of the file alone."""
    with opened(Path(request.path), vocabulary_only=True) as llama:
        return [llama.tokenize(text, special=True) for text in request.texts]


@dataclass(frozen=True, slots=True)
class Llama:
    """A file that llama.cpp has loaded, and one sequence of tokens of it."""

    model: Any
    context: Any
    vocabulary: Any
    log: _Log

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """(len(ids), vocabulary): what follows each of `ids`, read from an empty sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            if code := llama_cpp.llama_decode(self.context, batch):
                raise VerifyError(f"llama_decode returned {code}: {_tail(self.log)}")
            found = llama_cpp.llama_get_logits(self.context)
            shape = (len(ids), llama_cpp.llama_vocab_n_tokens(self.vocabulary))
            values: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape).copy()
            return values
        finally:
            llama_cpp.llama_batch_free(batch)

    def tokenize(self, text: str, *, start: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; `start` puts the token in front that the file asks for."""
        raw = text.encode("utf-8")
        # a byte becomes a token at most, and a part between special tokens gets one space
        room = (llama_cpp.llama_token * (2 * len(raw) + 2))()
        count = llama_cpp.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), start, special)
        if count < 0:
            raise VerifyError(f"llama_tokenize needs {-count} places: {_tail(self.log)}")
        return list(room[:count])


@contextmanager
def opened(
    path: Path, length: int = 512, *, threads: int = 1, vocabulary_only: bool = False
) -> Iterator[Llama]:
    """`path` loaded on the CPU, for at most `length` tokens; keys and values stay fp32.

    Weights are not repacked for the processor: the repacked kernels round activations otherwise.
    """
    log: _Log = deque(maxlen=_SAID)

    def note(_level: int, text: bytes, _data: Any) -> None:
        log.append(text.decode("utf-8", "replace"))

    collect: Any = llama_cpp.llama_log_callback(note)  # kept: C holds no reference
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers, wanted.load_mode, wanted.use_extra_bufts = 0, _OFF, False
    wanted.vocab_only = vocabulary_only
    model = context = None
    try:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), wanted)
        if not model:
            raise VerifyError(f"llama.cpp does not load {path.name}: {_tail(log)}")
        if not vocabulary_only:
            context = llama_cpp.llama_init_from_model(model, _context(length, threads))
            if not context:
                raise VerifyError(f"llama.cpp makes no context for {path.name}: {_tail(log)}")
        yield Llama(model, context, llama_cpp.llama_model_get_vocab(model), log)
    finally:
        if context:
            llama_cpp.llama_free(context)
        if model:
            llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))


def _context(length: int, threads: int) -> Any:
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = length
    wanted.n_threads = wanted.n_threads_batch = threads
    wanted.type_k = wanted.type_v = _F32
    wanted.flash_attn_type = _OFF
    wanted.no_perf = True
    return wanted


def _tail(log: _Log) -> str:
    return "".join(log).strip()
