"""`inspect`: what a checkpoint is, from its headers and configuration alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.recipe.sizes import format_size
from quantkit.run.export import MANIFEST
from quantkit.run.plan import architecture
from quantkit.run.table import Table

# quant_method in config.json → the format that reads it
_METHODS = {
    "gptq": "gptq",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors of one representation: how many, their parameters (None: not known) and bytes."""

    name: str
    tensors: int
    parameters: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `path` holds. `manifest` is what quantkit wrote beside it, when it did."""

    path: Path
    architecture: str
    quantization: dict[str, Any] | None
    kinds: tuple[Kind, ...]
    manifest: dict[str, Any] | None
    tied: bool

    @property
    def size_bytes(self) -> int:
        return sum(kind.size_bytes for kind in self.kinds)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/inspect/1",
            "status": "ok",
            "name": self.path.name,
            "architecture": self.architecture,
            "tied_embeddings": self.tied,
            "size_bytes": self.size_bytes,
            "quantization": self.quantization,
            "kinds": [
                {"kind": k.name, "tensors": k.tensors, "parameters": k.parameters, "size_bytes": k.size_bytes}
                for k in self.kinds
            ],
            "quantkit": self.manifest,
        }

    def table(self) -> Table:
        method = "not quantized" if self.quantization is None else self.quantization.get("quant_method", "?")
        title = f"{self.path.name} · {self.architecture} · {method} · {format_size(self.size_bytes)}"
        rows = []
        for kind in self.kinds:
            bits = f"{kind.size_bytes * 8 / kind.parameters:.2f}" if kind.parameters else ""
            count = f"{kind.parameters:,}" if kind.parameters is not None else ""
            rows.append((kind.name, f"{kind.tensors:,}", count, format_size(kind.size_bytes), bits))
        columns = ("kind", "tensors", "parameters", "size", "bits per weight")
        return Table(title, columns, tuple(rows), tuple(self._notes()))

    def _notes(self) -> list[str]:
        if self.manifest is None:
            if self.quantization is None:
                return []
            method = str(self.quantization.get("quant_method", "unknown"))
            unread = f"quantkit does not read '{method}' files: what is packed is shown as stored"
            return ["not made by quantkit: no quantkit.json", *([] if method in _METHODS else [unread])]
        m = self.manifest
        options = ", ".join(f"{name}={value}" for name, value in m["options"].items())
        with_ = [f"{m['method']} ({options})", *(t["name"] for t in m.get("transforms", ()))]
        if m.get("kv_cache"):
            with_.append(f"scales for a cache in {m['kv_cache']}")
        notes = [f"made by quantkit {m['quantkit']} from {m['source']['id']} with {', '.join(with_)}"]
        if m.get("calibration"):
            c = m["calibration"]
            names = ", ".join(share["name"] for share in c["sources"])
            notes.append(f"calibrated on {c['rows']:,} × {c['length']:,} tokens of {names}")
        for q in m.get("quality", ()):
            notes.append(
                f"perplexity {q['target']['value']:.3f} (source {q['source']['value']:.3f}), mean KL "
                f"{q['kl_mean']:.5f}, same top-1 {100 * q['top1_agreement']:.2f} % on {q['convention']}"
            )
        return notes


def inspect(path: Path) -> Inspection:
    """Look at a checkpoint folder; SourceError when it is none. Reads no weights."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config.get("quantization_config")
    quantization = config if isinstance(config, dict) else None
    manifest = path / MANIFEST
    return Inspection(
        path=path.resolve(),
        architecture=architecture(checkpoint),
        quantization=quantization,
        kinds=tuple(_kinds(checkpoint, quantization)),
        manifest=json.loads(manifest.read_text("utf-8")) if manifest.is_file() else None,
        tied=bool(checkpoint.config.get("tie_word_embeddings", False)),
    )


def _kinds(checkpoint: Checkpoint, quantization: dict[str, Any] | None) -> list[Kind]:
    """Tensors summed up by what they are: quantized weights by scheme, the rest by dtype."""
    method = None if quantization is None else _METHODS.get(str(quantization.get("quant_method")))
    packed: dict[str, dict[str, Any]] = {}
    tensors, parameters, sizes = Counter[str](), Counter[str](), Counter[str]()
    if method is not None and quantization is not None:
        reader = registry.load("formats", method).FORMAT
        for name, info in checkpoint.tensors.items():
            base = reader.base_name(name)
            if base is not None:
                packed.setdefault(base, {})[name] = info
        for base, parts in packed.items():
            if base in checkpoint.tensors:
                parts[base] = checkpoint.tensors[base]
            shape, bits = reader.measure(base, parts, quantization)
            kind = f"{method} {bits} bit"
            tensors[kind] += 1
            parameters[kind] += shape[0] * shape[1]
            sizes[kind] += sum(info.nbytes for info in parts.values())
    inside = {name for parts in packed.values() for name in parts}
    for name, info in checkpoint.tensors.items():
        if name not in inside:
            tensors[info.dtype] += 1
            sizes[info.dtype] += info.nbytes
            if info.torch_dtype.is_floating_point:
                parameters[info.dtype] += info.nbytes // info.torch_dtype.itemsize
    return [Kind(kind, tensors[kind], parameters.get(kind), sizes[kind]) for kind in tensors]
