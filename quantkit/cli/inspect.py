"""``quantkit inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.output import Output, common_options


@click.command(
    "inspect", cls=Command, examples=("quantkit inspect out/gptq-w4g128", "quantkit inspect ./model --json")
)
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
def command(folder: Path, **flags: Any) -> None:
    """Show what a model FOLDER or GGUF file holds: types, quantization."""
    output = Output.from_flags(flags)

    from quantkit.run.inspect import inspect

    found = inspect(folder)
    output.result("inspect", [found.table()], found.to_json(), [folder])
