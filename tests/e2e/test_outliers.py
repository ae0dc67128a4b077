"""Planted outliers: two inputs of every norm 50 times as large, their columns of weights 50 times smaller.

The model computes what it did, and its weights are on the 8-bit grid already: only who rounds inputs by their
largest value notices. That is what LLM.int8's decomposition and SmoothQuant are for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.numerics.nearest import nearest
from quantkit.run.report import Report, TargetReport
from quantkit.schemes import Scheme
from quantkit.tensors import dequantize
from tests.e2e.conftest import write_tokenizer
from tests.e2e.runs import recipe
from tests.models import tiny_model

PLANTED, FACTOR = [5, 40], 50
FED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for norm, consumers in FED.items():
                block.get_submodule(norm).weight[PLANTED] *= FACTOR
                for name in consumers:
                    block.get_submodule(name).weight[:, PLANTED] /= FACTOR
            for module in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
                on_grid = nearest(module.weight, Scheme(8, scale_dtype="float32"), "absmax")
                module.weight.copy_(dequantize(on_grid))
    folder = tmp_path_factory.mktemp("planted") / "model"
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def targets(
    planted: Path, calibration_text: Path, evaluation_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TargetReport]:
    out = tmp_path_factory.mktemp("outliers")
    texts = (
        "compressed_tensors:w8a8@scales=absmax,name=plain",
        "compressed_tensors:w8a8@scales=absmax,transforms=smoothquant,name=smooth",
        "compressed_tensors:w8a8_static@scales=absmax,name=static",
        "compressed_tensors:w8a8_static@scales=absmax,transforms=smoothquant,name=static-smooth",
        "bitsandbytes:int8@name=mixed",
        "compressed_tensors:w8@scales=absmax,name=weights",
    )
    report = quantkit.convert(recipe(planted, calibration_text, evaluation_text, out, *texts))
    return {t.name: t for t in report.targets}


def kl(target: TargetReport) -> float:
    return target.quality[0].kl_mean


def test_the_weights_alone_are_exact(targets: dict[str, TargetReport]) -> None:
    assert kl(targets["weights"]) < 1e-7
    assert max(row.error for row in targets["weights"].tensors) < 1e-9


def test_absmax_fails_and_decomposition_does_not(targets: dict[str, TargetReport]) -> None:
    assert kl(targets["mixed"]) < 1e-3
    assert kl(targets["plain"]) > 50 * kl(targets["mixed"])
    assert kl(targets["static"]) > 100 * kl(targets["mixed"])


def test_smoothing_repairs_what_absmax_breaks(targets: dict[str, TargetReport]) -> None:
    assert kl(targets["smooth"]) < kl(targets["plain"]) / 50
    assert kl(targets["static-smooth"]) < kl(targets["static"]) / 50
    for name in ("smooth", "static-smooth"):
        rows = {row.name: row for row in targets[name].tensors}
        for block in (0, 1):
            for consumer in (name for names in FED.values() for name in names):
                row = rows[f"model.layers.{block}.{consumer}.weight"]
                assert row.note is None and row.facts["rescaled_spread"] > 10


def test_planted_columns_are_counted(targets: dict[str, TargetReport]) -> None:
    """Two in each of the five weights behind a norm; products in the MLP are large by nature."""
    mixed = targets["mixed"]
    counts = {row.name: int(row.facts["outlier_columns"]) for row in mixed.tensors}
    fed = tuple(f"{name}.weight" for names in FED.values() for name in names)
    assert [counts[name] for name in counts if name.endswith(fed)] == [2] * 10
    assert all(count == 0 for name, count in counts.items() if name.endswith("o_proj.weight"))
    assert mixed.outliers == (sum(counts.values()), sum(count > 0 for count in counts.values()))
    assert targets["plain"].outliers is None
    said = f"mixed: calibration saw {sum(counts.values())} outlier columns in 12 weights, which LLM.int8"
    assert any(note.startswith(said) for note in notes(mixed))


def notes(target: TargetReport) -> tuple[str, ...]:
    """What a person reads below the table."""
    return Report("x", 1, 16.0, None, (target,), quantkit.Gates()).table().notes
