"""How config groups name modules: class names, full names, or ``re:`` and a pattern matched at the start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def patterns(modules: Sequence[str]) -> list[str]:
    """Targets for these modules: names, and one pattern for the experts of a layer.

    Transformers fuses experts, so it finds no module of that name; it takes the group that names
    experts in a pattern.
    """
    numbered = {m: re.sub(r"\.experts\.\d+\.", ".experts.#.", m) for m in modules}
    found = (n if n == m else f"re:{re.escape(n)}$".replace(r"\#", r"\d+") for m, n in numbered.items())
    return list(dict.fromkeys(found))


def groups_of(module: str, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config groups that apply to a module: by name or pattern first, then by class."""
    groups: list[Mapping[str, Any]] = list(config["config_groups"].values())
    named = [g for g in groups if any(names(t, module) for t in g["targets"])]
    return named or [g for g in groups if "Linear" in g["targets"]]


def names(target: str, module: str) -> bool:
    """Whether a target, or an entry of `ignore`, is the module or a pattern of its path."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module
