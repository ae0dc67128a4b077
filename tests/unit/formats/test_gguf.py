"""GGUF as a format: presets, what it takes, rows of bytes and back."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import RecipeError, UnsupportedError
from quantkit.formats.gguf import FORMAT, PRESETS, default_method, parse
from quantkit.gguf import rounding
from quantkit.gguf.types import TYPES
from quantkit.model.graph import Weight
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import GGML, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.quantized import same

NAME = "model.layers.1.mlp.down_proj.weight"
WEIGHT = Weight(NAME, (6, 512), "down")


def facts(name: str) -> FormatFacts:
    scheme = parse_scheme(name)
    return FormatFacts((Assigned(WEIGHT, scheme),), scheme, (), False, "rtn", "0.0")


def test_presets_are_rules_and_schemes_are_types() -> None:
    assert len({parse(preset) for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        scheme = parse(preset)
        assert (scheme.name, parse(scheme.name)) == (preset, scheme)
        assert FORMAT.accepts(scheme, WEIGHT) is None
    # a preset and the type of most of its weights may share a name, and are told apart
    assert parse("Q6_K").mix == "q6_k" and parse_scheme("q6_k").mix == ""
    assert parse("q4-k") == parse("q4_k_m")
    with pytest.raises(RecipeError, match="did you mean 'q4_k_s'"):
        parse("q4_k_n")


def test_methods() -> None:
    assert {default_method(parse(p)) for p in ("f16", "q8_0", "tq2_0")} == {"rtn"}
    assert {default_method(parse(p)) for p in ("q4_0", "q4_k_m", "iq2_xs", "mxfp4_moe")} == {"gptq"}


@pytest.mark.parametrize("name", [*GGML, "mxfp4"])
def test_rows_mean_what_was_packed(name: str, rng: torch.Generator) -> None:
    scheme = parse_scheme(name)
    w = torch.randn(WEIGHT.shape, generator=rng)
    rounded = QuantizedLinear(NAME, rounding.nearest(w, scheme, torch.rand(512, generator=rng)))
    (spec,) = FORMAT.layout(WEIGHT, scheme)
    stored = FORMAT.encode(rounded, scheme)
    assert stored[spec.name].shape == spec.shape == (6, TYPES[name].row_bytes(512))
    assert FORMAT.base_name(spec.name) == NAME and FORMAT.base_name(NAME) is None
    config = FORMAT.config(facts(name))
    found = FORMAT.decode(NAME, stored, config)
    assert torch.equal(dequantize(found.weight), dequantize(rounded.weight))
    again = FORMAT.encode(found, scheme)
    assert torch.equal(again[spec.name], stored[spec.name])
    # the zero of e2m1 has two codes and one value
    assert name == "mxfp4" or same(found.weight, rounded.weight)


def test_what_cannot_be_stored() -> None:
    assert "gguf stores ggml's types" in str(FORMAT.accepts(parse_scheme("w4g128"), WEIGHT))
    narrow = Weight(NAME, (6, 96), "down")
    assert "not a multiple of 256" in str(FORMAT.accepts(parse_scheme("q4_k"), narrow))
    assert FORMAT.accepts(parse_scheme("q4_0"), narrow) is None
    plain = Affine(torch.zeros(6, 512, dtype=torch.int8), 4, torch.ones(6, 16).half(), (1, 32))
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight.*does not lie on the grid of Q5_0"):
        FORMAT.encode(QuantizedLinear(NAME, plain), parse_scheme("q5_0"))
