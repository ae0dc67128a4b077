"""Rows of quantkit and of other tools: each a process that turns a source folder into a quantized folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from benchmarks.memory import write_checkpoint
from benchmarks.peers.texts import SOURCE
from benchmarks.record import ROOT, placeless

OURS = "quantkit"
# name of a ratio → what both sides measured
RATIOS = {
    "process_cpu": "process_cpu_seconds",
    "step_cpu": "step_cpu_seconds",
    "peak_rss": "peak_rss_bytes",
    "size": "size_bytes",
    "weight_error": "weight_error",
    "kl": "kl_mean",
}


@dataclass(frozen=True)
class Run:
    """One process: a row of a script, on the shared model or the large one."""

    script: str
    row: str
    large: bool = False


@dataclass(frozen=True)
class Setting:
    """What all runs share. `seconds`: after so many a process is given up."""

    base: Path
    pythons: Mapping[str, str]
    threads: int
    seconds: int = 1200

    @property
    def texts(self) -> Path:
        return self.base / "texts.safetensors"

    @property
    def large(self) -> Path:
        return self.base / "large"

    def write_texts(self) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.texts", str(self.texts)]
        subprocess.run(command, cwd=ROOT, check=True)


def carry_out(
    run: Run,
    setting: Setting,
    options: Sequence[str] = (),
    look: Callable[[Path], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What the script measured, or why it failed, and what `look` finds in its output folder, which is removed."""
    with tempfile.TemporaryDirectory(dir=setting.base) as folder:
        out = Path(folder) / "out"
        found = _measured(run, setting, options, out)
        if look is not None and "failed" not in found:
            found |= look(out)
    cost = found.get("failed") or (
        f"{found['process_cpu_seconds']:6.1f} s ({found['step_cpu_seconds']:.2f} s without imports), "
        f"{found['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    kl = f", KL {found['kl_mean']:.5f}" if "kl_mean" in found else ""
    print(f"{run.script:15} {run.row:26}{' large' if run.large else '':6} {cost}{kl}", flush=True)
    return found


def _measured(run: Run, setting: Setting, options: Sequence[str], out: Path) -> dict[str, Any]:
    result = out.parent / "result.json"
    command = [setting.pythons[run.script], "-m", f"benchmarks.peers.{run.script}", run.row]
    command += ["--source", str(setting.large if run.large else SOURCE)]
    command += ["--out", str(out), "--result", str(result), *options]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setting.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=setting.seconds
        )
    except subprocess.TimeoutExpired:
        return {"row": run.row, "failed": f"took more than {setting.seconds} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"row": run.row, "failed": placeless(lines[-1]) if lines else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def ratios(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """quantkit / other of whatever both have."""
    return {name: own[key] / theirs[key] for name, key in RATIOS.items() if own.get(key) and theirs.get(key)}


def goals(found: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Whether ratios are at most what they must be."""
    return [
        {"what": name, "limit": limit, "found": found[name], "met": found[name] <= limit}
        for name, limit in limits.items()
        if name in found
    ]


def print_missed(comparisons: Sequence[Mapping[str, Any]]) -> None:
    for c in comparisons:
        missed = [f"{g['what']} {g['found']:.2f} > {g['limit']:g}" for g in c["goals"] if not g["met"]]
        if missed:
            print(f"short of the goal: {c['row']} beside {c['peer']} {c['theirs']}: {', '.join(missed)}")


def pythons(given: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    """Python of each peer, from ``PEER=PYTHON`` or a folder of virtual environments."""
    found = {}
    for text in given:
        name, equals, python = text.partition("=")
        if equals and name in peers:
            found[name] = python
        elif not equals and Path(text).is_dir():
            inside = {peer: Path(text) / peer / "bin" / "python" for peer in peers}
            found |= {peer: str(python.absolute()) for peer, python in inside.items() if python.exists()}
        else:
            raise SystemExit(f"{text!r} is neither PEER=PYTHON nor a folder; peers: {', '.join(peers)}")
    return found


def make_large(folder: Path) -> int:
    """A random Llama of 252 M parameters; returns its bytes."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return write_checkpoint(folder, config)


def listed(found: Mapping[Run, Mapping[str, Any]], large: bool) -> list[dict[str, Any]]:
    return [
        {"tool": run.script, **{name: value for name, value in measured.items() if name != "versions"}}
        for run, measured in found.items()
        if run.large == large
    ]


def versions(found: Mapping[Run, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Of what each peer's Python has."""
    return {
        run.script: dict(f["versions"]) for run, f in found.items() if run.script != OURS and "versions" in f
    }
