"""`inspect` on what quantkit made, on a plain checkpoint, and on what others made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import SourceError
from tests.e2e.runs import recipe


def test_a_result_of_ours(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    report = quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, "gptq:w3g32"))
    found = quantkit.inspect(tmp_path / "gptq-w3g32")
    kinds = {kind.name: kind for kind in found.kinds}
    source = {k.name: k for k in quantkit.inspect(checkpoint).kinds}
    quantized = kinds["gptq 3 bit"]
    assert quantized.tensors == 14
    # every parameter is either quantized or kept
    assert quantized.parameters is not None and kinds["F32"].parameters is not None
    assert quantized.parameters + kinds["F32"].parameters == source["F32"].parameters
    assert found.manifest is not None
    assert found.manifest.quality[0].kl_mean == report.targets[0].quality[0].kl_mean
    assert any("perplexity" in note for note in found.table().notes)
    assert json.dumps(found.to_json())


def test_int_quantized_weights_are_counted_as_weights(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, tmp_path, "compressed_tensors:w8"))
    kinds = {kind.name: kind for kind in quantkit.inspect(tmp_path / "compressed_tensors-w8").kinds}
    assert kinds["compressed_tensors 8 bit"].tensors == 14 and "I8" not in kinds


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        quantkit.inspect(tmp_path / "absent")


@pytest.mark.parametrize(
    ("folder", "kind", "tensors"),
    [
        ("autogptq", "gptq 4 bit", 14),
        ("llmc-gptq-w4a16", "compressed_tensors 4 bit", 14),
        ("autoawq", "awq 4 bit", 14),
        ("autoround-auto-awq-w4g128", "awq 4 bit", 14),
    ],
)
def test_what_others_made(shared: Path, folder: str, kind: str, tensors: int) -> None:
    found = quantkit.inspect(shared / "strangers" / folder)
    assert {k.name: k.tensors for k in found.kinds}[kind] == tensors
    assert any("not made by quantkit" in note for note in found.table().notes)
