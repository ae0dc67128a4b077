"""Learned rounding and corrected targets in the sweep: the same bytes twice, never worse where judged."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantkit
from quantkit.run.report import Report
from tests.e2e.runs import recipe, sums

TARGETS = (
    "gptq:w2g32@name=start,feedback=true",
    "gptq:w2g32@method=signround,iterations=12,name=alone",
    "gptq:w2g32@method=signround,iterations=12,feedback=true,name=followed",
    "awq:w4g32_asym@method=signround,iterations=4,transforms=awq,name=folded",
    "gptq:w2g32@corrected=0.25,feedback=true,name=corrected",
)
LEARNED = ("alone", "followed", "folded")


def run(checkpoint: Path, calibration: Path, evaluation: Path, out: Path) -> Report:
    return quantkit.convert(recipe(checkpoint, calibration, evaluation, out, *TARGETS))


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("learned")
    return out, run(checkpoint, calibration_text, evaluation_text, out)


def test_every_block_is_at_least_as_good_as_its_start(made: tuple[Path, Report]) -> None:
    targets = {target.name: target for target in made[1].targets}
    for name in LEARNED:
        for row in targets[name].tensors:
            assert row.facts["block_loss"] <= row.facts["block_loss_start"]
            # statistics are gone by then: the error is that of the weights
            assert row.metric == "weights" and row.error > 0
    assert any(row.facts["block_loss"] < row.facts["block_loss_start"] for row in targets["alone"].tensors)
    assert {name for name in targets if sums(made[0], name)} == set(targets)


def test_a_second_run_writes_the_same_bytes(
    made: tuple[Path, Report], checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    run(checkpoint, calibration_text, evaluation_text, tmp_path)
    names = [target.name for target in made[1].targets]
    assert sums(tmp_path, *names) == sums(made[0], *names)
