"""The protocol of `../shared/models/README.md` as a recipe: its texts, and any number of named targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import quantkit
from benchmarks.peers.texts import CALIBRATION, EVALUATION, SOURCE


def recipe(
    shorthands: Mapping[str, str],
    out: Path,
    *,
    source: Path = SOURCE,
    calibration: quantkit.Calibration = CALIBRATION,
    evaluation: quantkit.EvalText = EVALUATION,
) -> quantkit.Recipe:
    """Targets by their names, made and measured in one sweep."""
    targets: list[quantkit.Target] = []
    for name, shorthand in shorthands.items():
        joint = "," if "@" in shorthand else "@"
        targets += quantkit.parse_targets(f"{shorthand}{joint}name={name}")
    return quantkit.Recipe(
        source=str(source),
        targets=tuple(targets),
        output=quantkit.Output(dir=str(out)),
        calibration=calibration,
        eval=quantkit.Eval(perplexity=(evaluation,)),
        engine_check=False,
    )


def refused(shorthands: Mapping[str, str], source: Path = SOURCE) -> dict[str, str]:
    """Those that this quantkit cannot make, with its reason."""
    found = {}
    for name, shorthand in shorthands.items():
        try:
            quantkit.plan(recipe({name: shorthand}, Path("out"), source=source)).check()
        except quantkit.QuantkitError as error:
            found[name] = str(error)
    return found
