from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import RecipeError, SourceError, UnsupportedError
from quantkit.formats.hqq import DEFAULT_SCHEME, FORMAT, PRESETS, default_method, pack, parse, unpack
from quantkit.model.graph import Part, Weight
from quantkit.numerics.nearest import nearest
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize

NAMES = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}
# bits: first row, sha256 of all bytes, of codes (7r + 3c) mod 2^bits in 40 rows and 8 columns
VECTORS = {
    8: ([0, 3, 6, 9, 12], "cbb2fb4f2a5ff00c6a0c2761735719b74d9c563d0930fbc11eb1bf008236c4bd"),
    4: ([12, 63, 98, 149, 200], "c526041fe1f837ecd2411840f89c6c96c1f8719716a153464808a57f62875695"),
    3: ([68174084, 528349151], "2464756c83e2ab61e4e36d292cd0f598494213458adaf198ddcf7939d386a837"),
    2: ([34, 221, 136, 119, 34], "daab07315f16864e4fa50013f10ca1006be44a2bddd456cd4c7e320844049526"),
    1: ([85, 170, 85, 170, 85], "a7c4a7a6360012a37bd68371b9ec070edfc468c68b6426069c2942a45cf22ee5"),
}


def weight(module: str = "model.layers.0.mlp.up_proj", shape: tuple[int, int] = (64, 128)) -> Weight:
    return Weight(f"{module}.weight", shape)


def facts(default: Scheme, assigned: dict[Weight, Scheme | None]) -> FormatFacts:
    pairs = tuple(Assigned(w, s) for w, s in assigned.items())
    return FormatFacts(pairs, default, (), False, "hqq", "1.2.3")


def random(shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> Affine:
    found = nearest(torch.randn(shape, generator=rng) * 0.05, scheme, "mse")
    assert isinstance(found, Affine)
    return found


@pytest.mark.parametrize("bits", VECTORS)
def test_packing_vectors(bits: int) -> None:
    r, c = torch.arange(40), torch.arange(8)
    codes = ((7 * r[:, None] + 3 * c) % (1 << bits)).to(torch.uint8)
    packed = pack(codes, bits)
    first, sha = VECTORS[bits]
    assert packed[0, : len(first)].tolist() == first
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == sha
    assert torch.equal(unpack(packed, bits, 40), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows", [8, 16, 24])
def test_unpack_inverts_pack(bits: int, rows: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, (rows, 5), generator=rng).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, rows), codes)


# bits, group size, axis → packed shape of a weight of (64, 128), as the library packs it
SHAPES = {
    (4, 64, 1): (64, 64),
    (3, 64, 1): (13, 64),
    (2, 16, 1): (128, 16),
    (1, 32, 1): (32, 32),
    (8, 64, 1): (128, 64),
    (5, 64, 1): (128, 64),
    (6, 64, 1): (128, 64),
    (4, 64, 0): (32, 128),
    (3, 64, 0): (7, 128),
}


@pytest.mark.parametrize("bits, size, axis", SHAPES)
def test_every_tensor_of_a_layer(bits: int, size: int, axis: int, rng: torch.Generator) -> None:
    scheme = parse(f"w{bits}g{size}{'' if axis else '_axis0'}")
    q = random((64, 128), scheme, rng)
    found = FORMAT.encode(QuantizedLinear("x.y.weight", q), scheme)
    groups = 64 * 128 // size
    packing = {8: b"8bit_u8", 4: b"4bit_u8", 3: b"3bit_32", 2: b"2bit_u8", 1: b"1bit_u8"}
    assert found["x.y.W_q"].shape == SHAPES[bits, size, axis]
    assert found["x.y.W_q"].dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert found["x.y.scale"].shape == found["x.y.zero"].shape == ((groups, 1) if axis else (1, groups))
    assert found["x.y.shape"].tolist() == [64, 128] and found["x.y.shape"].dtype == torch.int64
    numbers = {name: found[f"x.y.{name}"] for name in ("nbits", "group_size", "axis")}
    assert {name: int(n) for name, n in numbers.items()} == {"nbits": bits, "group_size": size, "axis": axis}
    assert {(n.dtype, n.shape) for n in numbers.values()} == {(torch.int32, torch.Size([]))}
    texts = ("packing", "unpack_view_dtype", "compute_dtype")
    assert [bytes(found[f"x.y.{name}"].tolist()) for name in texts] == [
        packing.get(bits, b"8bit_u8"),
        b"torch.int32" if bits == 3 else b"torch.uint8",
        b"torch.float16",
    ]
    flags = {name: int(found[f"x.y.{name}"]) for name in ("view_as_float", "quant_scale", "quant_zero")}
    assert flags == {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
    ones = ("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize")
    assert [int(found[f"x.y.{name}"]) for name in ones] == [1] * 4
    assert (int(found["x.y.offload_meta"]), int(found["x.y.round_zero"])) == (0, bits == 4)
    assert len(found) == 19 and {FORMAT.base_name(name) for name in found} == {"x.y.weight"}


def by_hand(tensors: dict[str, Tensor], base: str) -> Tensor:
    """The weight by the library's rule: unpack, subtract, multiply, reshape."""
    shape, size = tensors[f"{base}.shape"].tolist(), int(tensors[f"{base}.group_size"])
    count = shape[0] * shape[1] // size
    rows = count if int(tensors[f"{base}.axis"]) else size
    codes = unpack(tensors[f"{base}.W_q"], int(tensors[f"{base}.nbits"]), rows)
    grouped = (codes.float() - tensors[f"{base}.zero"].float()) * tensors[f"{base}.scale"].float()
    return grouped.reshape(shape)


@pytest.mark.parametrize("name", [*PRESETS, "w5g64_asymf", "w6_asymf", "w3_asymf", "w2g8_asymf_axis0"])
def test_files_mean_what_the_values_mean(name: str, rng: torch.Generator) -> None:
    scheme, w = parse_scheme(name), weight(shape=(128, 256))
    assert FORMAT.accepts(scheme, w) is None
    q = random(w.shape, scheme, rng)
    tensors = FORMAT.encode(QuantizedLinear(w.name, q), scheme)
    assert torch.equal(by_hand(tensors, w.module), dequantize(q))
    assert [(s.name, s.dtype, s.shape) for s in FORMAT.layout(w, scheme)] == [
        (n, t.dtype, tuple(t.shape)) for n, t in tensors.items()
    ]
    back = FORMAT.decode(w.name, tensors, {}).weight
    assert isinstance(back, Affine) and isinstance(back.scale, Tensor) and isinstance(q.scale, Tensor)
    pairs = [(back.codes, q.codes), (back.scale, q.scale), (back.zero_point, q.zero_point)]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
    assert (back.bits, back.group) == (q.bits, q.group)
    assert (back.row_group is None) == (q.row_group is None) == (scheme.axis == 1)
    assert torch.equal(dequantize(back), dequantize(q))


def test_worked_example() -> None:
    codes = torch.tensor([[0, 2, 4, 4, 5, 6, 7, 15], [15, 13, 10, 8, 6, 4, 2, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.1], [0.0467]]).half(), torch.tensor([[3.125], [4.035]]).half()
    q = Affine(codes, 4, scale, (1, 8), zero_point=zero)
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), parse("w4g8"))
    assert tensors["x.W_q"].tolist() == [[15, 45, 74, 72, 86, 100, 114, 240]]


@pytest.mark.parametrize(
    "text, name",
    [
        ("w4g64", "w4g64_asymf"),
        ("W2g16", "w2g16_asymf"),
        ("w1g32", "w1g32_asymf"),
        ("w8", "w8_asymf"),
        ("w4g64_axis0", "w4g64_asymf_axis0"),
        ("w4g64_asymf", "w4g64_asymf"),
        ("w4g64_asymf_axis0", "w4g64_asymf_axis0"),
        # an integer zero point is another grid, and refused as such
        ("w4g64_asym", "w4g64_asym"),
        ("nf4", "nf4"),
        ("w8a8", "w8a8"),
    ],
)
def test_names_of_schemes(text: str, name: str) -> None:
    assert parse(text).name == name


def test_unknown_names_are_refused_as_they_were_written() -> None:
    with pytest.raises(RecipeError, match="'w4g64_zero'"):
        parse("w4g64_zero")
    with pytest.raises(RecipeError, match="bits must be 1 to 8"):
        parse("w9g64")


def test_presets() -> None:
    assert DEFAULT_SCHEME in PRESETS
    assert {default_method(parse_scheme(p)) for p in PRESETS} == {"hqq"}
    assert [parse(p).name for p in PRESETS] == list(PRESETS)
    assert {FORMAT.accepts(parse(p), weight(shape=(256, 512))) for p in PRESETS} == {None}


@pytest.mark.parametrize(
    "scheme, shape, part, reason",
    [
        ("w4g64_asym", (64, 128), None, "fractional zero points, not w4g64_asym"),
        ("nf4", (64, 128), None, "not nf4"),
        ("w7g64_asymf", (64, 128), None, "1 to 6 and 8 bits, not 7"),
        ("w4_tensor_asymf", (64, 128), None, "not per tensor"),
        ("w4g64_asymf", (64, 128), Part(transposed=True), "Conv1D"),
        ("w4g64_asymf", (64, 128), Part(expert=3), "stack of experts"),
        ("w4g64_asymf", (64, 96), None, "in_features is 96, not a multiple of 64"),
        ("w4g64_asymf_axis0", (96, 64), None, "out_features is 96, not a multiple of 64"),
        ("w4g64_asymf", (3, 64), None, "packs 2 groups of 4 bits together, and here are 3"),
        ("w2g32_asymf", (3, 64), None, "packs 4 groups of 2 bits together, and here are 6"),
        ("w1g16_asymf", (1, 64), None, "packs 8 groups of 1 bits together, and here are 4"),
        ("w2g6_asymf_axis0", (12, 64), None, "packs 4 values of a group of 2 bits together, and here are 6"),
    ],
)
def test_what_cannot_be_stored(scheme: str, shape: tuple[int, int], part: Part | None, reason: str) -> None:
    found = FORMAT.accepts(parse_scheme(scheme), Weight("x.weight", shape, "other", part))
    assert found is not None and reason in found and not found.endswith(".")


@pytest.mark.parametrize("scheme", ["w3g64_asymf", "w5g64_asymf", "w8g64_asymf", "w3g6_asymf_axis0"])
def test_3_and_8_bits_take_any_number_of_groups(scheme: str, rng: torch.Generator) -> None:
    found, shape = parse_scheme(scheme), (6, 192) if scheme.endswith("0") else (1, 192)
    assert FORMAT.accepts(found, Weight("x.weight", shape)) is None
    q = random(shape, found, rng)
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), found)
    assert torch.equal(dequantize(FORMAT.decode("x.weight", tensors, {}).weight), dequantize(q))


def test_values_of_another_scheme_are_refused(rng: torch.Generator) -> None:
    scheme = parse("w4g64")
    q = random((64, 128), scheme, rng)
    along_outputs = random((64, 128), parse("w4g32_axis0"), rng)
    wrong = {
        "not fractional": replace(q, zero_point=torch.ones(64, 2, dtype=torch.uint8)),
        "column groups": replace(q, column_group=torch.arange(128, dtype=torch.int32) // 64),
        "plain scales": replace(q, offset=torch.zeros(64, 2)),
        "as w4g64_asymf": along_outputs,
        "bits are others": replace(q, bits=3),
    }
    for reason, value in wrong.items():
        with pytest.raises(UnsupportedError, match=reason):
            FORMAT.encode(QuantizedLinear("x.weight", value), scheme)
    shuffled = replace(along_outputs, row_group=torch.zeros(64, dtype=torch.int32))
    for value in (q, shuffled):
        with pytest.raises(UnsupportedError, match="as w4g32_asymf_axis0"):
            FORMAT.encode(QuantizedLinear("x.weight", value), parse("w4g32_axis0"))


def broken(change: str, rng: torch.Generator) -> dict[str, Tensor]:
    scheme = parse("w4g64")
    tensors = FORMAT.encode(QuantizedLinear("x.weight", random((64, 128), scheme, rng)), scheme)
    name, _, number = change.partition("=")
    old = tensors[f"x.{name}"]
    new = torch.tensor(json.loads(number))
    tensors[f"x.{name}"] = new.to(old.dtype) if not new.is_floating_point() else new
    return tensors


@pytest.mark.parametrize(
    "change, kind",
    [
        ("nbits=7", UnsupportedError),
        ("nbits=1.58", UnsupportedError),
        ("nbits=[4, 4]", UnsupportedError),
        ("nbits=2", SourceError),
        ("axis=2", UnsupportedError),
        ("axis=0", SourceError),
        ("group_size=0", UnsupportedError),
        ("group_size=48", UnsupportedError),
        ("group_size=32", SourceError),
        ("shape=[64, 256]", SourceError),
        ("shape=[-64, -128]", SourceError),
        ("shape=[64, 128, 1]", SourceError),
        ("shape=64", SourceError),
        ("scale=[[1.0]]", SourceError),
        ("zero=[[1.0]]", SourceError),
        ("W_q=[[1, 2]]", SourceError),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    change: str, kind: type[Exception], rng: torch.Generator
) -> None:
    with pytest.raises(kind, match=r"`x\."):
        FORMAT.decode("x.weight", broken(change, rng), {})


def test_codes_under_a_float_dtype_are_read(rng: torch.Generator) -> None:
    for bits in (3, 4):
        scheme = parse(f"w{bits}g64")
        q = random((64, 128), scheme, rng)
        tensors = FORMAT.encode(QuantizedLinear("x.weight", q), scheme)
        tensors["x.W_q"] = tensors["x.W_q"].view(torch.float16)
        tensors["x.view_as_float"] = torch.tensor(1, dtype=torch.uint8)
        assert torch.equal(dequantize(FORMAT.decode("x.weight", tensors, {}).weight), dequantize(q))


def test_older_files_without_flags_are_read(rng: torch.Generator) -> None:
    scheme = parse("w4g64")
    q = random((64, 128), scheme, rng)
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), scheme)
    few = ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis")
    found = FORMAT.decode("x.weight", {f"x.{n}": tensors[f"x.{n}"] for n in few}, {})
    assert torch.equal(dequantize(found.weight), dequantize(q))


def test_config() -> None:
    default = parse("w4g64")
    found = FORMAT.config(facts(default, {weight(): default}))
    assert found["quant_method"] == "hqq"
    assert found["quant_config"] == {
        "weight_quant_params": {
            **{"nbits": 4, "group_size": 64, "axis": 1},
            **{"channel_wise": True, "optimize": True, "round_zero": True, "view_as_float": False},
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    assert FORMAT.side_files(found) == {}


def test_config_makes_transformers_stop() -> None:
    """It reads this key without asking whether it is there; with it, every layer would be random numbers."""
    default = parse("w4g64")
    assert "skip_modules" not in FORMAT.config(facts(default, {weight(): default}))


def infos(w: Weight, scheme: Scheme) -> dict[str, TensorInfo]:
    return {
        s.name: TensorInfo(s.name, NAMES[s.dtype], s.shape, Path("x"), 0, s.nbytes)
        for s in FORMAT.layout(w, scheme)
    }


def test_measure_finds_every_weight_in_the_config() -> None:
    default, odd = parse("w4g64"), parse("w2g32_axis0")
    same = [weight(f"model.layers.{n}.mlp.up_proj") for n in range(3)]
    other = weight("model.layers.3.mlp.up_proj", (32, 128))
    down, kept = weight("model.layers.0.mlp.down_proj", (128, 64)), weight("model.layers.1.mlp.down_proj")
    schemes: dict[Weight, Scheme | None] = {
        **dict.fromkeys(same, default),
        other: default,
        down: odd,
        kept: None,
    }
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config(facts(default, schemes))))
    assert found["linears"] == {
        "mlp.up_proj": {"shape": [64, 128], "nbits": 4, "group_size": 64, "axis": 1},
        "model.layers.3.mlp.up_proj": {"shape": [32, 128], "nbits": 4, "group_size": 64, "axis": 1},
        "mlp.down_proj": {"shape": [128, 64], "nbits": 2, "group_size": 32, "axis": 0},
    }
    for w, scheme in schemes.items():
        if scheme is not None:
            assert FORMAT.measure(w.name, infos(w, scheme), found) == (w.shape, scheme.bits)


@pytest.mark.parametrize("name", ["w4g64", "w3g64", "w2g32", "w1g32", "w8g64", "w4g64_axis0", "w3g64_axis0"])
def test_measure_counts_the_weights_of_files_by_others(name: str) -> None:
    scheme, w = parse(name), weight(shape=(128, 640))
    stated = {"quant_config": {"weight_quant_params": {"nbits": scheme.bits}}}
    shape, bits = FORMAT.measure(w.name, infos(w, scheme), stated)
    padded = scheme.bits == 3
    assert bits == scheme.bits
    assert 0 <= shape[0] * shape[1] - 128 * 640 < (10 * shape[1] if padded else 1)


def test_measure_survives_a_model_s_own_scale() -> None:
    name = "model.layers.0.router.scale"
    info = TensorInfo(name, "BF16", (64,), Path("x"), 0, 128)
    found = FORMAT.config(facts(parse("w4g64"), {weight(): parse("w4g64")}))
    assert FORMAT.measure("model.layers.0.router.weight", {name: info}, found) == ((1, 64), 16)


def test_plain_tensors_belong_to_nothing() -> None:
    for name in ("model.norm.weight", "x.bias", "x.weight", "lm_head.weight"):
        assert FORMAT.base_name(name) is None


def test_engines() -> None:
    def told(*names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        schemes = {weight(f"m.{n}"): parse(name) for n, name in enumerate(names)}
        return FORMAT.engines(facts(parse(names[0]), {**schemes}))

    loads, notes = told("w4g64")
    assert loads == ("hqq",)
    assert len(notes) == 1 and "transformers" in notes[0]
    assert any("bfloat16" in note for note in told("w4g64", "w8g64")[1])
    assert any("axis 0" in note for note in told("w4g64_axis0")[1])


def test_what_the_format_says_of_itself() -> None:
    assert {FORMAT.scale_dtype(source) for source in ("bfloat16", "float32", "float16")} == {"float16"}
    assert not FORMAT.holds_column_groups()
    assert FORMAT.cache_scales("model.layers.0.self_attn", "fp8") is None
    assert FORMAT.convention(parse("w4g64")) == "absmax"
