from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.cli.main import run


@dataclass(frozen=True)
class Ran:
    """What one invocation did."""

    code: int
    out: str
    err: str


@pytest.fixture
def quantkit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Runs the command line in an empty folder, as the console script would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def invoke(*arguments: str) -> Ran:
        code = run(list(arguments))
        shown = capsys.readouterr()
        return Ran(code, shown.out, shown.err)

    return invoke


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Stand-ins for methods and formats; their names."""
    from tests.fake_plugins import FAKES, install

    install(monkeypatch)
    return sorted(FAKES["formats"])
