"""A GGUF file seen as the checkpoint that it was made from: its names, its shapes, values as floats."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint import folder
from quantkit.checkpoint.header import NAMES
from quantkit.checkpoint.reader import Checkpoint, TensorInfo, usual_dtype
from quantkit.errors import QuantkitError, SourceError
from quantkit.gguf.blocks import unpack
from quantkit.gguf.container import Opened
from quantkit.gguf.types import TYPES
from quantkit.run.gguf_source.placed import Piece
from quantkit.run.gguf_source.tokenizer import NORMAL, Vocabulary
from quantkit.tensors import dequantize

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SAMPLE_BYTES = 4096
# weights that are decoded at once: what is made on the way takes several times as much memory
_CHUNK = 2**22
_TOKENIZER = "tokenizer.json"


class TokenizerFolder:
    """Where the tokenizer of a file lies: beside it, or written from its metadata to a folder that lives as
    long as this object."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path, self._metadata = path, metadata
        self._folder: Path | None = None

    def folder(self) -> Path:
        """SourceError when the file has no tokenizer, UnsupportedError when it cannot be expressed."""
        if self._folder is None and self._beside():
            self._folder = self._path.parent
        elif self._folder is None:
            files = list(Vocabulary.of(str(self._path), self._metadata).files())
            self._folder = Path(tempfile.mkdtemp(prefix="quantkit-tokenizer-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            for name, content in files:
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
                (self._folder / name).write_text(text, "utf-8")
        return self._folder

    def _beside(self) -> bool:
        """Whether a tokenizer.json lies beside the file and has the same tokens."""
        file = self._path.parent / _TOKENIZER
        if not file.is_file():
            return False
        model = folder.read_json(file).get("model")
        known = model.get("vocab") if isinstance(model, dict) else None
        tokens: Sequence[str] = self._metadata.get("tokenizer.ggml.tokens") or ()
        kinds: Sequence[int] = self._metadata.get("tokenizer.ggml.token_type") or (NORMAL,) * len(tokens)
        texts = (
            (n, text) for n, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == NORMAL
        )
        return isinstance(known, dict) and all(known.get(text) == n for n, text in texts)


@dataclass(frozen=True, slots=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as floats; what is quantized is fp32, and made whenever it is read.

    path       the file, of several the first
    opened     its header
    pieces     checkpoint name → where its rows lie in the file
    tokenizer  where the tokenizer is
    """

    opened: Opened
    pieces: Mapping[str, tuple[Piece, ...]]
    tokenizer: TokenizerFolder

    def read(self, name: str, *, rows: slice | None = None) -> Tensor:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise SourceError(f"`{self.path}` has no tensor `{name}`{hint}")
        info, found = self.tensors[name], self.pieces[name]
        if rows is not None and len(found) == 1 and found[0].in_order:
            start, stop, step = rows.indices(info.shape[0])
            if step != 1:
                raise ValueError(f"rows must be consecutive, not {rows}")
            return self._values(found[0], start, max(start, stop), info.torch_dtype)
        # biases that a file leaves out are zero
        whole = (torch.empty if found else torch.zeros)(info.shape, dtype=info.torch_dtype)
        for piece in found:
            piece.put(whole, self._values(piece, 0, piece.end - piece.begin, info.torch_dtype))
        return whole if rows is None else whole[rows].clone()

    def extras(self) -> list[Path]:
        """The tokenizer's files; none when there is no tokenizer that could be used."""
        try:
            found = self.tokenizer.folder()
        except QuantkitError:
            return []
        return sorted(f for f in found.iterdir() if folder.is_extra(f.name) and f.is_file())

    def fingerprint(self) -> str:
        """sha256 over config, names, types and the first and last 4 KiB of every tensor of the file."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for stored in self.opened.tensors.values():
            digest.update(f"\n{stored.name}\0{stored.kind}\0{stored.shape}\0".encode())
            data = self.opened.read_bytes(stored.name).reshape(-1)
            for part in (data[:_SAMPLE_BYTES], data[-_SAMPLE_BYTES:]):
                digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    @property
    def dtype(self) -> str:
        """That of the matrices that are stored as floats, float16 where none is."""
        plain = [i for n, i in self.tensors.items() if len(i.shape) > 1 and self.kind(n) in FLOATS]
        return usual_dtype(plain) if plain else "float16"

    @property
    def size_bytes(self) -> int:
        return sum(stored.nbytes for stored in self.opened.tensors.values())

    @property
    def types(self) -> tuple[str, ...]:
        """The types that it is quantized in, the one of most weights first."""
        counts: Counter[str] = Counter()
        for stored in self.opened.tensors.values():
            counts[stored.kind] += math.prod(stored.shape)
        return tuple(kind.upper() for kind, _ in counts.most_common() if kind not in FLOATS)

    def kind(self, name: str) -> str:
        """The type that a checkpoint tensor is stored in, as a scheme is called."""
        found = self.pieces[name]
        return self.opened.tensors[found[0].stored].kind if found else "f32"

    def _values(self, piece: Piece, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of a piece."""
        stored = self.opened.tensors[piece.stored]
        data = self.opened.read_bytes(piece.stored)
        inside = data if piece.matrix is None else data[piece.matrix]
        # of a vector, a row is one value
        rows = inside.view(stored.shape[0], -1) if inside.dim() == 1 else inside
        values = decode(rows[piece.begin + start : piece.begin + stop], stored.kind)
        values = values.flatten() if inside.dim() == 1 else values
        return (values - piece.add if piece.add else values).to(dtype)


def decode(rows: Tensor, kind: str) -> Tensor:
    """The values that (rows, row bytes) of a type are."""
    if kind in FLOATS:
        return rows.clone(memory_format=torch.contiguous_format).view(FLOATS[kind])
    count, row_bytes = rows.shape
    values = torch.empty(count, row_bytes // TYPES[kind].nbytes * TYPES[kind].elements)
    step = max(1, _CHUNK // values.shape[1])
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        values[part] = dequantize(unpack(rows[part], TYPES[kind]))
    return values


def infos(
    path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, tuple[Piece, ...]], opened: Opened
) -> Iterator[TensorInfo]:
    """What a header would say of every checkpoint tensor; its bytes are not what the file has."""
    for name, found in shapes.items():
        kinds = {opened.tensors[piece.stored].kind for piece in pieces[name]}
        kind = kinds.pop() if len(kinds) == 1 else "f32"
        dtype = FLOATS.get(kind, torch.float32)
        yield TensorInfo(name, NAMES[dtype], found, path, 0, math.prod(found) * dtype.itemsize)
