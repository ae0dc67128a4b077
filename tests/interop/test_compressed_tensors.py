"""Transformers with the compressed-tensors package loads what quantkit writes.

From a float32 source, scales are float32 and the engine computes scale · code as we do: logits agree
but for the order of sums. From a bfloat16 source the default path does the same with bfloat16 scales;
`dequantize=True` and fused experts are held in bfloat16, one rounding of every weight (2⁻⁹ relative).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantkit import Rule, plan
from quantkit.run.report import Report
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, load, make, measure, perplexity, quantize, recipe_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs quantkit[compressed-tensors]"),
]

FORMAT = "compressed_tensors"
Make = Callable[..., Source]
# measured: 0; the order of sums may differ between builds of torch
EXACT = 1e-4
# scheme → method. Calibrated and data-free results take the same paths in the engine.
TARGETS = {
    "w2g64": "gptq",
    "w3g128": "gptq",
    "w4g128": "gptq",
    "w4g32": "gptq",
    "w4": "rtn",
    "w5g64": "gptq",
    "w8": "gptq",
    "w8g128": "rtn",
    "w8_tensor": "rtn",
}


def _dequantize() -> dict[str, Any]:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.fixture(scope="module")
def llama(source: Make) -> Source:
    return source("llama", **WIDE)


@pytest.fixture(scope="module")
def results(llama: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All schemes of one source, made in one sweep."""
    out = tmp_path_factory.mktemp("compressed-tensors")
    targets = [f"{FORMAT}:{scheme}@method={method},name={scheme}" for scheme, method in TARGETS.items()]
    return out, quantize(llama, out, [*targets, f"{FORMAT}:w4g128_asym@name=w4g128_asym"])


@pytest.mark.parametrize("scheme", TARGETS)
def test_loads_and_computes_our_weights(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / scheme
    measure(load(folder), folder, FORMAT, llama).check(EXACT)


@pytest.mark.parametrize("scheme", ["w4g128", "w4g128_asym", "w8"])
def test_loads_dequantized(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / scheme
    measure(load(folder, **_dequantize()), folder, FORMAT, llama).check(EXACT)


@pytest.mark.parametrize("scheme", ["w4g128", "w3g128", "w8"])
def test_perplexity_is_what_the_report_says(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == scheme)
    assert perplexity(load(results[0] / scheme), llama) == pytest.approx(told.target.value, rel=1e-3)
    assert perplexity(load(llama.folder), llama) == pytest.approx(told.source.value, rel=1e-3)


def check(made: Source, out: Path, target: str, rules: Sequence[Rule] = ()) -> PreTrainedModel:
    """Convert; the engine must load it, as quantkit says, and compute our weights."""
    folder, engines = make(made, out, f"{FORMAT}:{target}", rules)
    assert "transformers" in engines
    model = load(folder)
    measure(model, folder, FORMAT, made).check(EXACT)
    return model


def test_bfloat16_source(source: Make, tmp_path: Path) -> None:
    made = source("llama", torch.bfloat16, **WIDE)
    check(made, tmp_path, "w4g128")
    asym, _ = make(made, tmp_path, f"{FORMAT}:w4g128_asym")
    measure(load(asym, **_dequantize()), asym, FORMAT, made, stored=torch.bfloat16).check(EXACT)


def test_asymmetric_files_need_dequantize_as_the_plan_says(
    llama: Source, results: tuple[Path, Report], tmp_path: Path
) -> None:
    (told,) = plan(recipe_of(llama, tmp_path, [f"{FORMAT}:w4g128_asym"])).to_json()["targets"]
    assert any("dequantize=True" in note for note in told["notes"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(results[0] / "w4g128_asym")


def test_mixed_widths_and_kept_weights(llama: Source, tmp_path: Path) -> None:
    rules = [
        Rule("*.down_proj", scheme="w8g128"),
        Rule("*.o_proj", scheme="w8"),
        Rule("*.q_proj", keep=True, blocks="0"),
    ]
    model = check(llama, tmp_path, "w4g32", rules)
    kept = load(llama.folder).get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight, kept)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", WIDE),
        ("qwen3", {**WIDE, "tie_word_embeddings": True}),
        ("gemma2", WIDE),
        ("phi3", {}),
        ("opt", {}),  # tied head, and projections around the blocks that stay float
        ("cohere", {}),
        ("starcoder2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "tied" if "tie_word_embeddings" in value else "",
)
def test_architectures(family: str, changes: dict[str, Any], source: Make, tmp_path: Path) -> None:
    check(source(family, **changes), tmp_path, "w4g32")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts(family: str, source: Make, tmp_path: Path) -> None:
    made = source(family)
    check(made, tmp_path, "w4g16")
    folder = tmp_path / f"{FORMAT}-w4g16"
    measure(load(folder, **_dequantize()), folder, FORMAT, made).check(EXACT)


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("*.k_proj", keep=True), Rule("*.self_attn.*", scheme="w8")],
        [Rule("*.self_attn.*", scheme="w8g32")],
        [Rule("*.experts.*", scheme="w3g32")],
        [Rule("*.self_attn.*", keep=True)],
    ],
    ids=["attention w8 and kept", "attention w8g32", "experts w3", "attention kept"],
)
def test_experts_beside_other_widths(rules: list[Rule], source: Make, tmp_path: Path) -> None:
    check(source("qwen3_moe"), tmp_path, "w4g32", rules)


def test_stacked_experts_can_be_kept(source: Make, tmp_path: Path) -> None:
    check(source("gpt_oss"), tmp_path, "w4g32", [Rule("*.experts.*", keep=True)])


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("*.experts.*", keep=True)],
        [Rule("*.experts.*", scheme="w8")],
        [Rule("*.experts.*.down_proj", scheme="w8g32")],
        [Rule("*.experts.*", scheme="w4g32_asym")],
    ],
    ids=["kept", "w8", "two widths", "asymmetric"],
)
def test_experts_that_no_reader_takes_are_announced(rules: list[Rule], source: Make, tmp_path: Path) -> None:
    """The day an engine learns to read one of these, this fails and the announcement can go."""
    made = source("qwen3_moe")
    folder, engines = make(made, tmp_path, f"{FORMAT}:w4g32", rules)
    assert "transformers" not in engines
    with pytest.raises((RuntimeError, AssertionError)):
        measure(load(folder, **_dequantize()), folder, FORMAT, made).check(EXACT)
