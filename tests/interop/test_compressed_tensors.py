"""Transformers with the compressed-tensors package loads what quantkit writes.

From a float32 source, scales are float32 and the engine computes scale · code as we do: logits agree
but for the order of sums. From a bfloat16 source the default path does the same with bfloat16 scales;
`dequantize=True` and fused experts are held in bfloat16, one rounding of every weight (2⁻⁹ relative).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import Rule
from quantkit.run.report import Report
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, load, measure, perplexity, quantize

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
def test_perplexity_is_what_the_report_says(
    scheme: str, llama: Source, results: tuple[Path, Report]
) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == scheme)
    assert perplexity(load(results[0] / scheme), llama) == pytest.approx(told.target.value, rel=1e-3)
    assert perplexity(load(llama.folder), llama) == pytest.approx(told.source.value, rel=1e-3)


def test_bfloat16_source(source: Make, tmp_path: Path) -> None:
    made = source("llama", torch.bfloat16, **WIDE)
    quantize(made, tmp_path, [f"{FORMAT}:w4g128,w4g128_asym"])
    plain, asym = tmp_path / f"{FORMAT}-w4g128", tmp_path / f"{FORMAT}-w4g128_asym"
    measure(load(plain), plain, FORMAT, made).check(EXACT)
    measure(load(asym, **_dequantize()), asym, FORMAT, made, stored=torch.bfloat16).check(EXACT)


def test_mixed_widths_and_kept_weights(llama: Source, tmp_path: Path) -> None:
    rules = [
        Rule("*.down_proj", scheme="w8g128"),
        Rule("*.o_proj", scheme="w8"),
        Rule("*.q_proj", keep=True, blocks="0"),
    ]
    quantize(llama, tmp_path, [f"{FORMAT}:w4g32"], rules)
    folder = tmp_path / f"{FORMAT}-w4g32"
    model = load(folder)
    kept = load(llama.folder).get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight, kept)
    measure(model, folder, FORMAT, llama).check(EXACT)


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
    made = source(family, **changes)
    quantize(made, tmp_path, [f"{FORMAT}:w4g32"])
    folder = tmp_path / f"{FORMAT}-w4g32"
    measure(load(folder), folder, FORMAT, made).check(EXACT)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dequantized", [False, True], ids=["", "dequantized"])
def test_experts(family: str, dequantized: bool, source: Make, tmp_path: Path) -> None:
    made = source(family)
    quantize(made, tmp_path, [f"{FORMAT}:w4g16"])
    folder = tmp_path / f"{FORMAT}-w4g16"
    model = load(folder, **(_dequantize() if dequantized else {}))
    measure(model, folder, FORMAT, made).check(EXACT)


def test_experts_of_other_width_than_attention(source: Make, tmp_path: Path) -> None:
    made = source("qwen3_moe")
    rules = [Rule("*.self_attn.*", scheme="w8"), Rule("*.k_proj", keep=True)]
    quantize(made, tmp_path, [f"{FORMAT}:w4g32"], rules[::-1])
    folder = tmp_path / f"{FORMAT}-w4g32"
    measure(load(folder), folder, FORMAT, made).check(EXACT)
