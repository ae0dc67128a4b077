"""Tiny models are saved once per session and run block by block; tests do not change the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph
from quantkit.model.runtime import Runtime
from quantkit.recipe.plan import Described, TargetPlan, resolve
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Recipe
from tests.models import tiny_model, tiny_tokens


@dataclass(frozen=True)
class Model:
    """A tiny model ready to run."""

    checkpoint: Checkpoint
    graph: ModelGraph
    runtime: Runtime

    def target(self, text: str) -> TargetPlan:
        """What a recipe makes of a target for this model; it must be possible."""
        resolved = resolve(Recipe("x", parse_targets(text)), self.graph, Described.of(self.checkpoint), "0")
        assert resolved.blockers == ()
        return resolved.targets[0]

    def states(self, index: int = 0) -> Tensor:
        """States that enter a block."""
        hidden = self.runtime.embed(tiny_tokens())
        for before in range(index):
            hidden = self.runtime.load(before).run(hidden)
        return hidden


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """(family, dtype of the file) → the model, computed in fp32."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def opened(family: str, dtype: torch.dtype = torch.float32) -> Model:
        if (family, dtype) not in folders:
            folders[family, dtype] = tmp_path_factory.mktemp(family)
            tiny_model(family).to(dtype).save_pretrained(folders[family, dtype])
        checkpoint = Checkpoint.open(folders[family, dtype])
        graph = build_graph(checkpoint)
        return Model(
            checkpoint, graph, Runtime(checkpoint, graph, dtype=torch.float32, device=torch.device("cpu"))
        )

    return opened
