"""One tensor of a file, described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import UnsupportedError
from quantkit.gguf.types import OTHER_TYPES, TYPES, BlockType

MAX_NAME, MAX_DIMENSIONS = 63, 4
_PLAIN = MappingProxyType({torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"})
_KINDS: Mapping[str, BlockType] = MappingProxyType({**TYPES, **OTHER_TYPES})


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: `shape` is the logical one, (…, out, in), `kind` the name of a type: ``q4_k``."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        """A tensor of floats; UnsupportedError for a dtype that models do not hold."""
        if dtype not in _PLAIN:
            raise UnsupportedError(f"GGUF stores `{name}` as float32, float16 or bfloat16, not {dtype}")
        return cls(name, shape, _PLAIN[dtype])

    @property
    def type(self) -> BlockType:
        """What `kind` names; UnsupportedError for a name that means nothing."""
        if self.kind not in _KINDS:
            raise UnsupportedError(f"`{self.name}` is of the type {self.kind!r}, which GGUF does not have")
        return _KINDS[self.kind]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape in bytes."""
        return (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor of floats as files hold them."""
    return tensor.contiguous().view(torch.uint8)
