"""Embedding and head of targets whose format quantizes them too.

The embedding is made before the first block, so that the target's own stream starts from it; the head behind
the last, from what the final norm lets through. Both are committed like a block, under numbers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantkit.calibrate import statistics
from quantkit.calibrate.record import held_out
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.gguf import rounding
from quantkit.model.graph import ModelGraph, Site, Weight
from quantkit.model.runtime import Runtime
from quantkit.recipe.plan import TargetPlan
from quantkit.run.advance import Streams
from quantkit.run.embedding import sensitivity
from quantkit.run.quantize import Made, TensorMetrics, naming, on_device, quantize_site, relative_error
from quantkit.run.results import BlockResult
from quantkit.run.store import RunStore
from quantkit.run.streams import REFERENCE, RowSet
from quantkit.schemes import Scheme
from quantkit.tensors import QuantizedLinear, dequantize

# in place of the number of a block; the head has the number after the last block
EMBED = -1


class Ends:
    """What the targets of a run make of the ends of the model. `keys` maps target names to store keys."""

    def __init__(
        self, targets: Sequence[TargetPlan], keys: Mapping[str, str], runtime: Runtime, store: RunStore
    ) -> None:
        self._keys, self._runtime, self._store = keys, runtime, store
        self._targets = {keys[t.name]: t for t in targets}
        graph = runtime.graph
        self._embed = next((w for w in graph.outer if w.role == "embed"), None)
        self._head = next((w for w in graph.outer if w.role == "head"), None)
        self._last = len(graph.blocks)

    def own_embedding(self) -> list[str]:
        """Keys of the targets whose embedding is not the source's."""
        return [key for key, t in self._targets.items() if _scheme(t, self._embed) is not None]

    def complete(self) -> bool:
        """Whether all embeddings are in the store."""
        return all(self._store.has(key, EMBED) for key in self.own_embedding())

    def embeddings(
        self, calibration: RowSet | None
    ) -> Iterator[tuple[str, Tensor, tuple[BlockResult, list[TensorMetrics]] | None]]:
        """(key, rows in the runtime's dtype, what is to be committed if it is new) of each such target."""
        keys = self.own_embedding()
        fresh = [key for key in keys if not self._store.has(key, EMBED)]
        made = self._made_embeddings(fresh, calibration)
        for key in keys:
            if key in made:
                yield (
                    key,
                    self._values(made[key].linear),
                    (BlockResult([made[key].linear]), [made[key].metrics]),
                )
            else:
                yield key, self._values(self._store.load(key, EMBED).linears[0]), None

    def _made_embeddings(self, keys: Sequence[str], calibration: RowSet | None) -> dict[str, Made]:
        """Of targets that solve, by what the first block makes of errors; of others, to nearest.

        An embedding that is the head, too, is rounded evenly: the head reads what no probe of the first block
        tells.
        """
        weight = self._embed
        solving = [
            key
            for key in keys
            if Need.GRAM in self._targets[key].needs and calibration is not None and self._head is not None
        ]
        made = {key: self._round(self._targets[key], weight) for key in keys if key not in solving}
        if solving and weight is not None and calibration is not None:
            needs = Need.NOTHING
            for key in solving:
                needs |= self._targets[key].needs & ~Need.CROSS
            stats = sensitivity(self._runtime, calibration, needs | Need.SQUARES)
            targets = [self._targets[key] for key in solving]
            found = quantize_site(Site("embedding", (weight,)), stats, self._runtime.read, targets, {})
            made |= {key: found[self._targets[key].name][0] for key in solving}
        return made

    def _round(self, target: TargetPlan, weight: Weight | None) -> Made:
        """To nearest, where nothing is known of inputs. An embedding has none: its rows are looked up."""
        scheme = _scheme(target, weight)
        if weight is None or scheme is None:
            raise ValueError("there is nothing to round")
        matrix = self._runtime.read(weight)
        quantizer = target.quantizer
        with naming([weight]):
            if quantizer.needs is Need.NOTHING:
                found = quantizer.quantize(matrix, quantizer.prepare(None, scheme), scheme).weight
            else:
                found = rounding.nearest(matrix, scheme, None)
            rounded = on_device(found, torch.device("cpu"))
        error, metric = relative_error(matrix, rounded, None)
        metrics = TensorMetrics(weight.key, scheme.name, 0, error, metric, None)
        return Made(QuantizedLinear(weight.key, rounded), metrics)

    def heads(
        self, streams: Streams, calibration: RowSet | None
    ) -> dict[str, tuple[BlockResult, list[TensorMetrics]]]:
        """What is to be committed of the head, by key, of targets that have none in the store yet."""
        weight = self._head
        wanted = {
            key: t
            for key, t in self._targets.items()
            if _scheme(t, weight) is not None and not self._store.has(key, self._last)
        }
        found: dict[str, tuple[BlockResult, list[TensorMetrics]]] = {}
        if weight is None:
            return found
        by_stream: dict[str, list[tuple[str, TargetPlan]]] = {}
        for key, target in wanted.items():
            own = target.calibrated and target.target.feedback
            by_stream.setdefault(key if own else REFERENCE, []).append((key, target))
        site = Site("head", (weight,))
        for stream, targets in by_stream.items():
            needs = Need.NOTHING
            for _, target in targets:
                needs |= target.needs & ~Need.CROSS
            if needs and calibration is not None:
                stats = self._statistics(streams, stream, calibration, needs | Need.SQUARES, weight.shape[1])
                made = quantize_site(site, stats, self._runtime.read, [t for _, t in targets], {})
            else:
                made = {t.name: [self._round(t, weight)] for _, t in targets}
            for key, target in targets:
                ours = made[target.name]
                found[key] = BlockResult([m.linear for m in ours]), [m.metrics for m in ours]
        return found

    def _statistics(self, streams: Streams, stream: str, rows: RowSet, needs: Need, width: int) -> Statistics:
        """What calibration rows of a stream look like where they enter the head."""
        stats = statistics.zero(width, needs, self._runtime.device)
        for number, (_, states) in enumerate(streams.batches(self._last, stream, rows)):
            stats = statistics.update(stats, self._runtime.final(states), held_out=held_out(number))
        return stats

    def has_own_head(self, key: str) -> bool:
        """Whether a target's logits come from another head than the source's."""
        target = self._targets[key]
        return _scheme(target, self._head if self._head is not None else self._embed) is not None

    def head_of(self, key: str) -> Tensor | None:
        """(vocabulary, hidden) weights of a target's logits, in the runtime's dtype; None: the source's."""
        if not self.has_own_head(key):
            return None
        # a head that shares its weights with the embedding was made with it
        stage = EMBED if self._head is None else self._last
        return self._values(self._store.load(key, stage).linears[0])

    def _values(self, linear: QuantizedLinear) -> Tensor:
        return dequantize(linear.weight).to(self._runtime.device, self._runtime.dtype)


def stages(target: TargetPlan, graph: ModelGraph) -> list[int]:
    """The numbers under which the store keeps what was made of a target, in order."""
    roles = {w.role for w in graph.outer if target.scheme_of(w) is not None}
    blocks = range(len(graph.blocks))
    return [*([EMBED] if "embed" in roles else []), *blocks, *([len(blocks)] if "head" in roles else [])]


def _scheme(target: TargetPlan, weight: Weight | None) -> Scheme | None:
    return None if weight is None else target.scheme_of(weight)
