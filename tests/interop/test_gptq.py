"""Transformers through gptqmodel, and gptqmodel itself, load what quantkit writes.

The engine dequantizes to float16, the dtype of the scales, before it multiplies in float32: our
weights are rounded the same way for the comparison, and logits then agree but for the order of sums.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quantkit import Rule
from quantkit.run.report import Report
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, distance, engine_warnings, load, make, measure, perplexity, quantize

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        find_spec("gptqmodel") is None or find_spec("optimum") is None, reason="needs quantkit[gptq]"
    ),
    # gptqmodel leaves temporary folders to the collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

FORMAT = "gptq"
Make = Callable[..., Source]
# measured: 0, and 6e-4 with biases, which the engine rounds to float16
TOLERANCE = 2e-3
TARGETS = {
    "w2g64": "method=gptq",
    "w3g32": "method=rtn",
    "w3g128": "method=gptq",
    "w4": "method=gptq",
    "w4g128": "method=gptq",
    "w4g32": "act_order=free",
    "w4g64": "act_order=group_aware",
    "w8g128": "method=rtn",
    "w8": "method=rtn",
    "w2g32_asym": "method=gptq",
    "w3g64_asym": "method=rtn",
    "w4g128_asym": "method=gptq",
    "w8g128_asym": "method=rtn",
    "w4g128_asym_free": "act_order=free",
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
    out = tmp_path_factory.mktemp("gptq")
    targets = [f"{FORMAT}:{name.removesuffix('_free')}@{how},name={name}" for name, how in TARGETS.items()]
    return out, quantize(llama, out, targets)


def read(folder: Path, bits: int) -> PreTrainedModel:
    """The way of transformers, on its slow and plain kernel: the automatic one compiles for minutes."""
    from transformers import GPTQConfig

    return load(folder, quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"))


def bits_of(name: str) -> int:
    return int(name[1])


@pytest.mark.parametrize("name", TARGETS)
def test_loads_and_computes_our_weights(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / name
    found = measure(read(folder, bits_of(name)), folder, FORMAT, llama, stored=torch.float16)
    found.check(TOLERANCE)


@pytest.mark.parametrize("name", ["w4g128", "w3g128", "w4g32", "w4g128_asym"])
def test_perplexity_is_what_the_report_says(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == name)
    found = perplexity(read(results[0] / name, bits_of(name)), llama)
    assert found == pytest.approx(told.target.value, rel=1e-3)


def check(made: Source, out: Path, rules: Sequence[Rule] = ()) -> PreTrainedModel:
    """Convert to w4g32; the engine must load it, as quantkit says, and compute our weights."""
    folder, engines = make(made, out, f"{FORMAT}:w4g32", rules)
    assert "transformers+gptqmodel" in engines
    model = read(folder, 4)
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
        ("qwen3", {**WIDE, "tie_word_embeddings": True}),
        ("gemma2", WIDE),
        ("phi3", {}),
        ("opt", {}),
        ("starcoder2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_architectures(family: str, changes: dict[str, Any], source: Make, tmp_path: Path) -> None:
    check(source(family, **changes), tmp_path)


def test_bfloat16_source(source: Make, tmp_path: Path) -> None:
    check(source("llama", torch.bfloat16, **WIDE), tmp_path)


MIXED = [Rule("*.down_proj", scheme="w8g128"), Rule("*.v_proj", keep=True), Rule("*.q_proj", bits=3)]
# name → family, target, rules
NATIVE: dict[str, tuple[str, str, list[Rule]]] = {
    "w4g128": ("llama", "w4g128", []),
    "w3g128": ("llama", "w3g128", []),
    "free order": ("llama", "w4g32@act_order=free", []),
    "asymmetric": ("llama", "w4g64_asym", []),
    "mixed widths": ("llama", "w4g32@name=mixed", MIXED),
    "Conv1D": ("gpt2", "w4g32@name=gpt2", []),
    "experts": ("qwen3_moe", "w4g32@name=experts", []),
}
# measured: 4e-3; part of its arithmetic stays in float16
NATIVE_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Native:
    """A folder, the engines that quantkit says will load it, its source and what gptqmodel computes."""

    folder: Path
    engines: list[str]
    source: Source
    logits: torch.Tensor


@pytest.fixture(scope="module")
def native(source: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Native]:
    """Everything that gptqmodel itself is to load, in one process of its own.

    Sources are float16: what is not quantized then passes through it unchanged.
    """
    out = tmp_path_factory.mktemp("native")
    made = {}
    for name, (family, target, rules) in NATIVE.items():
        sizes = WIDE if family == "llama" else {}
        of = source(family, torch.float16, **sizes)
        made[name] = (*make(of, out, f"{FORMAT}:{target}", rules), of)
    script = Path(__file__).with_name("native.py")
    folders = [str(folder) for folder, _, _ in made.values()]
    command = [sys.executable, str(script), str(out / "logits"), *folders]
    ended = subprocess.run(command, cwd=script.parents[2], env=_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = load_file(out / "logits")
    return {name: Native(folder, e, of, found[folder.name]) for name, (folder, e, of) in made.items()}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize("name", NATIVE)
def test_gptqmodel_itself(name: str, native: dict[str, Native]) -> None:
    case = native[name]
    assert "gptqmodel" in case.engines
    found = distance(case.logits, case.folder, FORMAT, case.source, stored=torch.float16)
    found.check(NATIVE_TOLERANCE)


@pytest.mark.parametrize("name", ["mixed widths", "Conv1D", "experts"])
def test_what_transformers_does_not_read_is_announced(name: str, native: dict[str, Native]) -> None:
    """The day it learns to read one of these, this fails and the announcement can go."""
    case = native[name]
    assert "transformers+gptqmodel" not in case.engines
    with pytest.raises((RuntimeError, AttributeError, AssertionError)):
        found = measure(read(case.folder, 4), case.folder, FORMAT, case.source, stored=torch.float16)
        found.check(TOLERANCE)
