from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.schemes import COMMON, Activations, Scheme, parse_scheme

NF4, FP8 = Scheme(4, 64, numbers="nf4"), Scheme(8, numbers="fp8")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("w4g128", Scheme(4, 128)),
        ("w8", Scheme(8)),
        ("w3g64_asym", Scheme(3, 64, sym=False)),
        ("w8_tensor", Scheme(8, per_tensor=True)),
        ("w4_asym", Scheme(4, sym=False)),
        ("w8_tensor_asym", Scheme(8, sym=False, per_tensor=True)),
        ("  W4G32 ", Scheme(4, 32)),
        ("w4g64_asymf", Scheme(4, 64, sym=False, fractional=True)),
        ("w1g64_asymf", Scheme(1, 64, sym=False, fractional=True)),
        ("w4g64_asymf_axis0", Scheme(4, 64, sym=False, fractional=True, axis=0)),
        ("w4g64_axis0", Scheme(4, 64, axis=0)),
        ("nf4", NF4),
        ("nf4g64", NF4),
        ("NF4g128_dq", Scheme(4, 128, numbers="nf4", nested=True)),
        ("fp4_dq", Scheme(4, 64, numbers="fp4", nested=True)),
        ("fp8", FP8),
        ("fp8_tensor", replace(FP8, per_tensor=True)),
        ("fp8_block", replace(FP8, tile=128)),
        ("mxfp4", Scheme(4, 32, numbers="mxfp4")),
        ("mxfp4g32", Scheme(4, 32, numbers="mxfp4")),
        ("nvfp4", Scheme(4, 16, numbers="nvfp4")),
        ("w8a8", Scheme(8, activations=Activations())),
        ("w4a8g128", Scheme(4, 128, activations=Activations())),
        ("w8a8_tensor_static", Scheme(8, per_tensor=True, activations=Activations(dynamic=False))),
        ("w8a8_mixed", Scheme(8, activations=Activations(outliers=6.0))),
        ("w8a8_mixed4.5", Scheme(8, activations=Activations(outliers=4.5))),
        ("fp8a8_static", replace(FP8, activations=Activations(dynamic=False))),
        ("fp8a8_block", replace(FP8, tile=128, activations=Activations(group_size=128))),
    ],
)
def test_preset_names(text: str, expected: Scheme) -> None:
    assert parse_scheme(text) == expected


MORE = (
    *("w1g64_asymf", "w1_asymf", "w2g16_asymf_axis0", "w4g64_axis0", "w4g64_asym_axis0", "w8_tensor_asymf"),
    *("nf4g32", "nf4g4096_dq", "fp4_dq", "fp4g128", "w4a8g128", "w4a8", "w8a8g64_static", "w8a8_tensor"),
    *("w8a8_tensor_static", "w8a8_asym", "w8a8_mixed4.5", "w8a8_mixed0", "fp8a8_tensor"),
    "fp8a8_tensor_static",
)


@pytest.mark.parametrize("name", [*COMMON, *MORE])
def test_names_parse_back_to_themselves(name: str) -> None:
    assert parse_scheme(name).name == name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group, per_tensor", [(None, False), (64, False), (None, True)])
@pytest.mark.parametrize("sym", [True, False])
def test_every_scheme_of_integers_parses_back_from_its_name(
    bits: int, group: int | None, per_tensor: bool, sym: bool
) -> None:
    for fractional in {False, not sym}:
        scheme = Scheme(bits, group, sym, per_tensor, fractional=fractional)
        assert parse_scheme(scheme.name) == scheme
    if group is not None:
        assert parse_scheme(replace(scheme, axis=0).name) == replace(scheme, axis=0)


@pytest.mark.parametrize("name", ["w4g128", "nf4", "fp8_block", "w8a8_static"])
def test_what_the_format_chooses_is_not_in_the_name(name: str) -> None:
    scheme = parse_scheme(name)
    assert (scheme.scale_dtype, scheme.convention) == ("float16", "absmax")
    assert replace(scheme, scale_dtype="bfloat16", convention="half_step").name == name


@pytest.mark.parametrize(
    "text",
    [
        *("w4g129x", "4bit", "", "w", "g128", "w4-g128", "w4g128_tensor", "w4g", "nf5", "int8", "fp8_e5m2"),
        # inputs have static scales and outliers only where they are rounded
        *("w8_static", "fp8_static", "w8_mixed", "w8a8_mixed6_static", "w8a8_mixed-1", "fp8a4"),
        *("w4g64_axis0_asymf", "nf4_dqg64", "w4_axis1", "nf4_tensor_block"),
    ],
)
def test_unknown_names_are_refused_with_what_is_read(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown scheme") as caught:
        parse_scheme(text)
    assert caught.value.remedy is not None and "w<bits>" in caught.value.remedy
    assert "quantkit formats" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "meant"), [("w4g128asym", "w4g128_asym"), ("nf4dq", "nf4_dq"), ("fp8_blok", "fp8_block")]
)
def test_near_misses_get_a_suggestion(text: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown scheme '{text}'; did you mean '{meant}'"):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("w0g32", "bits must be 1 to 8, not 0", None),
        ("w9", "bits must be 1 to 8, not 9", None),
        ("w1g32", "1 bit needs a fractional zero point", "write w1g64_asymf"),
        ("w1g32_asym", "1 bit needs a fractional zero point", "write w1g64_asymf"),
        ("w4g0", "group_size must be at least 1, not 0", "leave it out for one scale per row"),
        ("w4_axis0", "groups along the outputs need a group size", "write w4g64_asymf_axis0"),
        ("w4_dq", "double quantization belongs to nf4 and fp4", "write nf4_dq"),
        ("w8_block", "blocks of 128 × 128 belong to fp8", "write fp8_block"),
        ("w8a8_asymf", "inputs cannot be rounded beside a fractional zero point", None),
        ("nf4_asym", "nf4 has 4 bits, no zero point and groups along the inputs", None),
        ("nf4_axis0", "nf4 has 4 bits, no zero point and groups along the inputs", None),
        ("nf4_tensor", "per_tensor, tile and group_size exclude each other", None),
        ("mxfp4g64", "mxfp4 has groups of 32 inputs", "write mxfp4"),
        ("nvfp4g32", "nvfp4 has groups of 16 inputs", "write nvfp4"),
        ("fp8g128", "fp8 scales are per row, tensor or block", "write fp8, fp8_tensor or fp8_block"),
        ("fp8_dq", "double quantization belongs to nf4 and fp4", None),
        ("nf4a8", "inputs cannot be rounded beside nf4 weights", "leave out a8"),
        ("w4a8_mixed", "outlier columns belong to 8 bits with one scale per row", "write w8a8_mixed"),
        ("w8a8g64_mixed", "outlier columns belong to 8 bits with one scale per row", "write w8a8_mixed"),
        ("w8a8_tensor_mixed", "outlier columns belong to 8 bits with one scale per row", "write w8a8_mixed"),
        ("fp8a8_mixed", "outlier columns belong to 8 bits with one scale per row", "write w8a8_mixed"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str, remedy: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_scheme(text)
    assert (caught.value.message, caught.value.remedy) == (message, remedy)
    assert remedy is None or not remedy.startswith("write ") or parse_scheme(remedy.split()[1].rstrip(","))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8, "group_size": 32, "per_tensor": True}, "exclude each other"),
        ({"bits": 8, "numbers": "fp8", "tile": 128, "per_tensor": True}, "exclude each other"),
        ({"bits": 8, "numbers": "fp8", "tile": 64}, "tile must be 128, not 64"),
        ({"bits": 4, "group_size": 32, "scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"bits": 4, "fractional": True}, "sym must be false"),
        ({"bits": 8, "group_size": 64, "numbers": "nf4"}, "nf4 has 4 bits"),
        ({"bits": 4, "numbers": "nf4"}, "nf4 needs groups of inputs"),
        ({"bits": 4, "group_size": 64, "numbers": "fp4", "sym": False}, "fp4 has 4 bits, no zero point"),
        ({"bits": 8, "numbers": "fp8", "group_size": 64}, "per row, tensor or block"),
        ({"bits": 8, "activations": Activations(dynamic=False, outliers=6.0)}, "outlier columns belong"),
    ],
)
def test_contradictions_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Scheme(**fields)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("w4g32", (1, 32)),
        ("w4", (1, 64)),
        ("w8_tensor", (16, 64)),
        ("nf4", (1, 64)),
        ("mxfp4", (1, 32)),
        ("nvfp4", (1, 16)),
        ("fp8", (1, 64)),
        ("fp8_tensor", (16, 64)),
        ("fp8_block", (128, 128)),
        ("w4g8_asymf_axis0", (8, 1)),
        ("w8a8_mixed", (1, 64)),
    ],
)
def test_groups_in_rows_and_columns(text: str, group: tuple[int, int]) -> None:
    assert parse_scheme(text).group((16, 64)) == group


def test_which_schemes_are_plain_and_which_tie_rows() -> None:
    plain = {name for name in (*COMMON, *MORE) if parse_scheme(name).plain}
    assert {"w4", "w4g128", "w4g128_asym", "w8_tensor"} <= plain
    assert not plain & {"w4g64_asymf", "w4g64_axis0", "nf4", "fp8", "mxfp4", "nvfp4", "w8a8", "w8a8_mixed"}
    tied = {name for name in (*COMMON, *MORE) if parse_scheme(name).ties_rows}
    assert tied == {
        name for name in (*COMMON, *MORE) if name.endswith("_dq") or "_tensor" in name or "_block" in name
    } | {"w4g64_axis0", "w4g64_asym_axis0", "w2g16_asymf_axis0"}


@pytest.mark.parametrize(
    ("text", "shape", "parts"),
    [
        ("w4g128", (16, 256), None),
        ("w4", (16, 7), None),
        ("w8_tensor", (3, 7), None),
        ("w4g128", (16, 2880), ("in_features is 2,880, not a multiple of 128", "size 64 or 32 or 16")),
        ("w4g128", (16, 100), ("in_features is 100", "use one scale per row")),
        ("w4g128", (16, 64), ("not a multiple of 128", "64 or 32")),
        # the last tile of the outputs may be cut short, not of the inputs
        ("fp8_block", (130, 256), None),
        ("fp8_block", (128, 192), ("in_features is 192, not a multiple of 128", "with one scale per row")),
        ("mxfp4", (16, 48), ("not a multiple of 32", "use nf4 or integers")),
        ("nvfp4", (16, 24), ("not a multiple of 16", "use nf4 or integers")),
        ("nf4", (16, 96), ("not a multiple of 64", "use group_size 32 or 16")),
        ("w4g64_asymf_axis0", (128, 7), None),
        ("w4g64_asymf_axis0", (96, 64), ("out_features is 96, not a multiple of 64", "size 32 or 16")),
    ],
)
def test_misfits_say_what_would_fit(text: str, shape: tuple[int, int], parts: tuple[str, str] | None) -> None:
    found = parse_scheme(text).misfit(shape)
    if parts is None:
        assert found is None
        return
    assert found is not None and all(part in found for part in parts)
    assert found.endswith("or keep the weight with a rule")
