"""The folder is the registry: a method is ``quantkit/methods/<name>.py``; formats and transforms likewise.

Finding a plugin is an import, listing them is a directory listing. Whether the module *exists* is
asked before it is imported, so an error inside a plugin is shown as itself.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Literal

from quantkit.errors import RecipeError

Kind = Literal["methods", "formats", "transforms", "allocate"]
_SINGULAR = {"methods": "method", "formats": "format", "transforms": "transform", "allocate": "mix"}


def names(kind: Kind) -> tuple[str, ...]:
    """Sorted names of the plugins in ``quantkit/<kind>/``; imports none of them."""
    package = importlib.util.find_spec(f"quantkit.{kind}")
    folders = [] if package is None else package.submodule_search_locations or []
    return tuple(sorted(m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")))


def load(kind: Kind, name: str) -> ModuleType:
    """The module of one plugin; an unknown name is a RecipeError with a suggestion."""
    known = names(kind)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"unknown {_SINGULAR[kind]} {name!r}{hint}", remedy=f"known: {', '.join(known)}")
    return importlib.import_module(f"quantkit.{kind}.{name}")
