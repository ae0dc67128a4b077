"""Hidden states between blocks, kept in files.

A *stream* is the hidden states of all rows under one weight history: `reference` passed through
untouched blocks, a target's stream through its quantized ones. Between two blocks a stream is a file
per set of rows, written while the block runs and read micro-batch by micro-batch by the next one, so
memory holds one micro-batch and a killed run continues from the very bits it had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import AtomicFile
from quantkit.errors import RunError

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows that run together: tokens (rows, length) int32; only calibration rows feed statistics."""

    name: str
    tokens: Tensor
    collects: bool

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def batches(self, batch_tokens: int) -> Iterator[slice]:
        """Slices of rows of at most `batch_tokens` tokens, at least one row each."""
        step = max(1, batch_tokens // self.length)
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))


@dataclass(frozen=True, slots=True)
class StreamFile:
    """(rows, length, hidden) states of `dtype` in row-major order, nothing else in the file."""

    path: Path
    rows: int
    length: int
    hidden: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.length * self.hidden * self.dtype.itemsize

    def read(self, rows: slice, device: torch.device) -> Tensor:
        """The states of consecutive rows."""
        count = (rows.stop - rows.start) * self.row_bytes
        with self.path.open("rb") as file:
            file.seek(rows.start * self.row_bytes)
            data = bytearray(count)
            found = file.readinto(data)
        if found != count:
            raise RunError(
                f"`{self.path}` is {count - found:,} bytes short at row {rows.start:,}",
                remedy="run again with --restart",
            )
        states = torch.frombuffer(data, dtype=self.dtype).view(-1, self.length, self.hidden)
        return states.to(device)


class StreamWriter:
    """Writes one StreamFile row by row; `commit` gives it its name and returns the sha256 of its bytes."""

    def __init__(self, file: StreamFile) -> None:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        self._out = AtomicFile(file.path, size=file.rows * file.row_bytes)
        self._digest = hashlib.sha256()

    def append(self, states: Tensor) -> None:
        """The next rows (rows, length, hidden)."""
        data = states.detach().cpu().contiguous().view(torch.uint8).numpy().data
        self._digest.update(data)
        self._out.write(data)

    def commit(self) -> str:
        self._out.commit()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        self._out.discard()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
