"""`Report`: what a run made and what it measured. JSON first; tables are views.

Nothing in it depends on the clock or the machine's paths, so a run that was killed and continued writes the
same bytes; what engines made of the files is told, and kept in `checks.json` beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.evaluate.quality import Quality
from quantkit.hub.manifest import Check
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import Gates
from quantkit.run.quantize import TensorMetrics
from quantkit.table import Table


@dataclass(frozen=True, slots=True)
class TargetReport:
    """One target: where it is, how large, how good, and what engines made of it."""

    name: str
    folder: str
    method: str
    scheme: str
    size_bytes: int
    bits_per_weight: float
    tensors: tuple[TensorMetrics, ...]
    quality: tuple[Quality, ...]
    checks: tuple[Check, ...] = ()

    @property
    def outliers(self) -> tuple[int, int] | None:
        """(outlier columns, weights that meet any), None when nobody counted."""
        counts = [int(t.facts["outlier_columns"]) for t in self.tensors if "outlier_columns" in t.facts]
        return (sum(counts), sum(count > 0 for count in counts)) if counts else None

    @property
    def fallbacks(self) -> int:
        """Weights whose method fell back or had to be helped."""
        return sum(t.note is not None for t in self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "method": self.method,
            "scheme": self.scheme,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "fallbacks": self.fallbacks,
            "quality": [q.to_json() for q in self.quality],
            "tensors": [t.to_json() for t in self.tensors],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The whole run."""

    source: str
    source_bytes: int
    source_bpw: float
    calibration: dict[str, Any] | None
    targets: tuple[TargetReport, ...]
    gates: Gates

    @property
    def broken_gates(self) -> tuple[str, ...]:
        """Every limit of the recipe that a target breaks; the files are kept all the same."""
        broken = []
        for target in self.targets:
            for q in target.quality:
                checks = (
                    ("ppl_ratio_max", q.ratio.value, self.gates.ppl_ratio_max, 1),
                    ("kl_mean_max", q.kl_mean, self.gates.kl_mean_max, 1),
                    ("top1_agreement_min", q.top1_agreement, self.gates.top1_agreement_min, -1),
                )
                for name, value, limit, sign in checks:
                    if limit is not None and sign * value > sign * limit:
                        broken.append(
                            f"{target.name}: {name} is {limit:g}, measured {value:.4g} on {q.convention}"
                        )
        return tuple(broken)

    @property
    def unsound(self) -> tuple[str, ...]:
        """Every target that its engine does not load, or computes something else from."""
        return tuple(
            f"{target.name}: {check.engine} {check.version}: {check.problem}"
            for target in self.targets
            for check in target.checks
            if check.problem is not None
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/convert/1",
            "status": "unsound" if self.unsound else "gates-failed" if self.broken_gates else "ok",
            "broken_gates": list(self.broken_gates),
            "source": {
                "id": self.source,
                "size_bytes": self.source_bytes,
                "bits_per_weight": self.source_bpw,
            },
            "calibration": self.calibration,
            "targets": [t.to_json() for t in self.targets],
        }

    def table(self) -> Table:
        """One row per target and evaluation text, the source first."""
        rows = []
        measured = next((t.quality for t in self.targets if t.quality), ())
        first = _source_cells(measured[0]) if measured else ("", "", "", "")
        rows.append((self.source, "–", format_size(self.source_bytes), f"{self.source_bpw:.2f}", *first))
        for target in self.targets:
            head = (
                target.name,
                target.method,
                format_size(target.size_bytes),
                f"{target.bits_per_weight:.2f}",
            )
            if not target.quality:
                rows.append((*head, "", "", "", ""))
            for quality in target.quality:
                rows.append((*head, *_cells(quality)))
        columns = ("target", "method", "size", "bpw", "perplexity", "vs source", "mean KL", "same top-1")
        return Table(
            "result", columns, tuple(rows), tuple(self._notes()), (*self.unsound, *self.broken_gates)
        )

    def _notes(self) -> list[str]:
        notes = []
        conventions = dict.fromkeys(q.convention for t in self.targets for q in t.quality)
        if conventions:
            notes.append(
                f"perplexity: {', '.join(conventions)}; ± is one standard error; KL in nats per token"
            )
        for target in self.targets:
            if target.fallbacks:
                notes.append(f"{target.name}: {target.fallbacks} weights needed help, see report.json")
            if target.outliers is not None:
                columns, sites = target.outliers
                notes.append(
                    f"{target.name}: calibration saw {columns:,} outlier columns in {sites:,} weights, which "
                    "LLM.int8 computes in 16 bit"
                )
            for check in target.checks:
                if check.kl_mean is not None and check.problem is None:
                    notes.append(
                        f"{target.name}: loaded by {check.engine} {check.version}, which computes the same: "
                        f"KL {check.kl_mean:.1e} over {check.tokens:,} tokens"
                    )
            if any(q.ratio.value < 1 - 2 * q.ratio.error for q in target.quality):
                notes.append(
                    f"{target.name}: perplexity lies below the source's: the calibration text resembles the "
                    "evaluation text; rank by KL"
                )
        return notes


def _source_cells(q: Quality) -> tuple[str, str, str, str]:
    return (f"{q.source.value:.3f} ± {q.source.error:.3f}", "", "", "")


def _cells(q: Quality) -> tuple[str, str, str, str]:
    return (
        f"{q.target.value:.3f} ± {q.target.error:.3f}",
        f"{100 * (q.ratio.value - 1):+.2f} ± {100 * q.ratio.error:.2f} %",
        f"{q.kl_mean:.5f}",
        f"{100 * q.top1_agreement:.2f} %",
    )
