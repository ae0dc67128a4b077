"""``quantkit push``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import REPO, C, Flag, option
from quantkit.cli.output import Output, common_options
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.recipe.spec import Publish
    from quantkit.run.publish import Pushing

_EXAMPLES = (
    "quantkit push out --repo alice/Qwen3-0.6B-{target} --dry-run",
    "quantkit push out/gguf-q4_k_m out/gguf-q6_k --repo alice/Qwen3-0.6B-GGUF --visibility public",
    "quantkit push out",
)
FLAGS = (
    REPO,
    Flag(("--visibility",), "publish.visibility", "Publish"),
    Flag(("--layout",), "publish.layout", "Publish"),
    Flag(("--branch",), "publish.branch", "Publish", "NAME"),
    Flag(("--create-pr",), "publish.create_pr", "Publish"),
    Flag(("--tag",), "publish.tag", "Publish", "NAME"),
    Flag(("--base-model",), "publish.base_model", "Publish", "ORG/NAME"),
    Flag(("--license",), "publish.license", "Publish", "ID"),
    Flag(("--license-confirmed",), "publish.license_confirmed", "Publish"),
    Flag(("--notes",), "publish.card.notes", "Publish", "FILE"),
)
TOKEN_FILE = option(
    "Publish",
    "--token-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="file with the token  [default: HF_TOKEN or the login]",
)
_PERMISSIONS = (
    ("--replace", "replace published files of the same name that differ"),
    ("--replace-card", "replace what a person changed inside quantkit's part of a card"),
    ("--prune", "delete files that an earlier push made and this one does not"),
    ("--yes", "go on where the visibility is another, or files that quantkit did not write become public"),
)


def permissions(section: str) -> Callable[[C], C]:
    """What a push does only when it is told to; no key of a recipe, because it is said of one push."""

    def decorate(command: C) -> C:
        for name, text in reversed(_PERMISSIONS):
            command = option(section, name, is_flag=True, help=text)(command)
        return command

    return decorate


def permitted(flags: Mapping[str, Any]) -> list[str]:
    """The permissions that were given."""
    return [name for name, _ in _PERMISSIONS if flags[name.removeprefix("--").replace("-", "_")]]


def pushing(flags: Mapping[str, Any], **more: bool) -> Pushing:
    """What the permissions among `flags` say; `more` are other fields."""
    from quantkit.run.publish import Pushing

    return Pushing(
        replace=flags["replace"],
        replace_card=flags["replace_card"],
        prune=flags["prune"],
        confirmed=flags["yes"],
        **more,
    )


def publish_options(command: Any) -> Any:
    """All flags that say where and how to publish."""
    for flag in reversed(FLAGS):
        command = flag.option()(command)
    return command


@click.command("push", cls=Command, examples=_EXAMPLES)
@click.argument("paths", nargs=-1, metavar="PATH...", type=click.Path(path_type=Path))
@option("Common", "--dry-run", is_flag=True, help="show what would change; nothing is written, here or there")
@option("Common", "--only", multiple=True, metavar="NAME", help="only this target; repeatable")
@permissions("Common")
@option("Common", "--no-engine", is_flag=True, help="do not load results that no engine has loaded yet")
@publish_options
@TOKEN_FILE
@common_options
def command(paths: tuple[Path, ...], **flags: Any) -> int:
    """Publish results with a model card: checked, uploaded, checked again.

    PATH is the folder of a conversion or of one target. A push that was stopped continues when the same
    command is given again.
    """
    output = Output.from_flags(flags)
    if not paths:
        raise UsageError("there is nothing to publish", remedy="give the folder that quantkit convert wrote")
    if (missing := next((path for path in paths if not path.exists()), None)) is not None:
        raise UsageError(f"`{missing}` is not there", remedy="give the folder that quantkit convert wrote")

    from quantkit.cli.progress import choose
    from quantkit.run.publish import publish

    how = _how(paths, flags)
    with choose(output) as progress:
        found = publish(
            paths,
            how,
            only=flags["only"],
            token=find_token(how, flags["token_file"]),
            pushing=pushing(flags, dry_run=flags["dry_run"], engines=not flags["no_engine"]),
            progress=progress,
        )
    output.result("push", found.tables(), found.to_json(), [done.url for done in found.done])
    return UsageError.exit_code if found.problems and found.dry_run else 0


def find_token(how: Publish, file: Path | None) -> str | None:
    """The token that was pointed to; None: the client finds HF_TOKEN or the login by itself."""
    from quantkit.cli.logs import keep_secret

    if file is not None:
        try:
            token = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {file} cannot be read: {error}") from error
        if not token or len(token.split()) != 1:
            raise UsageError(
                f"--token-file {file} holds no token", remedy="put the token there, and nothing else"
            )
        keep_secret(token)
        return token
    if how.token_env is not None:
        token = os.environ.get(how.token_env, "").strip()
        if not token:
            raise UsageError(
                f"publish.token_env: the environment has no {how.token_env}",
                remedy=f"set {how.token_env}, or give --token-file",
            )
        keep_secret(token)
        return token
    return None


def _how(paths: tuple[Path, ...], flags: Mapping[str, Any]) -> Publish:
    """What the recipe of the conversion says of publishing, with the flags on top."""
    from quantkit.recipe.load import load_recipe
    from quantkit.recipe.publishing import published

    folders = [folder for path in paths for folder in (path, path.resolve().parent)]
    recipe = next((p for p in (folder / "recipe.resolved.yaml" for folder in folders) if p.is_file()), None)
    base = None if recipe is None else load_recipe(recipe).publish
    given = {flag.path: flags[flag.parameter] for flag in FLAGS if flags[flag.parameter] is not None}
    return published(base, given)
