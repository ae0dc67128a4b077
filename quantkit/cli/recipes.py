"""``quantkit recipes``: list, init, validate, schema."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from quantkit import resources
from quantkit.cli.help import SETTINGS, Command, Option
from quantkit.cli.output import Output, common_options
from quantkit.errors import RecipeError, UsageError
from quantkit.recipe.check import suggest
from quantkit.table import Table

_SCHEMA = "recipe-1.schema.json"


@click.group("recipes", context_settings=SETTINGS)
def command() -> None:
    """List, copy and check recipes."""


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(resources.folder("recipes").glob("*.yaml"))}


def _summary(path: Path) -> str:
    """The first comment that is not for the editor."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((line for line in comments if not line.startswith("yaml-language-server")), "")


@command.command("list", cls=Command)
@common_options
def list_(**flags: Any) -> None:
    """List the recipes that ship with quantkit."""
    output = Output.from_flags(flags)
    found = {name: _summary(path) for name, path in _shipped().items()}
    note = "use one: quantkit convert SOURCE -r NAME; copy one: quantkit recipes init NAME"
    rows = [{"name": name, "summary": text} for name, text in found.items()]
    output.result(
        "recipes-list",
        [Table("", ("name", ""), tuple(found.items()), (note,))],
        {"recipes": rows},
        list(_shipped().values()),
    )


@command.command("init", cls=Command, examples=("quantkit recipes init w4-gptq --source ./my-model",))
@click.argument("name")
@click.option("--source", cls=Option, metavar="SOURCE", help="model to put into the recipe")
@click.option("-o", "--output", "to", cls=Option, metavar="FILE", help="file to write  [default: NAME.yaml]")
@click.option("--force", cls=Option, is_flag=True, help="overwrite the file")
@common_options
def init(name: str, source: str | None, to: str | None, force: bool, **flags: Any) -> None:
    """Copy the shipped recipe NAME to start from."""
    output = Output.from_flags(flags)
    shipped = _shipped()
    if name not in shipped:
        raise UsageError(f"no recipe {name!r}{suggest(name, shipped)}", remedy=f"known: {', '.join(shipped)}")
    path = Path(to or f"{name}.yaml")
    if path.exists() and not force:
        raise UsageError(f"`{path}` exists", remedy="choose another with -o, or overwrite it with --force")
    text = shipped[name].read_text(encoding="utf-8")
    text = text.replace(f"$schema=./{_SCHEMA}", f"$schema={(shipped[name].parent / _SCHEMA).as_uri()}", 1)
    if source is not None:
        import json

        # A JSON string is a YAML string, whatever the source is called.
        text = re.sub(r"(?m)^source: .*$", lambda _: f"source: {json.dumps(source)}", text, count=1)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"`{path}` cannot be written: {error.strerror}") from error
    output.result("recipes-init", [Table(f"wrote {path}", (), ())], {"path": str(path)}, [path])


@command.command("validate", cls=Command, examples=("quantkit recipes validate recipe.yaml",))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@common_options
def validate(files: tuple[Path, ...], **flags: Any) -> None:
    """Check recipes; every problem is shown with its line."""
    from quantkit.recipe.load import load_recipe

    output = Output.from_flags(flags)
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            recipe = load_recipe(path, env=os.environ)
        except RecipeError as error:
            problems += error.problems
        else:
            rows.append({"path": str(path), "targets": [target.name for target in recipe.targets]})
    if problems:
        raise RecipeError(problems)
    lines = tuple((row["path"], "valid", ", ".join(row["targets"])) for row in rows)
    output.result("recipes-validate", [Table("", ("file", "", "targets"), lines)], {"recipes": rows}, files)


@command.command("schema", cls=Command, examples=(f"quantkit recipes schema > {_SCHEMA}",))
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from quantkit.recipe.schema import schema_text

    click.echo(schema_text(), nl=False)
