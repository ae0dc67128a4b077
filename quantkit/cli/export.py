"""``quantkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import CACHE_DIR, OFFLINE, option
from quantkit.cli.output import Output, common_options

_EXAMPLES = (
    "quantkit export out/gptq-w4g128 --to awq",
    "quantkit export out/gptq-w4g128 --to gguf:q4_0 -o out/gguf",
    "quantkit export ./stranger-awq --to compressed_tensors --json",
)


@click.command("export", cls=Command, examples=_EXAMPLES)
@click.argument("folder")
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
    help="folder of the result  [default: beside FOLDER, of a Hub id here; its name begins the same]",
)
@option(
    "Common",
    "--on-exists",
    type=click.Choice(("fail", "resume", "replace")),
    default="resume",
    help="what to do when DIR holds an earlier result  [default: resume]",
)
@OFFLINE
@CACHE_DIR
@common_options
def command(folder: str, **flags: Any) -> None:
    """Store a quantized FOLDER in another format, bit for bit.

    FOLDER is one, or a Hub id. Codes and scales are moved as they are; what would change a single value
    is refused, with the reason. The result is read back and compared with it bit for bit.
    """
    output = Output.from_flags(flags)

    from quantkit.cli.progress import choose
    from quantkit.run.plan import locate
    from quantkit.run.repack import repack

    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    target: Path | None = flags["output"]
    with choose(output) as progress:
        located = locate(folder, progress=progress, **where)
        if target is None and located.id is not None:  # beside it is the cache
            target = Path(f"{Path(located.id).name}-{flags['to'].strip().lower().replace(':', '-')}")
        made = repack(
            located.path,
            flags["to"],
            target,
            on_exists=flags["on_exists"],
            name=None if located.id is None else located.label,
            progress=progress,
        )
    document = {**made.to_json(), "folder": str(made.folder)}
    output.result("export", [made.table()], document, [made.folder])
