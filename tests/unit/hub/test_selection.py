"""Which files are the model: tags as llama.cpp reads them, sub-folders, and what is never a model."""

from __future__ import annotations

import pytest

from quantkit.errors import SourceError
from quantkit.hub.selection import Choice, check_shards, choose

FLAT = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
GGUF = ["m-Q4_K_M.gguf", "m.Q8_0.gguf", "m-IQ3_M.gguf", "m-Q3_M.gguf", "mmproj-m-F16.gguf", "m.imatrix.gguf"]
SHARDED = [f"BF16/m-BF16-0000{i}-of-00002.gguf" for i in (1, 2)]


def refused(names: list[str], which: str | None) -> SourceError:
    with pytest.raises(SourceError) as caught:
        choose("org/m", names, which)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("names", "which", "expected"),
    [
        (FLAT, None, Choice("")),
        ([*FLAT, *GGUF], None, Choice("")),
        ([*FLAT, *GGUF], "Q4_K_M", Choice("", ("m-Q4_K_M.gguf",))),
        (GGUF, "q8_0", Choice("", ("m.Q8_0.gguf",))),
        (GGUF, "Q3_M", Choice("", ("m-Q3_M.gguf",))),
        (GGUF, "m-IQ3_M.gguf", Choice("", ("m-IQ3_M.gguf",))),
        (["config.json", "m-Q8_0.gguf", "mmproj.gguf"], None, Choice("", ("m-Q8_0.gguf",))),
        (SHARDED, None, Choice("BF16/", tuple(SHARDED))),
        ([*GGUF, *SHARDED], "BF16", Choice("BF16/", tuple(SHARDED))),
        ([*GGUF, *SHARDED], SHARDED[1], Choice("BF16/", tuple(SHARDED))),
        ([*FLAT, "fp8/config.json", "fp8/model.safetensors"], "fp8", Choice("fp8/")),
        ([*FLAT, "a/b/config.json", "a/b/model.safetensors"], "a/b/", Choice("a/b/")),
        (["m-UD-Q4_K_XL.gguf", "m-Q8_0.gguf"], "Q4_K_XL", Choice("", ("m-UD-Q4_K_XL.gguf",))),
        (["foo-mtp-1B.gguf", "bar.gguf"], "foo-mtp-1B.gguf", Choice("", ("foo-mtp-1B.gguf",))),
    ],
)
def test_what_is_chosen(names: list[str], which: str | None, expected: Choice) -> None:
    assert choose("org/m", names, which) == expected


@pytest.mark.parametrize("aside", ["mmproj-m-F16.gguf", "m.imatrix.gguf"])
def test_what_lies_beside_a_model_is_none(aside: str) -> None:
    assert refused(GGUF, aside).message == f"'{aside}' of org/m is not a model"
    assert "has no model 'F16'" in refused(GGUF, "F16").message
    assert "has no config.json" in refused([aside], None).message


def test_more_than_one() -> None:
    error = refused(GGUF, None)
    assert error.message == "org/m has 4 GGUF models: IQ3_M, Q3_M, Q4_K_M, Q8_0"
    assert error.remedy == "give one, as org/m:IQ3_M"
    twice = ["a-Q4_0.gguf", "b-Q4_0.gguf"]
    assert refused(twice, None).remedy == "give one, as org/m:a-Q4_0.gguf"
    assert refused(twice, "Q4_0").message == "'Q4_0' means 2 models of org/m: a-Q4_0.gguf, b-Q4_0.gguf"


def test_nothing() -> None:
    assert refused([], None).remedy == "name a repository with a model"
    assert "it has fp8; give one, as org/m:fp8" in str(
        refused(["fp8/config.json", "fp8/m.safetensors"], None).remedy
    )
    assert refused(FLAT, "../secret").message == "org/m has no model '../secret'"


def test_small_files_are_those_of_the_models_folder() -> None:
    names = [
        *FLAT,
        "modeling_x.py",
        "pytorch_model.bin",
        "fp8/config.json",
        "fp8/tokenizer.json",
        "fp8/x/LICENSE",
    ]
    assert Choice("").small(names) == ["README.md", "config.json", "tokenizer.json"]
    assert Choice("fp8/").small(names) == ["README.md", "fp8/config.json", "fp8/tokenizer.json"]


def test_a_sub_folder_has_the_terms_of_the_root_where_it_has_none() -> None:
    terms = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"]
    root = [*FLAT, *terms[:3], "LICENSE.py", "fp8/config.json", "fp8/model.safetensors"]
    assert Choice("fp8/").small(root) == sorted([*terms, "fp8/config.json"])
    own = ["fp8/LICENSE", "fp8/README.md"]
    assert Choice("fp8/").small([*root, *own]) == sorted(["NOTICE", "USE_POLICY.md", *own, "fp8/config.json"])
    assert Choice("BF16/", tuple(SHARDED)).small([*root, *SHARDED]) == sorted(terms)


def test_missing_shards() -> None:
    check_shards("org/m", choose("org/m", SHARDED, None))
    with pytest.raises(SourceError, match=r"has 1 of 2 files of BF16/m-BF16.gguf"):
        check_shards("org/m", choose("org/m", SHARDED[:1], None))
