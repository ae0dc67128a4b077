from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import SourceError, UnsupportedError
from quantkit.formats.bitsandbytes import FORMAT, PRESETS, default_method, parse
from quantkit.methods.llm_int8 import Params, quantizer
from quantkit.model.graph import Part, Weight
from quantkit.numerics.levels import FP4, NF4
from quantkit.numerics.nearest import nearest
from quantkit.numerics.stored import nest
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize
from tests.quantized import random_affine, same

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs quantkit[bitsandbytes]"
)
NAME = "model.layers.1.mlp.down_proj.weight"
HEAD = Weight("lm_head.weight", (96, 64), "head")
STATE = "x.weight.quant_state.bitsandbytes__"
INT8 = parse("int8")


def scheme_of(text: str) -> Scheme:
    return replace(parse(text), scale_dtype="float32")


def sha16(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def random_table(shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> Codebook:
    """A 4-bit weight whose codes are random, as are its scales, of which about half are negative."""
    groups = (shape[0], shape[1] // (scheme.group_size or shape[1]))
    scale = (torch.rand(groups, generator=rng) + 0.5) * (torch.rand(groups, generator=rng) - 0.5).sign()
    return Codebook(
        codes=torch.randint(0, 16, shape, generator=rng).to(torch.uint8),
        bits=4,
        table=torch.tensor(NF4 if scheme.numbers == "nf4" else FP4),
        scale=nest(scale) if scheme.nested else scale,
        group=scheme.group(shape),
    )


def random_int8(shape: tuple[int, int], rng: torch.Generator) -> QuantizedTensor:
    method = quantizer(Params(report_outliers=False))
    return method.quantize(torch.randn(shape, generator=rng), None, INT8).weight


def random_weight(shape: tuple[int, int], scheme: Scheme, rng: torch.Generator) -> QuantizedTensor:
    return random_int8(shape, rng) if scheme.activations else random_table(shape, scheme, rng)


def encode(q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    return FORMAT.encode(QuantizedLinear("x.weight", q), scheme)


def decode(tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    return FORMAT.decode("x.weight", tensors, {}).weight


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    (raw,) = (t for name, t in tensors.items() if "quant_state" in name)
    found: dict[str, Any] = json.loads(bytes(raw.tolist()))
    return found


def rounded(weight: Tensor, text: str) -> dict[str, Tensor]:
    """What a file holds of a weight (out, in) rounded to nearest."""
    scheme = scheme_of(text)
    return encode(nearest(weight.float(), scheme, "absmax"), scheme)


# --- bytes

BLOCK = (0.02, -0.05, 0.10, 0, 0.07, -0.10, 0.03, -0.01)


@pytest.mark.parametrize(
    ("text", "data", "values"),
    [
        (
            "nf4",
            [0x92, 0xF7, 0xE0, 0xB6, 0x77],
            [0.016093, -0.052507, 0.1, 0, 0.072296, -0.1, 0.033792, -0.009105],
        ),
        (
            "fp4",
            [0x6D, 0x30, 0x2B, 0x4E, 0x00],
            [0.016667, -0.05, 0.1, 0, 0.066667, -0.1, 0.033333, -0.016667],
        ),
    ],
)
def test_one_group_by_hand(text: str, data: list[int], values: list[float]) -> None:
    tensors = rounded(torch.tensor([[*BLOCK, *[0.0] * 56]]), text)
    assert tensors["x.weight"].shape == (32, 1) and tensors["x.weight"][:5, 0].tolist() == data
    assert tensors["x.weight.absmax"].tolist() == pytest.approx([0.1])
    assert dequantize(decode(tensors))[0, :8].tolist() == pytest.approx(values, abs=1e-6)


REFERENCE = (((37 * torch.arange(4096) % 101) - 50) / 100).view(64, 64)


@pytest.mark.parametrize(
    ("text", "first", "data", "values"),
    [
        ("nf4", [4, 193, 110, 41, 243, 176], "2e744bd89d3bdc33", "57a066a46293cd17"),
        ("fp4", [191, 90, 146, 166, 60, 75], "1636d7cbc846c275", "0687a5f77c6629a8"),
    ],
)
def test_reference_vectors(text: str, first: list[int], data: str, values: str) -> None:
    tensors = rounded(REFERENCE, text)
    assert tensors["x.weight"][:6, 0].tolist() == first and sha16(tensors["x.weight"]) == data
    assert sha16(tensors["x.weight.absmax"]) == "3c8b18286c8fe66f"
    assert sha16(dequantize(decode(tensors))) == values


def test_reference_vector_of_double_quantization() -> None:
    tensors = rounded(REFERENCE, "nf4_dq")
    assert sha16(tensors["x.weight.absmax"]) == "f31b77650420296d"
    assert tensors["x.weight.nested_absmax"].tolist() == [0.00937497615814209]
    assert sha16(tensors["x.weight.nested_quant_map"]) == "e732639a65f497b4"
    state = state_of(tensors)
    assert state["nested_offset"] == 0.49937498569488525
    assert state["nested_blocksize"] == 256 and state["nested_dtype"] == "float32"


def test_reference_vector_of_int8() -> None:
    method = quantizer(Params(report_outliers=False))
    tensors = encode(method.quantize(REFERENCE, None, INT8).weight, INT8)
    assert list(tensors) == ["x.weight", "x.SCB", "x.weight_format"]
    assert tensors["x.weight"][0, :6].tolist() == [-127, -33, 61, -102, -8, 86]
    assert sha16(tensors["x.weight"]) == "89cb875c3adb7593"
    assert tensors["x.SCB"].shape == (64,) and sha16(tensors["x.SCB"]) == "8dd87cc4f7974070"
    assert tensors["x.weight_format"].shape == () and tensors["x.weight_format"].item() == 0


@pytest.mark.parametrize("shape", [(2, 4096), (64, 4096), (3, 8192)])
@pytest.mark.parametrize(
    "text", ["nf4", "nf4g32", "nf4g256", "nf4g4096_dq", "nf4_dq", "fp4", "fp4_dq", "int8"]
)
def test_decode_inverts_encode(text: str, shape: tuple[int, int], rng: torch.Generator) -> None:
    scheme = scheme_of(text)
    q = random_weight(shape, scheme, rng)
    tensors = encode(q, scheme)
    assert same(decode(tensors), q)
    planned = [(s.name, s.dtype, s.shape) for s in FORMAT.layout(Weight("x.weight", shape), scheme)]
    assert planned == [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize("offset", [0.0, -0.0, 1 / 3, -1.1754943508222875e-38, 3.4028234663852886e38, -1e-4])
def test_every_offset_has_room_and_survives(offset: float, rng: torch.Generator) -> None:
    """File sizes are known before anything is quantized, and the mean of scales prints as it likes."""
    scheme = scheme_of("nf4_dq")
    q = random_table((32, 64), scheme, rng)
    assert isinstance(q.scale, Codebook)
    exact = torch.tensor([offset], dtype=torch.float32)
    q = replace(q, scale=replace(q.scale, offset=exact))
    tensors = encode(q, scheme)
    (spec,) = (s for s in FORMAT.layout(Weight("x.weight", (32, 64)), scheme) if "quant_state" in s.name)
    assert tensors[spec.name].shape == spec.shape
    assert same(decode(tensors), q)
    assert state_of(tensors)["nested_offset"] == float(exact)


# --- the library


def quant_state(tensors: Mapping[str, Tensor]) -> Any:
    from bitsandbytes.functional import QuantState

    stats = {n.removeprefix("x.weight."): t.clone() for n, t in tensors.items() if n != "x.weight"}
    return QuantState.from_dict(stats, torch.device("cpu"))


@needs_bitsandbytes
@pytest.mark.parametrize("text", ["nf4", "nf4_dq", "nf4g32", "nf4g128_dq", "fp4", "fp4_dq", "fp4g512"])
def test_the_library_dequantizes_what_we_wrote(text: str, rng: torch.Generator) -> None:
    """Scales of both signs, which no tool but a search writes."""
    from bitsandbytes.functional import dequantize_4bit

    scheme = scheme_of(text)
    q = random_table((48, 512), scheme, rng)
    tensors = encode(q, scheme)
    state = quant_state(tensors)
    state.dtype = torch.float32
    assert torch.equal(dequantize_4bit(tensors["x.weight"], state), dequantize(q))


@needs_bitsandbytes
@pytest.mark.parametrize("text", ["nf4", "nf4_dq", "nf4g32", "fp4_dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_library_wrote_is_read(text: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    from bitsandbytes.functional import dequantize_4bit

    scheme = scheme_of(text)
    for storage in (torch.uint8, torch.bfloat16):
        packed, state = library(torch.randn(24, 256, generator=rng).to(dtype), scheme, storage)
        stats = {f"x.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        found = decode({"x.weight": packed, **stats})
        state.dtype = torch.float32
        assert torch.equal(dequantize(found), dequantize_4bit(packed, state))


def library(weight: Tensor, scheme: Scheme, storage: torch.dtype = torch.uint8) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        weight,
        blocksize=scheme.group_size,
        compress_statistics=scheme.nested,
        quant_type=scheme.numbers,
        quant_storage=storage,
    )


@needs_bitsandbytes
@pytest.mark.parametrize("numbers", ["nf4", "fp4"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_nearest_makes_the_bytes_of_the_library(
    numbers: str, group: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    for shape, size in (((9, group), 0.02), ((2, 2 * group), 30.0), ((33, max(group, 128)), 1e-3)):
        weight = (torch.randn(shape, generator=rng) * size).to(dtype)
        weight[:, ::5] = 0
        packed, state = library(weight, scheme_of(f"{numbers}g{group}"))
        tensors = rounded(weight, f"{numbers}g{group}")
        assert torch.equal(tensors["x.weight"], packed)
        assert torch.equal(tensors["x.weight.absmax"], state.absmax)


@needs_bitsandbytes
@pytest.mark.parametrize("text", ["nf4", "fp4"])
def test_groups_of_zeros_are_those_of_the_library(text: str, rng: torch.Generator) -> None:
    weight = torch.randn(5, 128, generator=rng)
    weight[1] = weight[3, 64:] = 0
    packed, state = library(weight, scheme_of(text))
    tensors = rounded(weight, text)
    assert torch.equal(tensors["x.weight"], packed)
    assert torch.equal(tensors["x.weight.absmax"], state.absmax)
    assert bool((dequantize(decode(tensors))[weight == 0] == 0).all())


@needs_bitsandbytes
@pytest.mark.parametrize("text", ["nf4_dq", "fp4_dq", "nf4g32_dq"])
@pytest.mark.parametrize("zeros", [False, True])
def test_double_quantization_is_that_of_the_library(text: str, zeros: bool, rng: torch.Generator) -> None:
    weight = torch.randn(64, 1024, generator=rng) * 0.02
    if zeros:
        weight[3:6] = 0
    packed, state = library(weight, scheme_of(text))
    tensors = rounded(weight, text)
    assert torch.equal(tensors["x.weight"], packed)
    assert torch.equal(tensors["x.weight.nested_absmax"], state.state2.absmax)
    assert state_of(tensors)["nested_offset"] == float(state.offset)
    # its CPU code looks 8-bit codes up in steps of 2^-15, which moves one in a thousand to a neighbour
    off = (tensors["x.weight.absmax"].int() - state.absmax.int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 0.01


@needs_bitsandbytes
@pytest.mark.parametrize("text", ["nf4", "fp4g128", "nf4_dq"])
def test_the_state_is_the_library_s_but_for_spaces(text: str, rng: torch.Generator) -> None:
    weight = torch.randn(32, 256, generator=rng).to(torch.bfloat16)
    _, state = library(weight, scheme_of(text))
    parts = state.as_dict(packed=True)
    tensors = rounded(weight, text)
    assert [f"x.weight.{name}" for name in sorted(parts)] == sorted(n for n in tensors if n != "x.weight")
    (key,) = (name for name in parts if "quant_state" in name)
    ours = bytes(tensors[f"x.weight.{key}"].tolist())
    assert ours.rstrip() == bytes(parts[key].tolist())
    assert len(ours) == len(ours.rstrip()) or "dq" in text


# --- hostile and foreign files


def test_broken_states_are_refused(rng: torch.Generator) -> None:
    tensors = encode(random_table((4, 64), scheme_of("nf4"), rng), scheme_of("nf4"))
    for missing in ("x.weight.absmax", "x.weight.quant_map", f"{STATE}nf4"):
        with pytest.raises(SourceError, match=missing.removeprefix("x.").replace(".", r"\.")):
            decode({name: t for name, t in tensors.items() if name != missing})
    states = (
        b"",
        b"{}",
        b"\xff",
        b"[1]",
        b'{"shape": 3}',
        b'{"shape": [4], "blocksize": 64}',
        b'{"shape": [4, 64], "blocksize": 0}',
        b'{"shape": [4, -64], "blocksize": 64}',
        b'{"shape": [4, 64], "blocksize": 64, "nested_offset": "x"}',
    )
    for raw in states:
        with pytest.raises(SourceError, match="quant_state"):
            decode({**tensors, f"{STATE}nf4": torch.tensor(list(raw), dtype=torch.uint8)})


@pytest.mark.parametrize(("shape", "group"), [((4, 48), 64), ((4, 128), 64)])
def test_groups_that_cross_rows_are_refused(shape: Sequence[int], group: int, rng: torch.Generator) -> None:
    tensors = encode(random_table((4, 64), scheme_of("nf4"), rng), scheme_of("nf4"))
    raw = json.dumps({"quant_type": "nf4", "blocksize": group, "dtype": "float16", "shape": shape})
    tensors[f"{STATE}nf4"] = torch.tensor(list(raw.encode()), dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="whole groups"):
        decode(tensors)


def test_values_that_the_file_cannot_hold_are_refused(rng: torch.Generator) -> None:
    scheme = scheme_of("nf4")
    table = random_table((8, 64), scheme, rng)
    int8 = random_int8((8, 64), rng)
    assert isinstance(int8, Affine) and isinstance(int8.scale, Float)
    refused = (
        replace(table, table=torch.linspace(-1, 1, 16)),
        replace(table, offset=torch.ones(1)),
        replace(table, scale=torch.ones(8, 1, dtype=torch.float16)),
        replace(table, group=(2, 64)),
        replace(int8, scale=torch.ones(8, 1)),
        replace(int8, scale=replace(int8.scale, scale=torch.ones(1, 1))),
        replace(int8, offset=torch.ones(8, 1)),
        random_affine((8, 64), Scheme(8), rng),
        random_affine((8, 64), Scheme(4, 32, sym=False), rng),
        Float(torch.ones(8, 64).to(torch.float8_e4m3fn), 8, torch.ones(8, 1), (1, 64)),
    )
    for q in refused:
        with pytest.raises(UnsupportedError, match=r"`x\.weight`"):
            encode(q, scheme)
    with pytest.raises(UnsupportedError, match="column groups"):
        encode(replace(int8, column_group=torch.zeros(64, dtype=torch.int32)), INT8)


# --- what is possible


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("nf4", (64, 96), "not a multiple of 64"),
        ("nf4", (64, 96), "use nf4g32"),
        ("fp4g128", (64, 192), "use fp4, or keep"),
        ("nf4", (64, 80), "; keep the weight with a rule"),
        ("nf4g16", (64, 64), "not 16"),
        ("nf4g8192", (64, 8192), "not 8192"),
        ("w8", (64, 64), "write int8"),
        ("w8a8", (64, 64), "write int8"),
        ("w4g64", (64, 64), "not w4g64"),
        ("w4g64_asym", (64, 64), "not w4g64_asym"),
        ("fp8", (64, 64), "not fp8"),
        ("mxfp4", (64, 64), "not mxfp4"),
    ],
)
def test_what_cannot_be_stored(text: str, shape: tuple[int, int], reason: str) -> None:
    found = FORMAT.accepts(scheme_of(text), Weight(NAME, shape))
    assert found is not None and reason in found
    assert not found.endswith(".")


@pytest.mark.parametrize("text", ["nf4", "fp4_dq", "int8"])
def test_experts_are_refused_with_the_rule_that_keeps_them(text: str) -> None:
    for weight in (
        Weight("model.layers.0.mlp.experts.3.up_proj.weight", (64, 64)),
        Weight("model.layers.0.feed_forward.up", (64, 64), "up", Part(expert=1)),
    ):
        found = FORMAT.accepts(scheme_of(text), weight)
        assert found is not None and "'*.experts.*=keep'" in found
    shared = Weight("model.layers.0.mlp.shared_experts.up_proj.weight", (64, 64))
    assert FORMAT.accepts(scheme_of(text), shared) is None


def test_all_groups_of_the_library_and_transposed_weights_are_accepted() -> None:
    for group in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        assert FORMAT.accepts(scheme_of(f"nf4g{group}"), Weight(NAME, (3, 4096))) is None
    assert FORMAT.accepts(INT8, Weight(NAME, (3, 7))) is None
    conv1d = Weight("h.0.attn.c_attn.weight", (192, 64), "qkv", Part(transposed=True))
    assert FORMAT.accepts(scheme_of("nf4"), conv1d) is None


def test_names_that_users_of_the_library_know() -> None:
    assert parse("int8") == parse(" LLM_int8 ") == parse("w8a8_mixed")
    assert parse("nf4").numbers == "nf4" and parse("nf4_dq").nested
    assert default_method(INT8) == "llm_int8"
    assert {default_method(parse(p)) for p in PRESETS if p != "w8a8_mixed"} == {"gptq"}


def test_scales_are_float32_of_either_sign() -> None:
    assert {FORMAT.scale_dtype(source) for source in ("bfloat16", "float16")} == {"float32"}
    assert FORMAT.convention(scheme_of("nf4")) == "absmax"
    assert not FORMAT.holds_column_groups() and FORMAT.cache_scales("model.layers.0.self_attn", "fp8") is None


def test_names_of_file_tensors() -> None:
    for text in ("nf4_dq", "fp4_dq", "int8"):
        for spec in FORMAT.layout(Weight(NAME, (64, 64)), scheme_of(text)):
            assert FORMAT.base_name(spec.name) == (None if spec.name == NAME else NAME)
    for plain in ("model.norm.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight", "SCB"):
        assert FORMAT.base_name(plain) is None


@pytest.mark.parametrize("text", ["nf4", "nf4_dq", "fp4g32"])
def test_headers_of_4_bits_tell_how_many_but_not_rows(text: str) -> None:
    infos = headers(text)
    assert FORMAT.measure(NAME, infos, {}) == ((32 * 64, 1), 4)


def test_headers_of_int8_tell_the_shape() -> None:
    assert FORMAT.measure(NAME, headers("int8"), {}) == ((32, 64), 8)


def headers(text: str) -> dict[str, TensorInfo]:
    names = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
    specs = FORMAT.layout(Weight(NAME, (32, 64)), scheme_of(text))
    return {s.name: TensorInfo(s.name, names[s.dtype], s.shape, Path("x"), 0, s.nbytes) for s in specs}


# --- configuration

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def facts(
    default: str, changes: Mapping[str, str | None] | None = None, shape: tuple[int, int] = (64, 64)
) -> FormatFacts:
    """Two blocks of four weights, all `default` but for `changes` by module."""
    names = {m: m for n in range(2) for part in PARTS for m in [f"model.layers.{n}.{part}"]}
    wanted = {**dict.fromkeys(names, default), **(changes or {})}
    assigned = tuple(
        Assigned(Weight(f"{module}.weight", shape), None if text is None else scheme_of(text))
        for module, text in wanted.items()
    )
    return FormatFacts(
        assigned, scheme_of(default), (HEAD,), False, "rtn", "1.2.3", ("lm_head",), None, "float16"
    )


def config(*args: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config(facts(*args))))
    return found


def test_config_of_4_bits() -> None:
    assert config("nf4_dq", {"model.layers.0.mlp.up_proj": None}) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp.up_proj"],
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
    }
    assert FORMAT.side_files({}) == {}


def test_config_of_int8() -> None:
    found = config("int8")
    assert found == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
    }
    # transformers refuses an integer
    assert isinstance(found["llm_int8_threshold"], float)
    assert config("w8a8_mixed4.5")["llm_int8_threshold"] == 4.5


def test_kept_experts_are_named_once() -> None:
    """Transformers tries every name on every module: thousands of experts would take minutes to load."""
    kept = {f"model.layers.0.mlp.experts.{n}.up_proj": None for n in range(128)}
    kept["model.layers.0.mlp.shared_experts.up_proj"] = None
    skipped = ["lm_head", "model.layers.0.mlp.experts", "model.layers.0.mlp.shared_experts.up_proj"]
    assert config("nf4", kept)["llm_int8_skip_modules"] == skipped


def test_4_bit_kinds_share_a_file_and_8_bits_do_not() -> None:
    mixed = config("nf4", {"model.layers.0.mlp.up_proj": "fp4g128", "model.layers.1.mlp.up_proj": "nf4_dq"})
    assert mixed["bnb_4bit_quant_type"] == "nf4" and mixed["bnb_4bit_use_double_quant"] is False
    for default, other in (("nf4", "int8"), ("int8", "fp4"), ("int8", "w8a8_mixed4")):
        with pytest.raises(UnsupportedError, match="one kind") as caught:
            config(default, {"model.layers.0.mlp.up_proj": other})
        assert caught.value.remedy is not None


def test_engines() -> None:
    loads, notes = FORMAT.engines(facts("nf4"))
    assert loads == ("transformers", "SGLang")
    assert any("vLLM" in note for note in notes) and any("dtype" in note for note in notes)
    assert not any("AVX512" in note for note in notes)
    assert any("AVX512" in note for note in FORMAT.engines(facts("nf4", None, (72, 64)))[1])
    assert not any("AVX512" in note for note in FORMAT.engines(facts("int8", None, (72, 64)))[1])
    loads, notes = FORMAT.engines(facts("nf4", {"model.layers.0.mlp.experts.3.up_proj": None}))
    assert loads == ("transformers",) and any("experts" in note for note in notes)
