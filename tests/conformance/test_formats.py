"""What every format must do, for every file in ``quantkit/formats/``."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import UnsupportedError
from quantkit.model.graph import Part, Weight
from quantkit.model.stored import StoredModel, StoredWeight
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.recipe.plugins import shortcuts
from quantkit.schemes import COMMON, CacheDtype, Convention, Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor
from tests.quantized import random_affine, random_linear, random_quantized, same

NAME = "model.layers.1.mlp.down_proj.weight"
SCHEMES = (
    *(f"w{bits}{rest}" for bits in range(2, 9) for rest in ("", "g32", "g32_asym")),
    *("w3g24", "w4g8", "w4g8_asym", "w4g64", "w4_asym", "w8_asym", "w4_tensor", "w8_tensor", "w4g8_axis0"),
    *("w4g16", "w4g16_asym"),
    *(f"w{bits}g32_asymf" for bits in range(1, 9)),
    *("w4_asymf", "w2g8_asymf_axis0", "w3g8_asymf_axis0", "w4g32_asymf_axis0", "w4_tensor_asymf"),
    *("nf4", "nf4_dq", "nf4g32", "nf4g128", "nf4g16", "fp4", "fp4g32_dq", "mxfp4", "nvfp4"),
    *("fp8", "fp8_tensor", "fp8_block", "fp8a8", "fp8a8_static", "fp8a8_tensor_static", "fp8a8_block"),
    *("w8a8", "w8a8_static", "w8a8_tensor_static", "w8a8_mixed", "w8a8_mixed4.5", "w4a8", "w8a8g32"),
)
# (out, in): square and multiples of 32, ragged either way, narrow, and a tile of 128 cut short
SHAPES = ((64, 96), (32, 32), (40, 72), (3, 48), (8, 16), (1, 64), (130, 128))
BIG = Weight(NAME, (256, 512), "down")
SAFETENSORS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def format_of(name: str) -> Format:
    found: Format = registry.load("formats", name).FORMAT
    return found


def stored(name: str, scheme: Scheme | str, source: str = "bfloat16") -> Scheme:
    """The scheme with what is the format's choice, as a plan resolves it."""
    if isinstance(scheme, str):
        scheme = parse_scheme(scheme)
    fmt = format_of(name)
    return replace(scheme, scale_dtype=fmt.scale_dtype(source), convention=fmt.convention(scheme))


def weights_for(name: str, scheme: Scheme) -> list[Weight]:
    """The shapes that the format takes in this scheme."""
    weights = (Weight(NAME, shape, "down") for shape in SHAPES)
    return [weight for weight in weights if format_of(name).accepts(scheme, weight) is None]


def accepted() -> list[Any]:
    return [
        pytest.param(name, stored(name, scheme), id=f"{name}-{scheme}")
        for name in registry.names("formats")
        if name != "gguf"
        for scheme in SCHEMES
        if weights_for(name, stored(name, scheme))
    ]


CASES = pytest.mark.parametrize("name, scheme", accepted())
FORMATS = pytest.mark.parametrize("name", registry.names("formats"))
# GGUF has grids of its own, which tests/unit/formats/test_gguf.py puts to the same questions
SAFE = pytest.mark.parametrize("name", [n for n in registry.names("formats") if n != "gguf"])


def facts(scheme: Scheme, weight: Weight, cache: CacheDtype | None = None) -> FormatFacts:
    return FormatFacts((Assigned(weight, scheme),), scheme, (), False, "rtn", "0.0", kv_cache=cache)


def config(name: str, scheme: Scheme, weight: Weight) -> Mapping[str, Any]:
    """The quantization config as a reader finds it: after a journey through JSON."""
    found: Mapping[str, Any] = json.loads(json.dumps(format_of(name).config(facts(scheme, weight))))
    return found


def linears(name: str, scheme: Scheme, rng: torch.Generator) -> Iterator[tuple[Weight, QuantizedLinear]]:
    for weight in weights_for(name, scheme):
        yield weight, random_linear(NAME, weight.shape, scheme, rng)


def digest(tensors: Mapping[str, Tensor]) -> str:
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    return hashlib.sha256(data).hexdigest()


def presets(name: str) -> list[Scheme]:
    module = registry.load("formats", name)
    return [stored(name, module.parse(preset)) for preset in (module.DEFAULT_SCHEME, *module.PRESETS)]


def test_there_are_formats() -> None:
    assert {"awq", "gptq", "compressed_tensors", "bitsandbytes"} <= set(registry.names("formats"))


@FORMATS
def test_every_format_takes_something_and_says_what_it_is(name: str) -> None:
    module = registry.load("formats", name)
    assert module.SUMMARY and not module.SUMMARY.endswith(".")
    for scheme in presets(name):
        assert format_of(name).accepts(scheme, BIG) is None, scheme.name
        method = module.default_method(scheme)
        plugin = registry.load("methods", method)
        assert plugin.quantizer(plugin.Params()).accepts(scheme) is None, f"{scheme.name} by {method}"
        assert format_of(name).convention(scheme) in get_args(Convention)


@SAFE
def test_names_of_schemes_parse_back(name: str) -> None:
    """A target keeps the canonical name of its scheme, which the format must read the same way."""
    module = registry.load("formats", name)
    short = [target.partition(":")[2] for target in shortcuts().values() if target.startswith(f"{name}:")]
    for text in (module.DEFAULT_SCHEME, *module.PRESETS, *short, *COMMON):
        scheme = module.parse(text)
        assert module.parse(scheme.name) == scheme == parse_scheme(scheme.name), text
        assert module.parse(f" {text.upper()} ") == scheme
    assert len({module.parse(text) for text in module.PRESETS}) == len(module.PRESETS)


@CASES
def test_decode_inverts_encode(name: str, scheme: Scheme, rng: torch.Generator) -> None:
    for weight, given in linears(name, scheme, rng):
        for dtype in ("bfloat16", "float32"):
            tensors = format_of(name).encode(given, scheme, dtype)
            found = format_of(name).decode(weight.name, tensors, config(name, scheme, weight))
            assert found.name == given.name
            assert same(found.weight, given.weight), weight.shape
            assert same(found.input_scale, given.input_scale)


@CASES
def test_layout_is_what_encode_makes(name: str, scheme: Scheme, rng: torch.Generator) -> None:
    for weight, given in linears(name, scheme, rng):
        planned = [(s.name, s.dtype, s.shape) for s in format_of(name).layout(weight, scheme)]
        assert len({name for name, _, _ in planned}) == len(planned)
        for dtype in ("bfloat16", "float16", "float32"):
            tensors = format_of(name).encode(given, scheme, dtype)
            assert planned == [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
            assert all(t.is_contiguous() for t in tensors.values())


@CASES
def test_same_input_same_bytes_and_the_input_stays(name: str, scheme: Scheme, rng: torch.Generator) -> None:
    for _, given in linears(name, scheme, rng):
        before = copy.deepcopy(given)
        first = digest(format_of(name).encode(given, scheme))
        assert digest(format_of(name).encode(given, scheme)) == first
        assert same(given.weight, before.weight) and same(given.input_scale, before.input_scale)


@CASES
def test_a_config_agrees_with_what_it_describes(name: str, scheme: Scheme, rng: torch.Generator) -> None:
    fmt = format_of(name)
    for weight, linear in linears(name, scheme, rng):
        tensors, says = fmt.encode(linear, scheme), config(name, scheme, weight)
        infos = {
            n: TensorInfo(n, SAFETENSORS[t.dtype], tuple(t.shape), Path("x"), 0, t.nbytes)
            for n, t in tensors.items()
        }
        found = StoredWeight.of(fmt.decode(NAME, tensors, says), infos)
        stored = StoredModel((found,), {}, frozenset(("lm_head",)), frozenset(tensors))
        assert list(fmt.disagreements(stored, says)) == []


@CASES
def test_measure_and_base_name_agree_with_layout(name: str, scheme: Scheme) -> None:
    fmt = format_of(name)
    for weight in weights_for(name, scheme):
        specs = fmt.layout(weight, scheme)
        infos = {
            s.name: TensorInfo(s.name, SAFETENSORS[s.dtype], s.shape, Path("x"), 0, s.nbytes) for s in specs
        }
        shape, bits = fmt.measure(weight.name, infos, config(name, scheme, weight))
        assert bits == scheme.bits
        out, width = weight.shape
        if scheme.group_size is None and width % 32:
            # packed rows say no more than how many words they take
            assert shape[0] == out and 0 <= shape[1] - width < 32
        else:
            # headers of flat layouts do not tell rows from columns
            assert shape in ((out, width), (out * width, 1))
        assert all(spec.name.startswith(NAME.removesuffix("weight")) for spec in specs)
        assert {fmt.base_name(spec.name) for spec in specs} <= {weight.name, None}
        assert all(fmt.base_name(spec.name) for spec in specs if spec.name != weight.name)
    assert fmt.base_name("model.norm.weight") is None
    assert fmt.base_name("model.layers.1.mlp.down_proj.bias") is None


@CASES
def test_static_inputs_have_a_scale_and_others_none(name: str, scheme: Scheme, rng: torch.Generator) -> None:
    weight, given = next(linears(name, scheme, rng))
    static = scheme.activations is not None and not scheme.activations.dynamic
    assert (given.input_scale is not None) == static
    if static:
        with pytest.raises(UnsupportedError, match=r"down_proj\.weight"):
            format_of(name).encode(replace(given, input_scale=None), scheme)
        kept = [s for s in format_of(name).layout(weight, scheme) if "input" in s.name]
        assert [(s.shape, s.dtype) for s in kept] == [((1,), getattr(torch, scheme.scale_dtype))]


@SAFE
def test_what_is_refused_is_refused_with_a_reason(name: str) -> None:
    fmt = format_of(name)
    weights = [Weight(NAME, shape, "down") for shape in SHAPES]
    stacked = Weight("model.layers.0.mlp.experts.gate_up_proj", (64, 96), "gate_up", Part(expert=1))
    turned = Weight("h.0.attn.c_attn.weight", (64, 96), "qkv", Part(transposed=True))
    found = {
        (scheme, weight.name, weight.shape): fmt.accepts(stored(name, scheme), weight)
        for scheme in SCHEMES
        for weight in (*weights, stacked, turned)
    }
    reasons = {reason for reason in found.values() if reason is not None}
    assert len(reasons) > 5
    for reason in reasons:
        assert len(reason) > 20 and not reason.endswith(".") and "!" not in reason
    # nothing holds experts stacked in one tensor, and every format lacks some kind of number
    assert all(why is not None for (_, weight, _), why in found.items() if weight == stacked.name)
    assert {"nf4", "fp8", "w4g32", "w8a8_mixed", "w4g32_asymf"} & {
        s for (s, _, _), why in found.items() if why
    }


@SAFE
def test_what_another_scheme_makes_is_refused(name: str, rng: torch.Generator) -> None:
    """A file never holds a weight that it would give back as something else."""
    fmt, weight = format_of(name), Weight(NAME, (64, 128), "down")
    plain = random_affine(weight.shape, Scheme(4, 32), rng)
    odd: list[QuantizedTensor] = [
        replace(plain, scale=random_affine((64, 4), Scheme(6), rng)),
        replace(plain, offset=torch.ones(64, 4)),
        replace(plain, row_group=torch.arange(64, dtype=torch.int32) % 2, group=(32, 1)),
        Codebook(torch.zeros(64, 128, dtype=torch.uint8), 4, torch.rand(16), torch.ones(64, 4), (1, 32)),
        Float(torch.zeros(64, 128).to(torch.float8_e5m2), 8, torch.ones(64, 1), (1, 128)),
    ]
    for q in odd:
        with pytest.raises(UnsupportedError, match=r"down_proj\.weight"):
            fmt.encode(QuantizedLinear(NAME, q), stored(name, registry.load("formats", name).DEFAULT_SCHEME))
    for other in ("w4g32", "w4g32_asymf", "nf4", "fp8", "mxfp4", "nvfp4", "w8a8_mixed"):
        scheme = stored(name, other)
        if fmt.accepts(scheme, weight) is None:
            continue
        default = presets(name)[0]
        with pytest.raises(UnsupportedError, match=r"down_proj\.weight"):
            fmt.encode(random_linear(NAME, weight.shape, scheme, rng), default)


@FORMATS
@pytest.mark.parametrize("width", [(64, 96), (32, 64)])
def test_column_groups_are_kept_or_refused(name: str, width: tuple[int, int], rng: torch.Generator) -> None:
    fmt, weight = format_of(name), Weight(NAME, width, "down")
    schemes = [stored(name, scheme) for scheme in ("w4g32", "w4g32_asymf")]
    scheme = next((s for s in schemes if fmt.accepts(s, weight) is None), schemes[0])
    order = torch.randperm(width[1], generator=rng)
    q = random_quantized(width, scheme, rng)
    assert isinstance(q, Affine)
    given = QuantizedLinear(NAME, replace(q, column_group=(order // 32).to(torch.int32)))
    if not fmt.holds_column_groups():
        with pytest.raises(UnsupportedError, match="column"):
            fmt.encode(given, scheme)
        return
    found = fmt.decode(NAME, fmt.encode(given, scheme), config(name, scheme, weight))
    assert same(found.weight, given.weight)


@FORMATS
def test_zero_points_at_every_extreme_survive(name: str, rng: torch.Generator) -> None:
    fmt, weight = format_of(name), Weight(NAME, (64, 96), "down")
    for bits in (2, 3, 4, 8):
        last = (1 << bits) - 1
        for kind, zeros in (("", (0,)), ("_asym", (0, 1, last // 2 + 1, last)), ("_asymf", (-7.5, 0, 1e4))):
            scheme = stored(name, f"w{bits}g32{kind}")
            if fmt.accepts(scheme, weight) is not None:
                continue
            for zero in zeros:
                q = random_quantized(weight.shape, scheme, rng)
                assert isinstance(q, Affine)
                if q.zero_point is not None:
                    q = replace(q, zero_point=torch.full_like(q.zero_point, zero))
                tensors = fmt.encode(QuantizedLinear(NAME, q), scheme)
                assert same(fmt.decode(NAME, tensors, config(name, scheme, weight)).weight, q)


@FORMATS
def test_config_is_json_and_repeats_itself(name: str) -> None:
    fmt = format_of(name)
    for scheme in presets(name):
        first = fmt.config(facts(scheme, BIG))
        assert json.dumps(first) == json.dumps(fmt.config(facts(scheme, BIG)))
        assert isinstance(first["quant_method"], str)
        for file, content in fmt.side_files(first).items():
            assert file.endswith(".json") and json.loads(json.dumps(content)) == content


@FORMATS
def test_companions_are_no_parts_of_weights(name: str) -> None:
    fmt, given = format_of(name), facts(presets(name)[0], Weight("h.0.mlp.c_fc.weight", (256, 512)))
    assert not fmt.companions(given)
    for model_type in ("llama", "gpt2", "starcoder2"):
        found = fmt.companions(replace(given, model_type=model_type))
        assert all(fmt.base_name(tensor) is None for tensor in found)


@FORMATS
def test_engines_are_named(name: str) -> None:
    for scheme in presets(name):
        loads, notes = format_of(name).engines(facts(scheme, BIG))
        assert loads and all(loads) and len(set(loads)) == len(loads), scheme.name
        for note in notes:
            assert len(note) > 20 and not note.endswith(".") and "!" not in note


@FORMATS
@pytest.mark.parametrize("dtype", get_args(CacheDtype))
def test_scales_of_a_cache_have_names_and_a_place_in_the_config(name: str, dtype: CacheDtype) -> None:
    fmt, attention, scheme = format_of(name), "model.layers.3.self_attn", presets(name)[0]
    names = fmt.cache_scales(attention, dtype)
    if names is None:
        return
    assert len(set(names)) == 2 and all(n.startswith(f"{attention}.") for n in names)
    with_cache = json.dumps(fmt.config(facts(scheme, BIG, dtype)))
    assert with_cache != json.dumps(fmt.config(facts(scheme, BIG)))
    assert all(fmt.base_name(n) is None for n in names)
