"""``quantkit formats``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from quantkit import registry
from quantkit.cli.help import Command
from quantkit.cli.output import Output, common_options
from quantkit.table import Table

if TYPE_CHECKING:
    from quantkit.schemes import Scheme

_EXAMPLE = (4096, 4096)
_SOURCE = "bfloat16"
# engines that load and compute without a GPU
_ON_CPU = ("transformers", "transformers+gptqmodel", "gptqmodel", "hqq", "llama.cpp")


@click.command("formats", cls=Command, examples=("quantkit formats", "quantkit formats --json"))
@common_options
def command(**flags: Any) -> None:
    """List formats, their presets and methods.

    For each preset: its size, what shares a scale, how codes are chosen by default, whether calibration text
    is needed, and what loads the result, with or without a GPU. Transforms are listed below.
    """
    from quantkit.recipe.plugins import shortcuts

    output = Output.from_flags(flags)
    targets = [row for name in registry.names("formats") for row in _presets(name)]
    methods = _described("methods")
    transforms = _described("transforms")
    notes = [
        "bits per weight: with scales and zero points, in a matrix of 4,096 x 4,096; gguf: of Llama 3.1 8B"
    ]
    notes += [f"{name}: {registry.load('formats', name).SUMMARY}" for name in registry.names("formats")]
    notes += [f"short names: {', '.join(f'{name} = {target}' for name, target in shortcuts().items())}"]
    rows = tuple(
        (
            row["target"] + ("  (default)" if row["default"] else ""),
            f"{row['bits_per_weight']:.2f}",
            row["group"],
            row["method"],
            "yes" if row["calibrated"] else "no",
            ", ".join(row["engines"]),
            "yes" if row["cpu"] else "no",
        )
        for row in targets
    )
    columns = ("target", "bits", "scale per", "method", "calibration", "loads in", "on a CPU")
    tables = [
        Table("", columns, rows, tuple(notes)),
        Table("", ("method", ""), tuple((row["name"], row["summary"]) for row in methods)),
        Table("", ("transform", ""), tuple((row["name"], row["summary"]) for row in transforms)),
    ]
    output.result("formats", tables, {"targets": targets, "methods": methods, "transforms": transforms})


def _described(kind: registry.Kind) -> list[dict[str, str]]:
    from quantkit.recipe.plugins import summary

    return [{"name": name, "summary": summary(kind, name)} for name in registry.names(kind)]


def _presets(name: str) -> list[dict[str, Any]]:
    """One row per preset, the format's default marked."""
    from quantkit.model.graph import Weight
    from quantkit.protocols import Assigned, FormatFacts
    from quantkit.recipe.plan import needs_of
    from quantkit.recipe.plugins import format_info

    info, fmt = format_info(name), registry.load("formats", name).FORMAT
    weight = Weight("model.layers.0.mlp.up_proj.weight", _EXAMPLE, "up")
    rows = []
    for preset in info.presets:
        scheme = replace(info.parse(preset), scale_dtype=fmt.scale_dtype(_SOURCE))
        method = info.default_method(scheme)
        module = registry.load("methods", method)
        facts = FormatFacts((Assigned(weight, scheme),), scheme, (), False, method, "", dtype=_SOURCE)
        size = sum(math.prod(s.shape) * s.dtype.itemsize for s in fmt.layout(weight, scheme))
        engines, _ = fmt.engines(facts)
        rows.append(
            {
                "target": f"{name}:{preset}",
                "bits_per_weight": _mixed_bits(scheme.mix) or 8 * size / math.prod(_EXAMPLE),
                "group": _group(scheme),
                "method": method,
                "calibrated": bool(needs_of(module.quantizer(module.Params()), (), (scheme,))),
                "engines": list(engines),
                "cpu": any(engine in _ON_CPU for engine in engines),
                "default": preset == info.default_scheme,
            }
        )
    return rows


def _mixed_bits(mix: str) -> float:
    """Of a whole model, where a preset gives its weights different types; else 0."""
    from quantkit.allocate.gguf_mix import typical_bits
    from quantkit.gguf.mixes import MIXES

    return typical_bits(MIXES[mix]) if mix else 0.0


def _group(scheme: Scheme) -> str:
    """What shares a scale, in words."""
    if scheme.per_tensor:
        return "tensor"
    if scheme.tile is not None:
        return f"{scheme.tile} x {scheme.tile}"
    if scheme.group_size is None:
        return "row"
    if scheme.group_size == 1:
        return "none"
    return f"{scheme.group_size} {'outputs' if scheme.axis == 0 else 'inputs'}"
