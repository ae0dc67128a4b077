"""``quantkit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import (
    CACHE_DIR,
    EVAL,
    EVAL_CHUNKS,
    EVAL_STYLE,
    FLAGS,
    OFFLINE,
    eval_texts,
    option,
)
from quantkit.cli.output import Output, common_options
from quantkit.errors import UsageError

_EXAMPLES = (
    "quantkit eval out/gptq-w4g128 --baseline Qwen/Qwen3-0.6B",
    "quantkit eval ./their-awq out/gptq-w4g128 --baseline ./my-model --eval my.txt --eval-style gptq-2048",
    "quantkit eval out/* --eval-chunks 32 --json",
)
_DEVICE, _DTYPE = (flag.option() for flag in FLAGS if flag.path in ("device.map", "device.dtype"))


@click.command("eval", cls=Command, examples=_EXAMPLES)
@click.argument("paths", nargs=-1, metavar="PATH...")
@option("Common", "--baseline", metavar="SOURCE", help="folder or Hub id they were made from, for KL")
@EVAL
@EVAL_STYLE
@EVAL_CHUNKS
@_DEVICE
@_DTYPE
@OFFLINE
@CACHE_DIR
@common_options
def command(paths: tuple[str, ...], **flags: Any) -> None:
    """Measure perplexity of saved models, and KL from a baseline.

    PATH is a folder quantized by any tool or not, a GGUF file, a Hub id, or demo. What engines
    round while such a file runs, inputs or a cache, is rounded here too.
    """
    output = Output.from_flags(flags)
    if not paths:
        raise UsageError("there is nothing to measure", remedy="give a folder or a Hub id")
    from quantkit.recipe.spec import Device, Eval, EvalText

    items = eval_texts(flags)
    texts = tuple(EvalText(**item) for item in items) or Eval().perplexity
    chosen = {name: flags[key] for name, key in (("map", "device"), ("dtype", "dtype")) if flags[key]}

    from quantkit.cli.progress import choose
    from quantkit.run.score import score

    with choose(output) as progress:
        found = score(
            paths,
            baseline=flags["baseline"],
            texts=texts,
            device=Device(**chosen),
            offline=flags["offline"],
            cache_dir=flags["cache_dir"],
            progress=progress,
        )
    output.result("eval", [found.table()], found.to_json(), [Path(path) for path in paths])
