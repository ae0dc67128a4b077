"""Transformers with the compressed-tensors package loads fp8, mxfp4, nvfp4, rounded inputs and caches.

From a float32 source the engine computes scale · code of fp8 as we do: logits agree but for the order of
sums. It keeps 4-bit floats in bfloat16. Inputs, keys and values are rounded on its default path, and not
with `dequantize=True`, which also leaves the scales of static inputs and caches in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit import Rule
from quantkit.formats.compressed_tensors import parse
from quantkit.numerics.inputs import InputRounding
from quantkit.run.report import Report
from tests.interop.conftest import WIDE
from tests.interop.engines import (
    Source,
    engine_warnings,
    load,
    logits,
    make,
    measure,
    ours,
    perplexity,
    quantize,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs quantkit[compressed-tensors]"),
]

FORMAT = "compressed_tensors"
Make = Callable[..., Source]
# measured: 0; the order of sums may differ between builds of torch
EXACT = 1e-4
# of perplexities; measured: 2e-7. Rounded inputs alone make 4e-5
CLOSE = 1e-5
WEIGHTS = ("fp8", "fp8_tensor", "fp8_block")
INPUTS = (
    *("w8a8", "w8a8_tensor", "w8a8_static", "fp8a8", "fp8a8_tensor", "fp8a8_static", "fp8a8_block"),
    "fp8a8_tensor_static",
)
E2M1 = ("mxfp4", "nvfp4")
CACHES = ("fp8", "int8")


def _dequantize() -> dict[str, Any]:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.fixture(scope="module")
def llama(source: Make) -> Source:
    return source("llama", **WIDE)


@pytest.fixture(scope="module")
def results(llama: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All schemes of one float32 source, made in one sweep."""
    out = tmp_path_factory.mktemp("compressed-tensors-floats")
    targets = [f"{FORMAT}:{name}@method=rtn,name={name}" for name in (*WEIGHTS, *INPUTS)]
    targets += [f"{FORMAT}:w8@method=rtn,kv_cache={dtype},name=kv_{dtype}" for dtype in CACHES]
    return out, quantize(llama, out, targets)


def reported(results: tuple[Path, Report], name: str) -> float:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == name)
    return told.target.value


@pytest.mark.parametrize("name", WEIGHTS)
def test_loads_and_computes_our_weights(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / name
    measure(load(folder), folder, FORMAT, llama).check(EXACT)
    assert perplexity(load(folder), llama) == pytest.approx(reported(results, name), rel=CLOSE)


@pytest.mark.parametrize("name", [*WEIGHTS, "w8a8", "fp8a8", "fp8a8_block"])
def test_loads_dequantized(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / name
    measure(load(folder, **_dequantize()), folder, FORMAT, llama).check(EXACT)


@contextmanager
def rounded(model: PreTrainedModel, folder: Path, name: str) -> Iterator[None]:
    """Inputs of the quantized layers of a plain model rounded as we say an engine does."""
    tensors = load_file(folder / "model.safetensors")
    scheme = replace(parse(name), scale_dtype="float32")

    def hook(rounding: InputRounding) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, given: (rounding(given[0]), *given[1:])

    hooks = []
    for key in tensors:
        module, _, part = key.rpartition(".")
        if part == "weight_scale":
            scale = tensors.get(f"{module}.input_scale")
            rounding = InputRounding(scheme, None if scale is None else float(scale))
            hooks.append(model.get_submodule(module).register_forward_pre_hook(hook(rounding)))
    assert hooks
    yield
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_rounded_as_we_say(name: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / name
    model = load(folder)
    found, unrounded = logits(model), ours(folder, FORMAT)
    plain = load(folder.with_name(f"{folder.name}-decoded-float32"))
    with rounded(plain, folder, name):
        expected = logits(plain)
    assert float((found - expected).abs().max()) <= EXACT
    assert float((found - unrounded).abs().max()) > 20 * EXACT
    assert perplexity(model, llama) == pytest.approx(reported(results, name), rel=CLOSE)


@pytest.mark.parametrize("dtype", CACHES)
def test_caches_are_rounded_as_the_report_says(
    dtype: str, llama: Source, results: tuple[Path, Report]
) -> None:
    folder = results[0] / f"kv_{dtype}"
    tensors = load_file(folder / "model.safetensors")
    scales = {key: t for key, t in tensors.items() if key.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4 and all(t.shape == (1,) and t > 0 for t in scales.values())
    model = load(folder)
    assert float((logits(model) - ours_without_cache(folder)).abs().max()) > 20 * EXACT
    assert perplexity(model, llama) == pytest.approx(reported(results, f"kv_{dtype}"), rel=CLOSE)


def ours_without_cache(folder: Path) -> Tensor:
    """The weights of `folder` alone: its scales have no place in a plain model."""
    with engine_warnings():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **_dequantize())
    return logits(model.eval())


@pytest.fixture(scope="module")
def e2m1(source: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    """mxfp4 and nvfp4 of a bfloat16 source."""
    made = source("llama", torch.bfloat16, **WIDE)
    out = tmp_path_factory.mktemp("e2m1")
    quantize(made, out, [f"{FORMAT}:{name}@method=rtn,name={name}" for name in E2M1])
    return out, made


def in_bfloat16(folder: Path) -> PreTrainedModel:
    with engine_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert bool(torch.isfinite(logits(model)).all())
    return model.eval()


def check_bfloat16(folder: Path) -> None:
    """Every parameter is our decoded one, rounded to the dtype in which the engine keeps it."""
    ours(folder, FORMAT)
    plain = load(folder.with_name(f"{folder.name}-decoded-float32"))
    found = dict(in_bfloat16(folder).named_parameters())
    for name, expected in plain.named_parameters():
        assert torch.equal(found[name], expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("name", E2M1)
def test_4_bit_floats_load_in_bfloat16(name: str, e2m1: tuple[Path, Source]) -> None:
    check_bfloat16(e2m1[0] / name)


@pytest.mark.parametrize("name", E2M1)
def test_4_bit_floats_load_dequantized_in_float32(name: str, e2m1: tuple[Path, Source]) -> None:
    folder, made = e2m1[0] / name, e2m1[1]
    measure(load(folder, **_dequantize()), folder, FORMAT, made, stored=torch.bfloat16).check(EXACT)


@pytest.mark.parametrize("name", E2M1)
def test_other_dtypes_are_announced(name: str, llama: Source, tmp_path: Path) -> None:
    """The day the engine computes them in float32, this fails and the announcement can go."""
    from quantkit import plan
    from tests.interop.engines import recipe_of

    (told,) = plan(recipe_of(llama, tmp_path, [f"{FORMAT}:{name}"])).to_json()["targets"]
    assert any("dtype=torch.bfloat16" in note for note in told["notes"])
    folder, _ = make(llama, tmp_path, f"{FORMAT}:{name}@method=rtn")
    with pytest.raises(RuntimeError, match="dtype"):
        logits(load(folder))


def check(made: Source, out: Path, target: str, rules: Sequence[Rule] = ()) -> Path:
    """Convert; the engine must load it, as quantkit says, and compute our weights."""
    folder, engines = make(made, out, f"{FORMAT}:{target}", rules)
    assert "transformers" in engines
    measure(load(folder), folder, FORMAT, made).check(EXACT)
    return folder


def test_layouts_side_by_side(llama: Source, tmp_path: Path) -> None:
    rules = [
        Rule("*.down_proj", scheme="w8g128"),
        Rule("*.mlp.gate_proj", scheme="w4g32"),
        Rule("*.q_proj", keep=True, blocks="0"),
    ]
    folder = check(llama, tmp_path, "fp8", rules)
    found = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert found["format"] == "mixed-precision" and len(found["config_groups"]) == 3


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
    check(source(family, **changes), tmp_path, "fp8")


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts(family: str, name: str, source: Make, tmp_path: Path) -> None:
    made = source(family)
    folder = check(made, tmp_path, name)
    measure(load(folder, **_dequantize()), folder, FORMAT, made).check(EXACT)


def test_4_bit_experts(source: Make, tmp_path: Path) -> None:
    made = source("qwen3_moe", torch.bfloat16)
    folder, engines = make(made, tmp_path, f"{FORMAT}:mxfp4@method=rtn")
    assert "transformers" in engines
    check_bfloat16(folder)


@pytest.mark.parametrize(
    ("target", "rules"),
    [
        ("fp8", [Rule("*.experts.*", keep=True)]),
        ("fp8", [Rule("*.experts.*", scheme="w4g32")]),
        ("w4g32", [Rule("*.experts.*", scheme="fp8")]),
        ("w4g32", [Rule("*.self_attn.*", scheme="fp8")]),
    ],
    ids=["kept", "packed beside fp8", "fp8 beside packed", "attention fp8"],
)
def test_experts_beside_other_layouts(target: str, rules: list[Rule], source: Make, tmp_path: Path) -> None:
    check(source("qwen3_moe"), tmp_path, target, rules)


BLOCKS: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 256}


@pytest.mark.parametrize(
    ("target", "changes"),
    [("w8a8", {}), ("fp8_block", BLOCKS), ("fp8a8_static", {}), ("nvfp4", {})],
    ids=["w8a8", "blocks", "static inputs", "nvfp4"],
)
def test_experts_that_the_engine_does_not_take_are_announced(
    target: str, changes: dict[str, Any], source: Make, tmp_path: Path
) -> None:
    """The day it learns to read one of these, this fails and the announcement can go."""
    made = source("qwen3_moe", torch.bfloat16, **changes)
    folder, engines = make(made, tmp_path, f"{FORMAT}:{target}@method=rtn")
    assert "transformers" not in engines
    with pytest.raises((RuntimeError, AssertionError)):
        measure(load(folder, **_dequantize()), folder, FORMAT, made, stored=torch.bfloat16).check(1e-2)
