"""`quantkit formats`: what each target needs and runs in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from quantkit import registry
from quantkit.recipe.shorthand import parse_targets

FIELDS = {"target", "bits_per_weight", "group", "method", "calibrated", "engines", "cpu", "default"}


@pytest.fixture
def document(quantkit: Callable[..., Any]) -> dict[str, Any]:
    shown = quantkit("formats", "--json")
    assert (shown.code, shown.err) == (0, "")
    found: dict[str, Any] = json.loads(shown.out)
    return found


@pytest.fixture
def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in document["targets"]}


def test_every_preset_is_a_target(document: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    assert (document["schema"], document["status"]) == ("quantkit/formats/1", "ok")
    assert len(rows) == len(document["targets"])
    for target, row in rows.items():
        assert row.keys() == FIELDS
        (parsed,) = parse_targets(target)
        assert (parsed.method, row["group"] != "") == (row["method"], True)
        assert row["engines"] and 1 < row["bits_per_weight"] < (33 if target.startswith("gguf:") else 9)
    for name in registry.names("formats"):
        assert [
            r["target"] for r in rows.values() if r["default"] and r["target"].startswith(f"{name}:")
        ] == [f"{name}:{registry.load('formats', name).DEFAULT_SCHEME}"]


@pytest.mark.parametrize(
    ("target", "bits", "group", "method", "calibrated"),
    [
        # 16 bits of scale, 4 of zero point, 32 rows of g_idx
        ("gptq:w4g128", 4 + 20 / 128 + 32 / 4096, "128 inputs", "gptq", True),
        ("compressed_tensors:w4g128", 4 + 16 / 128, "128 inputs", "gptq", True),
        ("compressed_tensors:w8", 8 + 16 / 4096, "row", "rtn", False),
        ("compressed_tensors:w8_tensor", 8, "tensor", "rtn", False),
        ("compressed_tensors:w8a8", 8 + 16 / 4096, "row", "rtn", False),
        ("compressed_tensors:w8a8_static", 8 + 16 / 4096, "row", "rtn", True),
        ("compressed_tensors:fp8_block", 8 + 16 / 128**2, "128 x 128", "rtn", False),
        ("compressed_tensors:mxfp4", 4 + 8 / 32, "32 inputs", "gptq", True),
        ("compressed_tensors:nvfp4", 4 + 8 / 16, "16 inputs", "gptq", True),
        # of all weights of Llama 3.1 8B, as llama.cpp's own tool reckons
        ("gguf:q4_k_m", 4.89, "256 inputs", "gptq", True),
        ("gguf:iq2_xs", 2.59, "256 inputs", "gptq", True),
        ("gguf:f16", 16, "none", "rtn", False),
        ("bitsandbytes:nf4", 4 + 32 / 64, "64 inputs", "gptq", True),
        ("bitsandbytes:nf4_dq", 4 + (8 + 32 / 256) / 64, "64 inputs", "gptq", True),
        ("bitsandbytes:w8a8_mixed", 8 + 32 / 4096, "row", "llm_int8", True),
    ],
)
def test_sizes_and_needs(
    target: str, bits: float, group: str, method: str, calibrated: bool, rows: dict[str, dict[str, Any]]
) -> None:
    row = rows[target]
    # a table and a JSON of a kilobyte beside two million
    assert row["bits_per_weight"] == pytest.approx(bits, abs=5e-3 if target.startswith("gguf") else 1e-3)
    assert (row["group"], row["method"], row["calibrated"]) == (group, method, calibrated)


def test_engines_and_processors(rows: dict[str, dict[str, Any]]) -> None:
    assert {"vLLM", "SGLang"} <= set(rows["gptq:w4g128"]["engines"])
    assert "transformers" in rows["bitsandbytes:nf4"]["engines"]
    assert "vLLM" not in rows["compressed_tensors:w8"]["engines"], (
        "weight-only int8 per row is not read there"
    )
    assert "vLLM" in rows["compressed_tensors:w8a8"]["engines"]
    on_a_cpu = {"transformers", "transformers+gptqmodel", "gptqmodel", "hqq", "llama.cpp"}
    for row in rows.values():
        assert row["cpu"] == bool(on_a_cpu & set(row["engines"])), row["target"]


def test_methods_and_transforms_are_described(document: dict[str, Any]) -> None:
    for kind in ("methods", "transforms"):
        assert [row["name"] for row in document[kind]] == list(registry.names(kind))  # type: ignore[arg-type]
        assert all(len(row["summary"]) > 20 for row in document[kind])


def test_the_table(quantkit: Callable[..., Any], rows: dict[str, dict[str, Any]]) -> None:
    out = quantkit("formats").out
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["target", "bits"]
    (row,) = (line for line in lines if line.startswith(" gptq:w4g128 "))
    assert row.split() == [
        *("gptq:w4g128", "(default)", "4.16", "128", "inputs", "gptq", "yes"),
        *(f"{name}," for name in rows["gptq:w4g128"]["engines"][:-1]),
        *(rows["gptq:w4g128"]["engines"][-1], "yes"),
    ]
    (row,) = (line for line in lines if line.startswith(" compressed_tensors:w8 "))
    assert row.split() == ["compressed_tensors:w8", "8.00", "row", "rtn", "no", "transformers", "yes"]
    assert "int8 = bitsandbytes:int8" in out and "fp8 = compressed_tensors:fp8a8" in out
    assert " smoothquant  large inputs" in out
    for name in registry.names("formats"):
        assert f" {name}: {registry.load('formats', name).SUMMARY}" in lines
