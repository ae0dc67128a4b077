"""``quantkit inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import CACHE_DIR, OFFLINE
from quantkit.cli.output import Output, common_options

if TYPE_CHECKING:
    from quantkit.run.inspect import Inspection

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

    It may be a Hub id, of which only headers are downloaded where they suffice.
    """
    output = Output.from_flags(flags)

    from quantkit.checkpoint.header_file import NotDownloaded

    try:
        found = _inspect(folder, flags, headers=True)
    except NotDownloaded:
        found = _inspect(folder, flags, headers=False)
    output.result("inspect", [found.table()], found.to_json(), [Path(folder)])


def _inspect(source: str, flags: dict[str, Any], *, headers: bool) -> Inspection:
    from quantkit.run.inspect import inspect
    from quantkit.run.plan import locate

    located = locate(source, offline=flags["offline"], cache_dir=flags["cache_dir"], headers=headers)
    found = inspect(located.path)
    return found if located.id is None else replace(found, label=located.label)
