"""What `verify` found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.reader import first_nonfinite
from quantkit.hub.manifest import Check
from quantkit.recipe.sizes import format_size
from quantkit.table import Table
from quantkit.tensors import Affine, Codebook, Float, Lattice, QuantizedLinear, QuantizedTensor

_SHOWN = 10


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


def listed(names: Sequence[str]) -> str:
    """The first of them, for a message."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more
