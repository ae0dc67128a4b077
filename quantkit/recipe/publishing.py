"""`Publish` of a recipe with some of its keys given otherwise, as flags do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantkit.errors import UsageError
from quantkit.recipe.spec import Card, Publish

_PREFIX = "publish."
_CARD = "card."


def published(base: Publish | None, given: Mapping[str, Any]) -> Publish:
    """`base` with the values of `given`, by recipe key; RecipeError for one that is not possible, UsageError
    without a repository."""
    keys = {path.removeprefix(_PREFIX): value for path, value in given.items()}
    if base is None and "repo" not in keys:
        raise UsageError(
            "no repository is named", remedy="give --repo name/model, or `publish:` in the recipe"
        )
    card = base.card if base is not None else Card()
    of_card = {key.removeprefix(_CARD): value for key, value in keys.items() if key.startswith(_CARD)}
    plain = {key: value for key, value in keys.items() if not key.startswith(_CARD)}
    card = dataclasses.replace(card, **of_card)
    if base is None:
        return Publish(**plain, card=card)
    return dataclasses.replace(base, **plain, card=card)
