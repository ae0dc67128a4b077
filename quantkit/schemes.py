"""`Scheme`: which numbers can be represented. Not how codes are chosen, not how bytes are laid out.

Preset names, read from left to right:
    w4 | nf4 | fp4 | fp8 | mxfp4 | nvfp4   the points of the grid: integers of some bits, or a table
    a8                                     inputs are rounded to 8 bits too while the model runs
    g128 | _tensor | _block                what shares a scale; default: a row (nf4, fp4: 64 inputs)
    _asym | _asymf                         an integer zero point, or one that may be fractional
    _axis0                                 groups run along the outputs
    _dq                                    scales are quantized themselves
    _static                                the scale of the inputs comes from calibration
    _mixed                                 input columns with values of 6 or more stay 16-bit (LLM.int8)
for example ``w4g128``, ``w3g64_asym``, ``w8a8``, ``nf4_dq``, ``fp8a8_block``. The grids of ggml have names
of their own, ``q4_k``, ``iq2_xs``: each fixes everything, see `GGML`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from quantkit.errors import RecipeError

MIN_BITS, MAX_BITS = 1, 8
SCALE_DTYPES = ("float16", "bfloat16", "float32")
TILE = 128
OUTLIERS = 6.0

Numbers = Literal[
    "int", "nf4", "fp4", "fp8", "mxfp4", "nvfp4",
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
]  # fmt: skip
Convention = Literal["absmax", "half_step", "full_range"]
CacheDtype = Literal["fp8", "int8"]

# bits of the tables, and the inputs that share a scale (None: a row)
_TABLES: dict[str, tuple[int, int | None]] = {
    "nf4": (4, 64),
    "fp4": (4, 64),
    "fp8": (8, None),
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
}
_FIXED_GROUP = ("mxfp4", "nvfp4")
# ggml's grids: nominal bits, and the inputs of a block or super-block, within which all scales are nested
GGML: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        **{"f32": (32, 1), "f16": (16, 1), "bf16": (16, 1)},
        **{"q8_0": (8, 32), "q4_0": (4, 32), "q4_1": (4, 32), "q5_0": (5, 32), "q5_1": (5, 32)},
        **{"q2_k": (2, 256), "q3_k": (3, 256), "q4_k": (4, 256), "q5_k": (5, 256), "q6_k": (6, 256)},
        **{"iq4_nl": (4, 32), "iq4_xs": (4, 256), "tq1_0": (2, 256), "tq2_0": (2, 256)},
        **{"iq1_s": (1, 256), "iq1_m": (1, 256), "iq2_xxs": (2, 256), "iq2_xs": (2, 256)},
        **{"iq2_s": (2, 256), "iq3_xxs": (3, 256), "iq3_s": (3, 256)},
    }
)
COMMON = (
    *("w2g64", "w3g128", "w4", "w4g32", "w4g64", "w4g128", "w4g128_asym", "w4g64_asymf", "w8", "w8g128"),
    *("w8_tensor", "w8a8", "w8a8_static", "w8a8_mixed", "nf4", "nf4_dq", "fp4", "fp8", "fp8_tensor"),
    *("fp8_block", "fp8a8", "fp8a8_static", "fp8a8_block", "mxfp4", "nvfp4"),
)
_PRESET = re.compile(
    r"(w(?P<bits>\d+)|(?P<table>nf4|fp4|fp8|mxfp4|nvfp4))(?P<a8>a8)?"
    r"(g(?P<group>\d+)|(?P<tensor>_tensor)|(?P<block>_block))?"
    r"(?P<asym>_asymf?)?(?P<axis0>_axis0)?(?P<dq>_dq)?"
    r"((?P<static>_static)|_mixed(?P<mixed>\d+(\.\d+)?)?)?"
)


@dataclass(frozen=True, slots=True)
class Activations:
    """How inputs are rounded to 8 bits while the model runs; integers beside integers, e4m3 beside floats.

    dynamic     the scale of each token is its largest magnitude; else one scale from calibration
    group_size  inputs of a token that share a scale; None: all of them
    outliers    columns in which any |x| of a row of text reaches this stay 16-bit (LLM.int8: 6.0), or None
    """

    dynamic: bool = True
    group_size: int | None = None
    outliers: float | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A grid of numbers and what shares its scales.

    bits         bits per code
    group_size   consecutive inputs (axis 1) or outputs (axis 0) that share a scale; None: the whole row
    sym          no zero point (codes are signed) against a zero point (codes unsigned)
    per_tensor   one scale for the whole tensor
    scale_dtype  dtype the file stores scales in; scales are rounded to it before codes are chosen
    numbers      the points: integers, NormalFloat 4 and FP4 of bitsandbytes, e4m3 floats (fp8), e2m1 floats
                 with power-of-two scales (mxfp4) or with e4m3 scales times one of the tensor (nvfp4)
    fractional   the zero point is a float
    axis         1: groups along a row; 0: groups of outputs out/group_size apart that share an input
    tile         128: squares of 128 × 128 share a scale
    nested       scales are quantized themselves ("double quantization")
    activations  how inputs are rounded, None: they are not
    convention   the symmetric scale that tools of the container choose, see `numerics.grids`
    mix          name of the rules by which weights get other grids than this one, as ``q4_k_m``; else empty
    """

    bits: int
    group_size: int | None = None
    sym: bool = True
    per_tensor: bool = False
    scale_dtype: str = "float16"
    numbers: Numbers = "int"
    fractional: bool = False
    axis: int = 1
    tile: int | None = None
    nested: bool = False
    activations: Activations | None = None
    convention: Convention = "absmax"
    mix: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise RecipeError(problem[0], remedy=problem[1])

    def _problem(self) -> tuple[str, str | None] | None:
        """(what cannot be, remedy)."""
        shared = [self.group_size is not None, self.per_tensor, self.tile is not None]
        if self.ggml:
            return self._ggml_problem()
        if not MIN_BITS <= self.bits <= MAX_BITS:
            return f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}", None
        if self.bits == 1 and not self.fractional:
            return "1 bit needs a fractional zero point", "write w1g64_asymf"
        if self.group_size is not None and self.group_size < 1:
            remedy = "leave it out for one scale per row"
            return f"group_size must be at least 1, not {self.group_size}", remedy
        if sum(shared) > 1:
            return "per_tensor, tile and group_size exclude each other", None
        if self.scale_dtype not in SCALE_DTYPES:
            return f"scale_dtype must be one of {SCALE_DTYPES}, not {self.scale_dtype!r}", None
        if self.tile not in (None, TILE):
            return f"tile must be {TILE}, not {self.tile}", None
        own = self._integer_problem() if self.numbers == "int" else self._table_problem()
        return own or self._mixed_problem()

    def _ggml_problem(self) -> tuple[str, str | None] | None:
        fixed = (self.bits, self.group_size) == GGML[self.numbers] and self.sym and self.axis == 1
        extra = self.per_tensor or self.fractional or self.tile or self.nested or self.activations
        if fixed and not extra:
            return None
        return f"{self.numbers} fixes its bits, groups and scales", f"write {self.numbers}"

    def _table_problem(self) -> tuple[str, str | None] | None:
        bits, group = _TABLES[self.numbers]
        if self.bits != bits or not self.sym or self.fractional or self.axis == 0:
            return f"{self.numbers} has {bits} bits, no zero point and groups along the inputs", None
        if self.numbers in _FIXED_GROUP and self.group_size != group:
            return f"{self.numbers} has groups of {group} inputs", f"write {self.numbers}"
        if self.numbers in ("nf4", "fp4") and self.group_size is None:
            return f"{self.numbers} needs groups of inputs", "write nf4 or nf4g128"
        if self.numbers == "fp8" and self.group_size is not None:
            return "fp8 scales are per row, tensor or block", "write fp8, fp8_tensor or fp8_block"
        if self.nested and self.numbers not in ("nf4", "fp4"):
            return "double quantization belongs to nf4 and fp4", None
        if self.activations is not None and self.numbers != "fp8":
            return f"inputs cannot be rounded beside {self.numbers} weights", "leave out a8"
        return None

    def _integer_problem(self) -> tuple[str, str | None] | None:
        if self.fractional and self.sym:
            return "a fractional zero point is a zero point: sym must be false", None
        if self.axis == 0 and self.group_size is None:
            return "groups along the outputs need a group size", "write w4g64_asymf_axis0"
        if self.nested:
            return "double quantization belongs to nf4 and fp4", "write nf4_dq"
        if self.tile is not None:
            return "blocks of 128 × 128 belong to fp8", "write fp8_block"
        if self.activations is not None and self.fractional:
            return "inputs cannot be rounded beside a fractional zero point", None
        return None

    def _mixed_problem(self) -> tuple[str, str | None] | None:
        """LLM.int8 is one scheme: 8 bits, a scale per row, dynamic inputs."""
        row = (self.bits, self.numbers, self.sym, self.group_size, self.per_tensor) == (
            8,
            "int",
            True,
            None,
            False,
        )
        if (
            self.activations is None
            or self.activations.outliers is None
            or (row and self.activations.dynamic)
        ):
            return None
        return "outlier columns belong to 8 bits with one scale per row", "write w8a8_mixed"

    @property
    def name(self) -> str:
        """The preset name that parses back to this scheme; scale dtype and convention are the format's."""
        if self.mix or self.ggml:
            return self.mix or self.numbers
        table = _TABLES.get(self.numbers)
        size = f"g{self.group_size}" if self.group_size is not None else ""
        if self.per_tensor or self.tile is not None:
            size = "_tensor" if self.per_tensor else "_block"
        elif table is not None and self.group_size == table[1]:
            size = ""
        asym = "" if self.sym else "_asymf" if self.fractional else "_asym"
        a8 = "" if self.activations is None else "a8"
        inputs = "" if self.activations is None else _inputs_suffix(self.activations)
        head = f"w{self.bits}" if table is None else self.numbers
        return f"{head}{a8}{size}{asym}{'' if self.axis else '_axis0'}{'_dq' if self.nested else ''}{inputs}"

    @property
    def ggml(self) -> bool:
        """One of the named grids of `GGML`."""
        return self.numbers in GGML

    @property
    def plain(self) -> bool:
        """Integers with groups along a row or a whole tensor, an integer zero point or none, weights only."""
        return not (self.numbers != "int" or self.fractional or self.axis == 0 or self.activations)

    @property
    def ties_rows(self) -> bool:
        """Rows share a scale, so weights cannot be stacked and solved together."""
        return self.per_tensor or self.tile is not None or self.axis == 0 or self.nested

    def group(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) that share one scale in a weight of `shape` (out, in)."""
        if self.per_tensor:
            return shape
        if self.tile is not None:
            return self.tile, self.tile
        if self.axis == 0:
            return self.group_size or shape[0], 1
        return 1, self.group_size or shape[1]

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """None when the groups divide a weight of `shape` (out, in), else the reason and a remedy.

        Tiles may be cut short at the last row, never at the last column: engines reshape inputs into tiles.
        """
        wanted = self.tile or self.group_size
        size, name = (shape[0], "out_features") if self.axis == 0 else (shape[1], "in_features")
        if wanted is None or size % wanted == 0:
            return None
        fitting = [g for g in (128, 64, 32, 16) if g < wanted and size % g == 0]
        if self.tile is not None or self.numbers in _FIXED_GROUP:
            use = "use fp8 with one scale per row" if self.tile else "use nf4 or integers"
        elif fitting:
            use = f"use group_size {' or '.join(map(str, fitting))}"
        else:
            use = "use w4 or w8" if self.numbers in _TABLES else "use one scale per row"
        return f"{name} is {size:,}, not a multiple of {wanted}; {use}, or keep the weight with a rule"


def _inputs_suffix(activations: Activations) -> str:
    if activations.outliers is not None:
        exact = f"{activations.outliers:.10f}".rstrip("0").rstrip(".")
        return "_mixed" if activations.outliers == OUTLIERS else f"_mixed{exact}"
    return "" if activations.dynamic else "_static"


def parse_scheme(text: str) -> Scheme:
    """The scheme that a preset name stands for; raises RecipeError with a suggestion."""
    name = text.strip().lower()
    if name in GGML:
        return Scheme(*GGML[name], numbers=name)  # type: ignore[arg-type]
    found = _PRESET.fullmatch(name)
    mixed = found is not None and "_mixed" in found[0]
    if found is None or ((found["static"] or mixed) and not found["a8"]):
        close = difflib.get_close_matches(text.lower(), (*COMMON, *GGML), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"unknown scheme {text!r}{hint}",
            remedy="schemes read w<bits>[g<group size>][_asym], nf4, fp8 and so on: see quantkit formats",
        )
    bits, group = _TABLES[found["table"]] if found["table"] else (int(found["bits"]), None)
    if found["group"]:
        group = int(found["group"])
    numbers: Numbers = found["table"] or "int"  # type: ignore[assignment]
    activations = None
    if found["a8"]:
        outliers = float(found["mixed"] or OUTLIERS) if mixed else None
        activations = Activations(not found["static"], TILE if found["block"] else None, outliers)
    return Scheme(
        bits=bits,
        group_size=group,
        sym=not found["asym"],
        per_tensor=bool(found["tensor"]),
        numbers=numbers,
        fractional=found["asym"] == "_asymf",
        axis=0 if found["axis0"] else 1,
        tile=TILE if found["block"] else None,
        nested=bool(found["dq"]),
        activations=activations,
    )
