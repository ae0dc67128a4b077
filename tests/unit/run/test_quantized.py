"""Reading quantized checkpoints: configs of every tool, damaged parts, and the view as floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.run.dialects import find_config, method_of, read_config, writer
from quantkit.run.quantized import dequantized, open_floats, open_quantized
from quantkit.schemes import parse_scheme
from quantkit.tensors import dequantize
from tests.models import tiny_model
from tests.quantized import random_linear, same

KEY = "model.layers.0.mlp.up_proj.weight"
SHAPE = (96, 64)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


def parts(scheme: str = "w4g32", seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """File tensors of one random GPTQ weight, and what they stand for."""
    parsed = parse_scheme(scheme)
    linear = random_linear(KEY, SHAPE, parsed, torch.Generator().manual_seed(seed))
    return registry.load("formats", "gptq").FORMAT.encode(linear, parsed), dequantize(linear.weight)


def saved(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = CONFIG) -> Checkpoint:
    """A Llama whose `KEY` is stored as `tensors`."""
    model = tiny_model("llama")
    plain = {n: t.clone() for n, t in model.state_dict().items() if n != KEY and n != "lm_head.weight"}
    save_file({**plain, "lm_head.weight": torch.ones(160, 64), **tensors}, folder / "model.safetensors")
    stated = model.config.to_dict()
    (folder / "config.json").write_text(
        json.dumps(stated if config is None else {**stated, "quantization_config": config})
    )
    return Checkpoint.open(folder)


def test_a_checkpoint_of_floats_is_not_quantized(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {KEY: torch.ones(SHAPE)}, None)
    assert open_quantized(checkpoint) is None
    assert open_floats(checkpoint) is checkpoint


def test_a_weight_is_decoded_and_shown_as_floats(tmp_path: Path) -> None:
    tensors, expected = parts()
    checkpoint = saved(tmp_path, tensors)
    found = open_quantized(checkpoint)
    assert found is not None and found.format_name == "gptq"
    assert set(found.parts) == {KEY} and set(found.parts[KEY]) == set(tensors)
    assert found.measure(KEY) == (SHAPE, 4)
    assert torch.equal(dequantize(found.linear(KEY).weight), expected)
    view = dequantized(found)
    assert torch.equal(view.read(KEY), expected)
    assert torch.equal(view.read(KEY, rows=slice(5, 9)), expected[5:9])
    assert view.tensors[KEY].shape == SHAPE and view.tensors[KEY].dtype == "F32"
    assert view.tensors.keys() == {*(n for n in checkpoint.tensors if n not in tensors), KEY}
    assert "quantization_config" not in view.config
    assert (view.dtype, view.size_bytes) == ("float32", checkpoint.size_bytes)
    assert view.fingerprint() == checkpoint.fingerprint()


def test_unknown_names_are_close_to_known_ones(tmp_path: Path) -> None:
    found = open_quantized(saved(tmp_path, parts()[0]))
    assert found is not None
    with pytest.raises(SourceError, match=f"did you mean `{KEY}`"):
        found.linear(KEY.replace("up", "ap"))


def test_a_config_beside_floats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"says that it is quantized \(gptq\), but none of its tensors is"):
        open_quantized(saved(tmp_path, {KEY: torch.ones(SHAPE)}))


@pytest.mark.parametrize(
    ("part", "damage", "what"),
    [
        ("scales", None, "lacks 'model.layers.0.mlp.up_proj.scales'"),
        ("scales", torch.ones(2, 7, dtype=torch.float16), "cannot be decoded"),
        ("qzeros", torch.zeros(1, 12, dtype=torch.int32), "zero points"),
        (
            "g_idx",
            torch.full((64,), 9, dtype=torch.int32),
            "group numbers from 9 to 9 where there are 2 groups",
        ),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), "group numbers from -1"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), "63 group numbers for 64 columns"),
        ("qweight", torch.zeros(8, 95, dtype=torch.int32), "cannot be decoded"),
    ],
)
def test_damaged_parts_name_file_and_tensor(
    tmp_path: Path, part: str, damage: Tensor | None, what: str
) -> None:
    tensors, _ = parts("w4g32_asym")
    name = KEY.replace("weight", part)
    del tensors[name]
    if damage is not None:
        tensors[name] = damage
    found = open_quantized(saved(tmp_path, tensors, {**CONFIG, "sym": False, "checkpoint_format": "gptq_v2"}))
    assert found is not None
    with pytest.raises(SourceError) as caught:
        found.linear(KEY)
    assert f"`{KEY}` in `{tmp_path / 'model.safetensors'}`" in caught.value.message
    assert what in caught.value.message


@pytest.mark.parametrize("file", ["quantize_config.json", "quantization_config.json"])
def test_a_config_in_a_file_of_its_own(tmp_path: Path, file: str) -> None:
    """AutoGPTQ's named neither the method nor the checkpoint format."""
    tensors, expected = parts()
    checkpoint = saved(tmp_path, tensors, None)
    (tmp_path / file).write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True, "desc_act": False}))
    found = open_quantized(checkpoint)
    assert found is not None and found.config["checkpoint_format"] == "gptq"
    assert torch.equal(dequantize(found.linear(KEY).weight), expected)


def test_old_awq_names(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    )
    stated = find_config(tmp_path, {})
    assert stated is not None
    name, config = read_config(stated)
    assert (name, config["bits"], config["q_group_size"], config["version"]) == ("awq", 4, 64, "gemm")


@pytest.mark.parametrize(
    ("stated", "columns"),
    [({}, 128), ({"q_group_size": 64}, 64), ({"group_size": 64}, 64), ({"group_size": -1}, 256)],
)
def test_awq_groups_of_128_need_no_mention(tmp_path: Path, stated: dict[str, int], columns: int) -> None:
    """transformers takes 128 where the config is silent; only the layouts that pad have to be told."""
    out, width = 32, 256
    padded = 2 if columns == 64 else 1
    tensors = {
        "qweight": torch.zeros(out, width // 8, dtype=torch.int32),
        "qzeros": torch.zeros(out, padded, dtype=torch.int32),
        "scales": torch.ones(out, 8 * padded, dtype=torch.float16),
    }
    named = {KEY.replace("weight", part): tensor for part, tensor in tensors.items()}
    config = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemv", **stated}
    found = open_quantized(saved(tmp_path, named, config))
    assert found is not None and found.linear(KEY).weight.group == (1, columns)


@pytest.mark.parametrize(
    ("packing", "name", "stored"),
    [
        ("auto_round", "gptq", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq", "gptq_v2"),
        ("auto_round:auto_gptq", "gptq", "gptq"),
        ("auto_round:auto_awq", "awq", None),
        ("auto_round:llm_compressor", "compressed_tensors", None),
    ],
)
def test_packings_of_auto_round(packing: str, name: str, stored: str | None) -> None:
    config = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32}
    found, normal = read_config(config)
    assert (found, normal.get("checkpoint_format")) == (name, stored)


def test_exceptions_of_auto_round_are_read() -> None:
    extra = {"model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64}, r".*\.k_proj": {"bits": 16}}
    _, config = read_config(
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "extra_config": extra}
    )
    assert config["dynamic"] == {
        r"+:model\.layers\.0\.mlp\.up_proj$": {"bits": 8, "group_size": 64},
        r"-:.*\.k_proj$": {"bits": 16},
    }


def test_flat_keys_of_auto_round_become_a_config_group() -> None:
    config = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "bits": 8}
    _, normal = read_config({**config, "data_type": "fp", "act_bits": 8, "act_data_type": "fp"})
    (group,) = normal["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["type"]) == (8, "float")
    assert group["input_activations"]["strategy"] == "token"


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quant_method": "fp8"}, "method 'fp8' is not read"),
        ({"quant_method": "quip"}, "method 'quip' is not read"),
        ({**CONFIG, "is_marlin_format": True}, "laid out as 'marlin'"),
        ({**CONFIG, "checkpoint_format": "gptq_p"}, "laid out as 'gptq_p'"),
        ({**CONFIG, "pack_dtype": "int64"}, "packed into int64"),
        ({**CONFIG, "bits": "four"}, "'four' bits"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fake"}, "'auto_round:fake'"),
        ({"quant_method": "auto-round", "rotation_config": {"a": 1}}, "rotations"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}, "transforms"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "'sparse-24'"),
    ],
)
def test_what_changes_the_meaning_is_refused(config: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        read_config(config)


def test_methods_without_a_name() -> None:
    assert method_of({"load_in_4bit": True}) == "bitsandbytes"
    assert method_of({"config_groups": {}}) == "compressed-tensors"
    assert method_of({"quant_method": "Auto_Round"}) == "auto-round"
    assert method_of({"bits": 4}) == "unknown"


@pytest.mark.parametrize(
    ("config", "metadata", "tool"),
    [
        ({"meta": {"quantizer": ["gptqmodel:7.7.0"]}}, {}, "gptqmodel 7.7.0"),
        ({"meta": {"quantizer": "quantkit:0.1"}}, {}, "quantkit 0.1"),
        ({"autoround_version": "0.16.1"}, {}, "auto-round 0.16.1"),
        (CONFIG, {"auto_gptq_version": "0.7.1"}, "auto-gptq 0.7.1"),
        ({"quant_method": "compressed-tensors", "version": "0.19.0"}, {}, "compressed-tensors 0.19.0"),
        (CONFIG, {"format": "pt"}, None),
    ],
)
def test_who_wrote_it(config: dict[str, Any], metadata: dict[str, str], tool: str | None) -> None:
    found = writer(config, metadata)
    assert found is None if tool is None else found is not None and found.endswith(tool)


def test_a_short_last_group_is_read(tmp_path: Path) -> None:
    """AutoGPTQ and auto-round cut the last group short; GPTQ tensors alone do not say where groups end."""
    tensors, _ = parts("w4g32")
    scales = KEY.replace("weight", "scales")
    tensors[scales] = torch.tensor([[1.0], [2.0]], dtype=torch.float16).expand(2, 96).contiguous()
    del tensors[KEY.replace("weight", "g_idx")]
    found = open_quantized(saved(tmp_path, tensors, {**CONFIG, "group_size": 48}))
    assert found is not None
    weight = found.linear(KEY).weight
    assert weight.group == (1, 48)
    ratio = dequantize(weight) / (weight.codes if hasattr(weight, "codes") else torch.ones(1)).float()
    assert set(ratio[0, :48][~ratio[0, :48].isnan()].tolist()) == {1.0}
    assert set(ratio[0, 48:][~ratio[0, 48:].isnan()].tolist()) == {2.0}


def test_what_convert_wrote_is_what_is_read(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(4)
    scheme = parse_scheme("w3g32_asym")
    linear = random_linear(KEY, SHAPE, scheme, rng)
    fmt = registry.load("formats", "gptq").FORMAT
    config = {**CONFIG, "bits": 3, "sym": False, "checkpoint_format": "gptq_v2"}
    found = open_quantized(saved(tmp_path, fmt.encode(linear, scheme), config))
    assert found is not None
    assert same(found.linear(KEY).weight, linear.weight)
