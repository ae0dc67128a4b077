"""``quantkit convert``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import build_recipe, option, recipe_options
from quantkit.cli.output import Output, common_options
from quantkit.cli.plan import print_recipe, show_plan
from quantkit.cli.push import TOKEN_FILE, find_token, permissions, permitted, pushing
from quantkit.errors import GateError, UsageError, VerifyError

if TYPE_CHECKING:
    from quantkit.recipe.spec import Publish, Recipe
    from quantkit.run.report import Report

_EXAMPLES = (
    "quantkit convert Qwen/Qwen3-0.6B --to gptq:w4g128 -o out/",
    "quantkit convert ./my-model --to gguf:q4_k_m,q6_k --to gptq:w4g128 --calib calib.txt",
    "quantkit convert -r recipe.yaml --only gptq-w4g128",
    "quantkit convert -r publish --push --repo alice/Qwen3-0.6B-{target}",
    "quantkit convert demo",
)


@click.command("convert", cls=Command, examples=_EXAMPLES)
@recipe_options
@option("Common", "--dry-run", is_flag=True, help="only plan")
@option("Common", "--only", multiple=True, metavar="NAME", help="only this target; repeatable")
@option("Common", "--skip", multiple=True, metavar="NAME", help="all but this target; repeatable")
@option("Common", "--restart", is_flag=True, help="forget an earlier run instead of continuing it")
@option("Publish", "--push", is_flag=True, help="publish the results, as `publish:` of the recipe says")
@permissions("Publish")
@TOKEN_FILE
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
    how = _how(recipe, flags)

    from quantkit.cli.progress import choose
    from quantkit.run.convert import convert
    from quantkit.run.plan import plan

    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    token = None
    with choose(output) as progress:
        planned = plan(recipe, headers_only=True, progress=progress, **where)
        planned.check()
        if how is not None and how.when != "manual":
            from quantkit.run.publish import check_ready

            token = find_token(how, flags["token_file"])
            check_ready(how, planned, token=token, pushing=pushing(flags), progress=progress)
        output.preview(planned.table())
        with stop_on_interrupt(progress.warn) as stop:
            report = convert(recipe, progress=progress, restart=flags["restart"], stop=stop, **where)
    paths = [Path(recipe.output.dir) / target.folder for target in report.targets]
    code = _verdict(report, output)
    if how is None or not _may_publish(how, report, output):
        output.result("convert", [report.table()], report.to_json(), paths)
        return code
    if not output.as_json:  # else both are one document
        output.result("convert", [report.table()], report.to_json(), paths)

    from quantkit.run.publish import publish

    allowed = pushing(flags, engines=recipe.engine_check)
    with choose(output) as progress:
        pushed = publish(paths, how, token=token, pushing=allowed, progress=progress)
    if output.as_json:
        output.result("convert", [], {**report.to_json(), "push": pushed.to_json()})
    else:
        output.result("push", pushed.tables(), pushed.to_json(), [done.url for done in pushed.done])
    return code


def _how(recipe: Recipe, flags: Mapping[str, Any]) -> Publish | None:
    """Where the results are to be published, None: nowhere."""
    if flags["push"]:
        if recipe.publish is None:
            raise UsageError(
                "--push: no repository is named", remedy="give --repo name/model, or `publish:` in the recipe"
            )
        return recipe.publish
    if given := permitted(flags):
        raise UsageError(
            f"{given[0]} is for what is published, and nothing is",
            remedy="add --push; an earlier result on this disk is replaced by --on-exists replace",
        )
    return None


def _verdict(report: Report, output: Output) -> int:
    """The exit code of what was made; the files are there in any case."""
    if report.unsound:
        output.talk("error: an engine does not agree with the files; they are kept")
        return VerifyError.exit_code
    if report.broken_gates:
        output.talk("error: an evaluation gate failed; the files are kept")
        return GateError.exit_code
    return 0


def _may_publish(how: Publish, report: Report, output: Output) -> bool:
    """Whether the results are to be pushed; if not, the reason is said."""
    if report.unsound:
        reason = "an engine does not agree"
    elif report.broken_gates and how.when != "always":
        reason = "a gate failed"
    elif how.when == "manual":
        reason = "`publish.when` is manual"
    else:
        return True
    output.talk(f"nothing was pushed: {reason}")
    return False


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
