"""``quantkit plan``."""

from __future__ import annotations

from typing import Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import build_recipe, recipe_options
from quantkit.cli.output import Output, common_options
from quantkit.errors import UnsupportedError
from quantkit.recipe.spec import Recipe


@click.command(
    "plan",
    cls=Command,
    examples=("quantkit plan Qwen/Qwen3-0.6B --to gptq:w4g128", "quantkit plan -r recipe.yaml --json"),
)
@recipe_options
@common_options
def command(**flags: Any) -> int:
    """Show sizes, memory and problems of a conversion without doing it. SOURCE is a Hub id or a folder."""
    output = Output.from_flags(flags)
    recipe = build_recipe(flags)
    return print_recipe(recipe) if flags["print_recipe"] else show_plan(recipe, flags, output)


def print_recipe(recipe: Recipe) -> int:
    """The recipe as YAML on stdout."""
    from quantkit.recipe.dump import dump

    click.echo(dump(recipe), nl=False)
    return 0


def show_plan(recipe: Recipe, flags: dict[str, Any], output: Output) -> int:
    """The plan on stdout; exit code 2 when something in it cannot be done."""
    from quantkit.cli.progress import choose
    from quantkit.run.plan import plan

    where = {"offline": flags["offline"], "cache_dir": flags["cache_dir"]}
    with choose(output) as progress:
        found = plan(recipe, headers_only=True, progress=progress, **where)
    table = found.table()
    output.result("plan", [table], found.to_json())
    return UnsupportedError.exit_code if table.blockers else 0
