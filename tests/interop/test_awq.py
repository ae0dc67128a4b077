"""Transformers through gptqmodel loads what quantkit writes as AWQ.

The engine dequantizes to float16, the dtype of the scales, and multiplies in float16 too: logits agree with
ours but for the rounding of inputs, weights and sums to it.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from quantkit import Rule
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import awq
from quantkit.formats.awq import activations
from quantkit.run.report import Report
from quantkit.tensors import dequantize
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, engine_warnings, load, logits, make, measure, perplexity, quantize

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs quantkit[awq]"),
    # gptqmodel leaves temporary folders to the collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

FORMAT = "awq"
PARTS = ("qweight", "qzeros", "scales")
Make = Callable[..., Source]
# measured: at most 7e-3
TOLERANCE = 2e-2
TARGETS = {
    "w4g16_asym": "method=rtn",
    "w4g32_asym": "method=gptq",
    "w4g64_asym": "method=rtn",
    "w4g128_asym": "method=gptq",
    "w4_asym": "method=gptq",
    "w4g16": "method=gptq",
    "w4g32": "method=gptq",
    "w4g64": "method=gptq",
    "w4g128": "method=rtn",
    "w4": "method=gptq",
}


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """No compiler, and few workers; both are read when gptqmodel is imported."""
    import torch._dynamo

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("GPTQMODEL_CPU_WORKERS", "2")
        yield
        with engine_warnings():
            gc.collect()


@pytest.fixture(scope="module")
def llama(source: Make) -> Source:
    return source("llama", **WIDE)


@pytest.fixture(scope="module")
def results(llama: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All schemes of one source, made in one sweep."""
    out = tmp_path_factory.mktemp("awq")
    return out, quantize(llama, out, [f"{FORMAT}:{name}@{how},name={name}" for name, how in TARGETS.items()])


def read(folder: Path) -> PreTrainedModel:
    """The way of transformers, on its slow and plain kernel: the automatic one compiles for minutes."""
    from transformers import AwqConfig

    return load(folder, quantization_config=AwqConfig(backend="torch_awq"))


@pytest.mark.parametrize("name", TARGETS)
def test_loads_and_computes_our_weights(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / name
    measure(read(folder), folder, FORMAT, llama, stored=torch.float16).check(TOLERANCE)


@pytest.mark.parametrize("name", ["w4g128_asym", "w4g32", "w4"])
def test_its_weights_are_ours_to_the_bit(name: str, results: tuple[Path, Report]) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    folder = results[0] / name
    checkpoint, config = Checkpoint.open(folder), json.loads((folder / "config.json").read_text("utf-8"))
    found = 0
    for module, linear in read(folder).named_modules():
        if type(linear).__name__ != "AwqTorchLinear":
            continue
        parts = {f"{module}.{part}": checkpoint.read(f"{module}.{part}") for part in PARTS}
        ours = awq.FORMAT.decode(f"{module}.weight", parts, config["quantization_config"])
        stored = [getattr(linear, part) for part in PARTS]
        theirs = dequantize_gemm(*stored, bits=4, group_size=linear.group_size)
        assert torch.equal(theirs.T, dequantize(ours.weight).half()), module
        found += 1
    assert found == 14


def test_negative_scales(llama: Source, results: tuple[Path, Report], tmp_path: Path) -> None:
    """s · (q − z) = −s · ((15 − q) − (15 − z)): every field of every word inverted gives the same model."""
    folder = tmp_path / "mirrored"
    shutil.copytree(results[0] / "w4g32_asym", folder)
    (file,) = folder.glob("*.safetensors")
    turn = {"qweight": torch.bitwise_not, "qzeros": torch.bitwise_not, "scales": torch.neg}
    tensors = load_file(file)
    save_file({name: turn.get(name.rpartition(".")[2], torch.clone)(t) for name, t in tensors.items()}, file)
    model = read(folder)
    assert torch.equal(logits(model), logits(read(results[0] / "w4g32_asym")))
    measure(model, folder, FORMAT, llama, stored=torch.float16).check(TOLERANCE)


@pytest.mark.parametrize("name", ["w4g128_asym", "w4g128"])
def test_perplexity_is_what_the_report_says(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == name)
    assert perplexity(read(results[0] / name), llama) == pytest.approx(told.target.value, rel=1e-3)


def test_models_that_transformers_divides_activations_of() -> None:
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    theirs = {
        model: (found["layer_before_act"], found["act"]) for model, found in AWQ_SCALES_MAPPINGS.items()
    }
    assert theirs == activations.DIVIDED


def check(made: Source, out: Path, rules: Sequence[Rule] = ()) -> PreTrainedModel:
    """Convert; the engine must load it, as quantkit says, and compute our weights."""
    folder, engines = make(made, out, f"{FORMAT}:w4g32_asym", rules)
    assert "transformers+gptqmodel" in engines
    model = read(folder)
    measure(model, folder, FORMAT, made, stored=torch.float16).check(TOLERANCE)
    return model


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ([Rule("*.v_proj", keep=True)], 2),
        ([Rule("*.down_proj", keep=True, blocks="0")], 1),
        ([Rule("*.o_proj", keep=True), Rule("*.mlp.*", keep=True, blocks="-1")], 5),
    ],
    ids=["everywhere", "in one block", "both"],
)
def test_kept_weights(rules: list[Rule], kept: int, llama: Source, tmp_path: Path) -> None:
    model = check(llama, tmp_path, rules)
    plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert len(plain) == kept + 1, "the kept weights and the head"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {**WIDE, "tie_word_embeddings": True}),
        ("gemma2", WIDE),
        ("phi3", {}),
        ("opt", {}),  # tied head, and projections around the blocks that stay float
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_architectures(family: str, changes: dict[str, Any], source: Make, tmp_path: Path) -> None:
    check(source(family, **changes), tmp_path)


def test_experts_that_are_kept(source: Make, tmp_path: Path) -> None:
    check(source("mixtral"), tmp_path, [Rule("*.experts.*", keep=True)])


def test_bfloat16_source(source: Make, tmp_path: Path) -> None:
    check(source("llama", torch.bfloat16, **WIDE), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_what_transformers_does_not_read_is_announced(family: str, source: Make, tmp_path: Path) -> None:
    """The day it learns to read one of these, this fails and the announcement can go."""
    made = source(family)
    folder, engines = make(made, tmp_path, f"{FORMAT}:w4g32_asym")
    assert "transformers+gptqmodel" not in engines and "vLLM" in engines
    with pytest.raises((AssertionError, UnboundLocalError)):
        measure(read(folder), folder, FORMAT, made, stored=torch.float16).check(TOLERANCE)


@pytest.mark.parametrize("rules", [(), [Rule("*.c_fc", keep=True, blocks="0")]], ids=["", "one kept"])
def test_models_whose_activations_are_divided(rules: Sequence[Rule], source: Make, tmp_path: Path) -> None:
    model = check(source("starcoder2"), tmp_path, rules)
    divided = [module for module in model.modules() if type(module).__name__ == "ScaledActivation"]
    assert len(divided) == 2 and all(bool((module.scales == 1).all()) for module in divided)
