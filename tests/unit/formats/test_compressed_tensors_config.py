"""The `quantization_config`: groups, targets, what is ignored, inputs and caches."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from quantkit.formats.compressed_tensors import FORMAT, PRESETS, parse
from quantkit.model.graph import Weight
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import CacheDtype, Scheme, parse_scheme

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
EMBED, HEAD = (
    Weight("model.embed_tokens.weight", (96, 64), "embed"),
    Weight("lm_head.weight", (96, 64), "head"),
)


def facts(default: Scheme, changes: dict[str, Scheme | None]) -> FormatFacts:
    """Two blocks of four weights, all `default` but for `changes` by module."""
    modules = [f"model.layers.{n}.{part}" for n in range(2) for part in PARTS]
    assigned = tuple(Assigned(Weight(f"{m}.weight", (64, 64)), changes.get(m, default)) for m in modules)
    return FormatFacts(assigned, default, (EMBED, HEAD), False, "gptq", "1.2.3")


def config(default: Scheme, changes: dict[str, Scheme | None]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config(facts(default, changes))))
    return found


def test_config_of_one_scheme() -> None:
    found = config(Scheme(4, 128), {})
    # anything but "compressed" makes transformers run on random weights
    assert found["quantization_status"] == "compressed"
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "pack-quantized"
    assert found["ignore"] == ["lm_head"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["format"] == "pack-quantized"
    assert group["input_activations"] is None and group["output_activations"] is None
    expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    assert group["weights"].items() >= (expected | {"dynamic": False, "actorder": None}).items()


@pytest.mark.parametrize(
    "scheme, strategy, layout",
    [
        (Scheme(8), "channel", "int-quantized"),
        (Scheme(8, per_tensor=True), "tensor", "int-quantized"),
        (Scheme(4), "channel", "pack-quantized"),
        (Scheme(8, 128), "group", "pack-quantized"),
        (Scheme(3, 64, sym=False), "group", "pack-quantized"),
    ],
)
def test_strategies_and_layouts(scheme: Scheme, strategy: str, layout: str) -> None:
    found = config(scheme, {})
    (group,) = found["config_groups"].values()
    assert group["weights"]["strategy"] == strategy
    assert group["weights"]["group_size"] == scheme.group_size
    assert group["weights"]["symmetric"] == scheme.sym
    assert found["format"] == group["format"] == layout


def test_the_library_itself_accepts_the_config() -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    for scheme in (Scheme(4, 128), Scheme(8), Scheme(8, per_tensor=True), Scheme(3, 32, sym=False)):
        found = config(scheme, {"model.layers.0.mlp.up_proj": Scheme(8, 32)})
        library.QuantizationConfig.model_validate(found)


def chosen(found: dict[str, Any], module: str) -> list[str]:
    """Names of the groups that a reader applies to a module, which is nn.Linear."""

    def hits(name: str) -> bool:
        return re.match(name[3:], module) is not None if name.startswith("re:") else name == module

    if any(hits(name) for name in found["ignore"]):
        return []
    groups = found["config_groups"].items()
    return [n for n, g in groups if any(t == "Linear" or hits(t) for t in g["targets"])]


def test_kept_weights_are_ignored_by_full_name() -> None:
    kept: dict[str, Scheme | None] = {"model.layers.1.mlp.down_proj": None}
    found = config(Scheme(4, 64), kept)
    assert found["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    assert chosen(found, "model.layers.1.mlp.down_proj") == []
    assert len(chosen(found, "model.layers.0.mlp.down_proj")) == 1


def test_mixed_schemes_get_a_group_each_with_its_own_format() -> None:
    given = facts(
        Scheme(4, 64),
        {
            "model.layers.0.mlp.up_proj": Scheme(8),
            "model.layers.1.mlp.up_proj": Scheme(3, 64),
            "lm_head": None,
        },
    )
    found = dict(FORMAT.config(given))
    assert found["format"] == "mixed-precision"
    layouts = {g["weights"]["num_bits"]: g["format"] for g in found["config_groups"].values()}
    assert layouts == {4: "pack-quantized", 8: "int-quantized", 3: "pack-quantized"}
    for a in given.assigned:
        (name,) = chosen(found, a.weight.module)
        assert a.scheme is not None
        assert found["config_groups"][name]["weights"]["num_bits"] == a.scheme.bits
    assert chosen(found, "lm_head") == []


def test_schemes_of_one_layout_keep_its_name() -> None:
    found = config(Scheme(4, 64), {"model.layers.0.mlp.up_proj": Scheme(8, 64)})
    assert found["format"] == "pack-quantized"
    assert len(found["config_groups"]) == 2


def group_of(name: str) -> dict[str, Any]:
    """The one group of a model that is all `name`."""
    (group,) = config(parse(name), {})["config_groups"].values()
    found: dict[str, Any] = group
    return found


@pytest.mark.parametrize(
    "name, layout, expected",
    [
        ("fp8", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("fp8_tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "fp8_block",
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        ),
        (
            "mxfp4",
            "mxfp4-pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        ),
        (
            "nvfp4",
            "nvfp4-pack-quantized",
            {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        ),
        ("w8a8", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ],
)
def test_weights_of_every_kind(name: str, layout: str, expected: dict[str, Any]) -> None:
    group = group_of(name)
    assert group["format"] == layout
    assert group["weights"].items() >= {**expected, "symmetric": True, "dynamic": False}.items()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("w8a8", {"type": "int", "strategy": "token", "dynamic": True, "group_size": None}),
        ("w8a8_tensor", {"type": "int", "strategy": "token", "dynamic": True}),
        ("w8a8_static", {"type": "int", "strategy": "tensor", "dynamic": False}),
        ("fp8a8", {"type": "float", "strategy": "token", "dynamic": True, "group_size": None}),
        ("fp8a8_static", {"type": "float", "strategy": "tensor", "dynamic": False}),
        ("fp8a8_block", {"type": "float", "strategy": "group", "dynamic": True, "group_size": 128}),
    ],
)
def test_inputs_of_every_kind(name: str, expected: dict[str, Any]) -> None:
    inputs = group_of(name)["input_activations"]
    assert inputs.items() >= {**expected, "num_bits": 8, "symmetric": True}.items()


def test_integer_groups_name_no_dtypes() -> None:
    assert not {"scale_dtype", "zp_dtype"} & group_of("w4g128")["weights"].keys()


def test_different_layouts_are_mixed_precision() -> None:
    found = config(parse_scheme("fp8"), {"model.layers.0.mlp.up_proj": parse_scheme("nvfp4")})
    assert found["format"] == "mixed-precision"
    layouts = {g["weights"]["num_bits"]: g["format"] for g in found["config_groups"].values()}
    assert layouts == {8: "float-quantized", 4: "nvfp4-pack-quantized"}
    assert config(parse_scheme("fp8"), {"model.layers.0.mlp.up_proj": parse_scheme("fp8a8")})["format"] == (
        "float-quantized"
    )


@pytest.mark.parametrize("dtype, numbers", [("fp8", "float"), ("int8", "int")])
def test_key_value_scales(dtype: CacheDtype, numbers: str) -> None:
    given = facts(Scheme(8), {})
    assert FORMAT.config(given)["kv_cache_scheme"] is None
    found = FORMAT.config(replace(given, kv_cache=dtype))["kv_cache_scheme"]
    expected = {"num_bits": 8, "type": numbers, "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert found.items() >= expected.items()


def test_a_model_that_only_has_key_value_scales_is_dense() -> None:
    kept = {a.weight.module: None for a in facts(Scheme(8), {}).assigned}
    found = FORMAT.config(replace(facts(Scheme(8), kept), kv_cache="fp8"))
    assert found["format"] == "dense" and found["config_groups"] == {}


@pytest.mark.parametrize("name", [*PRESETS, "fp8a8_tensor", "fp8_static"])
def test_the_library_itself_accepts_every_preset(name: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    given = replace(facts(parse(name), {"model.layers.0.mlp.up_proj": Scheme(8, 32)}), kv_cache="fp8")
    library.QuantizationConfig.model_validate(json.loads(json.dumps(FORMAT.config(given))))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("W4A16", "w4a16"),
        ("W4A16_ASYM", "w4a16_asym"),
        ("W8A16", "w8a16"),
        ("W3A16", "w3a16"),
        ("W8A8", "w8a8"),
        ("INT8", "int8"),
        ("FP8", "fp8_static"),
        ("FP8_DYNAMIC", "fp8_dynamic"),
        ("FP8_BLOCK", "fp8a8_block"),
        ("NVFP4A16", "nvfp4a16"),
        ("MXFP4A16", "mxfp4a16"),
    ],
)
def test_presets_of_llm_compressor_mean_what_it_says(theirs: str, ours: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    expected = library.preset_name_to_scheme(theirs, ["Linear"])
    found = library.QuantizationScheme.model_validate(group_of(ours))
    for part in ("weights", "input_activations", "output_activations"):
        mine, other = getattr(found, part), getattr(expected, part)
        assert (mine is None) == (other is None), part
        if mine is not None:
            dumped = [a.model_dump(exclude={"observer", "observer_kwargs"}) for a in (mine, other)]
            assert dumped[0] == dumped[1], part
