"""The front of the format: names, what it accepts, input scales, what it reads of others."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import RecipeError, UnsupportedError
from quantkit.formats.compressed_tensors import FORMAT, PRESETS, default_method, parse
from quantkit.model.graph import Part, Weight
from quantkit.schemes import Activations, Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.quantized import same

CODES = torch.tensor([[-128, 127, 0, 1]], dtype=torch.int8)
ROW = Affine(CODES, 8, torch.ones(1, 1, dtype=torch.float16), (1, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_our_names_mean_what_they_mean_everywhere(name: str) -> None:
    assert parse(name) == parse_scheme(name)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("w4a16", "w4g128"),
        ("W4A16_ASYM", "w4g128_asym"),
        (" W8A16 ", "w8g128"),
        ("w3a16", "w3g128"),
        ("W8A8", "w8a8"),
        ("int8", "w8a8"),
        ("FP8_DYNAMIC", "fp8a8"),
        ("fp8_static", "fp8a8_tensor_static"),
        ("NVFP4A16", "nvfp4"),
        ("mxfp4a16", "mxfp4"),
    ],
)
def test_names_of_llm_compressor(text: str, expected: str) -> None:
    assert parse(text) == parse_scheme(expected)


def test_names_without_inputs_are_of_weights_alone() -> None:
    for name in ("fp8", "fp8_block", "nvfp4", "mxfp4"):
        assert parse(name).activations is None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown scheme 'w4a17'"):
        parse("w4a17")


@pytest.mark.parametrize(
    "name, method",
    [("w8", "rtn"), ("w8a8", "rtn"), ("fp8a8_block", "rtn"), ("nvfp4", "gptq"), ("w3g128", "gptq")],
)
def test_what_8_bits_lose_is_not_worth_a_calibration(name: str, method: str) -> None:
    assert default_method(parse(name)) == method


@pytest.mark.parametrize(
    "scheme, part, reason",
    [
        (Scheme(4, per_tensor=True), None, "8 bits only"),
        (Scheme(8, sym=False), None, "leave out _asym or add a group size"),
        (Scheme(4, 48), None, "not a multiple of 48"),
        (Scheme(4), Part(expert=0), "stack of experts"),
        (Scheme(4), Part(transposed=True), "Conv1D"),
        (parse_scheme("nf4"), None, "use mxfp4 or nvfp4"),
        (parse_scheme("fp4g128"), None, "no table for fp4"),
        (parse_scheme("w4g64_asymf"), None, "use _asym"),
        (parse_scheme("w4g32_asym_axis0"), None, "leave out _axis0"),
        (parse_scheme("w8a8_mixed"), None, "use w8a8"),
        (parse_scheme("w4a8g32"), None, "leave out a8"),
        (parse_scheme("w8a8g32"), None, "leave out the group size"),
        (parse_scheme("w8a8_asym"), None, "leave out _asym"),
        (parse_scheme("w8a8_tensor_asym"), None, "leave out _asym"),
        (parse_scheme("fp8a8_block_static"), None, "use fp8a8_block"),
        (Scheme(8, numbers="fp8", activations=Activations(group_size=128)), None, "use fp8a8_block"),
        (parse_scheme("fp8_block"), None, "use fp8 with one scale per row"),
        (parse_scheme("fp8a8_block"), None, "in_features is 96, not a multiple of 128"),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else None,
)
def test_what_cannot_be_stored(scheme: Scheme, part: Part | None, reason: str) -> None:
    found = FORMAT.accepts(scheme, Weight("x.weight", (64, 64 if scheme.tile is None else 96), "other", part))
    assert found is not None and reason in found
    assert len(found) > 20 and not found.endswith(".")


@pytest.mark.parametrize(("name", "width"), [("mxfp4", 48), ("nvfp4", 24)])
def test_4_bit_floats_need_whole_groups(name: str, width: int) -> None:
    found = FORMAT.accepts(parse_scheme(name), Weight("x.weight", (64, width)))
    assert found is not None and f"in_features is {width}, not a multiple of" in found


@pytest.mark.parametrize(
    "name", [*PRESETS, "w8a8_tensor", "w8a8_tensor_static", "fp8a8_tensor", "fp8_static"]
)
def test_what_can_be_stored(name: str) -> None:
    assert FORMAT.accepts(parse(name), Weight("x.weight", (96, 256))) is None


def test_scales_are_stored_in_the_dtype_of_the_model() -> None:
    assert FORMAT.scale_dtype("bfloat16") == "bfloat16"
    assert FORMAT.scale_dtype("float32") == "float32"
    assert not FORMAT.holds_column_groups()
    assert FORMAT.side_files({}) == {}


def test_the_largest_weight_lies_half_a_step_past_the_last_code() -> None:
    assert FORMAT.convention(parse_scheme("w4g128")) == "half_step"
    assert FORMAT.convention(parse_scheme("mxfp4")) == "half_step"
    assert FORMAT.convention(parse_scheme("fp8")) == "absmax"


def test_cache_scales_lie_in_the_attention() -> None:
    found = FORMAT.cache_scales("model.layers.3.self_attn", "fp8")
    assert found == ("model.layers.3.self_attn.k_scale", "model.layers.3.self_attn.v_scale")
    assert all(FORMAT.base_name(name) is None for name in found)


def test_a_static_scale_of_the_inputs_is_stored_and_read() -> None:
    scheme, scale = parse_scheme("w8a8_static"), torch.tensor([0.5], dtype=torch.float16)
    tensors = FORMAT.encode(QuantizedLinear("a.x.weight", ROW, scale), scheme)
    assert list(tensors) == ["a.x.weight", "a.x.weight_scale", "a.x.input_scale"]
    planned = FORMAT.layout(Weight("a.x.weight", (1, 4)), scheme)
    assert [(s.name, s.dtype, s.shape) for s in planned] == [
        (n, t.dtype, tuple(t.shape)) for n, t in tensors.items()
    ]
    assert FORMAT.base_name("a.x.input_scale") == "a.x.weight"
    found = FORMAT.decode("a.x.weight", tensors, {"config_groups": {}})
    assert found.input_scale is not None and torch.equal(found.input_scale, scale)


@pytest.mark.parametrize(
    "name, scale", [("w8a8_static", None), ("w8a8", torch.ones(1)), ("w8", torch.ones(1))]
)
def test_a_scale_of_the_inputs_too_many_or_too_few_is_refused(name: str, scale: torch.Tensor | None) -> None:
    with pytest.raises(UnsupportedError, match=r"`x\.weight` as w8.* of its inputs"):
        FORMAT.encode(QuantizedLinear("x.weight", ROW, scale), parse_scheme(name))


def test_columns_in_groups_of_their_own_are_read() -> None:
    """llm-compressor wrote them with actorder "group"; −1 everywhere stands for none."""
    tensors = {"x.weight": CODES, "x.weight_scale": torch.tensor([[1.0, 2.0]])}
    assert FORMAT.base_name("x.weight_g_idx") == "x.weight"
    for stored, group in (([0, 1, 1, 0], [0, 1, 1, 0]), ([-1] * 4, [0, 0, 1, 1])):
        groups = torch.tensor(stored, dtype=torch.int32)
        found = FORMAT.decode("x.weight", {**tensors, "x.weight_g_idx": groups}, {"config_groups": {}})
        expected = CODES.float() * tensors["x.weight_scale"][0, group]
        assert torch.equal(dequantize(found.weight), expected)


def test_scales_of_four_bit_inputs_do_not_change_the_weight() -> None:
    tensors = {"x.weight": CODES, "x.weight_scale": torch.ones(1, 1)}
    assert FORMAT.base_name("x.input_global_scale") == "x.weight"
    plain = FORMAT.decode("x.weight", tensors, {"config_groups": {}})
    with_scale = FORMAT.decode(
        "x.weight", {**tensors, "x.input_global_scale": torch.ones(1)}, {"config_groups": {}}
    )
    assert same(plain.weight, with_scale.weight)
