"""What saved checkpoints do to activations, as their configs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.graph import Block, Site, Weight
from quantkit.numerics.inputs import InputRounding
from quantkit.run.inputs import Runs, runs_of
from quantkit.run.quantized import QuantizedCheckpoint
from quantkit.schemes import parse_scheme

TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {**TOKEN, "strategy": "tensor", "dynamic": False}


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    """One weight with a scale of its inputs, and scales of a cache."""
    tensors = {
        "a.x.input_scale": torch.tensor([0.5], dtype=torch.bfloat16),
        "a.k_scale": torch.tensor([0.25]),
        "a.v_scale": torch.tensor([2.0]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return Checkpoint.open(tmp_path)


def runs(stored: Checkpoint, inputs: dict[str, Any] | None, **more: Any) -> Runs:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": inputs, **more}
    config = {"config_groups": {"group_0": group}, "kv_cache_scheme": more.get("cache")}
    return runs_of(QuantizedCheckpoint(stored, "compressed_tensors", config, {"a.x.weight": ()}))


def test_weights_alone(stored: Checkpoint) -> None:
    assert runs(stored, None) == Runs()
    assert runs_of(QuantizedCheckpoint(stored, "gptq", {}, {"a.x.weight": ()})) == Runs()


@pytest.mark.parametrize(
    ("inputs", "like", "scale"),
    [
        (TOKEN, "w8a8", None),
        ({**TOKEN, "type": "float"}, "fp8a8", None),
        ({**TOKEN, "type": "float", "strategy": "group", "group_size": 128}, "fp8a8_block", None),
        (STATIC, "w8a8_static", 0.5),
        ({**STATIC, "type": "float"}, "fp8a8_static", 0.5),
    ],
)
def test_inputs_are_rounded_as_in_a_conversion(
    stored: Checkpoint, inputs: dict[str, Any], like: str, scale: float | None
) -> None:
    found = runs(stored, inputs).roundings["a.x.weight"]
    scheme = parse_scheme(like)
    assert found.input_scale == scale and found.scheme.activations == scheme.activations
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)) * 9
    assert torch.equal(found(x), InputRounding(scheme, scale)(x))


def test_llm_int8(stored: Checkpoint) -> None:
    config = {"load_in_8bit": True, "llm_int8_threshold": 4.5}
    found = runs_of(QuantizedCheckpoint(stored, "bitsandbytes", config, {"a.x.weight": ()}))
    inputs = found.roundings["a.x.weight"].scheme.activations
    assert inputs is not None and inputs.outliers == 4.5
    nf4 = {"load_in_4bit": True, "load_in_8bit": False}
    assert runs_of(QuantizedCheckpoint(stored, "bitsandbytes", nf4, {"a.x.weight": ()})) == Runs()


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({**TOKEN, "num_bits": 4}, "4 bits, symmetric"),
        ({**TOKEN, "symmetric": False}, "8 bits, asymmetric"),
        ({**TOKEN, "strategy": "tensor"}, "by tensor, dynamic True"),
        ({**TOKEN, "dynamic": "local"}, "by token, dynamic local"),
    ],
)
def test_what_is_not_emulated_is_refused(stored: Checkpoint, inputs: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"`a.x.weight` cannot be run as engines do.*{what}"):
        runs(stored, inputs)


def test_rounded_outputs_and_odd_caches_are_refused(stored: Checkpoint) -> None:
    with pytest.raises(UnsupportedError, match="its outputs are rounded"):
        runs(stored, None, output_activations=TOKEN)
    with pytest.raises(UnsupportedError, match="key-value cache"):
        runs(stored, None, cache={"num_bits": 8, "type": "float", "dynamic": True})


def test_scales_of_a_cache(stored: Checkpoint) -> None:
    found = runs(stored, None, cache={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False})
    assert found.cache == "fp8"
    assert {n: float(t) for n, t in found.scales.items()} == {"a.k_scale": 0.25, "a.v_scale": 2.0}


def test_scales_that_no_file_holds(stored: Checkpoint) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    found = runs(stored, None, cache=cache)
    with pytest.raises(SourceError, match=r"names scales of the cache that no file holds: `b\.k_scale`"):
        found.cache_of(Block(0, (Site("b", (Weight("b.k_proj.weight", (8, 8), "k"),)),), (), attentions=1))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": STATIC}
    config = {"config_groups": {"group_0": group}}
    with pytest.raises(SourceError, match=r"the inputs of `b.y.weight` have one scale, and no file holds it"):
        runs_of(QuantizedCheckpoint(stored, "compressed_tensors", config, {"b.y.weight": ()}))
