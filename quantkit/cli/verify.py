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
    "quantkit verify model-Q4_K_M.gguf --no-engine",
)


@click.command("verify", cls=Command, examples=_EXAMPLES)
@click.argument("folder")
@option("Common", "--against", metavar="SOURCE", help="folder or Hub id it was made from, to compare")
@option("Common", "--no-engine", is_flag=True, help="look at the files alone, and run them in no engine")
@OFFLINE
@CACHE_DIR
@common_options
def command(folder: str, **flags: Any) -> int:
    """Check a model FOLDER or GGUF file, then run it in its engine.

    Sums, headers, names, every value and the tokenizer are looked at. The engine runs on the CPU, where it is
    installed: it must load the files and compute what quantkit reads in them. The folder may be quantized by
    any tool, or not at all, and may be a Hub id.
    """
    output = Output.from_flags(flags)

    from quantkit.cli.progress import choose
    from quantkit.run.plan import locate
    from quantkit.run.verify import verify

    how = {"against": flags["against"], "engine": not flags["no_engine"]}
    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    with choose(output) as progress:
        located = locate(folder, progress=progress, **where)
        found = verify(located.path, progress=progress, **how, **where)
    if located.id is not None:
        found.label = located.label
    output.result("verify", found.tables(), found.to_json(), [Path(folder)] if found.sound else [])
    return 0 if found.sound else VerifyError.exit_code
