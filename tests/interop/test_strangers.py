"""Our readers decode what other tools wrote: weights within the error of 4 bits of their source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.run.quantization_check import check_quantization, stored_weight
from quantkit.run.quantized import open_quantized
from quantkit.run.verification import Verification
from quantkit.tensors import dequantize

pytestmark = pytest.mark.interop

WRITTEN = {
    "autogptq": "gptq",
    "autoround-auto-gptq-w4g128": "gptq",
    "autoround-llm-compressor-wint-a16-w4g128": "compressed_tensors",
    "llmc-gptq-w4a16": "compressed_tensors",
}


def decoded(folder: Path, format_name: str) -> dict[str, torch.Tensor]:
    """Weight name → what our reader makes of it."""
    checkpoint = Checkpoint.open(folder)
    reader = registry.load("formats", format_name).FORMAT
    packed: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if (base := reader.base_name(name)) is not None:
            packed.setdefault(base, []).append(name)
    config = checkpoint.config["quantization_config"]
    return {
        base: dequantize(reader.decode(base, {name: checkpoint.read(name) for name in parts}, config).weight)
        for base, parts in packed.items()
    }


@pytest.mark.parametrize("stranger", WRITTEN)
def test_weights_lie_near_their_source(stranger: str, shared: Path) -> None:
    folder = shared / "strangers" / stranger
    if not folder.is_dir():
        pytest.skip(f"needs strangers/{stranger} in ../shared")
    source = Checkpoint.open(shared / "strangers" / "source-bf16")
    found = decoded(folder, WRITTEN[stranger])
    assert found.keys() == {name for name in source.tensors if name.endswith("_proj.weight")}
    for name, weight in found.items():
        original = source.read(name).float()
        error = float((weight - original).norm() / original.norm())
        # normal weights in groups of 128 on 16 levels: 0.11 rounded to nearest; GPTQ spends more
        assert 0.05 < error < 0.2, f"{name}: {error:.3f}"


def test_two_exports_of_one_tuning_are_equal(shared: Path) -> None:
    folders = [f"autoround-{kind}-w4g128" for kind in ("auto-gptq", "llm-compressor-wint-a16")]
    if not all((shared / "strangers" / folder).is_dir() for folder in folders):
        pytest.skip("needs strangers/autoround-* in ../shared")
    one, other = (decoded(shared / "strangers" / folder, WRITTEN[folder]) for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stranger", [*WRITTEN, "autoawq", "autoround-auto-awq-w4g128"])
def test_their_configs_say_what_their_tensors_are(stranger: str, shared: Path) -> None:
    folder = shared / "strangers" / stranger
    if not folder.is_dir():
        pytest.skip(f"needs strangers/{stranger} in ../shared")
    quantized = open_quantized(Checkpoint.open(folder))
    assert quantized is not None and len(quantized.parts) == 14
    report = Verification(folder)
    weights = [stored_weight(quantized, quantized.linear(name)) for name in quantized.parts]
    check_quantization(report, quantized, weights)
    assert report.problems == []
