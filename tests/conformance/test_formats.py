"""What every format must do, for every file in ``quantkit/formats/``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import UnsupportedError
from quantkit.model.graph import Part, Weight
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, QuantizedLinear
from tests.quantized import random_affine, same

NAME = "model.layers.1.mlp.down_proj.weight"
SCHEMES = [
    Scheme(bits, group, sym, per_tensor)
    for bits in range(2, 9)
    for group, sym, per_tensor in (
        (None, True, False),
        (32, True, False),
        (32, False, False),
        (8, True, False),
        (None, False, False),
        (None, True, True),
    )
] + [Scheme(4, 64), Scheme(3, 24), Scheme(4, 8, False)]
# (out, in): square and multiples of 32, ragged either way, narrow
SHAPES = ((64, 96), (32, 32), (40, 72), (3, 48), (8, 16), (1, 64))
WEIGHTS = [Weight(NAME, shape, "down") for shape in SHAPES]
DTYPES = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def format_of(name: str) -> Format:
    found: Format = registry.load("formats", name).FORMAT
    return found


def stored(name: str, scheme: Scheme, source: str = "bfloat16") -> Scheme:
    """The scheme with scales in the dtype that the format stores, as a plan resolves it."""
    return replace(scheme, scale_dtype=format_of(name).scale_dtype(source))


def accepted() -> list[Any]:
    return [
        pytest.param(
            name, stored(name, scheme), weight, id=f"{name}-{scheme.name}-{'x'.join(map(str, weight.shape))}"
        )
        for name in registry.names("formats")
        for scheme in SCHEMES
        for weight in WEIGHTS
        if format_of(name).accepts(stored(name, scheme), weight) is None
    ]


CASES = pytest.mark.parametrize("name, scheme, weight", accepted())
FORMATS = pytest.mark.parametrize("name", registry.names("formats"))


def facts(scheme: Scheme, weight: Weight) -> FormatFacts:
    return FormatFacts((Assigned(weight, scheme),), scheme, (), False, "rtn", "0.0")


def config(name: str, scheme: Scheme, weight: Weight) -> Mapping[str, Any]:
    """The quantization config as a reader finds it: after a journey through JSON."""
    found: Mapping[str, Any] = json.loads(json.dumps(format_of(name).config(facts(scheme, weight))))
    return found


def linear(weight: Weight, scheme: Scheme, rng: torch.Generator) -> QuantizedLinear:
    return QuantizedLinear(weight.name, random_affine(weight.shape, scheme, rng))


def digest(tensors: Mapping[str, Tensor]) -> str:
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    return hashlib.sha256(data).hexdigest()


def test_there_are_formats() -> None:
    assert {"gptq", "compressed_tensors"} <= set(registry.names("formats"))


@FORMATS
def test_every_format_takes_something_and_says_what_it_is(name: str) -> None:
    module = registry.load("formats", name)
    assert module.SUMMARY and not module.SUMMARY.endswith(".")
    methods = {module.default_method(parse_scheme(preset)) for preset in module.PRESETS}
    assert methods <= set(registry.names("methods"))
    big = Weight(NAME, (256, 512), "down")
    for preset in (module.DEFAULT_SCHEME, *module.PRESETS):
        assert format_of(name).accepts(stored(name, parse_scheme(preset)), big) is None, preset


@CASES
def test_decode_inverts_encode(name: str, scheme: Scheme, weight: Weight, rng: torch.Generator) -> None:
    given = linear(weight, scheme, rng)
    tensors = format_of(name).encode(given, scheme)
    found = format_of(name).decode(weight.name, tensors, config(name, scheme, weight))
    assert found.name == given.name
    assert same(found.weight, given.weight)


@CASES
def test_layout_is_what_encode_makes(name: str, scheme: Scheme, weight: Weight, rng: torch.Generator) -> None:
    tensors = format_of(name).encode(linear(weight, scheme, rng), scheme)
    planned = [(s.name, s.dtype, s.shape) for s in format_of(name).layout(weight, scheme)]
    assert planned == [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    assert all(t.is_contiguous() for t in tensors.values())


@CASES
def test_same_input_same_bytes_and_the_input_stays(
    name: str, scheme: Scheme, weight: Weight, rng: torch.Generator
) -> None:
    given = linear(weight, scheme, rng)
    q = given.weight
    assert isinstance(q, Affine) and isinstance(q.scale, Tensor)
    copy = replace(q, codes=q.codes.clone(), scale=q.scale.clone())
    first = digest(format_of(name).encode(given, scheme))
    assert digest(format_of(name).encode(given, scheme)) == first
    assert same(q, copy)


@CASES
def test_measure_and_base_name_agree_with_layout(name: str, scheme: Scheme, weight: Weight) -> None:
    fmt = format_of(name)
    specs = fmt.layout(weight, scheme)
    infos = {s.name: TensorInfo(s.name, SAFETENSORS[s.dtype], s.shape, Path("x"), 0, s.nbytes) for s in specs}
    shape, bits = fmt.measure(weight.name, infos, config(name, scheme, weight))
    assert bits == scheme.bits
    if scheme.group_size is not None or weight.shape[1] % 32 == 0:
        assert shape == weight.shape
    else:
        # packed rows say no more than how many words they take
        assert shape[0] == weight.shape[0] and 0 <= shape[1] - weight.shape[1] < 32
    belong = {fmt.base_name(s.name) for s in specs if s.name != weight.name}
    assert belong == {weight.name}
    assert fmt.base_name("model.norm.weight") is None
    assert fmt.base_name("model.layers.1.mlp.down_proj.bias") is None


@FORMATS
def test_what_is_refused_is_refused_with_a_reason(name: str) -> None:
    fmt = format_of(name)
    refused = [
        fmt.accepts(stored(name, s), w)
        for s in SCHEMES
        for w in [*WEIGHTS, Weight("h.0.x", (64, 96), "other", Part(expert=1))]
    ]
    reasons = {reason for reason in refused if reason is not None}
    assert reasons
    for reason in reasons:
        assert len(reason) > 20 and not reason.endswith(".") and "!" not in reason


@FORMATS
def test_values_off_a_plain_grid_are_refused(name: str, rng: torch.Generator) -> None:
    weight, scheme = WEIGHTS[0], stored(name, Scheme(4, 32))
    table = Codebook(torch.zeros(64, 96, dtype=torch.uint8), 4, torch.rand(16), torch.ones(64, 3), (1, 32))
    plain = random_affine(weight.shape, scheme, rng)
    nested = replace(plain, scale=random_affine((64, 3), Scheme(6), rng))
    shifted = replace(plain, offset=torch.ones(64, 3))
    for q in (table, nested, shifted):
        with pytest.raises(UnsupportedError, match=r"down_proj\.weight"):
            format_of(name).encode(QuantizedLinear(weight.name, q), scheme)


@FORMATS
@pytest.mark.parametrize("width", [(64, 96), (32, 64)])
def test_column_groups_are_kept_or_refused(name: str, width: tuple[int, int], rng: torch.Generator) -> None:
    fmt, scheme, weight = format_of(name), stored(name, Scheme(4, 32)), Weight(NAME, width, "down")
    order = torch.randperm(width[1], generator=rng)
    groups = (order // 32).to(torch.int32)
    given = QuantizedLinear(NAME, replace(random_affine(width, scheme, rng), column_group=groups))
    if not fmt.holds_column_groups():
        with pytest.raises(UnsupportedError, match="column"):
            fmt.encode(given, scheme)
        return
    found = fmt.decode(NAME, fmt.encode(given, scheme), config(name, scheme, weight))
    assert same(found.weight, given.weight)


@FORMATS
@pytest.mark.parametrize("sym", [True, False])
def test_zero_points_at_every_extreme_survive(name: str, sym: bool, rng: torch.Generator) -> None:
    fmt, weight = format_of(name), WEIGHTS[0]
    for bits in (2, 3, 4, 8):
        scheme = stored(name, Scheme(bits, 32, sym))
        if fmt.accepts(scheme, weight) is not None:
            continue
        for zero in (0, 1, 1 << (bits - 1), (1 << bits) - 1):
            q = random_affine(weight.shape, scheme, rng)
            if q.zero_point is not None:
                q = replace(q, zero_point=torch.full_like(q.zero_point, zero))
            tensors = fmt.encode(QuantizedLinear(NAME, q), scheme)
            assert same(fmt.decode(NAME, tensors, config(name, scheme, weight)).weight, q)


@FORMATS
def test_config_is_json_and_repeats_itself(name: str) -> None:
    scheme = stored(name, Scheme(4, 32))
    first = format_of(name).config(facts(scheme, WEIGHTS[0]))
    assert json.dumps(first) == json.dumps(format_of(name).config(facts(scheme, WEIGHTS[0])))
    assert isinstance(first["quant_method"], str)
    for file, content in format_of(name).side_files(first).items():
        assert file.endswith(".json") and json.loads(json.dumps(content)) == content


@FORMATS
def test_engines_are_named(name: str) -> None:
    loads, notes = format_of(name).engines(facts(stored(name, Scheme(4, 32)), WEIGHTS[0]))
    assert loads and all(loads)
    assert all(len(note) > 20 for note in notes)
