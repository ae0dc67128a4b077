"""Every kind of grid through the whole pipeline at once, on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantkit
from quantkit import registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.run.report import Report
from quantkit.tensors import dequantize
from tests.e2e.runs import recipe

# target → its folder; all blocks have inputs of 64 and 96
TARGETS = {
    "bitsandbytes:nf4g32@method=rtn": "bitsandbytes-nf4g32-rtn",
    "bitsandbytes:nf4g32": "bitsandbytes-nf4g32",
    "bitsandbytes:nf4g32_dq": "bitsandbytes-nf4g32_dq",
    "bitsandbytes:int8": "bitsandbytes-w8a8_mixed",
    "compressed_tensors:w8a8": "compressed_tensors-w8a8",
    "compressed_tensors:w8a8_static@transforms=smoothquant,alpha=0.5,kv_cache=int8": (
        "compressed_tensors-w8a8_static-smoothquant-kv_int8"
    ),
    "compressed_tensors:fp8a8@kv_cache=fp8": "compressed_tensors-fp8a8-kv_fp8",
    "compressed_tensors:mxfp4": "compressed_tensors-mxfp4",
    "compressed_tensors:nvfp4": "compressed_tensors-nvfp4",
    "hqq:w4g32": "hqq-w4g32_asymf",
}
SMOOTH = "compressed_tensors-w8a8_static-smoothquant-kv_int8"
NORMS = tuple(
    f"model.layers.{n}.{norm}.weight"
    for n in (0, 1)
    for norm in ("input_layernorm", "post_attention_layernorm")
)


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, calibration_text: Path, evaluation_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report, dict[str, Any]]:
    """(folder, report, plan) of one run with all targets."""
    out = tmp_path_factory.mktemp("grids")
    asked = recipe(checkpoint, calibration_text, evaluation_text, out, *TARGETS)
    planned = quantkit.plan(asked).to_json()
    return out, quantkit.convert(asked), planned


def weights(folder: Path) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def test_every_target_is_there_as_planned(made: tuple[Path, Report, dict[str, Any]]) -> None:
    out, report, planned = made
    assert [t.folder for t in report.targets] == list(TARGETS.values())
    for target in planned["targets"]:
        files = (out / target["name"]).glob("*.safetensors")
        assert target["size_bytes"] == sum(p.stat().st_size for p in files), target["name"]
    for target in report.targets:
        manifest = json.loads((out / target.folder / "quantkit.json").read_text())
        assert manifest["scheme"] == target.scheme
        assert target.fallbacks == 0, [t.note for t in target.tensors]


def test_what_was_measured_is_plausible(made: tuple[Path, Report, dict[str, Any]]) -> None:
    kl = {t.folder: t.quality[0].kl_mean for t in made[1].targets}
    assert all(0 < value < 0.2 for value in kl.values()), kl
    assert kl["bitsandbytes-nf4g32"] < kl["bitsandbytes-nf4g32-rtn"], "calibration helps inside the same grid"
    assert kl["bitsandbytes-nf4g32"] < 1.2 * kl["bitsandbytes-nf4g32_dq"]
    for eight in ("bitsandbytes-w8a8_mixed", "compressed_tensors-w8a8"):
        assert 3 * kl[eight] < min(v for name, v in kl.items() if "4" in name), "8 bits are closer than 4"


def test_files_hold_the_weights_of_the_source(
    made: tuple[Path, Report, dict[str, Any]], checkpoint: Path
) -> None:
    """Read by the format's own reader, as far as the grid allows; folded columns beside their norm."""
    out, report, _ = made
    source = load_file(checkpoint / "model.safetensors")
    for target in report.targets:
        fmt = registry.load("formats", target.folder.partition("-")[0]).FORMAT
        written = Checkpoint.open(out / target.folder)
        for row in target.tensors:
            base = row.name.removesuffix("weight")
            parts = {n: written.read(n) for n in written.tensors if n.startswith(base)}
            value = dequantize(fmt.decode(row.name, parts, written.config["quantization_config"]).weight)
            block = row.name.partition(".self_attn")[0].partition(".mlp")[0]
            if "rescaled_spread" in row.facts:
                norm = "input" if "self_attn" in row.name else "post_attention"
                name = f"{block}.{norm}_layernorm.weight"
                value = value * written.read(name) / source[name]
            wanted = source[row.name]
            error = float((value - wanted).square().sum() / wanted.square().sum())
            assert error < (1e-3 if "8" in target.scheme else 0.03), (target.name, row.name, error)
            assert 0 < row.error < 0.03, (target.name, row.name, row.error)


def test_everything_else_carries_source_bytes(
    made: tuple[Path, Report, dict[str, Any]], checkpoint: Path
) -> None:
    source = load_file(checkpoint / "model.safetensors")
    quantized = {row.name for row in made[1].targets[0].tensors}
    for folder in TARGETS.values():
        found = weights(made[0] / folder)
        for name in source.keys() - quantized:
            same = torch.equal(found[name], source[name])
            assert same != (folder == SMOOTH and name in NORMS), (folder, name)
            assert found[name].dtype == source[name].dtype and found[name].shape == source[name].shape


def test_scales_of_inputs_and_caches_are_in_the_files(
    made: tuple[Path, Report, dict[str, Any]], checkpoint: Path
) -> None:
    for folder in TARGETS.values():
        found = weights(made[0] / folder)
        caches = {n for n in found if n.endswith(("k_scale", "v_scale"))}
        inputs = {n for n in found if n.endswith("input_scale")}
        assert len(caches) == (4 if "kv_" in folder else 0), folder
        assert len(inputs) == (14 if "static" in folder else 0), folder
        for name in caches | inputs:
            # the source is float32, and so are scales of this format
            assert found[name].shape == (1,) and found[name].dtype == torch.float32
            assert 0 < float(found[name]) < 1
    smooth = made[0] / SMOOTH
    manifest = json.loads((smooth / "quantkit.json").read_text())
    assert (
        manifest["made"]["kv_cache"] == "int8" and manifest["made"]["transforms"][0]["name"] == "smoothquant"
    )
    config = json.loads((smooth / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "int"
    qkv = [f"model.layers.0.self_attn.{r}_proj.input_scale" for r in ("q", "k", "v")]
    assert len({float(weights(smooth)[name]) for name in qkv}) == 1, "one input has one scale"


def test_folds_are_in_the_report(made: tuple[Path, Report, dict[str, Any]]) -> None:
    (target,) = (t for t in made[1].targets if t.folder == SMOOTH)
    spread = {row.name: row.facts.get("rescaled_spread") for row in target.tensors}
    folded = {name for name, value in spread.items() if value is not None}
    assert folded == {n for n in spread if "o_proj" not in n and "down_proj" not in n}
    assert all(spread[name] > 1 for name in folded)  # type: ignore[operator]


def test_what_is_fused_shares_a_scale_of_the_tensor(made: tuple[Path, Report, dict[str, Any]]) -> None:
    found = weights(made[0] / "compressed_tensors-nvfp4")
    scales = {
        n.split(".", 3)[3]: float(t) for n, t in found.items() if "layers.1" in n and "global_scale" in n
    }
    attention = [scales[f"self_attn.{r}_proj.weight_global_scale"] for r in ("q", "k", "v")]
    mlp = [scales[f"mlp.{r}_proj.weight_global_scale"] for r in ("gate", "up")]
    assert len(set(attention)) == len(set(mlp)) == 1 and len(set(scales.values())) == 4


def test_inspect_reads_every_kind(made: tuple[Path, Report, dict[str, Any]]) -> None:
    for folder, bits in {
        "bitsandbytes-nf4g32_dq": 4,
        "bitsandbytes-w8a8_mixed": 8,
        "compressed_tensors-nvfp4": 4,
        "compressed_tensors-mxfp4": 4,
        "compressed_tensors-fp8a8-kv_fp8": 8,
        "hqq-w4g32_asymf": 4,
    }.items():
        kinds = {kind.name: kind for kind in quantkit.inspect(made[0] / folder).kinds}
        quantized = kinds[f"{folder.partition('-')[0]} {bits} bit"]
        assert quantized.tensors == 14, folder
        # 2 blocks of q, k, v, o and gate, up, down
        assert quantized.parameters == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96), folder
