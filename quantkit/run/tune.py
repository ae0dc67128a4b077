"""A block whose codes a tuner improves: what it is given, and what becomes of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.model.graph import Block
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.protocols import Tuner
from quantkit.recipe.plan import TargetPlan
from quantkit.run.folded import Fold, rewritten
from quantkit.run.quantize import Made, on_device, relative_error
from quantkit.run.streams import StreamFile


@dataclass(frozen=True, slots=True)
class StreamPairs:
    """`Pairs` from stream files: what enters the block on a target's stream, what leaves it untouched."""

    inputs: StreamFile
    goals: StreamFile
    device: torch.device

    @property
    def rows(self) -> int:
        return self.inputs.rows

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        chosen = slice(row, row + 1)
        return self.inputs.read(chosen, self.device), self.goals.read(chosen, self.device)


@dataclass(frozen=True, slots=True)
class _Rewritten:
    """`TunedBlock`: a loaded block with what folds have changed beside the weights that are tuned."""

    loaded: LoadedBlock
    tensors: Mapping[str, Tensor]

    def differentiable(self, hidden: Tensor, new: Mapping[str, Tensor]) -> Tensor:
        return self.loaded.differentiable(hidden, {**self.tensors, **new})


@dataclass(frozen=True, slots=True)
class Tuning:
    """One block of one target after its codes were chosen."""

    target: TargetPlan
    block: Block
    folds: Sequence[Fold]
    runtime: Runtime

    def improve(
        self, tuner: Tuner, made: Sequence[Made], loaded: LoadedBlock, pairs: StreamPairs
    ) -> list[Made]:
        """`made` with tuned codes; errors are those of the weights, for the statistics are gone."""
        device = self.runtime.device
        weights = {weight.key: weight for weight in self.block.weights()}
        kept = set(self.block.kept)
        sources = {}
        for one in made:
            source = self.runtime.read(weights[one.linear.name])
            for fold in self.folds:
                source = fold.of(one.linear.name, source)
            sources[one.linear.name] = source
        schemes = {key: s for key in sources if (s := self.target.scheme_of(weights[key])) is not None}
        vectors = rewritten(self.folds, self.block, self.target, self.runtime)
        changed = {n: t.to(device) for n, t in vectors.items() if n in kept or n in weights}
        start = {
            one.linear.name: replace(one.linear, weight=on_device(one.linear.weight, device)) for one in made
        }
        tuned = tuner.tune(_Rewritten(loaded, changed), sources, start, schemes, pairs)
        improved = []
        for one in made:
            linear = tuned.linears[one.linear.name]
            error, metric = relative_error(sources[linear.name], linear.weight, None)
            notes = [note for note in (one.metrics.note, tuned.note) if note is not None]
            metrics = replace(
                one.metrics,
                error=error,
                metric=metric,
                note="; ".join(notes) or None,
                facts={**one.metrics.facts, **tuned.facts},
            )
            on_cpu = replace(linear, weight=on_device(linear.weight, torch.device("cpu")))
            improved.append(Made(on_cpu, metrics))
        return improved
