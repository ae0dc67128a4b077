"""llama.cpp, as quantkit's own engine opens it: what it computes from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

llama_cpp: Any = pytest.importorskip("llama_cpp")

from quantkit.evaluate.engines import llamacpp  # noqa: E402 (it imports llama_cpp)


@dataclass(frozen=True, slots=True)
class Llama:
    """A file that llama.cpp has loaded."""

    llama: llamacpp.Llama

    @property
    def vocabulary(self) -> Any:
        return self.llama.vocabulary

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), vocabulary) fp32: what follows each of `ids`, read from an empty sequence."""
        return torch.from_numpy(self.llama.logits(ids))

    def losses(self, ids: Sequence[int]) -> Tensor:
        """(len(ids) − 1,) fp64: nats that each token after the first costs."""
        logprobs = self.logits(ids).double().log_softmax(-1)
        following = torch.as_tensor(ids[1:], dtype=torch.int64)
        return -logprobs[:-1].gather(1, following[:, None])[:, 0]

    def tokenize(self, text: str, *, start: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; `start` puts the token in front that the file asks for."""
        return self.llama.tokenize(text, start=start, special=special)


@contextmanager
def opened(path: Path, length: int = 512, *, vocabulary_only: bool = False) -> Iterator[Llama]:
    """`path` loaded on the CPU with one thread."""
    with llamacpp.opened(path, length, vocabulary_only=vocabulary_only) as llama:
        yield Llama(llama)


def logits(path: Path, ids: Sequence[int]) -> Tensor:
    """(len(ids), vocabulary) fp32, with a context as long as `ids`."""
    with opened(path, len(ids)) as llama:
        return llama.logits(ids)


def perplexity(path: Path, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss over all rows, each read on its own."""
    with opened(path, max(len(row) for row in rows)) as llama:
        return float(torch.cat([llama.losses(row) for row in rows]).mean().exp())
