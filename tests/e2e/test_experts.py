"""Experts that few or no tokens reach: what they are solved with does not depend on memory, and is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import quantkit
from quantkit import Calibration, Device, Recipe
from quantkit.run.report import Report
from tests.e2e.conftest import write_tokenizer
from tests.e2e.runs import recipe, sums
from tests.models import save_tiny

TARGETS = ("ct:w4g32", "ct:w4g32@transforms=awq,name=awq")
UNSEEN = "no calibration token reached this expert: it was rounded by what the others saw"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path, evaluation_text: Path) -> Recipe:
    """Eight tokens for sixteen experts."""
    folder = tmp_path_factory.mktemp("experts")
    source = save_tiny("qwen3_moe", folder / "source", num_experts=16, num_experts_per_tok=1)
    write_tokenizer(source)
    made = recipe(source, calibration_text, evaluation_text, folder / "out", *TARGETS)
    return replace(made, calibration=Calibration(file=str(calibration_text), rows=1, length=8))


@pytest.fixture(scope="module")
def report(wanted: Recipe) -> Report:
    return quantkit.convert(wanted)


def test_tokens_are_counted_and_experts_without_any_are_named(report: Report) -> None:
    for target in report.targets:
        experts = [row for row in target.tensors if ".experts." in row.name]
        unseen = [row for row in experts if row.tokens == 0]
        assert 0 < len(unseen) < len(experts)
        assert all(row.note is not None and UNSEEN in row.note for row in unseen)
        assert not any(row.note and UNSEEN in row.note for row in experts if row.tokens)
        first = [row for row in experts if ".layers.0." in row.name and "down_proj" in row.name]
        assert sum(row.tokens for row in first) == 8
        # what the others saw is known: plain rounding would lose more
        assert max(row.error for row in unseen) < 0.2


def test_memory_decides_nothing(wanted: Recipe, report: Report, tmp_path: Path) -> None:
    estimate = quantkit.plan(wanted).estimate
    # a little more than what is needed without any statistics
    least = -(-(estimate.memory - estimate.statistics) // 1024) + 4
    small = replace(
        wanted,
        output=replace(wanted.output, dir=str(tmp_path / "small")),
        device=Device(max_memory=f"{least}KiB"),
    )
    assert quantkit.plan(small).estimate.statistics < 6000 < estimate.statistics
    quantkit.convert(small)
    folders = [target.folder for target in report.targets]
    weights = {
        out: {
            name: found for name, found in sums(Path(out), *folders).items() if name.endswith(".safetensors")
        }
        for out in (wanted.output.dir, small.output.dir)
    }
    assert weights[wanted.output.dir] == weights[small.output.dir]
    assert len(weights[small.output.dir]) == len(folders)
