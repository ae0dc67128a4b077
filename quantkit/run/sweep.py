"""The sweep: the model goes through the machine one block at a time, once, for all targets.

At each block: run the reference stream and gather statistics, let every target choose its codes,
run every target's own stream through its quantized block, commit. What crosses from one block to the
next is exactly the streams. Statistics are gathered in waves that fit the memory budget; a wave's
sites are quantized before the next wave runs, so no more than one wave is alive.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event

from torch import Tensor

from quantkit.calibrate.record import Recorder, Wanted, held_out
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.errors import Interrupted
from quantkit.model.graph import Block, Site
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.progress import BlockError, BlockInfo, Progress
from quantkit.recipe.plan import TargetPlan
from quantkit.run.advance import Streams
from quantkit.run.budget import pools, release_memory, waves
from quantkit.run.ends import EMBED, Ends
from quantkit.run.fold import Proof, fold_site
from quantkit.run.folded import Fold, divide_rows, rewritten
from quantkit.run.known import Known
from quantkit.run.quantize import Made, Rescaled, TensorMetrics, quantize_site
from quantkit.run.replay import CacheRange, QuantizedBlock
from quantkit.run.results import BlockResult
from quantkit.run.store import RunStore
from quantkit.run.streams import REFERENCE, RowSet
from quantkit.run.tune import StreamPairs, Tuning

# One micro-batch in so many feeds what all experts of a layer know together; it divides `record.HELD_OUT`.
_POOLED = 4


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What the sweep is to do. `keys` maps target names to their store keys; `known` is what is known of the
    inputs of weights where no text says it."""

    targets: tuple[TargetPlan, ...]
    keys: Mapping[str, str]
    streams_key: str
    calibration: RowSet | None
    evaluation: tuple[RowSet, ...]
    statistics_bytes: int
    known: Known | None = None

    def stream_rows(self) -> Iterator[tuple[str, RowSet]]:
        """Every (stream, rows) that travels from block to block; a target's stream is named by its key."""
        if self.calibration is not None and any(t.calibrated and t.wants_reference for t in self.targets):
            yield REFERENCE, self.calibration
        for rows in self.evaluation:
            yield REFERENCE, rows
        for target in self.targets:
            own = self.keys[target.name]
            if self.calibration is not None and target.calibrated and target.target.feedback:
                yield own, self.calibration
            for rows in self.evaluation:
                yield own, rows


class _Held:
    """The block at work, loaded when its forward pass is wanted and dropped while weights are solved.

    Solving needs memory of its own (a gram and its factor), and reads weights one at a time.
    """

    def __init__(self, runtime: Runtime, index: int) -> None:
        self._runtime, self._index = runtime, index
        self._loaded: LoadedBlock | None = None

    def get(self) -> LoadedBlock:
        if self._loaded is None:
            self._loaded = self._runtime.load(self._index)
        return self._loaded

    def drop(self) -> None:
        self._loaded = None
        release_memory()


class Sweep:
    """One pass over the blocks for the targets of a SweepPlan."""

    def __init__(
        self, plan: SweepPlan, runtime: Runtime, blocks: Sequence[Block], store: RunStore, streams: Streams
    ) -> None:
        self._plan, self._runtime, self._blocks = plan, runtime, blocks
        self._store, self._streams = store, streams
        self.ends = Ends(plan.targets, plan.keys, runtime, store)
        streams.apart = frozenset(self.ends.own_embedding())

    def run(self, progress: Progress, stop: Event) -> None:
        """Quantize what is not in the store yet and leave the streams behind the last block.

        Raises Interrupted after the commit of the block at work when `stop` is set.
        """
        blocks = len(self._blocks)
        done = {t.name: self._store.done(self._plan.keys[t.name], blocks) for t in self._plan.targets}
        start = self._first_block(done)
        progress.start(sum(b.parameters for b in self._blocks), blocks)
        for block in self._blocks[:start]:
            progress.block(block.index, BlockInfo(0.0, block.parameters))
        if start:
            progress.note(f"continuing at block {start} of {blocks}: everything before it is committed")
        else:
            self._embed()
        for block in self._blocks[start:]:
            stored = {t.name for t in self._plan.targets if done[t.name] > block.index}
            progress.block(block.index, self._block(block, stored, progress))
            release_memory()
            if stop.is_set():
                raise Interrupted(
                    f"stopped after block {block.index + 1} of {blocks}, which is committed",
                    remedy="run the same command again: it continues with the next block",
                )
        made = self.ends.heads(self._streams, self._plan.calibration)
        if made:
            self._commit(blocks, made)

    def _first_block(self, done: Mapping[str, int]) -> int:
        """The block from which everything that is needed is at hand.

        A target that lacks results from before the stored streams (a new one, a damaged file) needs the
        streams of earlier blocks, which are gone: all rows then travel from the start, and blocks whose
        results are stored are not solved again.
        """
        if not self.ends.complete():
            return 0
        needed = [self._streams.name(stream, rows) for stream, rows in self._plan.stream_rows()]
        if not needed:
            return min(done.values())
        generation = self._store.generation(self._plan.streams_key, needed)
        return generation if generation <= min(done.values()) else 0

    def _embed(self) -> None:
        every = {rows.name: rows for _, rows in self._plan.stream_rows()}
        for rows in every.values():
            self._enter(REFERENCE, rows, None)
        made = {}
        for key, table, fresh in self.ends.embeddings(self._plan.calibration):
            own = {rows.name: rows for stream, rows in self._plan.stream_rows() if stream == key}
            for rows in own.values():
                self._enter(key, rows, table)
            if fresh is not None:
                made[key] = fresh
        self._runtime.release_embed()
        if made:
            self._commit(EMBED, made)
        else:
            self._streams.take_written()

    def _enter(self, stream: str, rows: RowSet, table: Tensor | None) -> None:
        """Write what enters the first block on a stream whose embedding is `table`, or the source's."""
        tokens = (rows.tokens[part] for part in rows.batches(self._streams.batch_tokens))
        self._streams.write(0, stream, rows, (self._runtime.embed(t, table) for t in tokens))

    def _commit(self, stage: int, made: Mapping[str, tuple[BlockResult, Sequence[TensorMetrics]]]) -> None:
        """Results of a block or an end by store key, and the streams written since the last commit."""
        told = {key: (result, {"tensors": [m.to_json() for m in ms]}) for key, (result, ms) in made.items()}
        self._store.commit(stage, told, self._plan.streams_key, self._streams.take_written())

    def _block(self, block: Block, stored: set[str], progress: Progress) -> BlockInfo:
        began = time.monotonic()
        fresh = [t for t in self._plan.targets if t.name not in stored]
        held = _Held(self._runtime, block.index)
        made = {t.name: _Making(t) for t in fresh}
        self._reference(held, block, [made[t.name] for t in fresh if not t.target.feedback])
        for target in fresh:
            if target.target.feedback:
                self._collect(held, block, self._plan.keys[target.name], [made[target.name]])
        for making in made.values():
            self._tune(making, block, held)
        results = {name: making.result(block, self._runtime) for name, making in made.items()}
        metrics = {name: making.metrics() for name, making in made.items()}
        _report(metrics, progress)
        every = dict(results)
        for name in stored:
            every[name] = self._store.load(self._plan.keys[name], block.index)
        self._advance_targets(held, block, every)
        self._commit(block.index, {self._plan.keys[n]: (r, metrics[n]) for n, r in results.items()})
        return _info(block, metrics, time.monotonic() - began)

    def _reference(self, held: _Held, block: Block, fresh: Sequence[_Making]) -> None:
        """Move the reference stream on, gather its statistics, and choose codes from them."""
        for rows in self._plan.evaluation:
            self._streams.advance(block.index, REFERENCE, rows, held.get().run)
        travels = {(stream, rows.name) for stream, rows in self._plan.stream_rows()}
        if self._plan.calibration is not None and (REFERENCE, self._plan.calibration.name) in travels:
            self._collect(held, block, REFERENCE, fresh)
        else:
            self._quantize(block.sites, None, held, None, fresh)

    def _collect(self, held: _Held, block: Block, stream: str, makings: Sequence[_Making]) -> None:
        """Run calibration rows of a stream through the untouched block, wave by wave, and quantize."""
        rows = self._plan.calibration
        if rows is None:
            raise ValueError("statistics are wanted, and there are no calibration rows")
        needs = _needs(block.sites, [m.target for m in makings])
        moves = stream == REFERENCE
        cache = CacheRange() if any(m.target.cache_names(block) for m in makings) else None
        pooled = pools(block.sites, needs)
        kin = {site.id: site.kin for site in block.sites if site.kin is not None}
        for wave in waves(block.sites, needs, self._plan.statistics_bytes):
            last = wave[-1] is block.sites[-1]
            wanted = {site.id: Wanted(site.width, needs[site.id]) for site in wave}
            recorder = Recorder(wanted, self._runtime.device, pooled, kin)
            loaded = held.get()
            outputs = self._recorded(block, stream, rows, loaded, recorder, cache)
            if last and moves:
                self._streams.write(block.index + 1, stream, rows, outputs)
            else:
                for _ in outputs:
                    pass
            del loaded, outputs
            self._quantize(wave, recorder, held, self._proof(held, block, stream), makings)
        for making in makings:
            making.cache = cache

    def _recorded(
        self,
        block: Block,
        stream: str,
        rows: RowSet,
        loaded: LoadedBlock,
        recorder: Recorder,
        cache: CacheRange | None,
    ) -> Iterator[Tensor]:
        """What comes out of the block, by micro-batch, while the recorder sees what goes on inside."""
        untouched = self._streams.file(block.index, REFERENCE, rows)
        for number, (part, states) in enumerate(self._streams.batches(block.index, stream, rows)):
            recorder.held_out = held_out(number)
            recorder.pooling = number % _POOLED == 0
            if recorder.pairs:
                loaded.run(untouched.read(part, self._runtime.device), recorder.pair)
            yield loaded.run(states, recorder, cache=cache)

    def _proof(self, held: _Held, block: Block, stream: str) -> Proof | None:
        """The first micro-batch of a calibration stream, on which folds are proven."""
        rows = self._plan.calibration
        if rows is None:
            return None
        first = next(rows.batches(self._streams.batch_tokens))
        return Proof(
            block,
            held.get,
            lambda: self._streams.file(block.index, stream, rows).read(first, self._runtime.device),
        )

    def _quantize(
        self,
        sites: Sequence[Site],
        recorder: Recorder | None,
        held: _Held,
        proof: Proof | None,
        makings: Sequence[_Making],
    ) -> None:
        held.drop()
        targets = [m.target for m in makings]
        for site in sites:
            pool = None
            stats = (
                None if self._plan.known is None else self._plan.known.statistics(site, self._runtime.device)
            )
            if recorder is not None:
                stats, pool = recorder.take(site.id), _pool(site, proof, recorder)
            rescaled = {}
            for making in makings:
                if stats is not None and proof is not None and making.target.transforms:
                    known = stats if pool is None else pool
                    rescaled[making.target.name] = making.rescale(site, known, self._runtime, proof)
                    held.drop()
            if stats is not None and recorder is not None and (own := recorder.pool(site.id)) is not None:
                # as many tokens as make a gram of full rank
                stats = stats.with_prior(own, site.width)
            results = quantize_site(site, stats, self._runtime.read, targets, rescaled)
            for making in makings:
                making.made += results.get(making.target.name, [])

    def _tune(self, making: _Making, block: Block, held: _Held) -> None:
        """Let a target's tuner improve the codes of a block, on the target's own stream where it has one."""
        tuner, rows = making.target.tuner, self._plan.calibration
        if tuner is None or rows is None or not making.made:
            return
        stream = self._plan.keys[making.target.name] if making.target.target.feedback else REFERENCE
        inputs = self._streams.file(block.index, stream, rows)
        goals = self._streams.file(block.index + 1, REFERENCE, rows)
        tuning = Tuning(making.target, block, making.folds, self._runtime)
        pairs = StreamPairs(inputs, goals, self._runtime.device)
        making.made = tuning.improve(tuner, making.made, held.get(), pairs)

    def _advance_targets(self, held: _Held, block: Block, results: Mapping[str, BlockResult]) -> None:
        """Every target's own rows through its quantized block."""
        # targets that differ in their format alone have one key, the same codes and one stream
        by_stream = {self._plan.keys[target.name]: target for target in self._plan.targets}
        for key, target in by_stream.items():
            own = {rows.name: rows for stream, rows in self._plan.stream_rows() if stream == key}
            if not own:
                continue
            quantized = QuantizedBlock(target, block, results[target.name])
            with quantized.within(held.get(), self._runtime) as forward:
                for rows in own.values():
                    self._streams.advance(block.index, key, rows, forward)


class _Making:
    """What is being made of one block for one target."""

    def __init__(self, target: TargetPlan) -> None:
        self.target = target
        self.made: list[Made] = []
        self.cache: CacheRange | None = None
        # by the first site that they were asked for
        self._folds: dict[str, Fold | str | None] = {}

    @property
    def folds(self) -> list[Fold]:
        """What transforms have done to the block so far."""
        return [fold for fold in self._folds.values() if isinstance(fold, Fold)]

    def rescale(self, site: Site, stats: Statistics, runtime: Runtime, proof: Proof) -> Rescaled:
        """Let the transforms of the target see a site; what its weights are to know of the outcome.

        One decision holds for all sites that one vector scales, made when the first is reached from what is
        known of them together.
        """
        sites = proof.block.together(site)
        first = sites[0].id
        if first not in self._folds:
            linears = {m.linear.name: m.linear for m in self.made}
            fold = fold_site(site, stats, self.target, runtime, proof, linears)
            self._folds[first] = fold
            if isinstance(fold, Fold):
                self.made = [_divided(m, fold) for m in self.made]
        found = self._folds[first]
        if isinstance(found, Fold):
            return Rescaled(found.factors)
        return Rescaled(note=found if first == site.id else None)

    def result(self, block: Block, runtime: Runtime) -> BlockResult:
        tensors = rewritten(self.folds, block, self.target, runtime)
        names = self.target.cache_names(block)
        kind = self.target.target.kv_cache
        if self.cache is not None and kind is not None and names is not None:
            tensors |= self.cache.scales(names, kind, self.target.default.scale_dtype)
        return BlockResult([m.linear for m in self.made], tensors)

    def metrics(self) -> list[TensorMetrics]:
        return [m.metrics for m in self.made]


def _pool(site: Site, proof: Proof | None, recorder: Recorder) -> Statistics | None:
    """What experts that read one activation saw together, when `site` is one of those that read it."""
    together = (site,) if proof is None else proof.block.together(site)
    expert = next((other for other in together if other.kin is not None and len(together) > 1), None)
    return None if expert is None else recorder.pool(expert.id)


def _divided(made: Made, fold: Fold) -> Made:
    """A weight with codes after a later fold into its rows."""
    divisors = fold.rows.get(made.linear.name)
    return made if divisors is None else replace(made, linear=divide_rows(made.linear, divisors))


def _needs(sites: Sequence[Site], targets: Sequence[TargetPlan]) -> dict[str, Need]:
    """Per site, the union over the targets that quantize something there.

    Mean squares are always taken: they cost nothing and give every target an honest error figure.
    """
    union: dict[str, Need] = {}
    for site in sites:
        need = Need.SQUARES
        for target in targets:
            if any(target.scheme_of(weight) for weight in site.weights):
                # experts of two streams see different tokens, which cannot be paired
                need |= target.needs & ~Need.CROSS if site.experts else target.needs
        union[site.id] = need
    return union


def _report(made: Mapping[str, Sequence[TensorMetrics]], progress: Progress) -> None:
    for target, metrics in made.items():
        for row in metrics:
            progress.tensor(target, row.name, row.error)


def _info(block: Block, made: Mapping[str, Sequence[TensorMetrics]], seconds: float) -> BlockInfo:
    errors: dict[str, BlockError] = {}
    fallbacks = 0
    for target, metrics in made.items():
        if metrics:
            worst = max(metrics, key=lambda m: m.error)
            mean = sum(m.error for m in metrics) / len(metrics)
            errors[target] = BlockError(mean, worst.error, worst.name)
            fallbacks += sum(m.note is not None for m in metrics)
    # ru_maxrss counts KiB on Linux
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return BlockInfo(seconds, block.parameters, errors, rss_bytes=rss, fallbacks=fallbacks)
