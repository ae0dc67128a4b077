"""``quantkit verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import CACHE_DIR, OFFLINE, option
from quantkit.cli.output import Output, common_options
from quantkit.errors import VerifyError

_EXAMPLES = (
    "quantkit verify out/gptq-w4g128",
    "quantkit verify ./downloaded-awq --against Qwen/Qwen3-0.6B",
)


@click.command("verify", cls=Command, examples=_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@option("Common", "--against", metavar="SOURCE", help="folder or Hub id it was made from, to compare")
@OFFLINE
@CACHE_DIR
@common_options
def command(folder: Path, **flags: Any) -> int:
    """Check a model FOLDER or GGUF file: every byte, tensor and name.

    The folder may be quantized by any tool, or not at all.
    """
    output = Output.from_flags(flags)

    from quantkit.cli.progress import choose
    from quantkit.run.verify import verify

    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    with choose(output) as progress:
        found = verify(folder, against=flags["against"], progress=progress, **where)
    output.result("verify", found.tables(), found.to_json(), [folder] if found.sound else [])
    return 0 if found.sound else VerifyError.exit_code
