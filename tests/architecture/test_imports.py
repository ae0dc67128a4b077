"""Importing does nothing, and help is quick because it imports little."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "datasets")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code` in a fresh interpreter."""
    report = (
        "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_of_the_package_is_light() -> None:
    assert not loaded_after("import quantkit") & set(HEAVY)


def test_import_of_the_package_leaves_the_environment_alone() -> None:
    code = "import os; before = dict(os.environ); import quantkit.errors; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["plan", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "from quantkit.cli.main import main\n"
        f"import sys; sys.argv = ['quantkit', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
    )
    assert not loaded_after(code) & set(HEAVY)


def test_every_public_name_is_there() -> None:
    import quantkit

    for name in quantkit.__all__:
        assert getattr(quantkit, name) is not None
    assert set(quantkit.__all__) <= set(dir(quantkit))
