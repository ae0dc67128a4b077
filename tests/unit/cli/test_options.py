from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from quantkit.cli import convert
from quantkit.cli.main import cli
from quantkit.recipe.load import parse_recipe
from quantkit.recipe.rules import Rule
from quantkit.recipe.spec import Calibration, EvalText, Recipe, Target

pytestmark = pytest.mark.usefixtures("fakes")


@pytest.fixture
def recipe_of(quantkit: Callable[..., Any]) -> Callable[..., Recipe]:
    """The recipe that `plan` makes of its arguments."""

    def make(*arguments: str) -> Recipe:
        shown = quantkit("plan", *arguments, "--print-recipe")
        assert shown.code == 0, shown.err
        return parse_recipe(shown.out)

    return make


def test_the_short_form(recipe_of: Callable[..., Recipe]) -> None:
    assert recipe_of("org/model", "--to", "gptq:w4g128") == Recipe("org/model", (Target("gptq"),))


def test_every_flag_is_a_recipe_key(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(
        "x", "--to", "gptq", "--to", "ct:w8", "-o", "there", "--on-exists", "fail", "--shard-size", "1GB",
        "--calib", "texts/c.txt", "--calib-rows", "8", "--calib-length", "64", "--calib-seed", "7",
        "--device", "cpu", "--max-memory", "2GiB", "--dtype", "float32", "--rule", "lm_head=keep",
        "--rule", "re:.*=.*=w8g128", "--eval", "embedded", "--eval", "e.txt", "--eval-style", "gptq",
        "--eval-chunks", "3", "--no-eval", "--set", "calibration.template=chat",
        "--set", "device.batch_tokens=9",
    )  # fmt: skip
    assert recipe.targets == (Target("gptq"), Target("ct", "w8"))
    assert (recipe.output.dir, recipe.output.on_exists, recipe.output.shard_size) == ("there", "fail", "1GB")
    assert recipe.calibration == Calibration(file="texts/c.txt", rows=8, length=64, seed=7, template="chat")
    assert (recipe.device.map, recipe.device.max_bytes, recipe.device.dtype) == ("cpu", 2 * 2**30, "float32")
    assert recipe.device.batch_tokens == 9
    assert recipe.rules == (Rule("lm_head", keep=True), Rule("re:.*=.*", scheme="w8g128"))
    assert recipe.eval.perplexity == (
        EvalText(data="embedded", style="gptq", context=2048, chunks=3),
        EvalText(file="e.txt", style="gptq", context=2048, chunks=3),
    )
    assert not recipe.eval.enabled


def test_evaluation_styles(recipe_of: Callable[..., Recipe]) -> None:
    assert recipe_of("x", "--to", "gptq", "--eval-style", "llamacpp-1024").eval.perplexity == (
        EvalText(data="wikitext2", context=1024),
    )
    assert recipe_of("x", "--to", "gptq", "--eval", "embedded").eval.perplexity == (
        EvalText(data="embedded"),
    )


def test_flags_change_a_recipe(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "source: a\ntargets: [gptq]\ncalibration: {set: embedded, rows: 8}\nrules: [{match: b, keep: true}]\n"
    )
    recipe = recipe_of("other", "-r", str(path), "--calib", "c.txt", "--rule", "a=w8", "--to", "ct")
    assert recipe.source == "other"
    assert recipe.calibration == Calibration(file="c.txt", rows=8)
    assert recipe.rules == (Rule("a", scheme="w8"), Rule("b", keep=True))
    assert recipe.targets == (Target("ct"),)


def test_shipped_recipes_by_name(recipe_of: Callable[..., Recipe]) -> None:
    assert recipe_of("./mine", "-r", "w8").source == "./mine"


def test_the_embedded_model_needs_no_flags(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of("demo")
    assert (recipe.source, recipe.calibration.set) == ("demo", "embedded")
    assert {text.data for text in recipe.eval.perplexity} == {"embedded"}
    assert recipe_of("demo", "--to", "ct:w8").targets == (Target("ct", "w8"),)


def test_a_folder_called_demo_is_not_in_the_way(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe_of("demo").calibration.set == "embedded"
    assert recipe_of("./demo", "--to", "ct:w8").source == "./demo"


def test_environment_values_stay_out_of_print_recipe(
    quantkit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_FOLDER", "/private")
    shown = quantkit("plan", "x", "--to", "gptq", "-o", "${env:SCRATCH_FOLDER}/a", "--print-recipe")
    assert "dir: ${env:SCRATCH_FOLDER}/a" in shown.out
    assert "private" not in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to convert"),
        (["--to", "gptq"], "there is nothing to convert"),
        (["x"], "there is no target"),
        (["x", "--to", "gptqq"], "--to targets[0]: 'gptqq': unknown format 'gptqq'; did you mean 'gptq'?"),
        (
            ["x", "--to", "gptq", "--calib-rows", "0"],
            "--calib-rows calibration.rows: must be at least 1, not 0",
        ),
        (
            ["x", "--to", "gptq", "--max-memory", "much"],
            "--max-memory device.max_memory: 'much' is not a size",
        ),
        (["x", "--to", "gptq", "--rule", "lm_head"], "--rule lm_head: write MATCH=keep or MATCH=SCHEME"),
        (["x", "--to", "gptq", "--rule", "a=w99"], "--rule rules[0].scheme: bits must be 1 to 8, not 99"),
        (["x", "--to", "gptq", "--set", "a"], "--set a: write PATH=VALUE"),
        (["x", "--to", "gptq", "--eval-style", "gptq-x"], "--eval-style gptq-x: write"),
        (["x", "--to", "gptq", "--eval-style", "harness"], "--eval-style harness: write llamacpp-512 or"),
        (["demo", "--eval-style", "gptq"], "--eval-style and --eval-chunks need --eval"),
        (["-r", "none.yaml"], "none.yaml: cannot be read"),
        (["-r", "none"], "none: cannot be read"),
    ],
)
def test_mistakes(quantkit: Callable[..., Any], arguments: list[str], message: str) -> None:
    shown = quantkit("plan", *arguments)
    assert shown.code == 2
    assert message in shown.err


def test_the_list_of_options_is_deliberate() -> None:
    def names(command: str) -> set[str]:
        with click.Context(cli) as context:
            found = cli.get_command(context, command)
        assert found is not None
        return {p.opts[-1] for p in found.params if isinstance(p, click.Option)}

    shared = {
        "--recipe", "--to", "--rule", "--set", "--print-recipe", "--output", "--on-exists", "--shard-size",
        "--calib", "--calib-rows", "--calib-length", "--calib-seed", "--imatrix", "--eval", "--eval-style",
        "--eval-chunks", "--no-eval", "--no-engine", "--repo", "--device", "--max-memory", "--dtype",
        "--offline", "--cache-dir", "--json", "--progress", "--quiet", "--verbose", "--no-color",
        "--log-file",
    }  # fmt: skip
    assert names("plan") == shared
    assert names("convert") == shared | {
        "--dry-run", "--only", "--skip", "--restart", "--push", "--token-file",
        "--replace", "--replace-card", "--prune", "--yes",
    }  # fmt: skip
    everywhere = {"--json", "--progress", "--quiet", "--verbose", "--no-color", "--log-file"}
    assert names("push") == everywhere | {
        "--dry-run", "--only", "--replace", "--replace-card", "--prune", "--yes", "--no-engine", "--repo",
        "--visibility", "--layout", "--branch", "--create-pr", "--tag", "--base-model", "--license",
        "--license-confirmed", "--notes", "--token-file",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["--replace", "--replace-card", "--prune", "--yes"])
def test_what_is_for_a_push_needs_one(quantkit: Callable[..., Any], name: str) -> None:
    shown = quantkit("convert", "x", "--to", "gptq", name, "--repo", "alice/x")
    assert shown.code == 2
    assert f"{name} is for what is published, and nothing is" in shown.err
    assert "add --push" in shown.err and "--on-exists replace" in shown.err


def test_ctrl_c_once_asks_and_twice_stops() -> None:
    import signal

    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), convert.stop_on_interrupt(said.append) as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        assert said == ["stopping after this block; Ctrl-C again stops now"]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
