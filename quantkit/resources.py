"""Where the data that ships with quantkit lies: inside the package, or in the repository it runs from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quantkit.errors import UsageError

Resource = Literal["calibration", "recipes", "demo-llama"]
_PACKAGE = Path(__file__).resolve().parent


def folder(name: Resource) -> Path:
    """The folder of one shipped resource; UsageError when this installation lacks it.

    A wheel holds it as ``quantkit/data/<name>``; an editable install finds it in the repository root.
    """
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(
        f"this installation of quantkit lacks its `{name}` folder",
        remedy="reinstall it: pip install --force-reinstall quantkit",
    )
