"""``quantkit formats``."""

from __future__ import annotations

import math
from typing import Any

import click

from quantkit import registry
from quantkit.cli.help import Command
from quantkit.cli.output import Output, common_options
from quantkit.run.table import Table

_EXAMPLE = (4096, 4096)


@click.command("formats", cls=Command, examples=("quantkit formats", "quantkit formats --json"))
@common_options
def command(**flags: Any) -> None:
    """List formats, their presets and methods."""
    output = Output.from_flags(flags)
    formats = [row for name in registry.names("formats") for row in _presets(name)]
    methods = [
        {"method": name, "summary": registry.load("methods", name).SUMMARY}
        for name in registry.names("methods")
    ]
    notes = ["bits per weight: with scales and zero points, in a matrix of 4,096 x 4,096"]
    notes += [f"{name}: {registry.load('formats', name).SUMMARY}" for name in registry.names("formats")]
    rows = [(row["target"], f"{row['bits_per_weight']:.2f}", row["method"], row["note"]) for row in formats]
    tables = [
        Table("", ("target", "bits per weight", "method", ""), tuple(rows), tuple(notes)),
        Table("", ("method", ""), tuple((row["method"], row["summary"]) for row in methods)),
    ]
    output.result("formats", tables, {"targets": formats, "methods": methods})


def _presets(name: str) -> list[dict[str, Any]]:
    """One row per preset, the format's default marked."""
    from quantkit.recipe.plugins import format_info
    from quantkit.schemes import parse_scheme

    info = format_info(name)
    return [
        {
            "target": f"{name}:{preset}",
            "bits_per_weight": _bits(registry.load("formats", name).FORMAT, parse_scheme(preset)),
            "method": info.default_method(parse_scheme(preset)),
            "note": "default" if preset == info.default_scheme else "",
        }
        for preset in info.presets
    ]


def _bits(layouts: Any, scheme: Any) -> float:
    """Bits per weight of a matrix as the format stores it."""
    from quantkit.model.graph import Weight

    specs = layouts.layout(Weight("model.layers.0.mlp.up_proj.weight", _EXAMPLE), scheme)
    size: int = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    return 8 * size / math.prod(_EXAMPLE)
