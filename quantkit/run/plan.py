"""Plan before act: everything that can be refused is refused, and every size is known, before work.

`plan` reads headers only. File sizes are exact to the byte; memory and disk are upper estimates.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import resources
from quantkit.calibrate.statistics import Need, nbytes
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardPlan, plan_shards
from quantkit.errors import SourceError, UnsupportedError
from quantkit.hub.fetch import Source
from quantkit.hub.fetch import resolve as fetch
from quantkit.model.build import build_graph
from quantkit.model.graph import Block, ModelGraph
from quantkit.recipe.plan import Resolved, TargetPlan, resolve
from quantkit.recipe.spec import DEFAULT_LENGTH, EvalText, Recipe
from quantkit.run import budget
from quantkit.run.files import entries, parameters, quantized_parameters
from quantkit.run.table import Table

DEMO = "demo"
# Interpreter, torch and transformers before any weight is read, with the allocator's slack.
_BASE_BYTES = 700 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """Upper estimates in bytes: peak memory of the run, disk for the results, the store and the streams."""

    memory: int
    outputs: int
    store: int
    streams: int
    statistics: int

    @property
    def disk(self) -> int:
        return self.outputs + self.store + self.streams


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe with nothing left to decide, or the reasons why it cannot be done (`blockers`)."""

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    graph: ModelGraph
    targets: tuple[TargetPlan, ...]
    shards: dict[str, ShardPlan]
    estimate: Estimate
    blockers: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens per calibration row: as asked, else 2,048 or the model's context if that is shorter."""
        asked = self.recipe.calibration.length
        return asked if asked is not None else min(DEFAULT_LENGTH, context(self.checkpoint))

    @property
    def needs_calibration(self) -> bool:
        return any(target.needs for target in self.targets)

    def check(self) -> None:
        """Raise UnsupportedError with every blocker."""
        if self.blockers:
            raise UnsupportedError("\n".join(("this plan cannot be carried out:", *self.blockers)))

    def bits_per_weight(self, target: TargetPlan) -> float:
        """Bits of the target's tensor files per parameter of the source, everything counted."""
        return self.shards[target.name].total_bytes * 8 / parameters(self.checkpoint, self.graph)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "quantkit/plan/1",
            "status": "blocked" if self.blockers else "ok",
            "source": {
                "id": self.source.requested,
                "revision": self.source.revision,
                "architecture": _architecture(self.checkpoint),
                "parameters": parameters(self.checkpoint, self.graph),
                "size_bytes": sum(t.nbytes for t in self.checkpoint.tensors.values()),
                "dtype": self.checkpoint.dtype,
            },
            "targets": [self._target_json(target) for target in self.targets if target.name in self.shards],
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
            "size_bytes": self.shards[target.name].total_bytes,
            "bits_per_weight": self.bits_per_weight(target),
            "quantized_parameters": quantized_parameters(target),
            "needs_calibration": bool(target.needs),
            "engines": list(loads),
            "notes": list(notes),
        }

    def table(self) -> Table:
        total = parameters(self.checkpoint, self.graph)
        size = sum(t.nbytes for t in self.checkpoint.tensors.values())
        revision = f" @ {self.source.revision[:7]}" if self.source.revision else ""
        title = (
            f"{self.source.requested}{revision} · {_architecture(self.checkpoint)}"
            f" · {_count(total)} parameters"
            f" · {self.checkpoint.dtype} {gigabytes(size)}"
        )
        rows = []
        notes = [*self.warnings]
        for target in self.targets:
            if target.name not in self.shards:
                continue
            loads, why = target.format.engines(target.facts)
            rows.append(
                (
                    target.name,
                    target.target.method,
                    gigabytes(self.shards[target.name].total_bytes),
                    f"{self.bits_per_weight(target):.2f}",
                    _calibration_cell(target),
                    ", ".join(loads),
                )
            )
            notes += [f"{target.name}: {note}" for note in why]
        notes.append(self._resources())
        columns = ("target", "method", "file size", "bpw", "calibration", "loads in")
        return Table(title, columns, tuple(rows), tuple(dict.fromkeys(notes)), self.blockers)

    def _resources(self) -> str:
        free = shutil.disk_usage(existing(Path(self.recipe.output.dir))).free
        text = (
            f"to make: up to {gigabytes(self.estimate.memory)} memory, {gigabytes(self.estimate.disk)} disk "
            f"({gigabytes(free)} free)"
        )
        if self.needs_calibration:
            c = self.recipe.calibration
            text += f"; calibration: {c.rows:,} × {self.length:,} tokens of {c.file or c.set}"
        return text


def plan(recipe: Recipe, *, offline: bool = False, cache_dir: Path | None = None) -> Plan:
    """Resolve a recipe against its source; raises for a broken source, collects all else as blockers."""
    source = locate(recipe.source, offline=offline, cache_dir=cache_dir)
    checkpoint = Checkpoint.open(source.path)
    method = checkpoint.config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise SourceError(
            f"`{source.requested}` is already quantized ({name})",
            remedy="give the original 16-bit checkpoint it was made from",
        )
    graph = build_graph(checkpoint)
    from quantkit import __version__

    resolved = resolve(recipe, graph, checkpoint.dtype, __version__)
    shards = {} if resolved.blockers else dict(_shards(recipe, resolved, checkpoint, graph))
    estimate = _estimate(recipe, resolved, checkpoint, graph, shards)
    blockers = (*resolved.blockers, *_resource_blockers(recipe, estimate))
    return Plan(
        recipe, source, checkpoint, graph, resolved.targets, shards, estimate, blockers, resolved.warnings
    )


def locate(source: str, *, offline: bool, cache_dir: Path | None) -> Source:
    """A folder, a Hub id, or `demo`, the embedded model (unless a folder of that name is there)."""
    if source == DEMO and not Path(source).exists():
        return Source(resources.folder("demo-llama"), None, None, DEMO)
    return fetch(source, offline=offline, cache_dir=cache_dir)


def context(checkpoint: Checkpoint) -> int:
    """Longest row the model was made for, from its configuration; 2,048 when it does not say."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = checkpoint.config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_LENGTH


def gigabytes(size: int) -> str:
    """Decimal units, as disks and the Hub count."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1000:.1f} kB"


def _count(parameters: int) -> str:
    """As people say it: 8.03 B, 6.82 M."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return f"{parameters:,}"


def existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    return str(named[0])


def _calibration_cell(target: TargetPlan) -> str:
    if not target.needs:
        return "none"
    return "own stream" if target.target.feedback else "shared"


def _shards(
    recipe: Recipe, resolved: Resolved, checkpoint: Checkpoint, graph: ModelGraph
) -> Iterator[tuple[str, ShardPlan]]:
    for target in resolved.targets:
        specs = [spec for entry in entries(target, checkpoint, graph) for spec in entry.specs]
        yield target.name, plan_shards(specs, recipe.output.shard_bytes)


def _estimate(
    recipe: Recipe,
    resolved: Resolved,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    shards: dict[str, ShardPlan],
) -> Estimate:
    on = budget.device(recipe.device.map)
    itemsize = budget.compute_dtype(recipe.device.dtype, on).itemsize
    widest = max((s.width for b in graph.blocks for s in b.sites), default=0)
    tallest = max((sum(w.shape[0] for w in s.weights) for b in graph.blocks for s in b.sites), default=0)
    weights = max((_block_parameters(b) for b in graph.blocks), default=0)
    outer = max((w.shape[0] * w.shape[1] for w in graph.outer), default=0) * itemsize
    hidden = graph.blocks[0].sites[0].width if graph.blocks else 0
    gram = any(Need.GRAM in t.needs for t in resolved.targets)
    # a block is in memory while rows run through it, and dropped while its sites are solved
    forward = weights * itemsize + 12 * recipe.device.batch_tokens * max(widest, hidden) * itemsize
    factor = 4 * widest * widest if gram else 0
    # one site's rows in fp32, stacked, with working copies of a piece of them, and the codes of the block
    solve = factor + 3 * 4 * widest * tallest + weights * len(resolved.targets)
    fixed = _BASE_BYTES + max(outer * 2, forward, solve)
    every = max(
        (sum(nbytes(s.width, Need.GRAM | Need.SQUARES) for s in b.sites) for b in graph.blocks), default=0
    )
    allowed = recipe.device.max_bytes or int(0.8 * budget.available(on))
    statistics = min(every, max(allowed - fixed, 0)) if gram else 0
    outputs = sum(s.total_bytes for s in shards.values())
    store = sum(quantized_parameters(t) * (t.default.bits + 1) // 8 for t in resolved.targets)
    streams = _stream_bytes(recipe, resolved, checkpoint, hidden * itemsize)
    return Estimate(fixed + statistics, outputs, store, streams, max(statistics, 1))


def _stream_bytes(recipe: Recipe, resolved: Resolved, checkpoint: Checkpoint, token_bytes: int) -> int:
    """Two generations of every stream. A token of a text is at least two bytes; texts of the Hub that are
    not at hand count as 700 windows."""
    c = recipe.calibration
    length = c.length or min(DEFAULT_LENGTH, context(checkpoint))
    own = sum(1 for t in resolved.targets if t.needs and t.target.feedback)
    shared = any(t.needs and not t.target.feedback for t in resolved.targets)
    tokens = c.rows * length * (own + shared)
    if recipe.eval.enabled:
        tokens += sum(_evaluated(text) for text in recipe.eval.perplexity) * (1 + len(resolved.targets))
    return 2 * tokens * token_bytes


def _evaluated(text: EvalText) -> int:
    """Tokens of an evaluation text, at most."""
    file = resources.folder("calibration") / "embedded-eval.txt" if text.data == "embedded" else text.file
    if file is not None and Path(file).is_file():
        windows = Path(file).stat().st_size // (2 * text.context) + 1
    else:
        windows = 700
    return min(windows, text.chunks or windows) * text.context


def _block_parameters(block: Block) -> int:
    return sum(w.shape[0] * w.shape[1] for w in block.weights())


def _resource_blockers(recipe: Recipe, estimate: Estimate) -> list[str]:
    blockers = []
    allowed = recipe.device.max_bytes
    if allowed is not None and estimate.memory > allowed:
        blockers.append(
            f"memory: up to {gigabytes(estimate.memory)} is needed; --max-memory allows {gigabytes(allowed)}"
        )
    free = shutil.disk_usage(existing(Path(recipe.output.dir))).free
    if estimate.disk > free:
        blockers.append(
            f"disk: {gigabytes(estimate.disk)} is needed at `{recipe.output.dir}`; {gigabytes(free)} is free"
        )
    return blockers
