"""A recipe as it may be published: what was done, without where on which machine."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

from quantkit.recipe.interpolate import FromEnv
from quantkit.recipe.spec import Output, Recipe

S = TypeVar("S")
_SEPARATOR = re.compile(r"[\\/]+")


def anonymous(recipe: Recipe, source_name: str) -> Recipe:
    """`recipe` of `source_name`, its files by their names alone, published nowhere; it loads as any recipe.

    Names of files that an environment variable gave are private, so they are replaced.
    """
    calibration = _by_name(recipe.calibration, file="calibration.txt", imatrix="imatrix.gguf")
    texts = tuple(_by_name(text, file="evaluation.txt") for text in recipe.eval.perplexity)
    return replace(
        recipe,
        source=source_name,
        output=replace(recipe.output, dir=Output().dir),
        calibration=calibration,
        eval=replace(recipe.eval, perplexity=texts),
        publish=None,
        vars={},
    )


def _by_name(spec: S, **private: str) -> S:
    """`spec` with the last part of the paths in these fields, or what stands for a private one."""
    found: Any = spec
    given = {field: getattr(found, field) for field in private}
    names = {field: _name(path, private[field]) for field, path in given.items() if path is not None}
    return replace(found, **names) if names else spec


def _name(path: str, private: str) -> str:
    """The last part of a path; of one from the environment only what the recipe itself wrote."""
    if not isinstance(path, FromEnv):
        return _SEPARATOR.split(path.rstrip("\\/"))[-1] or private
    _, separator, name = path.template.rpartition("}")[2].replace("\\", "/").rpartition("/")
    return name if separator and name else private
