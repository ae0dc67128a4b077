"""`verify`: whether the files of a checkpoint are whole, and mean what their config says.

One tensor is in memory at a time. What is wrong becomes a problem with the name of the tensor; what only
limits the look that was taken becomes a note.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint, first_nonfinite
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.build import build_graph
from quantkit.run.export import MANIFEST
from quantkit.run.plan import locate
from quantkit.run.progress import SILENT, Progress
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, dequantized, open_floats, open_quantized
from quantkit.run.streams import sha256_file
from quantkit.run.table import Table
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize

_SHOWN = 10
# weights that have nothing in common are so far apart: ‖a − b‖² = ‖a‖² + ‖b‖²
_UNRELATED = 1.0


@dataclass(frozen=True, slots=True)
class Difference:
    """A weight beside the source's: ‖Ŵ − W‖ / ‖W‖."""

    name: str
    error: float


@dataclass(slots=True)
class Verification:
    """What was found in `path`.

    checks       what was looked at → how much of it
    problems     what is wrong
    notes        what could not be looked at, and what explains a difference
    differences  quantized weights beside the source's, when there was one
    """

    path: Path
    checks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems

    def worst(self) -> list[Difference]:
        """The largest differences first."""
        return sorted(self.differences, key=lambda d: -d.error)[:_SHOWN]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/verify/1",
            "status": "ok" if self.sound else "damaged",
            "name": self.path.resolve().name,
            "checks": dict(self.checks),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "differences": [{"name": d.name, "error": d.error} for d in self.differences],
        }

    def tables(self) -> list[Table]:
        count = len(self.problems)
        verdict = "sound" if self.sound else f"{count:,} problem{'s' if count > 1 else ''}"
        title = f"{self.path.resolve().name} · {verdict}"
        rows = tuple(self.checks.items())
        tables = [Table(title, ("check", "found"), rows, tuple(self.notes), tuple(self.problems))]
        if self.differences:
            mean = sum(d.error for d in self.differences) / len(self.differences)
            shown = tuple((d.name, f"{d.error:.4f}") for d in self.worst())
            title = (
                f"relative difference of {len(self.differences):,} weights from the source, mean {mean:.4f}"
            )
            tables.append(Table(title, ("largest", "‖Ŵ − W‖ / ‖W‖"), shown))
        return tables


def verify(
    path: Path,
    *,
    against: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Look at every byte of a checkpoint folder; `against` is the source it was made from.

    A damaged checkpoint is no error here: see `Verification.problems`. SourceError when `path` is no folder,
    or the source cannot be opened.
    """
    folder.check_folder(path)
    source = None
    if against is not None:
        progress.step("open", against)
        found = locate(against, offline=offline, cache_dir=cache_dir)
        source = open_floats(Checkpoint.open(found.path))
    report = Verification(path)
    progress.step("verify", "sums of the files")
    _check_sums(report)
    if report.checks and folder.holds_gguf(path):
        report.notes.append("a GGUF file is not read: its bytes are what was written and proven, or not")
        return report
    try:
        checkpoint = Checkpoint.open(path)
        quantized = open_quantized(checkpoint)
        view = checkpoint if quantized is None else dequantized(quantized)
    except SourceError as error:
        report.problems.append(error.message)
        return report
    report.checks["headers"] = f"{len(checkpoint.tensors):,} tensors, {checkpoint.size_bytes:,} bytes"
    if isinstance(view, Dequantized):
        counts = Counter(view.dropped.values())
        report.notes += [f"{count:,} tensors left out: {why}" for why, count in counts.items()]
    _check_names(report, view)
    progress.step("verify", f"{len(checkpoint.tensors):,} tensors")
    _check_values(report, checkpoint, quantized, source)
    if source is not None:
        _compare_rest(report, view, source)
    progress.finish()
    return report


def _check_sums(report: Verification) -> None:
    """Sizes and sha256 of the files that quantkit.json lists."""
    manifest = report.path / MANIFEST
    if not manifest.is_file():
        report.notes.append("no quantkit.json: the sums of the files are not known")
        return
    try:
        files = json.loads(manifest.read_text("utf-8"))["files"]
        listed = {str(name): (int(sums["bytes"]), str(sums["sha256"])) for name, sums in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.problems.append(f"`{manifest}` is not what quantkit writes: {error!r}")
        return
    for name, (size, digest) in listed.items():
        file = report.path / name
        if Path(name).name != name or not file.is_file():
            report.problems.append(f"`{name}` is missing")
        elif file.stat().st_size != size:
            report.problems.append(f"`{name}` has {file.stat().st_size:,} bytes; {size:,} were written")
        elif sha256_file(file) != digest:
            report.problems.append(f"`{name}` changed since it was written: its sha256 is another")
    report.checks["sums"] = f"{len(listed):,} files of quantkit.json"


def _check_names(report: Verification, view: Checkpoint) -> None:
    """Every parameter of the architecture is filled, in its shape, and nothing is left over."""
    try:
        graph = build_graph(view)
    except SourceError as error:
        report.problems.append(error.message)
    except UnsupportedError as error:
        report.notes.append(f"names and shapes were not compared with the architecture: {error.message}")
    else:
        report.checks["architecture"] = f"{len(graph.blocks):,} blocks, every parameter filled"


def _check_values(
    report: Verification,
    checkpoint: Checkpoint,
    quantized: QuantizedCheckpoint | None,
    source: Checkpoint | None,
) -> None:
    """Every quantized weight decodes, and every float is finite."""
    parts = {} if quantized is None else quantized.parts
    inside = {part for found in parts.values() for part in found}
    floats = 0
    for name, info in checkpoint.tensors.items():
        if name not in inside and info.torch_dtype.is_floating_point:
            report.problems += _nonfinite(name, checkpoint.read(name))
            floats += 1
    report.checks["floats"] = f"{floats:,} tensors, all read"
    if quantized is None:
        return
    for name in parts:
        try:
            linear = quantized.linear(name)
        except (SourceError, UnsupportedError) as error:
            report.problems.append(error.message)
            continue
        bad = [problem for what, tensor in _floats(linear) for problem in _nonfinite(what, tensor)]
        report.problems += bad
        if source is not None and not bad:
            report.problems += _compare(report, name, linear, source)
    report.checks["weights"] = f"{len(parts):,} quantized ({quantized.format_name}), all decoded"


def _floats(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of floats that a quantized weight is made of, with a name for a message."""

    def within(what: str, q: QuantizedTensor | Tensor | None) -> Iterator[tuple[str, Tensor]]:
        match q:
            case Tensor():
                if q.is_floating_point():
                    yield f"{linear.name} ({what})", q
            case Affine():
                yield from within("scale", q.scale)
                yield from within("zero point", q.zero_point)
                yield from within("offset", q.offset)
            case Float():
                yield from within("values", q.values)
                yield from within("scale", q.scale)
            case Codebook():
                yield from within("table", q.table)
                yield from within("scale", q.scale)
                yield from within("offset", q.offset)

    yield from within("weight", linear.weight)
    yield from within("scale of the inputs", linear.input_scale)


def _nonfinite(name: str, tensor: Tensor) -> list[str]:
    place = first_nonfinite(tensor)
    return [] if place is None else [f"`{name}` is {tensor[place].item()} at index {list(place)}"]


def _compare(report: Verification, name: str, linear: QuantizedLinear, source: Checkpoint) -> list[str]:
    """Note how far a quantized weight is from the source's; what is wrong when they cannot be compared."""
    if name not in source.tensors:
        return [f"`{name}` is not in the source"]
    original = source.read(name).float()
    weight = dequantize(linear.weight)
    if weight.shape != original.shape and weight.shape == original.T.shape:
        original = original.T
    if weight.shape != original.shape:
        return [f"`{name}` is {tuple(weight.shape)}, the source has {tuple(original.shape)}"]
    norm = float(original.norm())
    distance = float(weight.sub_(original).norm())
    report.differences.append(Difference(name, distance / norm if norm else distance))
    return []


def _compare_rest(report: Verification, view: Checkpoint, source: Checkpoint) -> None:
    """What is not quantized should be the source's; where it is not, factors were folded into it."""
    quantized = view.quantized.parts if isinstance(view, Dequantized) else {}
    plain = [n for n in view.tensors if n not in quantized and n in source.tensors]
    changed = [n for n in plain if not _alike(view.read(n), source.read(n))]
    report.checks["against"] = f"{len(plain) - len(changed):,} of {len(plain):,} tensors equal the source's"
    if changed:
        folded = (
            ": factors were folded into them, as AWQ and SmoothQuant do, so weights differ by those too"
            if quantized
            else ""
        )
        report.notes.append(f"{_listed(changed)} differ from the source{folded}")
        return
    unrelated = [d.name for d in report.differences if d.error >= _UNRELATED]
    if unrelated:
        report.problems.append(f"{_listed(unrelated)} have nothing in common with the source's")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for a cast to another float dtype, which tools do to what they do not quantize."""
    if a.shape != b.shape or (a.dtype == b.dtype and torch.equal(a, b)):
        return a.shape == b.shape
    return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more
