"""``quantkit inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import CACHE_DIR, OFFLINE
from quantkit.cli.output import Output, common_options

_EXAMPLES = (
    "quantkit inspect out/gptq-w4g128",
    "quantkit inspect ./model --json",
    "quantkit inspect org/name-GGUF:Q4_K_M",
)


@click.command("inspect", cls=Command, examples=_EXAMPLES)
@click.argument("folder")
@OFFLINE
@CACHE_DIR
@common_options
def command(folder: str, **flags: Any) -> None:
    """Show what a model FOLDER or GGUF file holds: types, quantization.

    It may be a Hub id, of which only headers are downloaded.
    """
    output = Output.from_flags(flags)

    from quantkit.run.inspect import inspect
    from quantkit.run.plan import locate

    located = locate(folder, offline=flags["offline"], cache_dir=flags["cache_dir"], headers=True)
    found = inspect(located.path)
    found = found if located.id is None else replace(found, label=located.label)
    output.result("inspect", [found.table()], found.to_json(), [Path(folder)])
