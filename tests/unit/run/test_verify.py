"""`verify` finds what is wrong, and says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import Eval, Output, Recipe, parse_targets
from quantkit.errors import SourceError
from quantkit.run.convert import convert
from quantkit.run.verify import verify
from tests.models import save_tiny

SCALES = "model.layers.0.mlp.up_proj.scales"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    targets = parse_targets("gptq:w4g32@method=rtn,name=made")
    convert(Recipe(str(source), targets, output=Output(dir=str(out)), eval=Eval(enabled=False)))
    return out / "made"


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A GPTQ folder to damage."""
    return shutil.copytree(original, tmp_path / "made")


@pytest.fixture
def changed(made: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """The folder with other tensors, and without the sums that would give them away."""

    def change(how: Callable[[dict[str, Tensor]], None]) -> Path:
        file = made / "model.safetensors"
        tensors = load_file(file)
        how(tensors)
        save_file(tensors, file, {"format": "pt"})
        (made / "quantkit.json").unlink()
        return made

    return change


def test_whole_files(made: Path, source: Path) -> None:
    found = verify(made, against=str(source))
    assert found.sound and found.notes == []
    assert found.checks["sums"].startswith("4 files")
    assert found.checks["weights"] == "14 quantized (gptq), all decoded"
    assert all(0.02 < d.error < 0.2 for d in found.differences)
    document = json.loads(json.dumps(found.to_json()))
    assert document["status"] == "ok" and len(document["differences"]) == 14
    first, second = found.tables()
    assert first.title == "made · sound" and len(second.rows) == 10


def test_a_checkpoint_of_floats(source: Path) -> None:
    found = verify(source, against=str(source))
    assert found.sound and "weights" not in found.checks
    assert found.notes == ["no quantkit.json: the sums of the files are not known"]


def test_one_bit(made: Path) -> None:
    data = bytearray((made / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (made / "model.safetensors").write_bytes(data)
    found = verify(made)
    assert [p for p in found.problems if "`model.safetensors` changed since it was written" in p]


def test_missing_and_shortened_files(made: Path) -> None:
    (made / "quantize_config.json").unlink()
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    found = verify(made)
    assert "`quantize_config.json` is missing" in found.problems
    assert any("bytes; " in p and "were written" in p for p in found.problems)
    assert any("is truncated" in p for p in found.problems)
    assert found.to_json()["status"] == "damaged"


def test_a_manifest_of_somebody_else(made: Path) -> None:
    (made / "quantkit.json").write_text('{"files": []}')
    assert any("is not what quantkit writes" in p for p in verify(made).problems)
    listed = {"../secret": {"bytes": 1, "sha256": "0"}}
    (made / "quantkit.json").write_text(json.dumps({"files": listed}))
    assert "`../secret` is missing" in verify(made).problems


def test_values_that_are_not_finite(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES][1, 3] = float("inf")
        tensors[NORM][7] = float("nan")

    found = verify(changed(damage))
    assert f"`{NORM}` is nan at index [7]" in found.problems
    assert "`model.layers.0.mlp.up_proj.weight (scale)` is inf at index [3, 1]" in found.problems
    assert len(found.problems) == 2


def test_group_numbers_out_of_range(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES.replace("scales", "g_idx")][0] = 77

    (problem,) = verify(changed(damage)).problems
    assert "group numbers from 0 to 77 where there are 2 groups" in problem


def test_tensors_that_are_missing_or_left_over(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["model.layers.9.norm"] = torch.ones(3)

    (problem,) = verify(changed(damage)).problems
    assert NORM in problem and "`model.layers.9.norm`" in problem


def test_shapes_that_the_config_contradicts(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    found = verify(made)
    assert any("wrong shapes" in problem for problem in found.problems)


def test_folded_factors_are_said_and_no_problem(changed: Callable[..., Path], source: Path) -> None:
    def fold(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] *= 3
        for name in ("q", "k", "v"):
            tensors[f"model.layers.1.self_attn.{name}_proj.scales"] /= 3

    found = verify(changed(fold), against=str(source))
    assert found.sound and any("factors were folded" in note for note in found.notes)
    assert {d.name.split(".")[-2] for d in found.worst()[:3]} == {"q_proj", "k_proj", "v_proj"}


def test_weights_of_another_model(changed: Callable[..., Path], source: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES] *= -1

    (problem,) = verify(changed(mix), against=str(source)).problems
    assert "`model.layers.0.mlp.up_proj.weight` have nothing in common" in problem


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        verify(tmp_path / "absent")
