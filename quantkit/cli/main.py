"""``quantkit``: finds the command, and turns every error into a message and an exit code."""

from __future__ import annotations

import importlib
import io
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from quantkit import __version__
from quantkit.cli.help import SETTINGS, write_examples
from quantkit.errors import QuantkitError, RecipeError

EXAMPLES = (
    "quantkit convert Qwen/Qwen3-0.6B --to gptq:w4g128 -o out/",
    "quantkit convert ./my-model --to gguf:q4_k_m,q6_k --to gptq:w4g128",
    "quantkit convert -r recipe.yaml --set calibration.rows=128",
)
# Help of each command stands here as well as there, so that the first screen imports none of them.
COMMANDS = {
    "Make": {
        "convert": "Quantize a model to targets, check and measure the results.",
        "plan": "Show sizes, memory and problems of a conversion without doing it.",
        "export": "Store a quantized FOLDER in another format, bit for bit.",
        "calibrate": "Collect an importance matrix (imatrix), or merge some.",
    },
    "Look": {
        "inspect": "Show what a model FOLDER or GGUF file holds: types, quantization.",
        "verify": "Check a model FOLDER or GGUF file, then run it in its engine.",
        "eval": "Measure perplexity of saved models, and KL from a baseline.",
        "formats": "List formats, their presets and methods.",
        "recipes": "List, copy and check recipes.",
        "doctor": "Report on this installation: versions, memory, devices, packages.",
    },
    "Share": {
        "push": "Publish results with a model card: checked, uploaded, checked again.",
    },
}


class Lazy(click.Group):
    """Imports a command when it is run, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for group in COMMANDS.values() for name in group]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise click.NoSuchCommand(args[0], possibilities=self.list_commands(ctx), ctx=ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"quantkit.cli.{cmd_name}").command
        return command

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        write_examples(formatter, EXAMPLES)

    def format_commands(
        self,
        ctx: click.Context,
        formatter: click.HelpFormatter,
    ) -> None:
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl(list(commands.items()))


@click.group(cls=Lazy, context_settings=SETTINGS, options_metavar="", subcommand_metavar="COMMAND ...")
@click.version_option(__version__, "--version", prog_name="quantkit", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert a Hugging Face model to the quantized formats people run."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """The exit code of one invocation; errors are shown, not raised."""
    as_json = "--json" in arguments
    try:
        code = cli.main(args=arguments, prog_name="quantkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except QuantkitError as error:
        return _show(error, arguments, error.kind, error.exit_code, as_json=as_json)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "quantkit"
        wrapped = QuantkitError(error.format_message(), remedy=f"try '{path} --help'")
        return _show(wrapped, arguments, "UsageError", error.exit_code, as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        stopped = QuantkitError("stopped", remedy="run the same command again to continue")
        return _show(stopped, arguments, "Interrupted", 130, as_json=as_json)
    except Exception as error:
        report = _crash_report(arguments)
        crash = QuantkitError(
            f"a bug in quantkit: {type(error).__name__}: {error}", remedy=f"please report it with {report}"
        )
        return _show(crash, arguments, "InternalError", 1, as_json=as_json)


def _show(error: QuantkitError, arguments: list[str], kind: str, code: int, *, as_json: bool) -> int:
    """Print an error where and how it was asked for, without tokens; called while it is being handled."""
    from quantkit.cli.logs import masked
    from quantkit.cli.printable import printable

    if _verbosity(arguments) > 1:
        click.echo(printable(masked(traceback.format_exc())), err=True, nl=False)
    if as_json:
        from quantkit.cli.output import to_json

        fields = {"kind": kind, "message": error.message, "remedy": error.remedy, "code": code}
        click.echo(masked(to_json({"status": "error", "error": fields})))
    if isinstance(error, RecipeError) and len(error.problems) > 1:
        click.echo(f"error: {len(error.problems)} problems", err=True)
        click.echo(printable(masked(str(error))), err=True)
    else:
        click.echo(printable(masked(f"error: {error}")), err=True)
    return code


def _verbosity(arguments: list[str]) -> int:
    short = (a[1:] for a in arguments if a.startswith("-v") and set(a[1:]) == {"v"})
    return sum(map(len, short)) + arguments.count("--verbose")


def _crash_report(arguments: list[str]) -> str:
    """Write what a bug report needs; the path, or where else to look."""
    from quantkit.cli.logs import masked

    lines = (
        f"quantkit {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"arguments: {arguments}",
        traceback.format_exc(),
    )
    name = f"quantkit-crash-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    path = Path(tempfile.gettempdir()) / name
    try:
        path.write_text(masked("\n".join(lines)), encoding="utf-8")
    except OSError:
        return "the output of the same command with -vv"
    return str(path)
