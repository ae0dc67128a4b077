"""An importance matrix from a file in place of calibration text: mean squares of inputs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UnsupportedError
from quantkit.gguf import imatrix
from quantkit.gguf.architectures import Model
from quantkit.model.graph import ModelGraph, Site
from quantkit.recipe.plan import TargetPlan
from quantkit.recipe.spec import Recipe
from quantkit.run.streams import sha256_file

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Known:
    """`squares`: (in,) fp32 mean squares by `Weight.key`; `sha256` and `name` of the file they are from."""

    squares: Mapping[str, Tensor]
    name: str
    sha256: str
    datasets: tuple[str, ...]

    def statistics(self, site: Site, device: torch.device) -> Statistics | None:
        """What the file knows of a site, as if one token had been seen."""
        found = next((self.squares[w.key] for w in site.weights if w.key in self.squares), None)
        return None if found is None else Statistics(1, squares=found.to(device))

    def to_json(self) -> dict[str, Any]:
        return {"imatrix": self.name, "sha256": self.sha256, "datasets": list(self.datasets)}


def known_importance(
    recipe: Recipe, targets: Sequence[TargetPlan], checkpoint: Checkpoint, graph: ModelGraph
) -> tuple[Known | None, list[str]]:
    """(what the recipe's importance matrix says of this model, None without one; what stands in the way).

    SourceError for a file that cannot be read.
    """
    if recipe.calibration.imatrix is None:
        return None, []
    path = Path(recipe.calibration.imatrix).expanduser()
    problems = [problem for target in targets for problem in _unmet(target)]
    read = imatrix.read(path)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        placements = Model.of(checkpoint.config).placements(graph, shapes)
    except UnsupportedError as error:
        return None, [*problems, f"imatrix: names of its tensors mean nothing here: {error.message}"]
    lacking = imatrix.missing(read, placements)
    if lacking:
        more = f" and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
        problems.append(
            f"imatrix: `{path.name}` says nothing of {', '.join(lacking[:_SHOWN])}{more}: it is of "
            "another model, or collected from too little text"
        )
    found = imatrix.importance_for(read, placements)
    return Known(found, path.name, sha256_file(path), read.datasets), problems


def _unmet(target: TargetPlan) -> list[str]:
    """What a target wants to know beyond mean squares."""
    if target.target.kv_cache is not None or target.transforms:
        return [f"{target.name}: transforms and cache scales need text to calibrate on, not an imatrix"]
    if target.needs & ~Need.SQUARES:
        return [
            f"{target.name}: {target.target.method} needs the gram of inputs, and an imatrix holds its "
            "diagonal; use method rtn with scales weighted, or calibrate on text"
        ]
    return []
