"""Buffers that outlive the work on one chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Room:
    """fp32 buffers by name, which serve chunk after chunk.

    Buffers of some hundred kilobytes that come and go are handed back to the system and cleared anew each
    time, which takes as long as the arithmetic on them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer of that name, of arbitrary content; a later `take` of the name overwrites it."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def like(self, name: str, other: Tensor) -> Tensor:
        """The same in the shape of `other`."""
        return self.take(name, *other.shape)
