"""`inspect`: what a checkpoint is, from its headers and configuration alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.gguf.container import Opened, open_file
from quantkit.hub.manifest import Manifest, find_manifest
from quantkit.recipe.sizes import format_size
from quantkit.run.dialects import find_config, method_of, writer
from quantkit.run.gguf_source import find_gguf
from quantkit.run.gguf_source.facts import GgufFacts
from quantkit.run.plan import architecture
from quantkit.run.quantized import QuantizedCheckpoint, open_quantized
from quantkit.table import Table
from quantkit.tensors import Affine, QuantizedTensor, values


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors of one representation: how many, their parameters (None: not known) and bytes."""

    name: str
    tensors: int
    parameters: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `path` holds.

    manifest  what quantkit wrote beside it, when it did
    writer    the tool that quantized it and its version, where files say so
    traits    what its quantized weights are like, seen on one of them; None: they were not downloaded
    unread    why its quantized weights cannot be read, None when they can
    gguf      what the file says of itself when it is one of llama.cpp's
    label     what to call it, None: by the name of its folder or file
    """

    path: Path
    architecture: str
    quantization: dict[str, Any] | None
    kinds: tuple[Kind, ...]
    manifest: Manifest | None
    tied: bool
    writer: str | None = None
    traits: tuple[str, ...] | None = ()
    unread: str | None = None
    gguf: GgufFacts | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.path.name

    @property
    def size_bytes(self) -> int:
        return sum(kind.size_bytes for kind in self.kinds)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/inspect/1",
            "status": "ok",
            "name": self.name,
            "architecture": self.architecture,
            "tied_embeddings": self.tied,
            "size_bytes": self.size_bytes,
            "quantization": self.quantization,
            "writer": self.writer,
            "traits": None if self.traits is None else list(self.traits),
            "kinds": [
                {"kind": k.name, "tensors": k.tensors, "parameters": k.parameters, "size_bytes": k.size_bytes}
                for k in self.kinds
            ],
            "quantkit": None if self.manifest is None else self.manifest.to_json(),
            **({} if self.gguf is None else {"gguf": self.gguf.to_json()}),
        }

    def table(self) -> Table:
        method = "not quantized" if self.quantization is None else method_of(self.quantization)
        if self.gguf is not None:
            method = f"GGUF {self.gguf.label or ''}".strip()
        title = f"{self.name} · {self.architecture} · {method} · {format_size(self.size_bytes)}"
        rows = []
        for kind in self.kinds:
            bits = f"{kind.size_bytes * 8 / kind.parameters:.2f}" if kind.parameters else ""
            count = f"{kind.parameters:,}" if kind.parameters is not None else ""
            rows.append((kind.name, f"{kind.tensors:,}", count, format_size(kind.size_bytes), bits))
        columns = ("kind", "tensors", "parameters", "size", "bits per weight")
        return Table(title, columns, tuple(rows), tuple(self._notes()))

    def _notes(self) -> list[str]:
        own = [] if self.gguf is None else list(self.gguf.lines())
        if self.manifest is None:
            return own if self.quantization is None else self._foreign()
        return [*own, *self._ours(self.manifest)]

    def _ours(self, m: Manifest) -> list[str]:
        """Notes on what quantkit made."""
        if m.repacked is not None:
            notes = [f"repacked by quantkit {m.quantkit} from {m.repacked['source']}, every value the same"]
            if m.method == "unknown":
                return notes
        else:
            notes = [f"made by quantkit {m.quantkit}"]
        notes.append(f"quantized from {m.source.id} with {', '.join(_means(m))}")
        c = m.calibration or {}
        if "imatrix" in c:
            notes.append(f"importance of inputs from {c['imatrix']} ({', '.join(c['datasets'])})")
        elif c:
            names = ", ".join(share["name"] for share in c["sources"])
            notes.append(f"calibrated on {c['rows']:,} × {c['length']:,} tokens of {names}")
        for q in m.quality:
            notes.append(
                f"perplexity {q.target.value:.3f} (source {q.source.value:.3f}), mean KL "
                f"{q.kl_mean:.5f}, same top-1 {100 * q.top1_agreement:.2f} % on {q.convention}"
            )
        return notes

    def _foreign(self) -> list[str]:
        """Notes on what another tool quantized."""
        notes = ["not made by quantkit: no quantkit.json"]
        if self.writer is not None:
            notes.append(f"written by {self.writer}")
        if self.traits is None:
            notes.append(
                "groups and zero points are not shown: they are seen on weights, and only headers are here"
            )
        elif self.traits:
            notes.append(f"its weights have {', '.join(self.traits)}")
        if self.unread is not None:
            notes.append(f"what is packed is shown as stored: {self.unread}")
        return notes


def _means(manifest: Manifest) -> Iterator[str]:
    """What a manifest says the codes were chosen with."""
    made = manifest.made
    options = ", ".join(f"{name}={value}" for name, value in made["options"].items())
    yield f"{manifest.method} ({options})"
    yield from (transform["name"] for transform in made["transforms"])
    if made["kv_cache"]:
        yield f"scales for a cache in {made['kv_cache']}"


def inspect(path: Path) -> Inspection:
    """Look at a checkpoint folder or a GGUF file; SourceError when it is neither.

    Reads headers and, where it is here, one quantized weight.
    """
    if (file := find_gguf(path)) is not None:
        return _inspect_gguf(path, open_file(file))
    checkpoint = Checkpoint.open(path)
    stated = find_config(path, checkpoint.config)
    quantized, unread = None, None
    try:
        quantized = open_quantized(checkpoint)
    except UnsupportedError as error:
        unread = error.message
    return Inspection(
        path=path.resolve(),
        architecture=architecture(checkpoint),
        quantization=None if stated is None else dict(stated),
        kinds=tuple(_kinds(checkpoint, quantized)),
        manifest=find_manifest(path),
        tied=bool(checkpoint.config.get("tie_word_embeddings", False)),
        writer=None if stated is None else writer(stated, _metadata(checkpoint)),
        traits=() if quantized is None else _traits(quantized),
        unread=unread,
    )


def _inspect_gguf(path: Path, opened: Opened) -> Inspection:
    facts = GgufFacts.of(opened)
    tensors, parameters, sizes = Counter[str](), Counter[str](), Counter[str]()
    for stored in opened.tensors.values():
        kind = stored.kind.upper()
        tensors[kind] += 1
        parameters[kind] += math.prod(stored.shape)
        sizes[kind] += stored.nbytes
    return Inspection(
        path=path.resolve(),
        architecture=facts.model or facts.architecture,
        quantization=None,
        kinds=tuple(Kind(kind, tensors[kind], parameters[kind], sizes[kind]) for kind in tensors),
        manifest=find_manifest(opened.paths[0].parent, opened.paths[0].name),
        tied="token_embd.weight" in opened.tensors and "output.weight" not in opened.tensors,
        gguf=facts,
    )


def _metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
    """What the header of the first file says beside its tensors."""
    first = next(iter(checkpoint.tensors.values()), None)
    return {} if first is None else read_header(first.file).metadata


def _traits(quantized: QuantizedCheckpoint) -> tuple[str, ...] | None:
    """What one of the quantized weights shows; None where only headers are here."""
    name = next(iter(quantized.parts), None)
    try:
        return () if name is None else tuple(_shown(quantized.linear(name).weight))
    except NotDownloaded:
        return None


def _shown(q: QuantizedTensor) -> Iterator[str]:
    rows, columns = q.group
    yield f"groups of {columns} inputs" if rows == 1 else f"groups of {rows} × {columns}"
    if isinstance(q, Affine) and q.zero_point is not None:
        yield "fractional zero points" if q.zero_point.is_floating_point() else "zero points"
    if isinstance(q, Affine) and q.column_group is not None:
        yield "columns grouped in order of importance (act-order)"
    if bool((values(q.scale) < 0).any()):
        yield "negative scales"


def _kinds(checkpoint: Checkpoint, quantized: QuantizedCheckpoint | None) -> list[Kind]:
    """Tensors summed up by what they are: quantized weights by format and bits, the rest by dtype."""
    tensors, parameters, sizes = Counter[str](), Counter[str](), Counter[str]()
    inside: set[str] = set()
    if quantized is not None:
        for name, parts in quantized.parts.items():
            shape, bits = quantized.measure(name)
            kind = f"{quantized.format_name} {bits} bit"
            tensors[kind] += 1
            parameters[kind] += shape[0] * shape[1]
            sizes[kind] += sum(checkpoint.tensors[part].nbytes for part in parts)
            inside.update(parts)
    for name, info in checkpoint.tensors.items():
        if name not in inside:
            tensors[info.dtype] += 1
            sizes[info.dtype] += info.nbytes
            if info.torch_dtype.is_floating_point:
                parameters[info.dtype] += info.nbytes // info.torch_dtype.itemsize
    return [Kind(kind, tensors[kind], parameters.get(kind), sizes[kind]) for kind in tensors]
