"""The types of ggml: names, numbers and sizes. Without torch, for those who only plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import UnsupportedError
from quantkit.schemes import GGML, Scheme


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type of ggml's.

    name      as its scheme is called: ``q4_k``
    id        its number in files
    elements  weights of a super-block
    nbytes    bytes of a super-block
    """

    name: str
    id: int
    elements: int
    nbytes: int

    @property
    def ggml(self) -> str:
        """As llama.cpp writes it: ``Q4_K``."""
        return self.name.upper()

    @property
    def bits(self) -> int:
        """Per code, scales not counted; 0 for a type that no scheme stands for."""
        return 4 if self.name == "mxfp4" else GGML.get(self.name, (0, 0))[0]

    @property
    def minimum(self) -> bool:
        """Whether blocks of 32 store a minimum beside the scale."""
        return self.name in ("q4_1", "q5_1")

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights; UnsupportedError when they fill no whole super-blocks."""
        if width % self.elements:
            raise UnsupportedError(
                f"{self.ggml} has super-blocks of {self.elements} weights, and a row has {width:,}"
            )
        return width // self.elements * self.nbytes


def _types(*rows: tuple[str, int, int, int]) -> Mapping[str, BlockType]:
    return MappingProxyType({row[0]: BlockType(*row) for row in rows})


TYPES = _types(
    *(("f32", 0, 1, 4), ("f16", 1, 1, 2), ("bf16", 30, 1, 2)),
    *(("q4_0", 2, 32, 18), ("q4_1", 3, 32, 20), ("q5_0", 6, 32, 22), ("q5_1", 7, 32, 24)),
    *(("q8_0", 8, 32, 34), ("iq4_nl", 20, 32, 18), ("mxfp4", 39, 32, 17)),
    *(("q2_k", 10, 256, 84), ("q3_k", 11, 256, 110), ("q4_k", 12, 256, 144), ("q5_k", 13, 256, 176)),
    *(("q6_k", 14, 256, 210), ("iq4_xs", 23, 256, 136), ("tq1_0", 34, 256, 54), ("tq2_0", 35, 256, 66)),
    *(("iq1_s", 19, 256, 50), ("iq1_m", 29, 256, 56), ("iq2_xxs", 16, 256, 66), ("iq2_xs", 17, 256, 74)),
    *(("iq2_s", 22, 256, 82), ("iq3_xxs", 18, 256, 98), ("iq3_s", 21, 256, 110)),
)
# types that files may hold and that are neither packed nor unpacked here
OTHER_TYPES = _types(
    *(("i8", 24, 1, 1), ("i16", 25, 1, 2), ("i32", 26, 1, 4), ("i64", 27, 1, 8), ("f64", 28, 1, 8)),
    *(("nvfp4", 40, 64, 36), ("q1_0", 41, 128, 18), ("q2_0", 42, 64, 18)),
)


def type_of(scheme: Scheme) -> BlockType:
    """The type that stores the codes of `scheme`; UnsupportedError when none does."""
    kind = TYPES.get(scheme.numbers)
    if kind is None:
        raise UnsupportedError(
            f"GGUF has no type for {scheme.name}", remedy=f"its types are {', '.join(TYPES)}"
        )
    return kind
