from __future__ import annotations

import pytest

from quantkit.errors import RecipeError
from quantkit.schemes import COMMON, Scheme, parse_scheme


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
    ],
)
def test_preset_names(text: str, expected: Scheme) -> None:
    assert parse_scheme(text) == expected


@pytest.mark.parametrize("name", COMMON)
def test_common_names_parse_back_to_themselves(name: str) -> None:
    assert parse_scheme(name).name == name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group, per_tensor", [(None, False), (64, False), (None, True)])
@pytest.mark.parametrize("sym", [True, False])
def test_every_scheme_parses_back_from_its_name(
    bits: int, group: int | None, per_tensor: bool, sym: bool
) -> None:
    scheme = Scheme(bits, group, sym, per_tensor)
    assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize("text", ["w4g129x", "4bit", "", "w", "g128", "w4-g128", "w4g128_tensor", "w4g"])
def test_unknown_names_are_refused_with_what_is_read(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown scheme") as caught:
        parse_scheme(text)
    assert caught.value.remedy is not None and "w4g128" in caught.value.remedy


def test_near_misses_get_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"unknown scheme 'w4g128asym'; did you mean 'w4g128_asym'\?"):
        parse_scheme("w4g128asym")


@pytest.mark.parametrize(
    "text, message",
    [("w1g32", "bits must be 2 to 8, not 1"), ("w9", "2 to 8, not 9"), ("w4g0", "at least 1, not 0")],
)
def test_impossible_numbers_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_scheme(text)


def test_contradictions_are_refused() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        Scheme(8, 32, per_tensor=True)
    with pytest.raises(RecipeError, match="scale_dtype must be one of"):
        Scheme(4, 32, scale_dtype="int8")


def test_groups_in_rows_and_columns() -> None:
    assert Scheme(4, 32).group((16, 64)) == (1, 32)
    assert Scheme(4).group((16, 64)) == (1, 64)
    assert Scheme(8, per_tensor=True).group((16, 64)) == (16, 64)


def test_misfits_name_the_groups_that_would_fit() -> None:
    assert Scheme(4, 128).misfit((16, 256)) is None
    assert Scheme(4).misfit((16, 7)) is None
    found = Scheme(4, 128).misfit((16, 2880))
    assert found is not None and "in_features is 2,880, not a multiple of 128" in found
    assert "use group_size 64 or 32 or 16" in found
    narrow = Scheme(4, 128).misfit((16, 100))
    assert narrow is not None and "one scale per row" in narrow
    wide = Scheme(4, 128).misfit((16, 64))
    assert wide is not None and "64 or 32" in wide
