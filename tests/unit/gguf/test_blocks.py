"""Blocks against the worked examples of the format, and against the `gguf` package for any bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.blocks import Q4_0, Q4_1, TYPES, BlockType, pack, type_of, unpack
from quantkit.gguf.types import OTHER_TYPES
from quantkit.schemes import GGML, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, Lattice, QuantizedTensor, dequantize

gguf = pytest.importorskip("gguf")

EXAMPLES = [
    line.split()
    for line in Path(__file__).with_name("worked_blocks.txt").read_text("ascii").splitlines()
    if not line.startswith("#")
]
KINDS = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
# bytes of a super-block that hold the exponents of its floats; without their second bit all are finite
EXPONENTS = {
    **{"f32": (3,), "f16": (1,), "bf16": (1,), "q4_0": (1,), "q4_1": (1, 3), "q5_0": (1,), "q5_1": (1, 3)},
    **{"q8_0": (1,), "iq4_nl": (1,), "mxfp4": (0,), "q2_k": (81, 83), "q3_k": (109,), "q4_k": (1, 3)},
    **{"q5_k": (1, 3), "q6_k": (209,), "iq4_xs": (1,), "tq1_0": (53,), "tq2_0": (65,), "iq1_s": (1,)},
    **{"iq1_m": (55,), "iq2_xxs": (1,), "iq2_xs": (1,), "iq2_s": (1,), "iq3_xxs": (1,), "iq3_s": (1,)},
}


def random_blocks(kind: BlockType, rows: int, blocks: int, seed: int) -> Tensor:
    """Any bytes that a file may hold: only what is not finite and the absent code of tq2_0 are left out."""
    rng = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, blocks, kind.nbytes), generator=rng, dtype=torch.uint8)
    if kind.name == "tq2_0":
        data &= ~((data >> 1) & 0x55)
    for at in EXPONENTS[kind.name]:
        data[..., at] &= 0xBF
    return data.flatten(1)


def example(name: str, blocks: int = 2) -> Any:
    return unpack(random_blocks(TYPES[name], 3, blocks, 0), TYPES[name])


def theirs(rows: Tensor, kind: BlockType) -> Tensor:
    found = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind.ggml])
    return torch.from_numpy(found.astype("float32")).view(rows.shape[0], -1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("words", EXAMPLES, ids=lambda words: f"{words[0]}-{words[1][:6]}")
def test_worked_examples(words: list[str]) -> None:
    name, text, *numbers, error = words
    kind = TYPES[name]
    block = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)[None]
    assert block.shape[1] == kind.nbytes
    found = unpack(block, kind)
    values = dequantize(found)[0]
    told = torch.tensor([float(number) for number in numbers])
    torch.testing.assert_close(values[[0, 1, 2, 3, 4, 5, -2, -1]], told, rtol=1e-6, atol=1e-7)
    x = ((37 * torch.arange(kind.elements)) % 101 - 50).to(torch.float32) / 25
    assert float((values - x).double().square().sum()) == pytest.approx(float(error), abs=1e-5)
    assert torch.equal(pack(found, kind), block)


def test_every_quantized_type_has_an_example() -> None:
    assert {words[0] for words in EXAMPLES} == set(TYPES) - {"f32", "f16", "bf16"}


@KINDS
@settings(max_examples=10)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_bytes_mean_what_the_library_says_and_come_back(
    kind: BlockType, rows: int, blocks: int, seed: int
) -> None:
    data = random_blocks(kind, rows, blocks, seed)
    assert data.shape == (rows, kind.row_bytes(blocks * kind.elements))
    q = unpack(data, kind)
    assert same_bits(dequantize(q), theirs(data, kind))
    back = pack(q, kind)
    if kind.name == "tq1_0":
        # 243 of 256 bytes are what five trits become: the others say the same as one of these
        assert same_bits(dequantize(unpack(back, kind)), dequantize(q))
        data, back = back, pack(unpack(back, kind), kind)
    assert torch.equal(back, data)


@KINDS
def test_sizes_and_numbers_are_those_of_the_library(kind: BlockType) -> None:
    number = gguf.GGMLQuantizationType[kind.ggml]
    assert number == kind.id
    assert gguf.GGML_QUANT_SIZES[number] == (kind.elements, kind.nbytes)


def test_other_types_have_the_sizes_of_the_library() -> None:
    known = [kind for kind in OTHER_TYPES.values() if hasattr(gguf.GGMLQuantizationType, kind.ggml)]
    assert len(known) >= 7
    for kind in known:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.id)] == (kind.elements, kind.nbytes)
    with pytest.raises(UnsupportedError, match="does not know what NVFP4 stores"):
        unpack(torch.zeros(1, 36, dtype=torch.uint8), OTHER_TYPES["nvfp4"])


def test_schemes_and_types_are_one() -> None:
    for name in (*GGML, "mxfp4"):
        scheme = parse_scheme(name)
        kind = type_of(scheme)
        assert (kind.name, kind.elements, kind.bits) == (name, scheme.group_size, scheme.bits)
    assert set(TYPES) == {*GGML, "mxfp4"}
    with pytest.raises(UnsupportedError, match="GGUF has no type for w4g128"):
        type_of(parse_scheme("w4g128"))


@pytest.mark.parametrize(
    ("name", "made", "bits", "group", "nested"),
    [
        ("q4_0", Affine, 4, 32, None),
        ("q5_1", Affine, 5, 32, None),
        ("q8_0", Affine, 8, 32, None),
        ("iq4_nl", Codebook, 4, 32, None),
        ("mxfp4", Codebook, 4, 32, None),
        ("tq1_0", Affine, 2, 256, None),
        ("tq2_0", Affine, 2, 256, None),
        ("q2_k", Affine, 2, 16, (torch.uint8, 4, 16)),
        ("q3_k", Affine, 3, 16, (torch.int8, 6, 16)),
        ("q4_k", Affine, 4, 32, (torch.uint8, 6, 8)),
        ("q5_k", Affine, 5, 32, (torch.uint8, 6, 8)),
        ("q6_k", Affine, 6, 16, (torch.int8, 8, 16)),
        ("iq4_xs", Codebook, 4, 32, (torch.int8, 6, 8)),
        ("iq2_xxs", Lattice, 8, 32, (torch.uint8, 4, 8)),
        ("iq2_xs", Lattice, 9, 16, (torch.uint8, 4, 16)),
        ("iq2_s", Lattice, 10, 16, (torch.uint8, 4, 16)),
        ("iq3_xxs", Lattice, 8, 32, (torch.uint8, 4, 8)),
        ("iq3_s", Lattice, 9, 32, (torch.uint8, 4, 8)),
        ("iq1_s", Lattice, 11, 32, (torch.uint8, 3, 8)),
        ("iq1_m", Lattice, 11, 16, (torch.uint8, 3, 16)),
    ],
)
def test_what_a_type_is_made_of(
    name: str, made: type, bits: int, group: int, nested: tuple[torch.dtype, int, int] | None
) -> None:
    q = example(name)
    assert (type(q), q.bits, q.group) == (made, bits, (1, group))
    if nested is None:
        assert q.scale.shape == (3, 2 * TYPES[name].elements // group)
        return
    inner = q.scale
    assert (inner.codes.dtype, inner.bits, inner.group) == (nested[0], nested[1], (1, nested[2]))
    assert inner.codes.shape == (3, 2 * nested[2])
    assert inner.scale.shape == (3, 2) and inner.scale.dtype == torch.float16


def test_the_stored_minimum_is_held_as_an_offset() -> None:
    block = torch.zeros(1, 144, dtype=torch.uint8)
    block[0, 2:4] = torch.tensor([1.5], dtype=torch.float16).view(torch.uint8)
    q = cast(Affine, unpack(block, TYPES["q4_k"]))
    assert cast(Affine, q.offset).scale == torch.tensor([[-1.5]], dtype=torch.float16)


def test_signs_follow_their_parity() -> None:
    for name in ("iq2_xxs", "iq2_xs", "iq3_xxs"):
        negative = (cast(Tensor, example(name).signs) < 0).view(-1, 8).sum(dim=1)
        assert bool((negative % 2 == 0).all()) and int(negative.max()) > 0


@pytest.mark.parametrize("name", ["q4_k", "iq2_xs", "iq1_m", "tq1_0", "mxfp4"])
def test_rows_may_be_any_view(name: str) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, 4, 2, 1)
    wide = torch.cat((data[:, :1], data, data), dim=1)
    view = wide[::2, 1 : 1 + data.shape[1]]
    assert same_bits(dequantize(unpack(view, kind)), dequantize(unpack(data[::2].clone(), kind)))


def changed(field: str, edit: Callable[[Any], Any]) -> Callable[[Any], QuantizedTensor]:
    """`q` with one field, or `outer.inner` field, edited."""
    outer, _, inner = field.partition(".")

    def change(q: Any) -> Any:
        part = getattr(q, outer)
        return replace(q, **{outer: changed(inner, edit)(part) if inner else edit(part)})

    return change


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        found = tensor.clone()
        found.view(-1)[0] = value
        return found

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("q4_0", changed("group", lambda _: (1, 64)), "4 bits, groups .1, 64. instead of .*groups .1, 32."),
        ("q4_0", changed("bits", lambda _: 5), "5 bits, .* instead of Affine, 4 bits"),
        ("q4_0", changed("scale", lambda s: s.float()), "scale is .3, 2. float32, not .3, 2. float16"),
        ("q4_0", changed("scale", put(float("inf"))), "a scale is not finite"),
        ("q4_0", changed("codes", put(8)), "codes reach from -8 to 8, which is outside of -8 to 7"),
        ("q4_0", changed("codes", lambda c: c[:, :48]), "rows of 48 weights are no whole super-blocks of 32"),
        ("q4_0", changed("zero_point", lambda _: torch.zeros(3, 2)), "zero_point is given"),
        ("q4_0", changed("column_group", lambda _: torch.zeros(64)), "column_group is given"),
        ("q4_1", changed("offset", lambda _: None), "offset is no tensor"),
        ("q5_1", changed("codes", lambda c: c.view(torch.int8)), "codes is .* int8, not .* uint8"),
        ("q5_1", changed("codes", put(32)), "codes reach from 0 to 32"),
        ("q4_k", changed("scale", lambda s: dequantize(s).half()), "scale: it is plain"),
        ("q4_k", changed("offset", lambda _: None), "offset: it is plain"),
        ("q4_k", changed("scale.codes", put(64)), "scale: codes reach from 0 to 64"),
        ("q6_k", changed("scale.scale", put(float("nan"))), "scale: a scale is not finite"),
        ("iq4_xs", changed("table", lambda t: t + 1), "the table is another"),
        ("mxfp4", changed("scale", lambda s: s.view(torch.uint8)), "scale is .* uint8"),
        ("iq2_s", changed("scale.zero_point", put(0.5)), "zero points are not -0.5"),
        ("iq2_s", changed("signs", put(0)), "signs are 1 or −1"),
        ("iq3_s", changed("codes", put(512)), "codes reach from 0 to 512"),
        ("iq2_xxs", changed("signs", lambda s: torch.cat((-s[:, :1], s[:, 1:]), 1)), "3 of 192 runs of 8"),
        ("iq1_m", changed("shift", put(0.125)), "points are shifted by 0.25 or −0.25"),
        ("tq1_0", changed("codes", put(-2)), "codes reach from -2 to 1"),
        ("f16", changed("scale", lambda s: 2 * s), "there are scales"),
        ("f16", changed("values", put(float("inf"))), "a value is not finite"),
        ("bf16", changed("values", lambda v: v.half()), "values are float16, not bfloat16"),
        ("q4_0", lambda _: example("iq4_nl"), "it is made of Codebook, not Affine"),
    ],
)
def test_what_is_not_on_the_grid_is_refused(
    name: str, change: Callable[[Any], QuantizedTensor], reason: str
) -> None:
    q = example(name, 2)
    assert pack(q, TYPES[name]).shape[0] == 3
    with pytest.raises(UnsupportedError, match=f"not lie on the grid of {name.upper()}: .*{reason}"):
        pack(change(q), TYPES[name])


def test_zero_points_may_be_one_for_all() -> None:
    q = cast(Lattice, example("iq3_s"))
    scale = cast(Affine, q.scale)
    flat = replace(q, scale=replace(scale, zero_point=torch.full((6,), -0.5)))
    assert torch.equal(pack(flat, TYPES["iq3_s"]), random_blocks(TYPES["iq3_s"], 3, 2, 0))


def test_rows_must_be_whole_super_blocks() -> None:
    with pytest.raises(SourceError, match="rows of 17 bytes are no whole Q4_0 super-blocks of 18"):
        unpack(torch.zeros(2, 17, dtype=torch.uint8), Q4_0)
    with pytest.raises(UnsupportedError, match="Q4_K has super-blocks of 256 weights, and a row has 128"):
        TYPES["q4_k"].row_bytes(128)
    assert Q4_1.row_bytes(64) == 40


def test_a_code_that_tq2_0_does_not_have() -> None:
    block = torch.zeros(1, 66, dtype=torch.uint8)
    block[0, 5] = 0b1100
    with pytest.raises(SourceError, match="tq2_0 has codes 0, 1 and 2, and here is a 3"):
        unpack(block, TYPES["tq2_0"])


def test_floats_have_one_scale_of_one() -> None:
    q = cast(Float, example("bf16", 4))
    assert (q.bits, q.group, q.values.dtype) == (16, (3, 4), torch.bfloat16)
    assert torch.equal(q.scale, torch.ones(1, 1))  # type: ignore[arg-type]
