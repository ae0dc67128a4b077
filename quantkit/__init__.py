"""One checkpoint to many quantized formats, with one sweep over the model, in bounded memory.

Names are imported when they are first used: ``import quantkit`` is cheap and does nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.errors import QuantkitError
    from quantkit.recipe.dump import dump as dump_recipe
    from quantkit.recipe.load import load_recipe
    from quantkit.recipe.rules import Rule
    from quantkit.recipe.shorthand import parse_targets
    from quantkit.recipe.spec import (
        Calibration,
        Card,
        Device,
        Eval,
        EvalText,
        Gates,
        Output,
        Publish,
        Recipe,
        Target,
    )
    from quantkit.run.calibrate import collect_imatrix, merge_imatrix
    from quantkit.run.convert import convert
    from quantkit.run.inspect import inspect
    from quantkit.run.plan import plan
    from quantkit.run.publish import Pushing
    from quantkit.run.publish import publish as push
    from quantkit.run.repack import repack as export
    from quantkit.run.score import score
    from quantkit.run.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Card",
    "Device",
    "Eval",
    "EvalText",
    "Gates",
    "Output",
    "Publish",
    "Pushing",
    "QuantkitError",
    "Recipe",
    "Rule",
    "Target",
    "__version__",
    "collect_imatrix",
    "convert",
    "dump_recipe",
    "export",
    "inspect",
    "load_recipe",
    "merge_imatrix",
    "parse_targets",
    "plan",
    "push",
    "score",
    "verify",
]

_SPEC = "quantkit.recipe.spec"
_HOME = (
    *((name, _SPEC, name) for name in ("Calibration", "Card", "Device", "Eval", "EvalText", "Gates")),
    *((name, _SPEC, name) for name in ("Output", "Publish", "Recipe", "Rule", "Target")),
    ("QuantkitError", "quantkit.errors", "QuantkitError"),
    ("collect_imatrix", "quantkit.run.calibrate", "collect_imatrix"),
    ("convert", "quantkit.run.convert", "convert"),
    ("dump_recipe", "quantkit.recipe.dump", "dump"),
    ("export", "quantkit.run.repack", "repack"),
    ("inspect", "quantkit.run.inspect", "inspect"),
    ("load_recipe", "quantkit.recipe.load", "load_recipe"),
    ("merge_imatrix", "quantkit.run.calibrate", "merge_imatrix"),
    ("parse_targets", "quantkit.recipe.shorthand", "parse_targets"),
    ("plan", "quantkit.run.plan", "plan"),
    ("Pushing", "quantkit.run.publish", "Pushing"),
    ("push", "quantkit.run.publish", "publish"),
    ("score", "quantkit.run.score", "score"),
    ("verify", "quantkit.run.verify", "verify"),
)


def __getattr__(name: str) -> Any:
    for public, module, attribute in _HOME:
        if public == name:
            return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
