"""`ShardedWriter`: a sharded safetensors checkpoint, written one tensor at a time.

The plan fixes every byte position before any data exists, so headers are written first and no more
than a slice of one tensor is ever copied. Inside a file wider dtypes come first, which keeps every
tensor aligned whatever the order of writing; the safetensors library does the same.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import AtomicFile, write_text
from quantkit.checkpoint.header import METADATA, NAMES, build_header
from quantkit.errors import RunError

INDEX_FILE = "model.safetensors.index.json"
SLICE_BYTES = 64 * 2**20
FORMAT_PT: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file: its exact size in bytes, and where each of `specs` begins after the header."""

    name: str
    bytes: int
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All files of a checkpoint; `metadata` is part of every header and therefore of the sizes."""

    files: tuple[PlannedFile, ...]
    metadata: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all safetensors files together, headers included."""
        return sum(file.bytes for file in self.files)


def plan_shards(
    specs: Sequence[TensorSpec], shard_bytes: int, *, metadata: Mapping[str, str] = FORMAT_PT
) -> ShardPlan:
    """Distribute `specs`, in order, over files of at most `shard_bytes` of data each.

    A tensor larger than `shard_bytes` gets a file of its own. Raises RunError for a name that occurs
    twice, is reserved, or whose dtype safetensors cannot hold.
    """
    _check_specs(specs)
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not groups or spec.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = [_plan_file(name, group, metadata) for name, group in zip(names, groups, strict=True)]
    return ShardPlan(tuple(files), metadata)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    if not specs:
        raise RunError("a checkpoint without tensors cannot be written")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or spec.name == METADATA:
            why = "is reserved by the file format" if spec.name == METADATA else "would be written twice"
            raise RunError(f"tensor `{spec.name}` {why}")
        if spec.dtype not in NAMES:
            raise RunError(f"tensor `{spec.name}`: safetensors cannot hold {spec.dtype}")
        seen.add(spec.name)


def _plan_file(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PlannedFile:
    begins: dict[str, int] = {}
    position = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        begins[spec.name] = position
        position += spec.nbytes
    offsets = tuple(begins[spec.name] for spec in specs)
    return PlannedFile(name, len(_header(specs, offsets, metadata)) + position, tuple(specs), offsets)


def _header(specs: Sequence[TensorSpec], offsets: Sequence[int], metadata: Mapping[str, str]) -> bytes:
    placed = zip(specs, offsets, strict=True)
    return build_header([(s.name, s.dtype, s.shape, at, at + s.nbytes) for s, at in placed], metadata)


class ShardedWriter:
    """Context manager that writes the files of `plan` into `folder`; tensors come in planned order.

    A file is complete and flushed before it gets its name, and the index is written last, on leaving.
    Leaving with an exception removes the file under construction; finished shards stay. RunError when a
    tensor is missing, unexpected or of the wrong dtype or shape, or when the disk refuses.
    """

    def __init__(self, folder: Path, plan: ShardPlan, metadata: Mapping[str, str] | None = None) -> None:
        if metadata is not None and dict(metadata) != dict(plan.metadata):
            raise ValueError("metadata is part of the planned sizes: give it to plan_shards as well")
        self._folder = folder
        self._plan = plan
        self._queue = deque((file, i) for file in plan.files for i in range(len(file.specs)))
        self._unwritten = plan.total_bytes
        self._file: AtomicFile | None = None
        self._data_begin = 0

    def __enter__(self) -> ShardedWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any layout or device), in slices of at most 64 MiB."""
        if not self._queue:
            raise RunError(f"tensor `{name}` was not planned; all planned tensors are written")
        planned, i = self._queue[0]
        _check_tensor(planned.specs[i], name, tensor)
        file = self._file if self._file is not None else self._open(planned)
        position = self._data_begin + planned.offsets[i]
        for piece in _slices(tensor.detach()):
            file.write(piece.numpy().data, at=position)
            position += piece.numel()
        self._queue.popleft()
        if not self._queue or self._queue[0][0] is not planned:
            file.commit()
            self._file = None

    def _open(self, planned: PlannedFile) -> AtomicFile:
        self._unwritten -= planned.bytes
        file = AtomicFile(self._folder / planned.name, size=planned.bytes, beyond=self._unwritten)
        self._file = file  # from here on, leaving the context removes it
        header = _header(planned.specs, planned.offsets, self._plan.metadata)
        file.write(header)
        self._data_begin = len(header)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.discard()
        if error is not None:
            return
        if self._queue:
            planned, i = self._queue[0]
            count = len(self._queue)
            raise RunError(
                f"tensor `{planned.specs[i].name}` was never written; {count:,} planned tensors are missing"
            )
        if len(self._plan.files) > 1:
            write_text(self._folder / INDEX_FILE, _index(self._plan))


def _check_tensor(spec: TensorSpec, name: str, tensor: Tensor) -> None:
    if name != spec.name:
        raise RunError(f"tensor `{name}` came out of order: the plan expects `{spec.name}` now")
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise RunError(f"tensor `{name}`: planned as {spec.dtype} {spec.shape}, got {found}")


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of `tensor` in row-major order as 1-d uint8 CPU tensors of at most `SLICE_BYTES`."""
    if tensor.nbytes <= SLICE_BYTES:
        flat = tensor.cpu().contiguous()
        # a tensor of one element is contiguous whatever its stride, but cannot be viewed as bytes then
        yield flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
    elif len(tensor) == 1:
        yield from _slices(tensor[0])
    else:
        rows = max(1, SLICE_BYTES * len(tensor) // tensor.nbytes)
        for part in torch.split(tensor, rows):
            yield from _slices(part)


def _index(plan: ShardPlan) -> str:
    """The index file as transformers writes it; total_size counts data without headers."""
    total = sum(spec.nbytes for file in plan.files for spec in file.specs)
    weight_map = {spec.name: file.name for file in plan.files for spec in file.specs}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
