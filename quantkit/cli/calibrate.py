"""``quantkit calibrate``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.help import Command
from quantkit.cli.options import CACHE_DIR, FLAGS, OFFLINE, is_file, option
from quantkit.cli.output import Output, common_options
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.run.calibrate import Collected

_EXAMPLES = (
    "quantkit calibrate Qwen/Qwen3-0.6B -o qwen3.imatrix.gguf",
    "quantkit calibrate ./my-model --calib my.txt --calib-length 512 -o my.imatrix.dat",
    "quantkit calibrate --merge a.imatrix.gguf b.imatrix.dat -o both.imatrix.gguf",
)
_GROUPS = ("calibration", "device")
_CHOSEN = [flag for flag in FLAGS if flag.path.partition(".")[0] in _GROUPS]
# with files only: how much one call of a legacy file weighs
_LENGTH = "calib_length"


def _recipe_flags(command: Any) -> Any:
    for flag in reversed(_CHOSEN):
        command = flag.option()(command)
    return command


@click.command("calibrate", cls=Command, examples=_EXAMPLES)
@click.argument("sources", nargs=-1, metavar="SOURCE|FILE...")
@option(
    "Common",
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="GGUF, or the legacy format when it ends in .dat",
)
@option("Common", "--merge", is_flag=True, help="add up imatrix FILEs of either format, or convert one")
@option(
    "Common",
    "--on-exists",
    type=click.Choice(("fail", "replace")),
    default="fail",
    help="what to do when the output is there  [default: fail]",
)
@option("Common", "--restart", is_flag=True, help="forget an earlier run instead of continuing it")
@option("Calibration", "--calib", metavar="SET|FILE", help="text to calibrate on; a dot or slash: a file")
@_recipe_flags
@OFFLINE
@CACHE_DIR
@common_options
def command(sources: tuple[str, ...], **flags: Any) -> None:
    """Collect an importance matrix (imatrix), or merge some.

    SOURCE is a Hub id, a folder, a GGUF file, or demo for the embedded model and text. A run that was stopped
    continues when the same command is given again. In a merge, --calib-length says how many tokens a chunk
    of a .dat file has, 512 by default.
    """
    output = Output.from_flags(flags)
    path: Path = flags["output"]
    if path.exists() and flags["on_exists"] == "fail":
        raise UsageError(f"`{path}` exists", remedy="give another --output, or --on-exists replace")
    found = _merge(sources, path, flags) if flags["merge"] else _collect(sources, path, flags, output)
    output.result("calibrate", [found.table()], found.to_json(), [path])


def _collect(sources: tuple[str, ...], path: Path, flags: dict[str, Any], output: Output) -> Collected:
    if len(sources) != 1:
        raise UsageError(
            f"one model is calibrated at a time, not {len(sources)}",
            remedy="give a Hub id or a folder, or --merge with imatrix files",
        )
    from quantkit.cli.progress import choose
    from quantkit.recipe.spec import Calibration, Device
    from quantkit.run.calibrate import collect_imatrix, store_of

    given: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for flag in _CHOSEN:
        if (value := flags[flag.parameter]) is not None:
            group, _, name = flag.path.partition(".")
            given[group][name] = value
    if flags["calib"] is not None:
        given["calibration"]["file" if is_file(flags["calib"]) else "set"] = flags["calib"]
    elif sources[0] == "demo":  # no network, and no more than the text has
        given["calibration"] = {"set": "embedded", "rows": 64, "length": 256} | given["calibration"]
    if flags["restart"]:
        shutil.rmtree(store_of(path), ignore_errors=True)
    with choose(output) as progress:
        return collect_imatrix(
            sources[0],
            path,
            calibration=Calibration(**given["calibration"]),
            device=Device(**given["device"]),
            offline=flags["offline"],
            cache_dir=flags["cache_dir"],
            progress=progress,
        )


def _merge(sources: tuple[str, ...], path: Path, flags: dict[str, Any]) -> Collected:
    refused = [flag.names[-1] for flag in _CHOSEN if flag.parameter != _LENGTH and flags[flag.parameter]]
    refused += [f"--{name}" for name in ("calib", "restart", "offline") if flags[name]]
    if refused:
        raise UsageError(f"{', '.join(refused)} and --merge exclude each other: no model is run")
    if not sources:
        raise UsageError("there is nothing to merge", remedy="give imatrix files")
    from quantkit.gguf.imatrix import CHUNK_SIZE
    from quantkit.run.calibrate import merge_imatrix

    return merge_imatrix([Path(source) for source in sources], path, chunk_size=flags[_LENGTH] or CHUNK_SIZE)
