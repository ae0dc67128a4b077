"""A small trained model, where a wrong weight shows as perplexity: the engine must get the report's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.interop.engines import Source, load, measure, perplexity, quantize

pytestmark = pytest.mark.interop

ENGINES = {"compressed_tensors": ("compressed_tensors",), "gptq": ("gptqmodel", "optimum")}


@pytest.mark.parametrize("format_name", ENGINES)
def test_perplexity_in_the_engine(format_name: str, shared: Path, tmp_path: Path) -> None:
    if any(find_spec(package) is None for package in ENGINES[format_name]):
        pytest.skip(f"needs quantkit[{format_name.replace('_', '-')}]")
    text = shared / "data" / "wikitext-2"
    source = Source(shared / "models" / "wiki-llama-7m", text / "wiki.valid.tokens", text / "wiki.test.raw")
    if not source.folder.is_dir() or not source.text.is_file():
        pytest.skip("needs models/wiki-llama-7m and data/wikitext-2 in ../shared")
    (target,) = quantize(source, tmp_path, [f"{format_name}:w3g128@method=rtn"]).targets
    (told,) = target.quality
    folder = tmp_path / target.folder
    options = {}
    if format_name == "gptq":
        from transformers import GPTQConfig

        options["quantization_config"] = GPTQConfig(bits=3, backend="gptq_torch")
    model = load(folder, **options)
    assert abs(told.ratio.value - 1) > 0.01
    assert perplexity(model, source) == pytest.approx(told.target.value, rel=1e-3)
    stored = torch.float16 if format_name == "gptq" else torch.float32
    measure(model, folder, format_name, source, stored=stored).check(1e-3)
