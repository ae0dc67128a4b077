"""Plan before act: everything that can be refused is refused, and every size is known, before work.

`plan` reads headers only. File sizes are exact to the byte; memory and disk are upper estimates.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import resources
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardPlan, plan_shards
from quantkit.errors import SourceError, UnsupportedError
from quantkit.hub import fetch
from quantkit.hub.fetch import Source
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph
from quantkit.progress import SILENT, Progress
from quantkit.recipe.plan import Described, Resolved, TargetPlan, resolve
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import DEFAULT_LENGTH, Recipe
from quantkit.run.estimate import Estimate, context, estimate, existing, resource_blockers
from quantkit.run.files import entries, parameters, quantized_parameters
from quantkit.run.gguf import Title, plan_target
from quantkit.run.gguf_file import GgufFile
from quantkit.run.gguf_source import GgufCheckpoint
from quantkit.run.known import Known, known_importance
from quantkit.run.quantized import Dequantized, open_source
from quantkit.table import Table

DEMO = "demo"
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe with nothing left to decide, or the reasons why it cannot be done (`blockers`).

    known  an importance matrix that stands in for calibration text
    """

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    graph: ModelGraph
    targets: tuple[TargetPlan, ...]
    files: dict[str, ShardPlan | GgufFile]
    estimate: Estimate
    blockers: tuple[str, ...]
    warnings: tuple[str, ...]
    known: Known | None = None

    @property
    def length(self) -> int:
        """Tokens per calibration row: as asked, else 2,048 or the model's context if that is shorter."""
        asked = self.recipe.calibration.length
        return asked if asked is not None else min(DEFAULT_LENGTH, context(self.checkpoint))

    @property
    def needs_calibration(self) -> bool:
        return any(target.calibrated for target in self.targets)

    def check(self) -> None:
        """Raise UnsupportedError with every blocker."""
        if self.blockers:
            raise UnsupportedError("\n".join(("this plan cannot be carried out:", *self.blockers)))

    def bits_per_weight(self, target: TargetPlan) -> float:
        """Bits of the target's tensor files per parameter of the source, everything counted."""
        return self.files[target.name].total_bytes * 8 / parameters(self.checkpoint, self.graph)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/plan/1",
            "status": "blocked" if self.blockers else "ok",
            "source": {
                "id": self.source.requested,
                "revision": self.source.revision,
                "architecture": architecture(self.checkpoint),
                "parameters": parameters(self.checkpoint, self.graph),
                "size_bytes": self.checkpoint.size_bytes,
                "dtype": self.checkpoint.dtype,
            },
            "targets": [self._target_json(target) for target in self.targets if target.name in self.files],
            "peak_memory_bytes": self.estimate.memory,
            "disk_bytes": self.estimate.disk,
            "blockers": list(self.blockers),
            "warnings": list(self.warnings),
        }

    def _target_json(self, target: TargetPlan) -> dict[str, Any]:
        loads, notes = target.format.engines(target.facts)
        return {
            "name": target.name,
            "format": target.target.format,
            "scheme": target.default.name,
            "method": target.target.method,
            "size_bytes": self.files[target.name].total_bytes,
            "bits_per_weight": self.bits_per_weight(target),
            "quantized_parameters": quantized_parameters(target),
            "needs_calibration": target.calibrated,
            "engines": list(loads),
            "notes": [*target.notes, *notes],
        }

    def table(self) -> Table:
        total = parameters(self.checkpoint, self.graph)
        size = self.checkpoint.size_bytes
        revision = f" @ {self.source.revision[:7]}" if self.source.revision else ""
        title = (
            f"{self.source.requested}{revision} · {architecture(self.checkpoint)}"
            f" · {_count(total)} parameters"
            f" · {self.checkpoint.dtype} {format_size(size)}"
        )
        rows = []
        notes = [*self.warnings]
        for target in self.targets:
            if target.name not in self.files:
                continue
            loads, why = target.format.engines(target.facts)
            rows.append(
                (
                    target.name,
                    target.target.method,
                    format_size(self.files[target.name].total_bytes),
                    f"{self.bits_per_weight(target):.2f}",
                    _calibration_cell(target),
                    ", ".join(loads),
                )
            )
            notes += [f"{target.name}: {note}" for note in (*target.notes, *why)]
        notes.append(self._resources())
        columns = ("target", "method", "file size", "bpw", "calibration", "loads in")
        return Table(title, columns, tuple(rows), tuple(dict.fromkeys(notes)), self.blockers)

    def _resources(self) -> str:
        free = shutil.disk_usage(existing(Path(self.recipe.output.dir))).free
        text = (
            f"to make: up to {format_size(self.estimate.memory)} memory, "
            f"{format_size(self.estimate.disk)} disk ({format_size(free)} free)"
        )
        if self.needs_calibration:
            c = self.recipe.calibration
            rows = "" if c.imatrix else f"{c.rows:,} × {self.length:,} tokens of "
            text += f"; calibration: {rows}{c.source}"
        return text


def plan(
    recipe: Recipe,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    headers_only: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Resolve a recipe against its source; raises for a broken source, collects all else as blockers.

    headers_only  of a model of the Hub, weights are not downloaded: such a plan shows everything and cannot
                  be carried out
    """
    source = locate(
        recipe.source, offline=offline, cache_dir=cache_dir, headers=headers_only, progress=progress
    )
    checkpoint = open_source(source.path)
    graph = build_graph(checkpoint)
    check_floats(source, checkpoint, graph)
    from quantkit import __version__

    resolved = resolve(recipe, graph, Described.of(checkpoint), __version__)
    files, problems = _files(recipe, resolved, checkpoint, graph, source)
    needed = estimate(recipe, resolved, checkpoint, graph, files)
    known, lacking = known_importance(recipe, resolved.targets, checkpoint, graph)
    blockers = (*resolved.blockers, *problems, *lacking, *resource_blockers(recipe, needed))
    warnings = tuple(_quantized_before(source, checkpoint))
    return Plan(recipe, source, checkpoint, graph, resolved.targets, files, needed, blockers, warnings, known)


def _quantized_before(source: Source, checkpoint: Checkpoint) -> Iterator[str]:
    """What is to be known of a source that is not the original."""
    if isinstance(checkpoint, GgufCheckpoint) and checkpoint.types:
        yield (
            f"`{source.requested}` is already quantized (gguf, {' and '.join(checkpoint.types)}): its errors "
            "and those of the targets add up, and quality is measured against it, not against the original"
        )
    if not isinstance(checkpoint, Dequantized):
        return
    quantized = checkpoint.quantized
    bits = sorted({quantized.measure(name)[1] for name in quantized.parts})
    yield (
        f"`{source.requested}` is already quantized ({quantized.format_name}, "
        f"{' and '.join(map(str, bits))} bits): its errors and those of the targets add up, and quality is "
        "measured against it, not against the original"
    )
    for why, count in Counter(checkpoint.dropped.values()).items():
        yield f"{count:,} tensors of `{source.requested}` are left out: {why}"


def check_floats(source: Source, checkpoint: Checkpoint, graph: ModelGraph) -> None:
    """A matrix of integers or of 8-bit floats means nothing without its scales, whatever the config says."""
    for weight in graph.weights():
        dtype = checkpoint.tensors[weight.name].dtype
        if dtype not in _FLOATS:
            raise SourceError(
                f"`{weight.name}` of `{source.requested}` is stored as {dtype}: it is already quantized",
                remedy="give the original 16-bit checkpoint it was made from",
            )


def locate(
    source: str,
    *,
    offline: bool,
    cache_dir: Path | None,
    headers: bool = False,
    progress: Progress = SILENT,
) -> Source:
    """A folder, a GGUF file, a Hub id, or `demo`, the embedded model; a folder of that name is `./demo`.

    headers  of a model of the Hub, headers suffice: see `fetch.headers`
    """
    if source == DEMO:
        return Source(resources.folder("demo-llama"), None, None, DEMO)
    find = fetch.headers if headers else fetch.resolve
    return find(source, offline=offline, cache_dir=cache_dir, progress=progress)


def _count(parameters: int) -> str:
    """As people say it: 8.03 B, 6.82 M."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return f"{parameters:,}"


def architecture(checkpoint: Checkpoint) -> str:
    """The class that the model is, as its configuration names it."""
    named = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    return str(named[0])


def _calibration_cell(target: TargetPlan) -> str:
    if not target.calibrated:
        return "none"
    return "own stream" if target.target.feedback else "shared"


def _files(
    recipe: Recipe, resolved: Resolved, checkpoint: Checkpoint, graph: ModelGraph, source: Source
) -> tuple[dict[str, ShardPlan | GgufFile], list[str]]:
    """(the files of every target, by name; what stands in their way), nothing where the plan is blocked."""
    found: dict[str, ShardPlan | GgufFile] = {}
    problems: list[str] = []
    for target in () if resolved.blockers else resolved.targets:
        limit = recipe.output.shard_bytes(target.format.container)
        if target.format.container == "gguf":
            try:
                found[target.name] = plan_target(
                    target, checkpoint, graph, Title(source.name, source.id), limit
                )
            except UnsupportedError as error:
                problems.append(f"{target.name}: {error.in_one_line}")
        else:
            specs = [spec for entry in entries(target, checkpoint, graph) for spec in entry.specs]
            found[target.name] = plan_shards(specs, limit)
    return found, problems
