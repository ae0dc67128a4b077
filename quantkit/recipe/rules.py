"""`Rule`: which weights are kept, or get another scheme than their target's."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from typing import Annotated

from quantkit.errors import RecipeError
from quantkit.recipe.check import Range, check_types, complaint, refuse
from quantkit.schemes import MAX_BITS, MIN_BITS, Scheme, parse_scheme

_RANGE = re.compile(r"(?P<first>-?[0-9]+)(-(?P<last>-?[0-9]+))?")


def parse_blocks(text: str) -> tuple[tuple[int, int], ...]:
    """``0-1,-2--1`` as ((0, 1), (-2, -1)): inclusive ranges, negative numbers count from the end."""
    ranges = []
    for part in text.replace(" ", "").split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise RecipeError(f"{part!r} is not a block or a range of blocks", remedy="write 0-1,-2--1")
        first = int(found["first"])
        last = first if found["last"] is None else int(found["last"])
        if (first < 0) == (last < 0) and first > last:
            raise RecipeError(f"the range {part!r} holds no block", remedy=f"write {last}-{first}")
        ranges.append((first, last))
    return tuple(ranges)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of `rules`: the first rule that matches a weight decides about it."""

    match: Annotated[str, "module path: a glob as *.mlp.*, or re: and a regular expression for all of it"]
    keep: Annotated[bool, "leave the weight in the dtype of the source"] = False
    scheme: Annotated[str | None, "another scheme, as w8g128"] = None
    bits: Annotated[int | None, "another number of bits, the rest unchanged", Range(MIN_BITS, MAX_BITS)] = (
        None
    )
    group_size: Annotated[int | None, "another group size, the rest unchanged", Range(1)] = None
    blocks: Annotated[str | None, "only in these decoder blocks, as 0-1,-2--1; negative from the end"] = None
    why: Annotated[str | None, "the reason, shown in the plan and the report"] = None

    def __post_init__(self) -> None:
        check_types(self)
        refuse(self._problems())

    def _problems(self) -> list[str]:
        problems = []
        if not self.match.removeprefix("re:"):
            problems.append("match: is empty")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                problems.append(f"match: not a regular expression: {error}")
        changed = self.bits is not None or self.group_size is not None
        if self.keep + (self.scheme is not None) + changed != 1:
            problems.append("a rule needs one of `keep: true`, `scheme`, or `bits` and `group_size`")
        problems += complaint("scheme", parse_scheme, self.scheme)
        return problems + complaint("blocks", parse_blocks, self.blocks)

    def matches(self, module: str, block: int | None, total: int) -> bool:
        """Whether the rule is about `module`, in decoder block `block` of `total` (None: outside)."""
        if self.match.startswith("re:"):
            hit = re.fullmatch(self.match[3:], module) is not None
        else:
            hit = fnmatch.fnmatchcase(module, self.match)
        if not hit or self.blocks is None:
            return hit
        if block is None:
            return False
        for first, last in parse_blocks(self.blocks):
            if (first + total if first < 0 else first) <= block <= (last + total if last < 0 else last):
                return True
        return False

    def apply(self, scheme: Scheme) -> Scheme | None:
        """The scheme of a matching weight whose target says `scheme`; None: it is kept."""
        if self.keep:
            return None
        if self.scheme is not None:
            return replace(parse_scheme(self.scheme), scale_dtype=scheme.scale_dtype)
        return replace(
            scheme,
            bits=scheme.bits if self.bits is None else self.bits,
            group_size=scheme.group_size if self.group_size is None else self.group_size,
        )
