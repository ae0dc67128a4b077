"""One step of benchmarks/hub.py in a process of its own: what it does with the Hub of the environment.

python -m benchmarks.hub_steps STEP --repo NAME/MODEL --folder FOLDER

Prints one line of JSON with the seconds of the step without imports, and the processor time in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

import quantkit
from quantkit.hub import fetch
from quantkit.recipe.spec import Publish
from quantkit.run.plan import plan
from quantkit.run.publish import Pushing, publish


def planned(repo: str, _folder: Path) -> None:
    asked = quantkit.Recipe(source=repo, targets=quantkit.parse_targets("gptq:w4g128@method=rtn"))
    plan(asked, headers_only=True)


def resolved(repo: str, _folder: Path) -> None:
    fetch.resolve(repo)


def snapshot(repo: str, folder: Path) -> None:
    """The files that `resolve` takes, which are all of the folder's."""
    names = [path.name for path in folder.iterdir() if path.name not in ("quantkit.json", "checks.json")]
    snapshot_download(repo, allow_patterns=names)


def pushed(repo: str, folder: Path) -> None:
    how = Publish(repo=repo, visibility="public", license="apache-2.0", license_confirmed=True)
    publish([folder], how, pushing=Pushing(engines=False))


def uploaded(repo: str, folder: Path) -> None:
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)


STEPS: dict[str, Callable[[str, Path], None]] = {
    "plan": planned,
    "resolve": resolved,
    "snapshot": snapshot,
    "push": pushed,
    "upload_folder": uploaded,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--repo", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    began, used = time.perf_counter(), time.process_time()
    STEPS[given.step](given.repo, given.folder)
    told: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
