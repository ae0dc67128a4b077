"""llama.cpp's file types by name: what a preset is called, and the type of most of its weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import RecipeError
from quantkit.schemes import GGML

# What a row must be a multiple of.
ROW: Mapping[str, int] = MappingProxyType({**{kind: row for kind, (_, row) in GGML.items()}, "mxfp4": 32})


@dataclass(frozen=True, slots=True)
class Mix:
    """A file type. `default` is the type of all that no rule names, `file_type` its number in metadata."""

    name: str
    default: str
    file_type: int

    @property
    def label(self) -> str:
        """As it stands in file names: Q4_K_M."""
        return self.name.upper()


_MIXES = (
    *(Mix("f32", "f32", 0), Mix("f16", "f16", 1), Mix("bf16", "bf16", 32), Mix("q8_0", "q8_0", 7)),
    *(Mix("q6_k", "q6_k", 18), Mix("q5_k_m", "q5_k", 17), Mix("q5_k_s", "q5_k", 16)),
    *(Mix("q5_1", "q5_1", 9), Mix("q5_0", "q5_0", 8), Mix("q4_k_m", "q4_k", 15), Mix("q4_k_s", "q4_k", 14)),
    *(Mix("q4_1", "q4_1", 3), Mix("q4_0", "q4_0", 2), Mix("iq4_nl", "iq4_nl", 25)),
    *(Mix("iq4_xs", "iq4_xs", 30), Mix("mxfp4_moe", "mxfp4", 38), Mix("q3_k_l", "q3_k", 13)),
    *(Mix("q3_k_m", "q3_k", 12), Mix("q3_k_s", "q3_k", 11), Mix("iq3_m", "iq3_s", 27)),
    *(Mix("iq3_s", "iq3_s", 26), Mix("iq3_xs", "iq3_s", 22), Mix("iq3_xxs", "iq3_xxs", 23)),
    *(Mix("q2_k", "q2_k", 10), Mix("q2_k_s", "q2_k", 21), Mix("iq2_m", "iq2_s", 29)),
    *(Mix("iq2_s", "iq2_xs", 28), Mix("iq2_xs", "iq2_xs", 20), Mix("iq2_xxs", "iq2_xxs", 19)),
    *(Mix("tq2_0", "tq2_0", 37), Mix("tq1_0", "tq1_0", 36)),
    *(Mix("iq1_m", "iq1_m", 31), Mix("iq1_s", "iq1_s", 24)),
)
MIXES: Mapping[str, Mix] = MappingProxyType({mix.name: mix for mix in _MIXES})
ALIASES: Mapping[str, str] = MappingProxyType(
    {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4": "mxfp4_moe"}
)


def parse_mix(text: str) -> Mix:
    """The file type that `text` names, in any case, with dashes or underscores; RecipeError with a hint."""
    name = _known(text, (*MIXES, *ALIASES), "GGUF file type")
    return MIXES[ALIASES.get(name, name)]


def parse_type(text: str) -> str:
    """The type of one tensor that `text` names, as q6_k; RecipeError with a hint."""
    return _known(text, tuple(ROW), "GGUF type")


def _known(text: str, names: Sequence[str], what: str) -> str:
    name = text.strip().lower().replace("-", "_")
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"unknown {what} {text!r}{hint}", remedy=f"known: {', '.join(names)}")
