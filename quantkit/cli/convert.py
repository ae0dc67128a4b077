"""``quantkit convert``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import build_recipe, option, recipe_options
from quantkit.cli.output import Output, common_options
from quantkit.cli.plan import print_recipe, show_plan
from quantkit.errors import GateError

_EXAMPLES = (
    "quantkit convert Qwen/Qwen3-0.6B --to gptq:w4g128 -o out/",
    "quantkit convert ./my-model --to gguf:q4_k_m,q6_k --to gptq:w4g128 --calib calib.txt",
    "quantkit convert -r recipe.yaml --only gptq-w4g128",
    "quantkit convert demo",
)


@click.command("convert", cls=Command, examples=_EXAMPLES)
@recipe_options
@option("Common", "--dry-run", is_flag=True, help="only plan")
@option("Common", "--only", multiple=True, metavar="NAME", help="only this target; repeatable")
@option("Common", "--skip", multiple=True, metavar="NAME", help="all but this target; repeatable")
@option("Common", "--restart", is_flag=True, help="forget an earlier run instead of continuing it")
@common_options
def command(**flags: Any) -> int:
    """Quantize a model to targets, check and measure the results.

    SOURCE is a Hub id, a folder, a GGUF file, or demo for the embedded model. A run that was stopped
    continues when the same command is given again.
    """
    output = Output.from_flags(flags)
    recipe = build_recipe(flags)
    if flags["only"] or flags["skip"]:
        from quantkit.run.convert import only

        recipe = only(recipe, flags["only"], flags["skip"])
    if flags["print_recipe"]:
        return print_recipe(recipe)
    if flags["dry_run"]:
        return show_plan(recipe, flags, output)

    from quantkit.cli.progress import choose
    from quantkit.run.convert import convert
    from quantkit.run.plan import plan

    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    planned = plan(recipe, **where)
    planned.check()
    output.preview(planned.table())
    with choose(output) as progress, stop_on_interrupt(progress.warn) as stop:
        report = convert(recipe, progress=progress, restart=flags["restart"], stop=stop, **where)
    paths = [Path(recipe.output.dir) / target.folder for target in report.targets]
    output.result("convert", [report.table()], report.to_json(), paths)
    if report.broken_gates:
        output.talk("error: an evaluation gate failed; the files are kept")
        return GateError.exit_code
    return 0


@contextmanager
def stop_on_interrupt(tell: Callable[[str], None]) -> Iterator[Event]:
    """An event that the first Ctrl-C sets, so that a run ends after its next commit; the second raises."""
    stop = Event()

    def interrupt(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tell("stopping after this block; Ctrl-C again stops now")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
