"""`Checkpoint`: a folder of safetensors whose tensors have not been read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint import folder, header_file
from quantkit.checkpoint.header import TensorInfo, read_header
from quantkit.errors import SourceError

__all__ = ["Checkpoint", "TensorInfo", "first_nonfinite", "usual_dtype"]

_SAMPLE_BYTES = 4096
_SCAN_ELEMENTS = 2**24
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint folder. `tensors` is in file order, then in order of the data.

    config is the parsed config.json; nothing of the weights is held in memory.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Parse config, index and headers in `path`; SourceError on anything missing or malformed.

        Of weights that were not downloaded the header suffices, see `header_file`: what they hold is
        known, and `read` raises NotDownloaded.
        """
        folder.check_folder(path)
        config = folder.read_config(path)
        names = header_file.names_in(path)
        tensors: dict[str, TensorInfo] = {}
        for file in folder.weight_files(f"`{path}`", names, lambda name: folder.read_index(path / name)):
            _add(tensors, read_header(path / file).tensors)
        if (index := folder.index_file(names)) is not None:
            _check_index(path / index, tensors)
        return cls(path, MappingProxyType(config), MappingProxyType(tensors))

    def read(self, name: str, *, rows: slice | None = None) -> Tensor:
        """A fresh tensor in the stored dtype; `rows` picks a range of the first dimension.

        Reads from the file instead of mapping it, so memory is bounded by what is returned. SourceError
        when the name is unknown or the file is shorter than its header said.
        """
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise SourceError(f"`{self.path}` has no tensor `{name}`{hint}")
        info = self.tensors[name]
        if rows is None:
            return _read_bytes(info, info.begin, info.end).view(info.torch_dtype).reshape(info.shape)
        start, stop, step = rows.indices(info.shape[0])
        if step != 1:
            raise ValueError(f"rows must be consecutive, not {rows}")
        stop = max(start, stop)
        row_bytes = info.nbytes // max(info.shape[0], 1)
        data = _read_bytes(info, info.begin + start * row_bytes, info.begin + stop * row_bytes)
        return data.view(info.torch_dtype).reshape(stop - start, *info.shape[1:])

    def extras(self) -> list[Path]:
        """Files to copy along: tokenizer, chat template, generation config, licence."""
        return sorted(f for f in self.path.iterdir() if folder.is_extra(f.name) and f.is_file())

    def fingerprint(self) -> str:
        """sha256 over config, headers, file sizes and the first and last 4 KiB of every tensor.

        Cheap, and different when weights were exchanged; not a proof that every byte is the same.
        """
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for info in self.tensors.values():
            digest.update(f"\n{info.name}\0{info.dtype}\0{info.shape}\0".encode())
            for begin in (info.begin, max(info.begin, info.end - _SAMPLE_BYTES)):
                digest.update(_read_bytes(info, begin, min(info.end, begin + _SAMPLE_BYTES)).numpy().data)
        for file in dict.fromkeys(info.file for info in self.tensors.values()):
            digest.update(f"\n{file.stat().st_size}".encode())
        return digest.hexdigest()

    @property
    def dtype(self) -> str:
        """torch dtype name of most of the parameters: "bfloat16", "float16" or "float32"."""
        return usual_dtype(self.tensors.values())

    @property
    def model_type(self) -> str:
        """The kind of model, as config.json names it; empty where it does not."""
        return str(self.config.get("model_type", ""))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(info.nbytes for info in self.tensors.values())


def usual_dtype(tensors: Iterable[TensorInfo]) -> str:
    """torch dtype name of most of the 16- and 32-bit elements; "float32" when there are none."""
    elements: Counter[str] = Counter()
    for info in tensors:
        if info.dtype in _FLOATS:
            elements[_FLOATS[info.dtype]] += info.nbytes // info.torch_dtype.itemsize
    return elements.most_common(1)[0][0] if elements else "float32"


def first_nonfinite(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity in row-major order, or None; works for every float dtype."""
    if not tensor.is_floating_point():
        return None
    position = 0
    for part in torch.split(tensor.reshape(-1), _SCAN_ELEMENTS):
        # extremes are NaN where any value is, and 20 times quicker to have than a verdict on each
        if not part.numel() or (part.element_size() > 1 and _finite_ends(part)):
            position += part.numel()
            continue
        # torch has no isfinite for the 8-bit floats.
        bad = ~torch.isfinite(part.to(torch.float32) if part.element_size() == 1 else part)
        if bad.any():
            flat = torch.tensor(position + int(bad.to(torch.uint8).argmax()))
            return tuple(int(i) for i in torch.unravel_index(flat, tensor.shape))
        position += part.numel()
    return None


def _finite_ends(part: Tensor) -> bool:
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(part))


def _add(tensors: dict[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    for name, info in more.items():
        if name in tensors:
            raise SourceError(
                f"tensor `{name}` is in both `{tensors[name].file}` and `{info.file}`",
                remedy="remove the file that does not belong to the model",
            )
        tensors[name] = info


def _check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor that the index names is in the shard that the index names."""
    for name, file in folder.read_index(index).items():
        if name not in tensors or tensors[name].file.name != file:
            where = f"it is in `{tensors[name].file.name}`" if name in tensors else "no shard has it"
            raise SourceError(
                f"`{index}`: tensor {name[:200]!r} should be in `{file}`, but {where}",
                remedy="index and shards are of different versions: download both again",
            )


def _read_bytes(info: TensorInfo, begin: int, end: int) -> Tensor:
    """Bytes ``[begin, end)`` of the file as 1-d uint8 tensor; NotDownloaded where there is only a header."""
    out = torch.empty(end - begin, dtype=torch.uint8)
    rest = out.numpy().data
    try:
        with info.file.open("rb", buffering=0) as f:
            f.seek(begin)
            while rest:
                count = f.readinto(rest)
                if not count:
                    raise SourceError(
                        f"`{info.file}` ends {len(rest):,} bytes inside tensor `{info.name}`",
                        remedy="the file changed after it was opened: download it again",
                    )
                rest = rest[count:]
    except OSError as error:
        if header_file.stands_in(info.file):
            kept = bytearray(header_file.data(info.file, info.name, begin, end))
            return torch.frombuffer(kept, dtype=torch.uint8) if kept else out
        raise SourceError(
            f"cannot read `{info.name}` from `{info.file}`: {error.strerror}",
            remedy="check the file and its disk",
        ) from error
    return out
