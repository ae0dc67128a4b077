"""Flags of `convert` and `plan`. Every flag is a recipe key; its help is the key's documentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from quantkit import resources
from quantkit.cli.help import Option
from quantkit.errors import UsageError
from quantkit.recipe.check import doc, hints, options
from quantkit.recipe.spec import Recipe

if TYPE_CHECKING:
    from quantkit.recipe.overrides import Override

C = TypeVar("C", bound=Callable[..., Any])
STYLES = {"llamacpp": 512, "gptq": 2048}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that sets one recipe key."""

    names: tuple[str, ...]
    path: str
    section: str
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """The name under which click passes the value."""
        return self.names[-1].removeprefix("--").replace("-", "_")

    def option(self) -> Callable[[C], C]:
        """The click option; its type, default and help come from the recipe's dataclasses."""
        hint, default = _look_up(self.path)
        choices = [c for kind in options(hint) if get_origin(kind) is Literal for c in get_args(kind)]
        if bool in options(hint):
            return option(self.section, *self.names, is_flag=True, default=None, help=doc(hint))
        kind: Any = click.Choice(choices) if choices else int if int in options(hint) else str
        text = doc(hint) if default is None else f"{doc(hint)}  [default: {default}]"
        return option(self.section, *self.names, type=kind, metavar=self.metavar, help=text)


REPO = Flag(("--repo",), "publish.repo", "Publish", "NAME/MODEL")
FLAGS = (
    Flag(("-o", "--output"), "output.dir", "Output", "DIR"),
    Flag(("--on-exists",), "output.on_exists", "Output"),
    Flag(("--shard-size",), "output.shard_size", "Output", "SIZE"),
    Flag(("--calib-rows",), "calibration.rows", "Calibration", "N"),
    Flag(("--calib-length",), "calibration.length", "Calibration", "TOKENS"),
    Flag(("--calib-seed",), "calibration.seed", "Calibration", "N"),
    Flag(("--imatrix",), "calibration.imatrix", "Calibration", "FILE"),
    Flag(("--device",), "device.map", "Resources", "DEVICE"),
    Flag(("--max-memory",), "device.max_memory", "Resources", "SIZE"),
    Flag(("--dtype",), "device.dtype", "Resources"),
    REPO,
)


def option(section: str, *names: str, **settings: Any) -> Callable[[C], C]:
    """A click option under a section heading."""
    return click.option(*names, cls=Option, section=section, **settings)


EVAL = option(
    "Evaluation",
    "--eval",
    "evals",
    multiple=True,
    metavar="NAME|FILE",
    help="text to measure perplexity on; a dot or slash: a file; repeatable  [default: wikitext2]",
)
EVAL_STYLE = option(
    "Evaluation",
    "--eval-style",
    metavar="STYLE[-CONTEXT]",
    help="llamacpp-512 or gptq-2048  [default: llamacpp-512]",
)
EVAL_CHUNKS = option("Evaluation", "--eval-chunks", type=int, metavar="N", help="only this many windows")
OFFLINE = option("Resources", "--offline", is_flag=True, help="use only files that are already here")
CACHE_DIR = option(
    "Resources",
    "--cache-dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder of downloads",
)
SPECIAL = (
    option("Common", "-r", "--recipe", metavar="FILE", help="recipe to start from, or a shipped one by name"),
    option("Common", "--to", multiple=True, metavar="TARGET", help="target as gptq:w4g128; repeatable"),
    option(
        "Common",
        "--rule",
        multiple=True,
        metavar="MATCH=keep|SCHEME",
        help="keep matching weights or give them another scheme; goes before the recipe's rules; repeatable",
    ),
    option(
        "Common",
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="set any key of the recipe; applied last; repeatable",
    ),
    option("Common", "--print-recipe", is_flag=True, help="print the complete recipe and stop"),
    option("Calibration", "--calib", metavar="SET|FILE", help="text to calibrate on; a dot or slash: a file"),
    EVAL,
    EVAL_STYLE,
    EVAL_CHUNKS,
    option("Evaluation", "--no-eval", is_flag=True, help="measure nothing"),
    option("Evaluation", "--no-engine", is_flag=True, help="do not load the results in their engines"),
    OFFLINE,
    CACHE_DIR,
)


def recipe_options(command: C) -> C:
    """SOURCE and all flags that describe a recipe."""
    for flag in reversed(FLAGS):
        command = flag.option()(command)
    for decorate in reversed(SPECIAL):
        command = decorate(command)
    return click.argument("source", required=False)(command)


def _look_up(path: str) -> tuple[Any, Any]:
    """(type hint, default) of a recipe key."""
    owner: Any = Recipe
    *parents, name = path.split(".")
    for parent in parents:
        owner = next(kind for kind in options(hints(owner)[parent]) if is_dataclass(kind))
    default = next(f.default for f in fields(owner) if f.name == name)
    return hints(owner)[name], None if default is MISSING else default


def build_recipe(flags: Mapping[str, Any]) -> Recipe:
    """The recipe that the flags describe; raises RecipeError or UsageError."""
    from quantkit.recipe.load import load_recipe, recipe_from_flags

    path = _recipe_path(flags)
    overrides = _overrides(flags, path)
    if path is not None:
        return load_recipe(path, env=os.environ, overrides=overrides)
    given = {override.path.partition("[")[0] for override in overrides}
    if "source" not in given:
        raise UsageError("there is nothing to convert", remedy="give a Hub id or a folder, or --recipe FILE")
    if "targets" not in given:
        raise UsageError(
            "there is no target", remedy="add one as --to gptq:w4g128; `quantkit formats` lists them"
        )
    return recipe_from_flags(overrides, env=os.environ)


def _recipe_path(flags: Mapping[str, Any]) -> Path | None:
    """The recipe file to start from. The embedded model brings its own, so that it needs no network."""
    name = flags["recipe"] or ("demo" if flags["source"] == "demo" else None)
    if name is None:
        return None
    path = Path(name)
    if not path.is_file() and path.name == name and not path.suffix:
        shipped = resources.folder("recipes") / f"{name}.yaml"
        path = shipped if shipped.exists() else path
    return path


def _overrides(flags: Mapping[str, Any], path: Path | None) -> list[Override]:
    """The flags as changes to the keys of the recipe at `path`, or of a new one, `--set` last."""
    from quantkit.recipe.overrides import assignment, flag

    found = []
    if flags["source"] is not None:
        found.append(flag("source", flags["source"], "SOURCE"))
    if flags["to"]:
        found.append(flag("targets", list(flags["to"]), "--to"))
    for known in FLAGS:
        if flags[known.parameter] is not None:
            found.append(flag(known.path, flags[known.parameter], known.names[-1]))
    if flags["imatrix"] is not None:
        found += [flag(f"calibration.{name}", None, "--imatrix") for name in ("set", "file")]
    if flags["calib"] is not None:
        key, other = ("file", "set") if is_file(flags["calib"]) else ("set", "file")
        for name in (other, "imatrix"):
            found.append(flag(f"calibration.{name}", None, "--calib"))
        found.append(flag(f"calibration.{key}", flags["calib"], "--calib"))
    if flags["rule"]:
        found.append(flag("rules", [_rule(text) for text in flags["rule"]], "--rule", prepend=True))
    texts = eval_texts(flags, given=path is not None)
    if texts:
        found.append(flag("eval.perplexity", texts, "--eval"))
    if flags["no_eval"]:
        found.append(flag("eval.enabled", False, "--no-eval"))
    if flags["no_engine"]:
        found.append(flag("engine_check", False, "--no-engine"))
    return found + [assignment(text) for text in flags["assignments"]]


def is_file(text: str) -> bool:
    """Whether a value that may name a set or a file is a file."""
    return "." in text or "/" in text or "\\" in text


def _rule(text: str) -> dict[str, Any]:
    match, equals, what = text.rpartition("=")
    if not equals:
        raise UsageError(f"--rule {text}: write MATCH=keep or MATCH=SCHEME, as 'lm_head=keep'")
    return {"match": match, "keep": True} if what == "keep" else {"match": match, "scheme": what}


def eval_texts(flags: Mapping[str, Any], *, given: bool = False) -> list[dict[str, Any]]:
    """The items of `eval.perplexity` that the flags describe; none when no flag does.

    given  a recipe names texts of its own, which a style alone does not replace
    """
    styled = flags["eval_style"] is not None or flags["eval_chunks"] is not None
    if not flags["evals"] and styled and given:
        raise UsageError("--eval-style and --eval-chunks need --eval when there is a recipe")
    names = flags["evals"] or (["wikitext2"] if styled else [])
    style, _, context = (flags["eval_style"] or "llamacpp").partition("-")
    if style not in STYLES or (context and not context.isdigit()):
        raise UsageError(f"--eval-style {flags['eval_style']}: write llamacpp-512 or gptq-2048")
    item: dict[str, Any] = {"style": style, "context": int(context) if context else STYLES[style]}
    if flags["eval_chunks"] is not None:
        item["chunks"] = flags["eval_chunks"]
    return [{"file" if is_file(name) else "data": name, **item} for name in names]
