"""Writes results of benchmarks: JSON with what was run, on which commit, with which versions.

Absolute times of a shared machine mean little; every figure that matters is a ratio of things
measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "gptqmodel",
    "llmcompressor",
    "compressed-tensors",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, marked when the tree had changes."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "quantkit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processors": os.cpu_count(), "memory_bytes": memory, "architecture": platform.machine()}


def placeless(text: str) -> str:
    """Without the folders of this machine, which are nobody's business."""
    return re.sub(r"(/[\w.+-]+)+/", "…/", text)[:300]


def load(name: str) -> dict[str, Any]:
    """What benchmarks/results/<name>.json holds; empty when there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def save(name: str, content: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json and say where; what was there before is replaced as a whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)
    command = " ".join(["python -m", module, *map(placeless, sys.argv[1:])])
    facts = {
        "benchmark": name,
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**facts, **content}, indent=2) + "\n")
    partial.replace(path)
    print(f"wrote results/{path.name}", flush=True)
    return path
