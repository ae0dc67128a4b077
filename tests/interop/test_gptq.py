"""Transformers through gptqmodel, and gptqmodel itself, load what quantkit writes.

The engine dequantizes to float16, the dtype of the scales, before it multiplies in float32: our
weights are rounded the same way for the comparison, and logits then agree but for the order of sums.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantkit import Rule
from quantkit.run.report import Report
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, engine_warnings, load, make, measure, perplexity, quantize

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
# measured: 0 to 3e-5
TOLERANCE = 1e-3
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
        ("gpt2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_architectures(family: str, changes: dict[str, Any], source: Make, tmp_path: Path) -> None:
    check(source(family, **changes), tmp_path)


def test_bfloat16_source(source: Make, tmp_path: Path) -> None:
    check(source("llama", torch.bfloat16, **WIDE), tmp_path)


def native(folder: Path) -> Any:
    """gptqmodel's own loader, which also reads what transformers ignores; it insists on float16."""
    with engine_warnings():
        from gptqmodel import BACKEND, GPTQModel

        loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return loaded.model.float()


@pytest.fixture(scope="module")
def half(source: Make) -> Source:
    """A float16 source: what is not quantized then passes through gptqmodel unchanged."""
    return source("llama", torch.float16, **WIDE)


@pytest.mark.parametrize("target", ["w4g128", "w3g128", "w4g32@act_order=free", "w4g64_asym"])
def test_gptqmodel_itself(target: str, half: Source, tmp_path: Path) -> None:
    folder, engines = make(half, tmp_path, f"{FORMAT}:{target}")
    assert "gptqmodel" in engines
    measure(native(folder), folder, FORMAT, half, stored=torch.float16).check(TOLERANCE)


def test_only_gptqmodel_reads_mixed_widths(half: Source, tmp_path: Path) -> None:
    rules = [Rule("*.down_proj", scheme="w8g128"), Rule("*.v_proj", keep=True), Rule("*.q_proj", bits=3)]
    folder, engines = make(half, tmp_path, f"{FORMAT}:w4g32", rules)
    assert "gptqmodel" in engines and "transformers+gptqmodel" not in engines
    measure(native(folder), folder, FORMAT, half, stored=torch.float16).check(TOLERANCE)
    with pytest.raises((RuntimeError, AssertionError)):
        measure(read(folder, 4), folder, FORMAT, half, stored=torch.float16).check(TOLERANCE)


def test_transformers_does_not_read_experts_as_the_plan_says(source: Make, tmp_path: Path) -> None:
    made = source("qwen3_moe")
    folder, engines = make(made, tmp_path, f"{FORMAT}:w4g32")
    assert "transformers+gptqmodel" not in engines
    with pytest.raises(AssertionError):
        read(folder, 4)
