from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quantkit.calibrate.statistics import Need, nbytes
from quantkit.recipe.plan import Described, resolve
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Device, Recipe
from quantkit.run.budget import waves
from quantkit.run.estimate import estimate


@pytest.mark.parametrize(
    "target",
    [
        "gptq:w4g32",
        "gptq:w4g32@method=rtn,scales=weighted",
        "int8",
        "compressed_tensors:w8a8_static",
        "compressed_tensors:w8a8@transforms=smoothquant",
    ],
)
def test_rows_run_once_through_a_block_when_memory_suffices(
    target: str, model_of: Callable[..., Any]
) -> None:
    """Whatever a target wants to know of its sites, all of them fit into one wave."""
    model = model_of("llama")
    recipe = Recipe("x", parse_targets(target), device=Device(max_memory="20GiB"))
    resolved = resolve(recipe, model.graph, Described.of(model.checkpoint), "0")
    found = estimate(recipe, resolved, model.checkpoint, model.graph, {})
    needs = resolved.targets[0].needs | Need.SQUARES
    for block in model.graph.blocks:
        assert found.statistics >= sum(nbytes(site.width, needs) for site in block.sites)
        every = {site.id: needs for site in block.sites}
        assert len(list(waves(block.sites, every, found.statistics))) == 1


def test_statistics_get_what_is_left_of_a_small_budget(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    targets = parse_targets("gptq:w4g32")
    wide = Recipe("x", targets, device=Device(max_memory="20GiB"))
    tight = Recipe("x", targets, device=Device(max_memory="1MiB"))
    resolved = resolve(wide, model.graph, Described.of(model.checkpoint), "0")
    most, least = (estimate(r, resolved, model.checkpoint, model.graph, {}) for r in (wide, tight))
    assert least.statistics < most.statistics
    assert least.memory < most.memory
