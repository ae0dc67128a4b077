"""Moving streams through one block: read a micro-batch, run it, write it to the next generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.run.store import RunStore
from quantkit.run.streams import REFERENCE, RowSet, StreamFile, StreamWriter

Forward = Callable[[Tensor], Tensor]


class Streams:
    """The stream files of one sweep: their names, generations and the sums of what was written."""

    def __init__(
        self, store: RunStore, hidden: int, dtype: torch.dtype, device: torch.device, batch_tokens: int
    ) -> None:
        self._store, self._hidden, self._dtype, self._device = store, hidden, dtype, device
        self.batch_tokens = batch_tokens
        # streams that do not start as the reference does
        self.apart: frozenset[str] = frozenset()
        self._written: dict[str, str] = {}

    @staticmethod
    def name(stream: str, rows: RowSet) -> str:
        return f"{stream}.{rows.name}"

    def file(self, generation: int, stream: str, rows: RowSet) -> StreamFile:
        """At generation 0 no block has run, so every stream is the reference stream, unless it is `apart`."""
        name = self.name(stream if generation or stream in self.apart else REFERENCE, rows)
        path = self._store.stream_path(generation, name)
        return StreamFile(path, rows.rows, rows.length, self._hidden, self._dtype)

    def batches(self, generation: int, stream: str, rows: RowSet) -> Iterator[tuple[slice, Tensor]]:
        """(rows, states) of one stream, micro-batch by micro-batch."""
        file = self.file(generation, stream, rows)
        for part in rows.batches(self.batch_tokens):
            yield part, file.read(part, self._device)

    def write(self, generation: int, stream: str, rows: RowSet, states: Iterator[Tensor]) -> None:
        """Write one stream file of `generation`; an error while `states` are made leaves nothing.

        NumericsError when hidden states are not finite.
        """
        writer = StreamWriter(self.file(generation, stream, rows))
        try:
            for batch in states:
                if not bool(torch.isfinite(batch).all()):
                    raise NumericsError(
                        f"hidden states entering block {generation} are not finite on stream `{stream}`",
                        remedy="the source overflows too: check it"
                        if self._dtype == torch.float32
                        else "run the forward pass in float32: --dtype float32",
                    )
                writer.append(batch.to(self._dtype))
            self._written[self.name(stream, rows)] = writer.commit()
        finally:
            writer.discard()

    def advance(self, generation: int, stream: str, rows: RowSet, forward: Forward) -> None:
        """Run `forward` over a stream and write the next generation."""
        batches = self.batches(generation, stream, rows)
        self.write(generation + 1, stream, rows, (forward(states) for _, states in batches))

    def take_written(self) -> dict[str, str]:
        """Sums of the files written since the last call, for the commit."""
        written, self._written = self._written, {}
        return written
