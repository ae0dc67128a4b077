"""Bad input through the command line: exit code, a message that says what and where, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.cli.main import run
from quantkit.errors import BudgetError
from tests.e2e.runs import sums

ROOT = Path(__file__).parents[2]
Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


@pytest.fixture
def convert(
    calibration_text: Path, evaluation_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Convert:
    """Runs `quantkit convert` and returns (exit code, stderr); checks that no target folder appeared."""

    def call(source: Path, *extra: str, target: str = "gptq:w4g32") -> tuple[int, str]:
        out = tmp_path / "out"
        arguments = ["convert", str(source), "--to", target, "-o", str(out), "--progress", "off"]
        arguments += ["--calib", str(calibration_text), "--calib-rows", "8", "--calib-length", "32"]
        arguments += ["--eval", str(evaluation_text), "--eval-style", "gptq-32", "--eval-chunks", "4", *extra]
        code = run(arguments)
        error = capsys.readouterr().err
        if code:
            assert "Traceback" not in error
            finished = [p for p in out.glob("*") if p.name != ".quantkit"] if out.exists() else []
            assert finished == [], "something looks complete"
        return code, error

    return call


def test_the_same_command_works_on_good_input(convert: Convert, checkpoint: Path) -> None:
    code, error = convert(checkpoint)
    assert code == 0, error


def test_truncated_shard(convert: Convert, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, error = convert(broken)
    assert code == 2 and "model.safetensors" in error and "1,000" in error


def test_hostile_header(convert: Convert, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    code, error = convert(broken)
    assert code == 2 and "model.safetensors" in error and "header" in error


def test_missing_tensor(convert: Convert, broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    code, error = convert(broken)
    assert code == 2 and "model.layers.1.mlp.up_proj.weight" in error


def test_orphan_tensor(convert: Convert, broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.sideways_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    code, error = convert(broken)
    assert code == 2 and "sideways_proj" in error


def damage(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return put


TARGETS = (
    *("gptq:w4g32", "bitsandbytes:nf4g32_dq", "bitsandbytes:int8@report_outliers=false", "hqq:w4g32"),
    *("compressed_tensors:fp8", "compressed_tensors:nvfp4", "compressed_tensors:w8a8@transforms=smoothquant"),
)


@pytest.mark.parametrize("target", TARGETS)
def test_nonfinite_weights(convert: Convert, broken: Path, target: str) -> None:
    value = float("nan") if "4" in target else -float("inf")
    damage(broken, "model.layers.1.self_attn.o_proj.weight", with_value(value))
    code, error = convert(broken, "--no-eval", target=target)
    assert code == 1 and "`model.layers.1.self_attn.o_proj.weight` is" in error and "[3, 5]" in error
    assert "the checkpoint is damaged; fetch it again" in error


def test_nonfinite_norms(convert: Convert, broken: Path) -> None:
    damage(broken, "model.layers.1.input_layernorm.weight", lambda norm: norm * float("inf"))
    code, error = convert(broken, target="compressed_tensors:w8a8@transforms=smoothquant")
    assert code == 1 and "`model.layers.1.input_layernorm.weight` is inf at index [0]" in error


@pytest.mark.parametrize(
    ("target", "value", "problem"),
    [
        ("gptq:w4g32@method=rtn", 1e7, "does not fit float16"),
        ("hqq:w4g32", 1e7, "does not fit float16"),
        ("bitsandbytes:int8@report_outliers=false", 7e4, "a weight of 70,000 is beyond float16"),
    ],
)
def test_values_that_a_file_cannot_hold(
    convert: Convert, broken: Path, target: str, value: float, problem: str
) -> None:
    damage(broken, "model.layers.1.mlp.up_proj.weight", with_value(value))
    code, error = convert(broken, "--no-eval", target=target)
    assert code == 1 and "`model.layers.1.mlp.up_proj.weight`: " in error and problem in error
    assert "keep" in error and "with a rule" in error
    kept = ("--rule", "model.layers.1.mlp.up_proj=keep")
    assert convert(broken, "--no-eval", *kept, target=target)[0] == 0, "what the error says helps"


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda w: w[0], "(64,)"),
        (torch.flatten, "(6144,)"),
        (lambda w: w[:0], "(0, 64)"),
        (lambda w: w[:, :0], "(96, 0)"),
        (lambda w: w[None], "(1, 96, 64)"),
    ],
    ids=["a vector", "flat", "no rows", "no columns", "stacked"],
)
def test_shapes_that_are_no_matrix(
    convert: Convert, broken: Path, change: Callable[[torch.Tensor], torch.Tensor], shape: str
) -> None:
    damage(broken, "model.layers.1.mlp.up_proj.weight", change)
    code, error = convert(broken, target="bitsandbytes:nf4g32")
    assert code == 2 and f"`model.layers.1.mlp.up_proj.weight` has shape {shape}" in error
    assert "the config says (96, 64)" in error and "check that config.json belongs to these weights" in error


def test_empty_norms(convert: Convert, broken: Path) -> None:
    damage(broken, "model.layers.0.input_layernorm.weight", lambda norm: norm[:0])
    code, error = convert(broken, target="compressed_tensors:fp8")
    assert code == 2 and "`model.layers.0.input_layernorm.weight` has shape (0,)" in error


@pytest.mark.parametrize(
    ("target", "multiple", "remedy"),
    [
        ("gptq:w4g128", "64, not a multiple of 128", "use group_size 64"),
        ("compressed_tensors:w4g128", "64, not a multiple of 128", "use group_size 64"),
        ("compressed_tensors:fp8_block", "64, not a multiple of 128", "use fp8 with one scale per row"),
        ("bitsandbytes:nf4", "96, not a multiple of 64", "use nf4g32"),
        ("hqq:w4g64", "96, not a multiple of 64", "use group_size 32"),
    ],
)
def test_indivisible_group(
    convert: Convert, checkpoint: Path, target: str, multiple: str, remedy: str
) -> None:
    code, error = convert(checkpoint, target=target)
    assert code == 2 and multiple in error and remedy in error and "keep the weight with a rule" in error
    assert "`model.layers.0." in error


def test_unknown_key(convert: Convert, checkpoint: Path) -> None:
    code, error = convert(checkpoint, target="gptq:w4g32@dmap=0.1")
    assert code == 2 and "did you mean 'damp'" in error


def test_calibration_text_too_short(convert: Convert, checkpoint: Path) -> None:
    code, error = convert(checkpoint, "--calib-rows", "1000")
    assert code == 2 and "2,000 tokens" in error and "32,000" in error


def test_evaluation_text_that_was_calibrated_on(
    convert: Convert, checkpoint: Path, calibration_text: Path
) -> None:
    code, error = convert(checkpoint, "--eval", str(calibration_text))
    assert code == 2 and "calibration" in error


def test_rule_that_matches_nothing(convert: Convert, checkpoint: Path) -> None:
    code, error = convert(checkpoint, "--rule", "*.attention.*=keep")
    assert code == 2 and "matches no weight" in error


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("awq", "says that it is quantized (awq), but none of its tensors is"),
        ("compressed-tensors", "says that it is quantized (compressed_tensors), but none of its tensors is"),
        ("fp8", "the quantization method 'fp8' is not read by quantkit"),
    ],
)
def test_sources_quantized_in_name_or_by_an_unknown_method(
    convert: Convert, broken: Path, method: str, what: str
) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}})
    )
    code, error = convert(broken, target="bitsandbytes:nf4g32")
    assert code == 2 and what in error


@pytest.mark.parametrize("target", ["hqq:w4g32", "bitsandbytes:nf4g32@method=rtn"])
def test_what_was_made_is_a_source_with_a_warning(
    convert: Convert, checkpoint: Path, tmp_path: Path, target: str
) -> None:
    assert (
        convert(checkpoint, "--no-eval", target=f"{target}{',' if '@' in target else '@'}name=made")[0] == 0
    )
    made = (tmp_path / "out").rename(tmp_path / "before") / "made"
    code, shown = convert(made, "--no-eval", target="gptq:w4g32@method=rtn")
    assert code == 0 and "`" + str(made) + "` is already quantized (" in shown


def test_cuda_that_is_not_there(convert: Convert, checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, error = convert(checkpoint, "--device", "cuda:3")
    assert code == 2 and "cuda:3" in error


def test_memory_that_is_not_allowed(convert: Convert, checkpoint: Path) -> None:
    code, error = convert(checkpoint, "--max-memory", "100MB")
    assert code == 2 and "--max-memory" in error


LIMITED = """
import resource, sys
from quantkit.cli.main import run
import torch, transformers
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "limit", [20_000, 90_000], ids=["while streams are written", "while files are written"]
)
def test_full_disk_loses_nothing(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path, limit: int
) -> None:
    """A limit on the size of files stands in for a full disk; without it the same command continues."""
    arguments = [
        "convert",
        str(checkpoint),
        "--to",
        "gptq:w4g32",
        "-o",
        str(tmp_path / "out"),
        "--progress",
        "off",
    ]
    arguments += ["--calib", str(calibration_text), "--calib-rows", "8", "--calib-length", "32"]
    arguments += ["--eval", str(evaluation_text), "--eval-style", "gptq-32", "--eval-chunks", "4"]
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == BudgetError.exit_code, full.stderr
    assert "still needed" in full.stderr and "Traceback" not in full.stderr
    assert not (tmp_path / "out" / "gptq-w4g32").exists()
    assert run(arguments) == 0
    assert "gptq-w4g32/model.safetensors" in sums(tmp_path / "out")
