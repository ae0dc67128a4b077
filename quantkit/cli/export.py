"""``quantkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import option
from quantkit.cli.output import Output, common_options

_EXAMPLES = (
    "quantkit export out/gptq-w4g128 --to awq",
    "quantkit export out/gptq-w4g128 --to gguf:q4_0 -o out/gguf",
    "quantkit export ./stranger-awq --to compressed_tensors --json",
)


@click.command("export", cls=Command, examples=_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@option(
    "Common",
    "--to",
    required=True,
    metavar="TARGET",
    help="awq, compressed_tensors or gptq, with a scheme or without, or gguf:q4_0 and the like",
)
@option(
    "Common",
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="folder of the result  [default: beside FOLDER, which its name begins with]",
)
@option(
    "Common",
    "--on-exists",
    type=click.Choice(("fail", "resume", "replace")),
    default="resume",
    help="what to do when DIR holds an earlier result  [default: resume]",
)
@common_options
def command(folder: Path, **flags: Any) -> None:
    """Store a quantized FOLDER in another format, bit for bit.

    Codes and scales are moved as they are; what would change a single value is refused, with the reason.
    The result is read back and compared with FOLDER bit for bit.
    """
    output = Output.from_flags(flags)

    from quantkit.cli.progress import choose
    from quantkit.run.repack import repack

    with choose(output) as progress:
        made = repack(folder, flags["to"], flags["output"], on_exists=flags["on_exists"], progress=progress)
    document = {**made.to_json(), "folder": str(made.folder)}
    output.result("export", [made.table()], document, [made.folder])
