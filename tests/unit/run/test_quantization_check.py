"""What a config says beside what tensors are: files that quantkit writes agree, and what is false is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.graph import Weight
from quantkit.model.stored import StoredModel
from quantkit.protocols import Assigned, Format, FormatFacts
from quantkit.run.dialects import read_config, writer
from quantkit.run.inputs import runs_of
from quantkit.run.quantization_check import check_plain, check_quantization, stored_weight
from quantkit.run.quantized import open_quantized
from quantkit.run.verification import Verification
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear
from tests.models import tiny_model
from tests.quantized import random_linear

HEAD = Weight("lm_head.weight", (160, 128), "head")
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, Tensor]
WRITTEN = {
    "gptq": ("w4g32", "w4g64", "w4", "w3g32", "w8g32", "w4g32_asym"),
    "awq": ("w4g32", "w4g64", "w4g32_asym"),
    "compressed_tensors": (
        *("w4g32", "w4g32_asym", "w3g32", "w8", "w8_tensor", "w8g32", "fp8", "fp8_tensor", "mxfp4", "nvfp4"),
        *("w8a8", "w8a8_static", "fp8a8", "fp8a8_tensor_static"),
    ),
    "bitsandbytes": ("nf4", "nf4_dq", "fp4g32", "w8a8_mixed"),
    "hqq": ("w4g64", "w3g32", "w8g64", "w2g32_axis0", "w4"),
}


def scheme_of(format_name: str, text: str) -> Scheme:
    module = registry.load("formats", format_name)
    fmt: Format = module.FORMAT
    scheme: Scheme = module.parse(text)
    return replace(scheme, scale_dtype=fmt.scale_dtype("float32"), convention=fmt.convention(scheme))


def write(
    folder: Path,
    format_name: str,
    *schemes: str,
    kept: tuple[str, ...] = (),
    linear_of: Callable[[QuantizedLinear], QuantizedLinear] = lambda linear: linear,
    act_order: bool = False,
) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors) of a Llama in a format, whose weights take turns in the schemes."""
    fmt: Format = registry.load("formats", format_name).FORMAT
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    rng = torch.Generator().manual_seed(3)
    parsed = [scheme_of(format_name, text) for text in schemes]
    tensors: Tensors = {}
    assigned = []
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.clone()
            continue
        weight = Weight(name, (tensor.shape[0], tensor.shape[1]))
        scheme = None if name in kept else parsed[len(assigned) % len(parsed)]
        assigned.append(Assigned(weight, scheme))
        if scheme is None:
            tensors[name] = tensor.clone()
        else:
            linear = linear_of(random_linear(name, weight.shape, scheme, rng))
            tensors |= fmt.encode(linear, scheme, "float32")
    facts = FormatFacts(tuple(assigned), parsed[0], (HEAD,), act_order, "rtn", "0", dtype="float32")
    config = {**model.config.to_dict(), "quantization_config": fmt.config(facts)}
    folder.mkdir(exist_ok=True)
    for name, content in fmt.side_files(config["quantization_config"]).items():
        (folder / name).write_text(json.dumps(content))
    return config, tensors


def problems(folder: Path, config: dict[str, Any], tensors: Tensors) -> list[str]:
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    quantized = open_quantized(Checkpoint.open(folder))
    assert quantized is not None
    report = Verification(folder)
    weights = [stored_weight(quantized, quantized.linear(name)) for name in quantized.parts]
    check_quantization(report, quantized, weights)
    assert len(set(report.problems)) == len(report.problems)
    return report.problems


# --------------------------------------------------------------------------------------- what quantkit writes
@pytest.mark.parametrize(
    ("format_name", "scheme"), [(name, scheme) for name, found in WRITTEN.items() for scheme in found]
)
def test_what_is_written_agrees(format_name: str, scheme: str, tmp_path: Path) -> None:
    assert problems(tmp_path, *write(tmp_path, format_name, scheme)) == []


@pytest.mark.parametrize(
    ("format_name", "schemes"),
    [
        ("gptq", ("w4g32", "w8g64")),
        ("awq", ("w4g32",)),
        ("compressed_tensors", ("w4g32_asym", "fp8", "w8a8", "nvfp4")),
        ("bitsandbytes", ("nf4", "fp4_dq")),
        ("hqq", ("w4g64", "w8g32", "w2g32_axis0")),
    ],
)
def test_schemes_beside_each_other_and_weights_that_are_kept(
    format_name: str, schemes: tuple[str, ...], tmp_path: Path
) -> None:
    assert problems(tmp_path, *write(tmp_path, format_name, *schemes, kept=(f"{Q}.weight", DOWN))) == []


def test_hqq_says_what_weights_are_where_none_is_the_default(tmp_path: Path) -> None:
    fmt: Format = registry.load("formats", "hqq").FORMAT
    four, eight = (scheme_of("hqq", text) for text in ("w4g64", "w8g64"))
    facts = FormatFacts((Assigned(Weight(DOWN, (64, 96)), eight),), four, (), False, "rtn", "0")
    assert fmt.config(facts)["quant_config"]["weight_quant_params"]["nbits"] == 8


def reordered(linear: QuantizedLinear) -> QuantizedLinear:
    assert isinstance(linear.weight, Affine)
    groups = torch.arange(linear.weight.codes.shape[1], dtype=torch.int32).flip(0) // linear.weight.group[1]
    return replace(linear, weight=replace(linear.weight, column_group=groups))


def test_act_order(tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "gptq", "w4g32", linear_of=reordered, act_order=True)
    assert problems(tmp_path, config, tensors) == []
    (tmp_path / "quantize_config.json").unlink()
    config["quantization_config"]["desc_act"] = False
    (problem,) = problems(tmp_path, config, tensors)
    assert "`desc_act` is false, but `" in problem and "do not look at g_idx" in problem


# ----------------------------------------------------------------------------------------- what configs claim
WEIGHTS = ("config_groups", "group_0", "weights")
CLAIMS = [
    ("gptq", "w4g32", {"group_size": 64}, "`group_size` is 64, but `"),
    ("gptq", "w4g32", {"desc_act": True, "static_groups": False}, "`desc_act` is true, but in every weight"),
    ("gptq", "w4g32_asym", {"sym": True}, "has zero points other than 8"),
    (
        "gptq",
        "w4g32",
        {"checkpoint_format": "gptq_v2"},
        "zero points that are all 7, which 'gptq' writes for 8",
    ),
    ("gptq", "w4g32", {"checkpoint_format": "gptq_v2", "sym": False}, "zero points that are all 7"),
    ("gptq", "w4g32", {"lm_head": True}, "`lm_head` is true, but the head is not quantized"),
    ("gptq", "w4g32", {"dynamic": {"-:.*q_proj": {}}}, "`dynamic` leaves it out, but `"),
    ("gptq", "w4g32", {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, "does not name it, but"),
    ("awq", "w4g32_asym", {"group_size": 64}, "`group_size` is 64, but"),
    ("awq", "w4g32_asym", {"zero_point": False}, "`zero_point` is false, but"),
    ("awq", "w4g32_asym", {"sym": True}, "`sym` is true, but"),
    ("awq", "w4g32", {"modules_to_not_convert": ["q_proj"]}, "names 'q_proj', but `"),
    ("compressed_tensors", "w8", {(*WEIGHTS, "num_bits"): 4}, "`num_bits` is 4, but"),
    ("compressed_tensors", "w4g32", {(*WEIGHTS, "num_bits"): 3}, "`num_bits` is 3, but"),
    ("compressed_tensors", "w8", {(*WEIGHTS, "symmetric"): False}, "has no weight_zero_point"),
    ("compressed_tensors", "w4g32_asym", {(*WEIGHTS, "symmetric"): True}, "has zero points that matter"),
    ("compressed_tensors", "w8", {(*WEIGHTS, "type"): "float"}, "`type` is 'float', but"),
    ("compressed_tensors", "fp8", {(*WEIGHTS, "type"): "int"}, "`type` is 'int', but"),
    ("compressed_tensors", "w8", {(*WEIGHTS, "strategy"): "tensor"}, "`strategy` is 'tensor', but"),
    ("compressed_tensors", "w4g32", {(*WEIGHTS, "group_size"): 64}, "with groups of 64, but"),
    ("compressed_tensors", "w8", {"ignore": []}, "but `lm_head` is stored as floats"),
    ("compressed_tensors", "w8", {"ignore": ["lm_head", "re:.*q_proj"]}, "`ignore` names 're:.*q_proj', but"),
    (
        "compressed_tensors",
        "w8",
        {("config_groups", "group_0", "targets"): [f"re:{Q}"]},
        "no `targets` name it",
    ),
    ("compressed_tensors", "w8", {"format": "pack-quantized"}, "`format` is 'pack-quantized', but"),
    (
        "compressed_tensors",
        "nvfp4",
        {"format": "mxfp4-pack-quantized"},
        "is stored as 'nvfp4-pack-quantized'",
    ),
    ("compressed_tensors", "w8", {"quantization_status": "frozen"}, "transformers would make up random ones"),
    (
        "compressed_tensors",
        "w8",
        {("config_groups", "group_0", "input_activations"): {"dynamic": False, "strategy": "tensor"}},
        "has no input_scale",
    ),
    ("compressed_tensors", "w8", {"kv_cache_scheme": {"num_bits": 8}}, "no file holds scales of a cache"),
    ("bitsandbytes", "nf4", {"bnb_4bit_quant_type": "fp4"}, '`bnb_4bit_quant_type` is "fp4", but'),
    ("bitsandbytes", "nf4", {"bnb_4bit_use_double_quant": True}, "is true, but of the weights it is false"),
    ("bitsandbytes", "nf4", {"load_in_8bit": True}, "`load_in_8bit` is true, but"),
    ("bitsandbytes", "w8a8_mixed", {"load_in_8bit": False}, "`load_in_8bit` is false, but"),
    ("bitsandbytes", "nf4", {"llm_int8_skip_modules": ["q_proj"]}, "names 'q_proj', but"),
    ("hqq", "w4g64", {("quant_config", "weight_quant_params", "nbits"): 8}, "`nbits` is 8, but"),
    ("hqq", "w4g64", {("linears", "mlp.up_proj", "group_size"): 32}, "`group_size` is 32, but"),
]


@pytest.mark.parametrize(("format_name", "scheme", "changes", "text"), CLAIMS)
def test_claims(format_name: str, scheme: str, changes: dict[Any, Any], text: str, tmp_path: Path) -> None:
    config, tensors = write(tmp_path, format_name, scheme)
    for place, value in changes.items():
        *path, key = (place,) if isinstance(place, str) else place
        table = config["quantization_config"]
        for step in path:
            table = table[step]
        table[key] = value
    (tmp_path / "quantize_config.json").unlink(missing_ok=True)
    found = problems(tmp_path, config, tensors)
    assert len(found) == 1 and text in found[0] and found[0].startswith("`config.json`: "), found


def test_claims_that_cannot_be_told_are_none(tmp_path: Path) -> None:
    """Zero points of 8 are those of a symmetric weight and of one that happens to be so."""
    config, tensors = write(tmp_path, "gptq", "w4g32")
    config["quantization_config"]["sym"] = False
    (tmp_path / "quantize_config.json").unlink()
    assert problems(tmp_path, config, tensors) == []
    config, tensors = write(tmp_path / "awq", "awq", "w4g32")
    config["quantization_config"]["zero_point"] = False
    assert problems(tmp_path / "awq", config, tensors) == [], "auto-round writes so"


def test_narrow_codes_may_lie_one_to_a_byte(tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "compressed_tensors", "w8a8")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    narrow = {n: t.clamp(-8, 7) if t.dtype == torch.int8 else t for n, t in tensors.items()}
    assert problems(tmp_path, config, narrow) == []


def test_floats_among_quantized_weights_that_no_key_tells_of(tmp_path: Path) -> None:
    for name, key in (("gptq", "dynamic"), ("awq", "modules_to_not_convert")):
        config, tensors = write(tmp_path / name, name, "w4g32", kept=(f"{Q}.weight",))
        stated = config["quantization_config"]
        stated[key] = {} if name == "gptq" else ["lm_head"]
        stated.pop("modules_in_block_to_quantize", None)
        (tmp_path / name / "quantize_config.json").unlink(missing_ok=True)
        (problem,) = problems(tmp_path / name, config, tensors)
        assert f"`{Q}` is stored as floats" in problem


# ----------------------------------------------------------------------------------- files beside config.json
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"bits": 8}, "`bits` is 8, but"),
        ({"group_size": 64}, "`group_size` is 64, but"),
        ({"checkpoint_format": "gptq_v2"}, "`checkpoint_format` is 'gptq_v2', but `config.json` says 'gptq'"),
        ({"quant_method": "awq"}, "`quant_method` stands for awq, but `config.json` says gptq"),
        ({"group_size": "x"}, "`group_size` is 'x', not a whole number"),
    ],
)
def test_a_second_config(content: dict[str, Any], text: str, tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "gptq", "w4g32")
    beside = {**config["quantization_config"], **content}
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    found = problems(tmp_path, config, tensors)
    assert found and all(p.startswith("`quantize_config.json`: ") for p in found)
    assert any(text in p for p in found)


# ------------------------------------------------------------------------------------------------ stray codes
def test_codes_without_scales(tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "compressed_tensors", "w8")
    del tensors[f"{Q}.weight_scale"]
    (problem,) = problems(tmp_path, config, tensors)
    assert problem.startswith(f"`{Q}.weight` holds codes (I8), and no file holds scales for them")


@pytest.mark.parametrize(("dtype", "count"), [(torch.int8, 1), (torch.float16, 0)])
def test_codes_in_a_checkpoint_of_floats(dtype: torch.dtype, count: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    tensors[DOWN] = tensors[DOWN].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    report = Verification(tmp_path)
    check_plain(report, Checkpoint.open(tmp_path))
    assert len(report.problems) == count


def test_buffers_of_integers_are_no_codes(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    report = Verification(tmp_path)
    check_plain(report, Checkpoint.open(tmp_path))
    assert report.problems == []


# ---------------------------------------------------------------------------------------------- hqq's tensors
@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("compute_dtype", "__import__('os')"),
        ("unpack_view_dtype", "torch.gloat16"),
        ("packing", "2bit_u8"),
    ],
)
def test_texts_that_hqq_would_run_or_misread(part: str, text: str, tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "hqq", "w4g64")
    tensors[f"{Q}.{part}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(SourceError, match=f"`{Q}.{part}` is "):
        problems(tmp_path, config, tensors)


@pytest.mark.parametrize("part", ["packing", "round_zero"])
def test_a_part_that_hqq_needs(part: str, tmp_path: Path) -> None:
    config, tensors = write(tmp_path, "hqq", "w4g64")
    del tensors[f"{Q}.{part}"]
    (found,) = problems(tmp_path, config, tensors)
    assert f"hqq loads no weight without its `{part}`" in found


# ------------------------------------------------------------------------------------------ malformed configs
ODD: tuple[Any, ...] = (None, True, 0, -7, 3, 2**70, 1.5, "x", "re:(", [], [1], ["re:("], [[1]], {}, {"a": 1})


def places(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        *(("gptq", "w4g32"), ("awq", "w4g32"), ("compressed_tensors", "w4g32_asym")),
        *(("compressed_tensors", "fp8a8_static"), ("bitsandbytes", "nf4_dq"), ("hqq", "w4g64")),
    ],
)
def test_no_config_makes_a_traceback(format_name: str, scheme: str, tmp_path: Path) -> None:
    """Every key of a config in turn is lost or holds something odd: an error of ours, or a sentence."""
    fmt: Format = registry.load("formats", format_name).FORMAT
    weight, rng = Weight(DOWN, (64, 96)), torch.Generator().manual_seed(1)
    if format_name == "compressed_tensors" or format_name in ("bitsandbytes", "hqq"):
        weight = Weight(DOWN, (64, 128))
    stated = scheme_of(format_name, scheme)
    facts = FormatFacts((Assigned(weight, stated),), stated, (), False, "rtn", "0", kv_cache=None)
    save_file(
        fmt.encode(random_linear(DOWN, weight.shape, stated, rng), stated, "float32"),
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    opened = Checkpoint.open(tmp_path)
    extra = {"dynamic": {"+:.*": {}}, "kv_cache_scheme": {"num_bits": 8}, "meta": {"quantizer": ["a:1"]}}
    valid = json.dumps({**fmt.config(facts), **extra})
    tried = 0
    for place in places(json.loads(valid)):
        for odd in (*ODD, ...):
            changed = json.loads(valid)
            table = changed
            for step in place[:-1]:
                table = table[step]
            if odd is ...:
                del table[place[-1]]
            else:
                table[place[-1]] = odd
            checkpoint = replace(opened, config={"quantization_config": changed})
            tried += 1
            try:
                writer(changed, {})
                read_config(changed)
                found = open_quantized(checkpoint)
                if found is None:
                    continue
                found.measure(DOWN)
                weights = (stored_weight(found, found.linear(DOWN)),)
                stored = StoredModel(weights, {"a.b": "a.b"}, frozenset(), frozenset(opened.tensors))
                assert all(list(found.reader.disagreements(stored, found.config)))
                runs_of(found)
            except (SourceError, UnsupportedError):
                continue
    assert tried > 100
