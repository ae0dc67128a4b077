"""llama.cpp's importance matrix: Σ x² of every input of every weight, in both of its file formats.

GGUF     two fp32 tensors per weight, `<name>.in_sum2` and `<name>.counts`: sums and tokens as they are
legacy   per weight the mean times a number of calls, so that the counts of experts are lost

Sources: llama.cpp tools/imatrix/imatrix.cpp (writer) and common/imatrix-loader.cpp (reader).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.atomic import write_bytes
from quantkit.errors import SourceError
from quantkit.gguf import container
from quantkit.gguf.architectures import Placed
from quantkit.gguf.container import Opened, Stored, Value

# what llama.cpp's tool cuts text into unless told otherwise; a legacy file does not say
CHUNK_SIZE = 512
LEGACY = ".dat"
_TYPE, _KIND, _DATASETS = "general.type", "imatrix", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "fetch the file again, or make one with `quantkit calibrate`"
# the count of entries; name length, a name of one byte, calls, length, one value
_HEAD_BYTES, _LEAST_BYTES = 4, 17


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of the input of one GGUF tensor, fp64; one expert when it is dense.

    sums    (experts, in)  Σ x²
    counts  (experts,)     tokens
    """

    sums: Tensor
    counts: Tensor

    def importance(self) -> Tensor:
        """(experts, in) fp32 mean squares; ones where no token was seen, as llama.cpp has it."""
        counts = self.counts[:, None]
        seen = counts > 0
        return torch.where(seen, self.sums / torch.where(seen, counts, 1), 1).to(torch.float32)

    def of_experts(self, experts: int) -> Entry | None:
        """The same for so many experts; None when that cannot be.

        A legacy file does not tell how many there are and has one count for all.
        """
        known, width = self.sums.shape
        if known == experts:
            return self
        if known != 1 or width % experts:
            return None
        return Entry(self.sums.view(experts, -1), self.counts.expand(experts))


@dataclass(frozen=True, slots=True)
class Imatrix:
    """One file: entries by GGUF tensor name (with ``.weight``), and what text they come from."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def read(path: Path, *, chunk_size: int = CHUNK_SIZE) -> Imatrix:
    """The imatrix at `path`, whichever format its content is; SourceError when it is not sound.

    chunk_size  tokens per chunk of a legacy file, which only weighs it against others
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_legacy(path, chunk_size)
    except OSError as error:
        raise SourceError(
            f"cannot read `{path}`: {error.strerror or error}", remedy="check the name and its permissions"
        ) from error
    if not found.entries:
        raise SourceError(f"`{path}` has no entries", remedy=_AGAIN)
    for name, entry in found.entries.items():
        for what, values in (("sums", entry.sums), ("counts", entry.counts)):
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise SourceError(
                    f"`{name}` of `{path}`: {what} are expected to be finite and not negative, "
                    f"found {float(values.min())} to {float(values.max())}",
                    remedy=_AGAIN,
                )
    return found


def write(path: Path, imatrix: Imatrix) -> None:
    """Write `path` whole or not at all: GGUF, or the legacy format when its name ends in ``.dat``."""
    if path.suffix == LEGACY:
        write_bytes(path, _legacy_bytes(imatrix))
        return
    metadata: dict[str, Value] = {
        _TYPE: _KIND,
        _DATASETS: _datasets(imatrix),
        _CHUNKS: imatrix.chunks,
        _CHUNK_SIZE: imatrix.chunk_size,
    }
    names = sorted(imatrix.entries)
    tensors = [stored for name in names for stored in _stored(name, imatrix.entries[name])]
    container.write(path, "", metadata, tensors, _contents(imatrix, names))


def merge(several: Sequence[Imatrix]) -> Imatrix:
    """Sums and counts added; an entry that only some have is theirs (see `unshared`).

    SourceError when they are of different models: widths differ, or no name is common to all.
    """
    first = several[0]
    if not set(first.entries).intersection(*(each.entries for each in several)):
        raise SourceError(
            "the files have no tensor in common: they are of different models",
            remedy="merge what was made from one model, with names as llama.cpp has them",
        )
    entries = dict(first.entries)
    for each in several[1:]:
        for name, entry in each.entries.items():
            entries[name] = _sum(name, entries[name], entry) if name in entries else entry
    datasets = dict.fromkeys(name for each in several for name in each.datasets)
    chunks = int(max(float(entry.counts.max()) for entry in entries.values())) // first.chunk_size
    return Imatrix(entries, tuple(datasets), chunks, first.chunk_size)


def unshared(several: Sequence[Imatrix]) -> tuple[str, ...]:
    """Names that some of them have and others do not, in order."""
    names = set(several[0].entries)
    everywhere = names.intersection(*(each.entries for each in several))
    return tuple(sorted(names.union(*(each.entries for each in several)) - everywhere))


def entries_of(placements: Sequence[Placed], seen: Mapping[str, tuple[Tensor, int]]) -> dict[str, Entry]:
    """Entries of the GGUF tensors whose weights were all `seen`: Σ x² (in,) fp64 and tokens by `Weight.key`.

    A tensor fused of several weights has one vector, because all of them read the same input; weights that
    one checkpoint tensor holds give theirs to each tensor they are cut into.
    """
    made: dict[tuple[int, ...], Entry] = {}
    found = {}
    for placed in placements:
        experts = [keys[0] for keys in _experts(placed)]
        if not all(key in seen for key in experts):
            continue
        # gate and up, or q, k and v, share one copy
        same = tuple(id(seen[key][0]) for key in experts)
        if same not in made:
            counts = torch.tensor([seen[key][1] for key in experts], dtype=torch.float64)
            made[same] = Entry(torch.stack([seen[key][0] for key in experts]), counts)
        found[placed.name] = made[same]
    return found


def importance_for(imatrix: Imatrix, placements: Sequence[Placed], *, prior: float = 0) -> dict[str, Tensor]:
    """(in,) fp32 mean squares by `Weight.key`, for all weights that have an entry (see `missing`).

    prior  tokens that the mean over all experts counts as beside an expert's own. With 0, an expert that no
           token reached has ones.
    Weights that are cut into several GGUF tensors have their entries added. SourceError when an entry does
    not fit the model.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for placed in placements:
        entry = imatrix.entries.get(placed.name)
        if entry is None or not placed.matrix:
            continue
        entry = _with_prior(_fitting(placed, entry), prior)
        for keys, total, count in zip(_experts(placed), entry.sums, entry.counts, strict=True):
            for key in dict.fromkeys(keys):
                sums[key] = sums[key] + total if key in sums else total
                counts[key] = counts[key] + count if key in counts else count
    return {key: Entry(sums[key][None], counts[key][None]).importance()[0] for key in sums}


def missing(imatrix: Imatrix, placements: Sequence[Placed]) -> tuple[str, ...]:
    """GGUF names of the matrices in blocks that the imatrix says nothing of."""
    return tuple(
        placed.name
        for placed in placements
        if placed.matrix and placed.name.startswith("blk.") and placed.name not in imatrix.entries
    )


def _experts(placed: Placed) -> list[list[str]]:
    """Keys of the weights that each expert is made of; one expert when the tensor is dense."""
    experts = placed.shape[0] if len(placed.shape) == 3 else 1
    keys = [source.key for source in placed.sources]
    each = len(keys) // experts
    if not each or len(keys) % experts:
        raise ValueError(f"`{placed.name}` of {experts} experts is made from {len(keys)} weights")
    return [keys[at : at + each] for at in range(0, len(keys), each)]


def _fitting(placed: Placed, entry: Entry) -> Entry:
    experts = placed.shape[0] if len(placed.shape) == 3 else 1
    width = placed.shape[-1]
    fitting = entry.of_experts(experts)
    if fitting is None or fitting.sums.shape[1] != width:
        raise SourceError(
            f"`{placed.name}` of the imatrix has {entry.sums.numel():,} values where the model has "
            f"{experts:,} × {width:,} inputs",
            remedy="give an imatrix that was made from this model",
        )
    return fitting


def _with_prior(entry: Entry, tokens: float) -> Entry:
    total = entry.counts.sum()
    if entry.counts.numel() == 1 or not tokens or not total:
        return entry
    return Entry(entry.sums + tokens * entry.sums.sum(0) / total, entry.counts + tokens)


def _sum(name: str, a: Entry, b: Entry) -> Entry:
    experts = max(a.counts.numel(), b.counts.numel())
    both = a.of_experts(experts), b.of_experts(experts)
    if both[0] is None or both[1] is None or both[0].sums.shape != both[1].sums.shape:
        raise SourceError(
            f"`{name}` has {a.sums.numel():,} values in one file and {b.sums.numel():,} in another",
            remedy="merge what was made from one model",
        )
    return Entry(both[0].sums + both[1].sums, both[0].counts + both[1].counts)


def _datasets(imatrix: Imatrix) -> list[str]:
    """At least one: llama.cpp refuses a file without."""
    return list(imatrix.datasets) or ["unknown"]


def _stored(name: str, entry: Entry) -> Iterator[Stored]:
    experts, width = entry.sums.shape
    dense = experts == 1
    yield Stored.plain(name + _SUMS, (width,) if dense else (experts, width), torch.float32)
    yield Stored.plain(name + _COUNTS, (1,) if dense else (experts, 1), torch.float32)


def _contents(imatrix: Imatrix, names: Sequence[str]) -> Iterator[Tensor]:
    for name in names:
        entry = imatrix.entries[name]
        for values, stored in zip((entry.sums, entry.counts), _stored(name, entry), strict=True):
            yield container.as_bytes(values.to(torch.float32).view(stored.shape))


def _read_gguf(path: Path) -> Imatrix:
    file = container.open_file(path)
    keys = file.metadata
    if absent := [key for key in (_DATASETS, _CHUNKS, _CHUNK_SIZE) if key not in keys]:
        raise SourceError(
            f"`{path}` is a GGUF file of type '{keys.get(_TYPE, 'unknown')}' without {', '.join(absent)}: "
            "no imatrix",
            remedy="give a file that llama-imatrix or `quantkit calibrate` has written",
        )
    datasets, chunks, chunk_size = keys[_DATASETS], keys[_CHUNKS], keys[_CHUNK_SIZE]
    if not isinstance(datasets, tuple) or not isinstance(chunks, int) or not isinstance(chunk_size, int):
        raise SourceError(
            f"`{path}`: a list of texts and two integers are expected under imatrix.*, found "
            f"{type(datasets).__name__}, {type(chunks).__name__} and {type(chunk_size).__name__}",
            remedy=_AGAIN,
        )
    entries = {name: _entry(file, name) for name in sorted({_entry_name(n) for n in file.tensors} - {""})}
    # a chunk size of 0 would say as little as 1
    return Imatrix(entries, tuple(map(str, datasets)), chunks, max(chunk_size, 1))


def _entry(file: Opened, name: str) -> Entry:
    parts = []
    for suffix in (_SUMS, _COUNTS):
        stored = file.tensors.get(name + suffix)
        if stored is None or stored.kind != "f32":
            raise SourceError(
                f"`{name}{suffix}` of `{file.paths[0]}` is expected to hold float32 values, "
                f"found {'nothing' if stored is None else stored.kind}",
                remedy=_AGAIN,
            )
        parts.append(file.read_bytes(stored.name).flatten().view(torch.float32).to(torch.float64))
    sums, counts = parts
    if sums.numel() % counts.numel():
        raise SourceError(
            f"`{name}` of `{file.paths[0]}`: {sums.numel():,} sums are no multiple of {counts.numel():,} "
            "counts",
            remedy=_AGAIN,
        )
    return Entry(sums.view(counts.numel(), -1), counts)


def _entry_name(tensor: str) -> str:
    """The weight that a tensor of the file is about; "" for one of another kind, which readers pass over."""
    for suffix in (_SUMS, _COUNTS):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    return ""


def _legacy_bytes(imatrix: Imatrix) -> bytes:
    """i32 entries; each: i32 name length, name, i32 calls, i32 values, fp32 values; i32 chunks, i32 length,
    text name. Calls are ⌈largest count / chunk size⌉, values mean squares · calls; all little endian."""
    named = [(name, imatrix.entries[name]) for name in sorted(imatrix.entries)]
    kept = [(name.encode(), entry) for name, entry in named if bool((entry.counts > 0).any())]
    parts = [struct.pack("<i", len(kept))]
    for name, entry in kept:
        calls = math.ceil(float(entry.counts.max()) / imatrix.chunk_size)
        # in fp32, as the tool computes
        values = (entry.importance() * calls).contiguous()
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, values.numel())]
        parts.append(values.numpy().astype("<f4").tobytes())
    text = _datasets(imatrix)[0].encode()
    return b"".join([*parts, struct.pack("<ii", imatrix.chunks, len(text)), text])


def _read_legacy(path: Path, chunk_size: int) -> Imatrix:
    bytes_ = _Bytes(path)
    entries: dict[str, Entry] = {}
    most_calls = 0
    for _ in range(bytes_.entries()):
        name = bytes_.text("the name of an entry")
        calls = bytes_.integer(f"the calls of `{name}`", least=0)
        values = bytes_.floats(bytes_.integer(f"the length of `{name}`", least=1), f"the values of `{name}`")
        if name in entries:
            raise SourceError(f"`{path}` has two entries `{name}`", remedy=_AGAIN)
        # no calls: the values are means as they are
        calls = max(calls, 1)
        most_calls = max(most_calls, calls)
        sums = values.to(torch.float64) * chunk_size
        entries[name] = Entry(sums[None], torch.tensor([calls * chunk_size], dtype=torch.float64))
    if not bytes_.left:
        return Imatrix(entries, (), most_calls, chunk_size)
    chunks = bytes_.integer("the number of chunks", least=0)
    dataset = bytes_.text("the name of the text", least=0)
    if bytes_.left:
        raise SourceError(f"`{path}` has {bytes_.left:,} bytes after its end", remedy=_AGAIN)
    return Imatrix(entries, (dataset,) if dataset else (), chunks, chunk_size)


class _Bytes:
    """The bytes of a legacy file from front to back; SourceError when there are fewer than it says."""

    def __init__(self, path: Path) -> None:
        self._path, self._data, self._at = path, path.read_bytes(), 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def entries(self) -> int:
        """How many there are, if that can be."""
        most = (len(self._data) - _HEAD_BYTES) // _LEAST_BYTES
        count = self.integer("the number of entries") if self.left >= _HEAD_BYTES else 0
        if not 0 < count <= most:
            raise SourceError(
                f"`{self._path}` is no imatrix, neither a GGUF file nor a legacy one: its first bytes would "
                f"mean {count:,} entries in {len(self._data):,} bytes",
                remedy="give a file that llama-imatrix or `quantkit calibrate` has written",
            )
        return count

    def integer(self, what: str, *, least: int | None = None) -> int:
        """The next i32, at least `least`."""
        found: int = struct.unpack("<i", self._take(4, what))[0]
        if least is not None and found < least:
            raise SourceError(f"{what} in `{self._path}` is {found:,}, not {least} or more", remedy=_AGAIN)
        return found

    def text(self, what: str, *, least: int = 1) -> str:
        """The next i32 and so many bytes of text."""
        data = self._take(self.integer(f"the length of {what}", least=least), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{what} in `{self._path}` is not text: {data[:32]!r}", remedy=_AGAIN
            ) from error

    def floats(self, count: int, what: str) -> Tensor:
        """The next (count,) fp32 values."""
        # a copy: the bytes of a file are not writable
        return torch.frombuffer(bytearray(self._take(4 * count, what)), dtype=torch.float32)

    def _take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise SourceError(
                f"`{self._path}` ends early: {what} at byte {self._at:,} takes {count:,} bytes, "
                f"{self.left:,} are left",
                remedy=_AGAIN,
            )
        begin, self._at = self._at, self._at + count
        return self._data[begin : self._at]
