"""Files whose weights were rescaled stand for the model they came from, whatever the factors went into."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.recipe.rules import Rule
from quantkit.run.report import Report
from quantkit.tensors import dequantize
from tests.e2e.conftest import write_tokenizer
from tests.e2e.runs import recipe
from tests.models import save_tiny, tiny_tokens

TARGET = "gptq:w8g32@method=rtn,transforms=awq,alpha=0.5"


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(tiny_tokens()).logits
    return found


def unpacked(folder: Path, source: Path, quantized: Iterable[str], to: Path) -> Path:
    """A copy of the source with the tensors that the files of `folder` stand for."""
    written = Checkpoint.open(folder)
    fmt = registry.load("formats", "gptq").FORMAT
    config = written.config["quantization_config"]
    found = {n: written.read(n) for n in written.tensors if fmt.base_name(n) is None}
    for name in quantized:
        base = name.removesuffix("weight")
        parts = {n: written.read(n) for n in written.tensors if n.startswith(base) and n != f"{base}bias"}
        found[name] = dequantize(fmt.decode(name, parts, config).weight)
    shutil.copytree(source, to)
    save_file({n: t.contiguous() for n, t in found.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("family", "folded", "kept"),
    [
        ("llama", 7, None),
        ("llama", 6, "v_proj"),
        ("llama", 6, "o_proj"),
        ("opt", 6, None),
        ("phi3", 4, None),
        ("mixtral", 4 + 3 * 4, None),
        ("gemma2", 7, None),
    ],
)
def test_folded_files_are_the_model(
    family: str,
    folded: int,
    kept: str | None,
    calibration_text: Path,
    evaluation_text: Path,
    tmp_path: Path,
) -> None:
    source = save_tiny(family, tmp_path / "source")
    write_tokenizer(source)
    wanted = recipe(source, calibration_text, evaluation_text, tmp_path / "out", TARGET)
    if kept is not None:
        wanted = replace(wanted, rules=(Rule(match=f"*.{kept}", keep=True),))
    report: Report = quantkit.convert(wanted)
    (target,) = report.targets
    rescaled = [row for row in target.tensors if "rescaled_spread" in row.facts]
    assert [row.note for row in target.tensors if row.note is not None] == []
    assert len(rescaled) == folded * 2
    assert min(row.facts["rescaled_spread"] for row in rescaled) > 1.2
    expected = logits(source)
    names = [row.name for row in target.tensors]
    found = logits(unpacked(tmp_path / "out" / target.folder, source, names, tmp_path / "meant"))
    # what 8 bits cost
    assert float((found - expected).norm() / expected.norm()) < 0.03
    # the sweep's own stream says the same; a router chose otherwise for a token or two
    assert target.quality[0].kl_mean < (5e-3 if family == "mixtral" else 1e-3)
