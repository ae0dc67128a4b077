"""Recipes for the tiny checkpoint, and how outputs are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantkit import Calibration, Eval, EvalText, Output, Recipe, parse_targets


def recipe(
    source: Path, calibration: Path, evaluation: Path, out: Path, *targets: str, on_exists: str = "resume"
) -> Recipe:
    """Eight rows of 32 tokens to calibrate on, eight windows of 32 to measure on."""
    return Recipe(
        source=str(source),
        targets=tuple(t for text in targets for t in parse_targets(text)),
        output=Output(dir=str(out), on_exists=on_exists),
        calibration=Calibration(file=str(calibration), rows=8, length=32),
        eval=Eval(perplexity=(EvalText(file=str(evaluation), style="gptq", context=32, chunks=8),)),
        engine_check=False,
    )


def sums(out: Path, *folders: str) -> dict[str, str]:
    """sha256 of every output file (not of the run store), by path below `out`."""
    found = sorted(p for p in out.rglob("*") if p.is_file() and ".quantkit" not in p.parts)
    chosen = [p for p in found if not folders or p.relative_to(out).parts[0] in folders]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in chosen}
