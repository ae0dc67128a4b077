"""The token rows of a run: what statistics are taken from, and what is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.calibrate.overlap import check_disjoint
from quantkit.calibrate.text import EvalSpec, SetSpec, as_set, find_set
from quantkit.calibrate.tokenizer import Tokenizer, load_tokenizer
from quantkit.calibrate.tokens import CalibrationSet, EvalSet, build, build_eval
from quantkit.recipe.spec import Calibration, EvalText, Recipe
from quantkit.run.streams import RowSet

# every text that is measured on, cut into windows, and the rows that are run for it
Windows = tuple[tuple[EvalSet, RowSet], ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Calibration rows, or None when no target needs them, and every evaluation text with its rows."""

    calibration: CalibrationSet | None
    evaluation: Windows

    @property
    def collecting(self) -> RowSet | None:
        """The calibration rows as the sweep runs them."""
        return None if self.calibration is None else RowSet("calibration", self.calibration.tokens, True)

    def calibration_json(self) -> dict[str, Any] | None:
        """What a manifest says about the calibration text."""
        if self.calibration is None:
            return None
        rows, length = self.calibration.tokens.shape
        return {
            "rows": rows,
            "length": length,
            "sha256": self.calibration.sha256,
            "sources": [dataclasses.asdict(share) for share in self.calibration.sources],
        }


def build_rows(recipe: Recipe, tokenizer_folder: Path, *, calibrate: bool, length: int) -> Rows:
    """Tokenize what the recipe asks for; CalibrationError when a text is too short or texts overlap."""
    texts = recipe.eval.perplexity if recipe.eval.enabled else ()
    if not calibrate and not texts:
        return Rows(None, ())
    tokenizer = load_tokenizer(tokenizer_folder)
    calibration = None
    if calibrate:
        c = recipe.calibration
        calibration = build(
            mixture(c),
            tokenizer,
            rows=c.rows,
            length=length,
            seed=c.seed,
            # `raw` leaves each part of a set its own template
            template=None if c.template == "raw" else c.template,
        )
    evaluation = evaluation_rows(texts, tokenizer)
    if calibration is not None:
        check_disjoint(calibration, [found for found, _ in evaluation])
    return Rows(calibration, evaluation)


def evaluation_rows(texts: Sequence[EvalText], tokenizer: Tokenizer) -> Windows:
    """Every text in the tokens of a model; CalibrationError when one is too short."""
    sets = (build_eval(_evaluation(text), tokenizer) for text in texts)
    return tuple((found, RowSet(f"eval{n}", found.tokens, False)) for n, found in enumerate(sets))


def mixture(c: Calibration) -> SetSpec:
    mixture = find_set(c.set) if c.set is not None else as_set(Path(c.file or ""))
    if c.max_chars is None:
        return mixture
    parts = (dataclasses.replace(part, max_chars=c.max_chars) for part in mixture.parts)
    return dataclasses.replace(mixture, parts=tuple(parts))


def _evaluation(text: EvalText) -> EvalSpec:
    file = None if text.file is None else Path(text.file)
    name = text.data if file is None else file.stem
    return EvalSpec(name or "", text.style, text.context, text.chunks, file)
