"""`Scheme`: which numbers can be represented. Not how codes are chosen, not how bytes are laid out.

Preset names: ``w4g128`` (4 bits, groups of 128 inputs, symmetric), ``w8`` (one scale per output
row), ``w3g64_asym`` (integer zero point), ``w8_tensor`` (one scale per tensor).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from quantkit.errors import RecipeError

MIN_BITS, MAX_BITS = 2, 8
SCALE_DTYPES = ("float16", "bfloat16", "float32")
COMMON = ("w2g64", "w3g128", "w4", "w4g32", "w4g64", "w4g128", "w4g128_asym", "w8", "w8g128", "w8_tensor")
_PRESET = re.compile(r"w(?P<bits>\d+)(g(?P<group>\d+)|(?P<tensor>_tensor))?(?P<asym>_asym)?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A grid of integers.

    bits         bits per code
    group_size   consecutive inputs that share a scale; None: the whole row (or tensor)
    sym          no zero point (codes are signed) against an integer zero point (codes unsigned)
    per_tensor   one scale for the whole tensor
    scale_dtype  dtype the file stores scales in; scales are rounded to it before codes are chosen
    """

    bits: int
    group_size: int | None = None
    sym: bool = True
    per_tensor: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise RecipeError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(
                f"group_size must be at least 1, not {self.group_size}",
                remedy="leave it out for one scale per row",
            )
        if self.per_tensor and self.group_size is not None:
            raise RecipeError("per_tensor and group_size exclude each other")
        if self.scale_dtype not in SCALE_DTYPES:
            raise RecipeError(f"scale_dtype must be one of {SCALE_DTYPES}, not {self.scale_dtype!r}")

    @property
    def name(self) -> str:
        """The preset name that parses back to this scheme (the scale dtype is the format's choice)."""
        size = "_tensor" if self.per_tensor else "" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}{size}{'' if self.sym else '_asym'}"

    def group(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) that share one scale in a weight of `shape` (out, in)."""
        if self.per_tensor:
            return shape
        return 1, self.group_size or shape[1]

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """None when the groups divide a weight of `shape` (out, in), else the reason and a remedy."""
        columns = shape[1]
        if self.group_size is None or columns % self.group_size == 0:
            return None
        fitting = [g for g in (128, 64, 32, 16) if g < self.group_size and columns % g == 0]
        use = f"use group_size {' or '.join(map(str, fitting))}" if fitting else "use one scale per row"
        return (
            f"in_features is {columns:,}, not a multiple of {self.group_size}; {use}, "
            "or keep the weight with a rule"
        )


def parse_scheme(text: str) -> Scheme:
    """The scheme that a preset name stands for; raises RecipeError with a suggestion."""
    found = _PRESET.fullmatch(text.strip().lower())
    if found is None:
        close = difflib.get_close_matches(text.lower(), COMMON, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"unknown scheme {text!r}{hint}",
            remedy="schemes read w<bits>[g<group size>][_asym], for example w4g128, w8, w3g64_asym",
        )
    return Scheme(
        bits=int(found["bits"]),
        group_size=int(found["group"]) if found["group"] else None,
        sym=not found["asym"],
        per_tensor=bool(found["tensor"]),
    )
