"""`quantkit.json` and `checks.json` that somebody else wrote, or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import SourceError
from quantkit.hub.manifest import (
    CHECKS,
    MANIFEST,
    FileSum,
    Manifest,
    checks_json,
    find_manifest,
    read_checks,
    read_manifest,
)
from tests.cards import check, manifest, quality


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    made = manifest()
    (tmp_path / MANIFEST).write_text(json.dumps(made.to_json()))
    assert read_manifest(tmp_path) == made
    assert find_manifest(tmp_path, "another.gguf") is None


def test_numbers_of_what_is_broken_may_be_infinite(tmp_path: Path) -> None:
    made = manifest(quality=(quality(kl_max=float("inf")),))
    (tmp_path / MANIFEST).write_text(json.dumps(made.to_json()))
    assert read_manifest(tmp_path) == made


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "scheme must be text": lambda m: m.update(scheme=None),
    "engines must be a list": lambda m: m.update(engines="vLLM"),
    "made must be a mapping": lambda m: m.update(made="x"),
    "recipe must be text": lambda m: m.update(recipe=3),
    "repacked must be a mapping or null": lambda m: m.update(repacked="x"),
    "kl_mean must be a number": lambda m: m["quality"][0].update(kl_mean="0.1"),
    "count must be an integer": lambda m: m["kept"][0].update(count="x"),
    "parameters must be an integer": lambda m: m["source"].update(parameters="many"),
    "card must be a mapping": lambda m: m["source"].update(card=[1]),
    "revision must be text or null": lambda m: m["source"].update(revision=5),
    "sha256 must be text": lambda m: next(iter(m["files"].values())).update(sha256=None),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_values_of_another_type(problem: str) -> None:
    found = json.loads(json.dumps(manifest().to_json()))
    CHANGES[problem](found)
    with pytest.raises(SourceError, match=problem):
        Manifest.from_json(found, "`here`")


def test_numbers_that_no_float_holds(tmp_path: Path) -> None:
    found = json.loads(json.dumps(manifest().to_json())) | {"bits_per_weight": 10**400}
    with pytest.raises(SourceError, match="is not what quantkit writes: OverflowError"):
        Manifest.from_json(found, "`here`")
    checks = checks_json("key", (check(),))
    checks["engines"][0]["kl_mean"] = 10**400
    (tmp_path / CHECKS).write_text(json.dumps(checks))
    with pytest.raises(SourceError, match="is not what quantkit writes: OverflowError"):
        read_checks(tmp_path, "key")


@pytest.mark.parametrize("text", ["[]", "{", "[" * 200_000, '"x"', "{}"])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    (tmp_path / CHECKS).write_text(text)
    with pytest.raises(SourceError, match="is not"):
        read_manifest(tmp_path)
    with pytest.raises(SourceError, match="is not"):
        read_checks(tmp_path, "key")


def test_checks_of_another_type(tmp_path: Path) -> None:
    found = checks_json("key", (check(),))
    (tmp_path / CHECKS).write_text(json.dumps(found))
    assert read_checks(tmp_path, "key") == (check(),)
    found["engines"][0]["kl_mean"] = "small"
    (tmp_path / CHECKS).write_text(json.dumps(found))
    with pytest.raises(SourceError, match="kl_mean must be a number or null"):
        read_checks(tmp_path, "key")


def test_what_engines_said_holds_for_the_same_bytes_alone() -> None:
    one = manifest(files={"a": FileSum(1, "00"), "b": FileSum(2, "11")})
    turned = manifest(files={"b": FileSum(2, "11"), "a": FileSum(1, "00")})
    other = manifest(files={"a": FileSum(1, "00"), "b": FileSum(2, "12")})
    assert one.files_key == turned.files_key != other.files_key
    assert one.files_key != manifest(key="another", files=one.files).files_key
