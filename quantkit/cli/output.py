"""stdout is data, stderr is talk: tables for people, paths for `-q`, one document for `--json`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from quantkit.cli.help import Option
from quantkit.cli.printable import printable
from quantkit.table import Table

C = TypeVar("C", bound=Callable[..., Any])
PROGRESS = ("auto", "bar", "lines", "json", "off")
_COMMON: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("--json", "as_json"), {"is_flag": True, "help": "one JSON document on stdout"}),
    (
        ("--progress",),
        {"type": click.Choice(PROGRESS), "default": "auto", "help": "on stderr; json: one event per line"},
    ),
    (("-q", "--quiet"), {"is_flag": True, "help": "only result paths on stdout, only errors on stderr"}),
    (("-v", "--verbose"), {"count": True, "help": "more on stderr; -vv shows tracebacks"}),
    (("--no-color",), {"is_flag": True, "help": "no colours, as with NO_COLOR in the environment"}),
    (("--log-file",), {"metavar": "PATH", "help": "write everything to this file"}),
)


def common_options(command: C) -> C:
    """The options that every command has; their values arrive as keyword arguments."""
    for names, settings in reversed(_COMMON):
        command = click.option(*names, cls=Option, section="Talk", **settings)(command)
    return command


@dataclass(frozen=True, slots=True)
class Output:
    """How a command talks."""

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0
    color: bool = True
    progress: str = "auto"

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Output:
        """From the values of `common_options`; sets up logging too."""
        from quantkit.cli.logs import set_up

        set_up(flags["verbose"], flags["quiet"], flags["log_file"])
        color = not flags["no_color"] and not os.environ.get("NO_COLOR")
        return cls(flags["as_json"], flags["quiet"], flags["verbose"], color, flags["progress"])

    def talk(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def preview(self, table: Table) -> None:
        """A table on stderr, before work begins."""
        if not self.quiet:
            self._table(table, err=True)

    def result(
        self,
        command: str,
        tables: Sequence[Table],
        document: Mapping[str, Any],
        paths: Sequence[Path | str] = (),
    ) -> None:
        """What the command found or made, in the way that was asked for."""
        if self.as_json:
            click.echo(to_json({"schema": f"quantkit/{command}/1", "status": "ok", **document}))
        elif self.quiet:
            for path in paths:
                click.echo(path)
        else:
            for i, table in enumerate(tables):
                if i:
                    click.echo()
                self._table(table)

    def _table(self, table: Table, *, err: bool = False) -> None:
        stream = sys.stderr if err else sys.stdout
        if stream.isatty():
            _rich(table, err=err, color=self.color)
        else:
            click.echo(printable(plain(table)), err=err)


def plain(table: Table) -> str:
    """The table in spaces and line ends only."""
    lines = [table.title] if table.title else []
    if table.rows:
        shown = [row for row in (table.columns, *table.rows) if any(row)]
        widths = [max(len(row[i]) for row in shown) for i in range(len(table.columns))]
        for row in shown:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f" {'  '.join(cells)}".rstrip())
    lines += [f" ✗ {blocker}" for blocker in table.blockers]
    return "\n".join([*lines, *(f" {note}" for note in table.notes)])


def _rich(table: Table, *, err: bool, color: bool) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(stderr=err, no_color=not color, highlight=False)
    if table.title:
        console.print(Text(table.title, style="bold"))
    if table.rows:
        grid = RichTable(box=None, header_style="dim", pad_edge=True)
        for column in table.columns:
            grid.add_column(Text(column))
        for row in table.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
    for blocker in table.blockers:
        console.print(Text(f" ✗ {blocker}", style="red"))
    for note in table.notes:
        console.print(Text(f" {note}", style="dim"))


def to_json(document: Any) -> str:
    """JSON text; a number that JSON does not know becomes null."""
    return json.dumps(finite(document), indent=2, ensure_ascii=False)


def finite(value: Any) -> Any:
    """`value` with numbers that JSON does not know as None, and tuples as lists."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value
