"""The hqq library loads what quantkit writes, and solves as quantkit does.

transformers 5 cannot load HQQ, and the whole-model loader of hqq reads pickles only; its layers read tensors
by name, and `HQQLinear` is all that loading takes. With float32 as compute dtype the engine computes
scale · (code − zero) as we do: logits agree but for the order of sums.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit import Rule
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.hqq import FORMAT, parse
from quantkit.methods.hqq import Params, quantizer
from quantkit.numerics import hqq
from quantkit.run.report import Report
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.interop.conftest import WIDE
from tests.interop.engines import Source, distance, engine_warnings, load, logits, make, perplexity, quantize

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("hqq") is None, reason="needs the hqq package"),
    # hqq loads kernels of torchao that may be built for another Python
    pytest.mark.filterwarnings("ignore"),
]

Make = Callable[..., Source]
# measured: 0; the order of sums may differ between builds of torch
EXACT = 1e-4
# scheme → method. Calibrated grids and codes lie in the same tensors.
TARGETS = {
    "w1g32": "hqq",
    "w2g16": "hqq",
    "w3g64": "hqq",
    "w4g64": "hqq",
    "w4": "hqq",
    "w5g64": "hqq",
    "w6g64": "hqq",
    "w8g64": "hqq",
    "w4g64_axis0": "hqq",
    "w3g32_axis0": "hqq",
    "w2g32": "gptq",
    "w4g128": "gptq",
}


def with_hqq(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `folder`, its layers hqq's own; a missing or left over tensor fails."""
    from accelerate import init_empty_weights
    from hqq.core.quantize import HQQLinear

    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name in [n.removesuffix(".W_q") for n in tensors if n.endswith(".W_q")]:
        model.set_submodule(name, HQQLinear(None, None, compute_dtype=dtype, device="cpu"))
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.to(dtype).eval()


def with_the_loader_of_hqq(folder: Path) -> PreTrainedModel:
    """Through `from_quantized`, which takes its tensors from a pickle unless told otherwise."""
    from hqq.models.hf.base import AutoHQQHFModel

    class Safetensors(AutoHQQHFModel):
        @classmethod
        def get_weight_file(cls, save_dir: str) -> str:
            return f"{save_dir}/model.safetensors"

        @classmethod
        def load_weights(cls, save_dir: str, map_location: Any = None) -> dict[str, dict[str, Tensor]]:
            weights: dict[str, dict[str, Tensor]] = {}
            for name, tensor in load_file(cls.get_weight_file(save_dir)).items():
                module, _, part = name.rpartition(".")
                weights.setdefault(module, {})[part] = tensor
            return weights

    model: PreTrainedModel = Safetensors.from_quantized(
        str(folder), compute_dtype=torch.float32, device="cpu"
    )
    return model.eval()


def solved(w: Tensor, bits: int, size: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) of the library, in the shape of the grouped matrix, all fp32."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        w, nbits=bits, group_size=size, axis=axis, round_zero=bits == 4, device="cpu", bitpack=False
    )
    return codes, meta["scale"], meta["zero"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_solver_is_the_library_s(bits: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(96, 160, generator=generator) * (0.02, 1.0, 4.0)[seed % 3]
    for size in (8, 32):
        codes, scale, zero = solved(w, bits, size, axis)
        grouped = w.reshape(-1, size) if axis == 1 else w.reshape(size, -1)
        found = hqq.solve(grouped, bits, axis)
        assert torch.equal(found[0], scale) and torch.equal(found[1], zero)
        ours = hqq.codes(grouped, *found, bits, axis).float()
        # w·(1/s) + z and w/s + z may fall on different sides of a tie
        tie = ((grouped / scale + zero) % 1 - 0.5).abs() < 1e-3
        assert torch.equal(ours[~tie], codes.float()[~tie])
        assert float((ours != codes).float().mean()) < 1e-3


@pytest.mark.parametrize("name", TARGETS)
def test_a_layer_dequantizes_to_our_weight(name: str) -> None:
    from hqq.core.quantize import HQQLinear

    scheme = replace(parse(name), scale_dtype="float16")
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(4)) * 0.05
    q = quantizer(Params()).quantize(w, None, scheme).weight
    tensors = FORMAT.encode(QuantizedLinear("x.weight", q), scheme)
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict({k.removeprefix("x."): v for k, v in tensors.items()})
    assert torch.equal(layer.dequantize(), dequantize(q))
    # and what the layer saves is what quantkit wrote
    assert layer.state_dict().keys() == {k.removeprefix("x.") for k in tensors}


def test_layers_that_the_library_made_are_read() -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits, size, axis in ((4, 64, 1), (3, 64, 1), (2, 32, 0), (8, 64, 1), (1, 32, 1)):
        linear = torch.nn.Linear(256, 128, bias=False)
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        tensors = {f"x.{k}": v for k, v in layer.state_dict().items()}
        q = FORMAT.decode("x.weight", tensors, {}).weight
        assert torch.equal(dequantize(q), layer.dequantize())


@pytest.fixture(scope="module")
def llama(source: Make) -> Source:
    return source("llama", **WIDE)


@pytest.fixture(scope="module")
def results(llama: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """All schemes of one source, made in one sweep."""
    out = tmp_path_factory.mktemp("hqq")
    targets = [f"hqq:{scheme}@method={method},name={scheme}" for scheme, method in TARGETS.items()]
    return out, quantize(llama, out, targets)


@pytest.mark.parametrize("scheme", TARGETS)
def test_loads_and_computes_our_weights(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / scheme
    distance(logits(with_hqq(folder)), folder, "hqq", llama).check(EXACT)


@pytest.mark.parametrize("scheme", ["w4g64", "w3g32_axis0"])
def test_whole_model_loader(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / scheme
    distance(logits(with_the_loader_of_hqq(folder)), folder, "hqq", llama).check(EXACT)


@pytest.mark.parametrize("scheme", ["w4g64", "w8g64", "w4g64_axis0"])
def test_perplexity_is_what_the_report_says(scheme: str, llama: Source, results: tuple[Path, Report]) -> None:
    (told,) = (t.quality[0] for t in results[1].targets if t.name == scheme)
    assert perplexity(with_hqq(results[0] / scheme), llama) == pytest.approx(told.target.value, rel=1e-3)


@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"])
def test_the_library_would_store_the_same(module: str, llama: Source, results: tuple[Path, Report]) -> None:
    """Codes are chosen after scale and zero point were rounded to float16, there before: ties may differ."""
    source, made = Checkpoint.open(llama.folder), Checkpoint.open(results[0] / "w4g64")
    codes, scale, zero = solved(source.read(f"{module}.weight").float(), 4, 64, 1)
    tensors = {n: made.read(n) for n in made.tensors if FORMAT.base_name(n) == f"{module}.weight"}
    assert torch.equal(tensors[f"{module}.scale"], scale.half())
    assert torch.equal(tensors[f"{module}.zero"], zero.half())
    found = FORMAT.decode(f"{module}.weight", tensors, {}).weight
    assert isinstance(found, Affine)
    assert float((found.codes.view(-1, 64) != codes).float().mean()) < 2e-3


def test_bfloat16_sources_biases_mixed_widths_and_kept_weights(source: Make, tmp_path: Path) -> None:
    made = source("llama", torch.bfloat16, attention_bias=True, mlp_bias=True, **WIDE)
    rules = [
        Rule("*.down_proj", scheme="w8g64_asymf"),
        Rule("*.o_proj", scheme="w2g16_asymf_axis0"),
        Rule("*.q_proj", keep=True, blocks="0"),
    ]
    folder, engines = make(made, tmp_path, "hqq:w4g64", rules)
    assert engines == ["hqq"]
    model = with_hqq(folder)
    distance(logits(model), folder, "hqq", made).check(EXACT)
    kept = load(made.folder).get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight, kept)


def test_tied_embeddings(source: Make, tmp_path: Path) -> None:
    made = source("llama", tie_word_embeddings=True, **WIDE)
    folder, _ = make(made, tmp_path, "hqq:w4g64")
    distance(logits(with_hqq(folder)), folder, "hqq", made).check(EXACT)


def test_float16_loses_little_and_bfloat16_more(llama: Source, results: tuple[Path, Report]) -> None:
    folder = results[0] / "w8g64"
    exact = logits(with_hqq(folder))
    half, brain = (logits(with_hqq(folder, dtype)) for dtype in (torch.float16, torch.bfloat16))
    assert float((half - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert float((half - exact).norm()) < 0.3 * float((brain - exact).norm())


def test_transformers_refuses_the_folder(results: tuple[Path, Report]) -> None:
    """With `skip_modules` in its config it loads: random numbers in every layer, and no error."""
    folder = results[0] / "w4g64"
    with pytest.raises(KeyError, match="skip_modules"):
        load(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    quantization = {**config["quantization_config"], "skip_modules": ["lm_head"]}
    complete = folder.with_name("complete")
    complete.mkdir()
    (complete / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization}), "utf-8"
    )
    (complete / "model.safetensors").symlink_to(folder / "model.safetensors")
    with engine_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(
            complete, dtype=torch.float32, output_loading_info=True
        )
    assert info["missing_keys"] and info["unexpected_keys"]
    assert float((logits(model) - logits(with_hqq(folder))).abs().max()) > 0.5
