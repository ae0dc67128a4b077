"""What a run will need, before it starts: upper estimates of memory and disk."""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit import resources
from quantkit.calibrate.statistics import Need, nbytes
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.graph import Block, ModelGraph
from quantkit.recipe.plan import Resolved
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import DEFAULT_LENGTH, EvalText, Recipe
from quantkit.run import budget
from quantkit.run.files import quantized_parameters

# Interpreter, torch and transformers before any weight is read, with the allocator's slack.
BASE_BYTES = 700 << 20


class Sized(Protocol):
    """Planned files."""

    @property
    def total_bytes(self) -> int: ...


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


def estimate(
    recipe: Recipe,
    resolved: Resolved,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    shards: Mapping[str, Sized],
) -> Estimate:
    on = budget.device(recipe.device.map)
    itemsize = budget.compute_dtype(recipe.device.dtype, on).itemsize
    widest = max((s.width for b in graph.blocks for s in b.sites), default=0)
    tallest = max((sum(w.shape[0] for w in s.weights) for b in graph.blocks for s in b.sites), default=0)
    weights = max((b.parameters for b in graph.blocks), default=0)
    outer = max((w.parameters for w in graph.outer), default=0) * itemsize
    # a quantized end of the model: in fp32, beside its codes and what they stand for
    ends = [
        w.parameters * 9 for w in graph.outer if any(t.scheme_of(w) is not None for t in resolved.targets)
    ]
    hidden = graph.blocks[0].sites[0].width if graph.blocks else 0
    gram = any(Need.GRAM in t.needs for t in resolved.targets)
    # a block is in memory while rows run through it, and dropped while its sites are solved
    forward = weights * itemsize + 12 * recipe.device.batch_tokens * max(widest, hidden) * itemsize
    # a factor, and beside it the gram and the factor of what is not held out
    factor = 3 * 4 * widest * widest if gram else 0
    # one site's rows in fp32, stacked, with working copies of a piece of them, and the codes of the block
    solve = factor + 3 * 4 * widest * tallest + weights * len(resolved.targets)
    # source, position, two moments, values, gradients of all weights, and the activations of a row
    tuned = any(t.tuner is not None for t in resolved.targets)
    row = (recipe.calibration.length or DEFAULT_LENGTH) * (tallest + widest)
    tune = 4 * (7 * weights + 6 * row) if tuned else 0
    fixed = BASE_BYTES + max(outer * 2, forward, solve, forward + tune, *ends)
    needs = functools.reduce(operator.or_, (t.needs for t in resolved.targets), Need.SQUARES)
    every = max((_statistics(b, needs) for b in graph.blocks), default=0)
    allowed = recipe.device.max_bytes or int(0.8 * budget.available(on))
    # with too little for all sites of a block, rows run through it once per part
    statistics = min(every, max(allowed - fixed, 0)) if any(t.calibrated for t in resolved.targets) else 0
    outputs = sum(s.total_bytes for s in shards.values())
    store = sum(quantized_parameters(t) * (t.default.bits + 1) // 8 for t in resolved.targets)
    streams = _stream_bytes(recipe, resolved, checkpoint, hidden * itemsize)
    return Estimate(fixed + statistics, outputs, store, streams, max(statistics, 1))


def _statistics(block: Block, needs: Need) -> int:
    """Bytes of what is to be known of all sites of a block at once."""
    pooled = budget.pools(block.sites, {site.id: needs for site in block.sites})
    return sum(nbytes(site.width, needs) for site in block.sites) + sum(p.nbytes for p in pooled.values())


def _stream_bytes(recipe: Recipe, resolved: Resolved, checkpoint: Checkpoint, token_bytes: int) -> int:
    """Two generations of every stream. A token of a text is at least two bytes; texts of the Hub that are
    not at hand count as 700 windows."""
    c = recipe.calibration
    length = c.length or min(DEFAULT_LENGTH, context(checkpoint))
    own = sum(1 for t in resolved.targets if t.calibrated and t.target.feedback)
    shared = any(t.calibrated and not t.target.feedback for t in resolved.targets)
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


def resource_blockers(recipe: Recipe, needed: Estimate) -> list[str]:
    blockers = []
    allowed = recipe.device.max_bytes
    if allowed is not None and needed.memory > allowed:
        blockers.append(
            f"memory: up to {format_size(needed.memory)} needed; --max-memory allows {format_size(allowed)}"
        )
    free = shutil.disk_usage(existing(Path(recipe.output.dir))).free
    if needed.disk > free:
        blockers.append(
            f"disk: {format_size(needed.disk)} needed at `{recipe.output.dir}`; {format_size(free)} is free"
        )
    return blockers


def context(checkpoint: Checkpoint) -> int:
    """Longest row the model was made for, from its configuration; 2,048 when it does not say."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = checkpoint.config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_LENGTH


def existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
