"""What `verify` found, and how weights are held against what they should be."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, first_nonfinite
from quantkit.hub.manifest import Check
from quantkit.recipe.sizes import format_size
from quantkit.run.table import Table
from quantkit.tensors import Affine, Codebook, Float, Lattice, QuantizedLinear, QuantizedTensor

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
    engines      what engines make of the files
    label        what to call it, None: by the name of its folder or file
    """

    path: Path
    checks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    engines: list[Check] = field(default_factory=list)
    label: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.path.resolve().name

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
            "name": self.name,
            "checks": dict(self.checks),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "engines": [asdict(check) for check in self.engines],
            "differences": [{"name": d.name, "error": d.error} for d in self.differences],
        }

    def tables(self) -> list[Table]:
        count = len(self.problems)
        verdict = "sound" if self.sound else f"{count:,} problem{'s' if count > 1 else ''}"
        title = f"{self.name} · {verdict}"
        rows = (*self.checks.items(), *((check.engine, engine_line(check)) for check in self.engines))
        tables = [Table(title, ("check", "found"), rows, tuple(self.notes), tuple(self.problems))]
        if self.differences:
            mean = sum(d.error for d in self.differences) / len(self.differences)
            shown = tuple((d.name, f"{d.error:.4f}") for d in self.worst())
            title = (
                f"relative difference of {len(self.differences):,} weights from the source, mean {mean:.4f}"
            )
            tables.append(Table(title, ("largest", "‖Ŵ − W‖ / ‖W‖"), shown))
        return tables


def engine_line(check: Check) -> str:
    """What an engine makes of the files, in one line."""
    parts = [check.version]
    if check.kl_mean is not None and check.top1_agreement is not None:
        parts.append(f"{check.tokens:,} tokens beside quantkit's own reading: KL {check.kl_mean:.2g}")
        parts.append(f"same top-1 {check.top1_agreement:.1%}")
    elif check.problem is None:
        parts.append(f"{check.tokens:,} tokens, all finite")
    if check.peak_bytes is not None:
        parts.append(f"{format_size(check.peak_bytes)} of memory")
    return "; ".join([*parts, *([] if check.problem is None else ["wrong"])])


def floats_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
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
            case Lattice():
                yield from within("scale", q.scale)

    yield from within("weight", linear.weight)
    yield from within("scale of the inputs", linear.input_scale)


def nonfinite(name: str, tensor: Tensor) -> list[str]:
    place = first_nonfinite(tensor)
    return [] if place is None else [f"`{name}` is {tensor[place].item()} at index {list(place)}"]


def compare(report: Verification, name: str, weight: Tensor, source: Checkpoint) -> list[str]:
    """Note how far a quantized weight is from the source's; what is wrong when they cannot be compared."""
    if name not in source.tensors:
        return [f"`{name}` is not in the source"]
    original = source.read(name).float()
    if weight.shape != original.shape and weight.shape == original.T.shape:
        original = original.T
    if weight.shape != original.shape:
        return [f"`{name}` is {tuple(weight.shape)}, the source has {tuple(original.shape)}"]
    norm = float(original.norm())
    distance = float(weight.sub_(original).norm())
    report.differences.append(Difference(name, distance / norm if norm else distance))
    return []


def compare_rest(
    report: Verification, view: Checkpoint, source: Checkpoint, quantized: Collection[str]
) -> None:
    """What is not quantized should be the source's; where it is not, factors were folded into it."""
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
