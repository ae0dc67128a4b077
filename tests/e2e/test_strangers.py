"""Files that other tools wrote, or might have: they open, verify, run and serve as sources."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import EvalText
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.build import build_graph
from quantkit.run.quantized import dequantized, open_quantized
from quantkit.tensors import dequantize
from tests.e2e.runs import recipe
from tests.models import save_tiny

# folder of a stranger → the format that reads it, and how far its weights may be from their source
STRANGERS = {
    "autoawq": ("awq", 0.15),
    "autogptq": ("gptq", 0.15),
    "autoround-auto-awq-w4g128": ("awq", 0.13),
    "autoround-auto-gptq-w4g128": ("gptq", 0.13),
    "autoround-llm-compressor-wint-a16-w4g128": ("compressed_tensors", 0.13),
    "llmc-gptq-w4a16": ("compressed_tensors", 0.15),
}
TARGETS = (
    *("gptq:w4g32@method=rtn", "gptq:w3g32_asym@method=rtn", "awq:w4g32@method=rtn", "hqq:w4g32"),
    *("bitsandbytes:nf4g32_dq@method=rtn", "int8", "compressed_tensors:w4g32@method=rtn"),
    *("compressed_tensors:w8a8_static@kv_cache=fp8", "compressed_tensors:fp8a8", "nvfp4@method=rtn"),
)
GPTQ = "gptq-w4g32-rtn"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight, dequantized."""
    found = open_quantized(Checkpoint.open(folder))
    assert found is not None
    return {name: dequantize(found.linear(name).weight) for name in found.parts}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_weights_lie_near_their_source(stranger: str, shared: Path) -> None:
    folder = shared / "strangers" / stranger
    if not folder.is_dir():
        pytest.skip(f"needs strangers/{stranger} in ../shared")
    name, allowed = STRANGERS[stranger]
    opened = open_quantized(Checkpoint.open(folder))
    assert opened is not None and opened.format_name == name
    source = Checkpoint.open(shared / "strangers" / "source-bf16")
    found = weights(folder)
    assert found.keys() == {n for n in source.tensors if n.endswith("_proj.weight")}
    for key, weight in found.items():
        original = source.read(key).float()
        assert 0.05 < float((weight - original).norm() / original.norm()) < allowed, key


def test_three_exports_of_one_tuning_are_equal(shared: Path) -> None:
    folders = [shared / "strangers" / name for name in STRANGERS if name.startswith("autoround")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("needs strangers/autoround-* in ../shared")
    first, *others = (weights(folder) for folder in folders)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("stranger", "notes"), [("autoawq", "folded"), ("autogptq", "a bias of zeros")])
def test_strangers_are_verified(stranger: str, notes: str, shared: Path) -> None:
    folder = shared / "strangers" / stranger
    if not folder.is_dir():
        pytest.skip(f"needs strangers/{stranger} in ../shared")
    found = quantkit.verify(folder, against=str(shared / "strangers" / "source-bf16"), engine=False)
    # these folders have neither embedding nor head, and nothing else is wrong with them
    assert len(found.problems) == 1 and "2 parameters that no tensor fills" in found.problems[0]
    assert any(notes in note for note in found.notes)
    assert len(found.differences) == 14 and found.worst()[0].error < 0.15


@pytest.fixture(scope="session")
def made(
    checkpoint: Path,
    calibration_text: Path,
    evaluation_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny model in many formats."""
    out = tmp_path_factory.mktemp("made")
    quantkit.convert(recipe(checkpoint, calibration_text, evaluation_text, out, *TARGETS))
    return out


@pytest.fixture
def odd(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """`odd(tensors, config)`: a copy of the GPTQ target after both functions changed it in place."""

    def build(
        change: Callable[[dict[str, torch.Tensor]], None], config: Callable[[dict[str, Any]], None]
    ) -> Path:
        folder = shutil.copytree(made / GPTQ, tmp_path / "odd")
        (folder / "quantkit.json").unlink()
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
        model = json.loads((folder / "config.json").read_text())
        config(model)
        (folder / "config.json").write_text(json.dumps(model))
        return folder

    return build


def biases(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Adds a bias to every quantized linear, as AutoGPTQ does with zeros."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".scales")]:
            out = tensors[name].shape[1]
            tensors[name.replace("scales", "bias")] = torch.full((out,), value, dtype=torch.float16)

    return add


def as_auto_gptq(model: dict[str, Any]) -> None:
    """Its config is in quantize_config.json only, with neither method nor checkpoint format."""
    del model["quantization_config"]


def as_auto_round(model: dict[str, Any]) -> None:
    stated = model["quantization_config"]
    kept = {key: stated[key] for key in ("bits", "group_size", "sym")}
    packing = "auto_round:auto_gptq"
    model["quantization_config"] = {**kept, "quant_method": "auto-round", "packing_format": packing}


def drop_groups(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.endswith(".g_idx")]:
        del tensors[name]


def scores_of(made: Path, folder: str) -> dict[str, Any]:
    """What convert measured on a target."""
    manifest = json.loads((made / folder / "quantkit.json").read_text())
    found: dict[str, Any] = manifest["quality"][0]
    return found


def text(evaluation: Path) -> tuple[EvalText, ...]:
    return (EvalText(file=str(evaluation), style="gptq", context=32, chunks=8),)


def test_saved_files_score_what_convert_measured(made: Path, checkpoint: Path, evaluation_text: Path) -> None:
    """Whatever the format: weights, rounded inputs and a rounded cache come back from the files."""
    folders = sorted(p for p in made.iterdir() if (p / "quantkit.json").is_file())
    assert len(folders) == len(TARGETS)
    found = quantkit.score([str(p) for p in folders], baseline=str(checkpoint), texts=text(evaluation_text))
    assert found.baseline is not None
    for folder, model in zip(folders, found.models, strict=True):
        expected, (one,) = scores_of(made, folder.name), model.scores
        assert one.beside is not None and one.convention == expected["convention"]
        assert one.beside.kl_mean == pytest.approx(expected["kl_mean"], rel=1e-4), folder.name
        assert one.perplexity.value == pytest.approx(expected["target"]["value"], rel=1e-6), folder.name
        assert one.beside.source.value == pytest.approx(expected["source"]["value"], rel=1e-6)
    rows = found.table().rows
    assert rows[0][0] == checkpoint.name and len(rows) == 1 + len(folders)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_made_is_sound(made: Path, checkpoint: Path, target: str) -> None:
    name = quantkit.parse_targets(target)[0].name
    found = quantkit.verify(made / name, against=str(checkpoint), engine=False)
    assert found.problems == [] and len(found.differences) == 14
    assert set(found.checks) >= {"sums", "headers", "architecture", "floats", "weights", "against"}


@pytest.mark.parametrize(
    ("tensors", "config"), [(biases(0.0), as_auto_gptq), (drop_groups, as_auto_round)], ids=["gptq", "round"]
)
def test_odd_folders_are_the_model_they_were_made_from(
    odd: Callable[..., Path],
    tensors: Callable[[dict[str, torch.Tensor]], None],
    config: Callable[[dict[str, Any]], None],
    made: Path,
    checkpoint: Path,
    evaluation_text: Path,
) -> None:
    folder = odd(tensors, config)
    expected = weights(made / GPTQ)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(folder).items())
    report = quantkit.verify(folder, engine=False)
    assert report.sound, report.problems
    assert {kind.name for kind in quantkit.inspect(folder).kinds} == {"gptq 4 bit", "F32", "F16"} - (
        {"F16"} if config is as_auto_round else set()
    )
    found = quantkit.score([str(folder)], baseline=str(checkpoint), texts=text(evaluation_text))
    beside = found.models[0].scores[0].beside
    assert beside is not None
    assert beside.kl_mean == pytest.approx(scores_of(made, GPTQ)["kl_mean"], rel=1e-4)


def test_a_bias_that_the_model_does_not_have_is_no_detail(odd: Callable[..., Path]) -> None:
    folder = odd(biases(0.5), as_auto_gptq)
    report = quantkit.verify(folder, engine=False)
    assert not report.sound and "tensors that the model does not use" in report.problems[0]
    with pytest.raises(SourceError, match=r"does not use.*bias"):
        quantkit.score([str(folder)])


def test_a_quantized_source_is_converted_with_a_warning(
    odd: Callable[..., Path],
    calibration_text: Path,
    evaluation_text: Path,
    tmp_path: Path,
) -> None:
    folder = odd(biases(0.0), as_auto_gptq)
    asked = recipe(folder, calibration_text, evaluation_text, tmp_path / "out", "hqq:w8g32")
    planned = quantkit.plan(asked)
    assert any("already quantized (gptq, 4 bits)" in warning for warning in planned.warnings)
    assert any("a bias of zeros" in warning for warning in planned.warnings)
    assert planned.to_json()["source"]["size_bytes"] < 250_000, "the size of the files, not of their floats"
    report = quantkit.convert(asked)
    assert report.targets[0].quality[0].kl_mean < 1e-3, "8 bits of 4 bits lose next to nothing"
    before, after = weights(folder), weights(tmp_path / "out" / "hqq-w8g32_asymf")
    for name, weight in after.items():
        assert float((weight - before[name]).norm() / before[name].norm()) < 0.01


@pytest.mark.parametrize(
    ("family", "target"), [("gpt2", "gptq:w4g32@method=rtn"), ("qwen3_moe", "gptq:w4g32@method=rtn")]
)
def test_weights_lie_as_the_architecture_has_them(family: str, target: str, tmp_path: Path) -> None:
    """Conv1D keeps (in, out), experts are loaded in stacks: the view shows what files of floats hold."""
    source = save_tiny(family, tmp_path / "source")
    asked = quantkit.Recipe(
        source=str(source),
        targets=quantkit.parse_targets(target),
        output=quantkit.Output(dir=str(tmp_path / "out")),
        eval=quantkit.Eval(enabled=False),
        engine_check=False,
    )
    quantkit.convert(asked)
    stored = open_quantized(Checkpoint.open(tmp_path / "out" / GPTQ))
    assert stored is not None
    view, plain = dequantized(stored), Checkpoint.open(source)
    assert {n: i.shape for n, i in view.tensors.items()} == {n: i.shape for n, i in plain.tensors.items()}
    assert build_graph(view) == build_graph(plain)
    for name in stored.parts:
        original = plain.read(name).float()
        assert float((view.read(name) - original).norm() / original.norm()) < 0.2
        assert torch.equal(view.read(name, rows=slice(1, 3)), view.read(name)[1:3])


def test_inputs_that_cannot_be_emulated_are_refused(
    made: Path, tmp_path: Path, evaluation_text: Path
) -> None:
    folder = shutil.copytree(made / "compressed_tensors-fp8a8", tmp_path / "a4")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] |= {"num_bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="inputs are rounded to 4 bits"):
        quantkit.score([str(folder)], texts=text(evaluation_text))
