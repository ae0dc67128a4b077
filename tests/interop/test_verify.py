"""`verify` with the real engines: sound results agree, and what an engine reads otherwise is found.

Every engine runs in a process of its own, a few seconds each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit import Rule
from quantkit.run.engine_check import check_engine
from quantkit.run.streams import sha256_file
from quantkit.run.verification import Verification
from tests.models import save_tiny

pytestmark = pytest.mark.interop

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
GPTQ, LLAMA = ("gptqmodel", "optimum"), ("llama_cpp",)
# target → packages, engine, and the largest KL; measured on the embedded model
TARGETS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "gptq:w4g128@method=rtn": (GPTQ, "transformers+gptqmodel", 1e-5),
    "gptq:w4g32@act_order=free": (GPTQ, "transformers+gptqmodel", 1e-5),
    "awq:w4g128@method=rtn": (GPTQ, "transformers+gptqmodel", 1e-5),
    "bitsandbytes:nf4@method=rtn": (("bitsandbytes",), "transformers", 5e-4),
    "bitsandbytes:int8": (("bitsandbytes",), "transformers", 2e-3),
    "hqq:w4g64": (("hqq",), "hqq", 1e-6),
    "compressed_tensors:w4g128_asym@method=rtn": (("compressed_tensors",), "transformers", 1e-4),
    "compressed_tensors:w8a8": (("compressed_tensors",), "transformers", 1e-6),
    "compressed_tensors:nvfp4@method=rtn": (("compressed_tensors",), "transformers", 1e-4),
    "gguf:f16": (LLAMA, "llama.cpp", 1e-5),
    "gguf:q4_k_m@method=rtn": (LLAMA, "llama.cpp", 2e-3),
    "gguf:iq2_xs": (LLAMA, "llama.cpp", 2e-3),
}


def need(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as every target, and as GPTQ of mixed widths."""
    out = tmp_path_factory.mktemp("made")
    mixed = [Rule("*.down_proj", scheme="w8g128")]
    convert(out, TARGETS)
    convert(out / "mixed", ["gptq:w4g128@method=rtn,name=gptq"], mixed)
    return out


def convert(out: Path, targets: Iterable[str], rules: Sequence[Rule] = (), source: str = "demo") -> None:
    asked = quantkit.Recipe(
        source=source,
        targets=tuple(t for text in targets for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        calibration=quantkit.Calibration(set="embedded", rows=8, length=128),
        eval=quantkit.Eval(enabled=False),
        rules=tuple(rules),
        engine_check=False,
    )
    quantkit.convert(asked)


def folder_of(made: Path, target: str) -> Path:
    return made / quantkit.parse_targets(target)[0].name


@pytest.mark.parametrize("target", TARGETS)
def test_engines_agree(target: str, made: Path) -> None:
    packages, engine, limit = TARGETS[target]
    need(packages)
    found = quantkit.verify(folder_of(made, target), against="demo")
    assert found.problems == [] and found.checks["coverage"]
    (check,) = found.engines
    assert (check.engine, check.problem, check.device, check.tokens) == (engine, None, "cpu", 128)
    assert check.version and check.kl_mean is not None and check.kl_mean < limit
    assert check.top1_agreement is not None and check.top1_agreement > 0.95
    assert check.peak_bytes is not None and 2e6 < check.peak_bytes < 1e9


def changed(folder: Path, copy: Path, change: Change) -> Path:
    """A copy with other tensors or another config, whose sums were written anew."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    tensors, config = load_file(file), json.loads((copy / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, file, {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    manifest = json.loads((copy / "quantkit.json").read_text())
    for name in manifest["files"]:
        path = copy / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (copy / "quantkit.json").write_text(json.dumps(manifest))
    return copy


def problem_of(found: Verification) -> str:
    """The only one, which only the engine saw."""
    (problem,) = found.problems
    assert found.checks["weights"] and len(found.engines) == 1
    return problem


def test_a_damaged_scale_is_read_alike_and_seen_beside_the_source(made: Path, tmp_path: Path) -> None:
    need(("compressed_tensors",))

    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors["model.layers.2.self_attn.k_proj.weight_scale"] *= -1

    folder = changed(folder_of(made, "compressed_tensors:w8a8"), tmp_path / "damaged", damage)
    alone = quantkit.verify(folder)
    assert alone.sound and alone.engines[0].problem is None, "both say what is written there"
    beside = quantkit.verify(folder, against="demo", engine=False)
    assert "`model.layers.2.self_attn.k_proj.weight` has nothing in common" in beside.problems[0]


@pytest.mark.parametrize(
    ("target", "packages"),
    [("compressed_tensors:w8a8", ("compressed_tensors",)), ("awq:w4g128@method=rtn", GPTQ)],
)
def test_a_config_that_the_engine_reads_otherwise(
    target: str, packages: tuple[str, ...], made: Path, tmp_path: Path
) -> None:
    """A weight that the config excepts: quantkit finds codes there and says so, the engine wants floats."""
    need(packages)

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        stated = config["quantization_config"]
        key = "ignore" if "ignore" in stated else "modules_to_not_convert"
        stated[key] = [*(stated[key] or []), "model.layers.2.self_attn.k_proj"]

    folder = changed(folder_of(made, target), tmp_path / "excepted", change)
    (problem,) = quantkit.verify(folder).problems
    assert "names 'model.layers.2.self_attn.k_proj', but" in problem
    (check,) = check_engine(folder).checks
    assert check.problem is not None and "Transformers found tensors that" in check.problem


def test_weights_that_the_engine_decodes_otherwise(tmp_path: Path) -> None:
    """Transformers forgets one scale of nvfp4 experts: quantkit.json warns of it, else only logits tell."""
    need(("compressed_tensors",))
    source = save_tiny("qwen3_moe", tmp_path / "source", hidden_size=128, moe_intermediate_size=64)
    convert(tmp_path, ["compressed_tensors:nvfp4@method=rtn,name=made"], source=str(source))
    known = quantkit.verify(tmp_path / "made")
    assert known.sound and not known.engines and any("as quantkit.json says" in n for n in known.notes)
    (tmp_path / "made" / "quantkit.json").unlink()
    assert "computes something else than the files say" in problem_of(quantkit.verify(tmp_path / "made"))


def test_widths_that_transformers_ignores(made: Path, tmp_path: Path) -> None:
    """Of GPTQ weights of several widths it reads all as the first; quantkit.json names another engine."""
    need(GPTQ)
    folder = shutil.copytree(made / "mixed" / "gptq", tmp_path / "mixed")
    known = quantkit.verify(folder)
    assert known.sound and known.engines[0].engine == "gptqmodel"
    (folder / "quantkit.json").unlink()
    found = quantkit.verify(folder)
    assert found.engines[0].engine == "transformers+gptqmodel" and not found.sound
