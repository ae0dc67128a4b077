"""The data-free and 8-bit family, method by method, beside the tools that do the same.

    python -m benchmarks.data_free [--peers DIR | PEER=PYTHON …] [--rows ROW …] [--no-large]

DIR holds a virtual environment for each peer, named after its script in benchmarks/peers/. Every row of
quantkit and of the peers is one process that turns the source folder into a quantized folder, in as many
threads (`--threads`, one by default) for all; rows that are compared run beside each other. Quality of
quantkit's rows is what one sweep over all of them measures, of the peers' what their own engine gives on
the same tokens. Protocol of the texts: `../shared/models/README.md`. A random Llama of 250 M parameters
shows time and memory where imports do not hide them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

import quantkit
from benchmarks.memory import write_checkpoint
from benchmarks.peers.measured import weight_error, weight_files
from benchmarks.peers.pairs import LARGE, PAIRS, PEERS, Pair
from benchmarks.peers.quantkit import ROWS, UNCOSTED, weights
from benchmarks.peers.texts import CALIBRATION, EVALUATION, SOURCE
from benchmarks.record import ROOT, save

OURS = "quantkit"
SECONDS = 1200


@dataclass(frozen=True)
class Run:
    """One process: a row of a script, on the shared model or the large one."""

    script: str
    row: str
    large: bool = False


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    base: Path
    pythons: Mapping[str, str]
    threads: int

    @property
    def texts(self) -> Path:
        return self.base / "texts.safetensors"

    @property
    def large(self) -> Path:
        return self.base / "large"


def carry_out(run: Run, setting: Setting) -> dict[str, Any]:
    """What the script measured, or why it failed; its output folder is removed."""
    with tempfile.TemporaryDirectory(dir=setting.base) as folder:
        out, result = Path(folder) / "out", Path(folder) / "result.json"
        command = [setting.pythons[run.script], "-m", f"benchmarks.peers.{run.script}", run.row]
        command += ["--source", str(setting.large if run.large else SOURCE)]
        command += ["--out", str(out), "--result", str(result)]
        command += [] if run.large or run.script == OURS else ["--texts", str(setting.texts)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setting.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"row": run.row, "failed": f"took more than {SECONDS} s"}
        found: dict[str, Any]
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            found = {"row": run.row, "failed": placeless(lines[-1]) if lines else f"exit {done.returncode}"}
        else:
            found = json.loads(result.read_text())
    cost = found.get("failed") or (
        f"{found['process_cpu_seconds']:6.1f} s ({found['step_cpu_seconds']:.2f} s without imports), "
        f"{found['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    print(f"{run.script:15} {run.row:26}{' large' if run.large else '':6} {cost}", flush=True)
    return found


def placeless(text: str) -> str:
    """Without the folders of this machine, which are nobody's business."""
    return re.sub(r"(/[\w.+-]+)+/", "…/", text)[:300]


def runs(names: Sequence[str], peers: Sequence[str], large: bool) -> list[Run]:
    """Every process once, the two of a pair one after the other."""
    wanted: dict[Run, None] = {}
    for pairs, of_large in ((PAIRS, False), (LARGE if large else (), True)):
        for pair in pairs:
            if pair.row in names:
                if pair.row not in UNCOSTED:
                    wanted[Run(OURS, pair.row, of_large)] = None
                if pair.peer in peers:
                    wanted[Run(pair.peer, pair.theirs, of_large)] = None
    return list(wanted | {Run(OURS, name): None for name in names if name not in UNCOSTED})


def possible(names: Sequence[str]) -> dict[str, str]:
    """The rows that this quantkit refuses, with its reason."""
    refused = {}
    for name in names:
        try:
            quantkit.plan(recipe([name], Path("out"))).check()
        except quantkit.QuantkitError as error:
            refused[name] = str(error)
    return refused


def recipe(names: Sequence[str], out: Path) -> quantkit.Recipe:
    targets = []
    for name in names:
        joint = "," if "@" in ROWS[name] else "@"
        targets += quantkit.parse_targets(f"{ROWS[name]}{joint}name={name}")
    return quantkit.Recipe(
        source=str(SOURCE),
        targets=tuple(targets),
        output=quantkit.Output(dir=str(out)),
        calibration=CALIBRATION,
        eval=quantkit.Eval(perplexity=(EVALUATION,)),
    )


def qualities(names: Sequence[str], base: Path) -> dict[str, dict[str, Any]]:
    """Perplexity, KL and weight error of all rows, from one sweep."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        report = quantkit.convert(recipe(names, Path(folder)))
        folders = {name: Path(folder) / name for name in names}
        errors = {name: weight_error(SOURCE, weights(made, name)) for name, made in folders.items()}
        sizes = {name: sum(f.stat().st_size for f in weight_files(made)) for name, made in folders.items()}
    found = {}
    for name, target in zip(names, report.targets, strict=True):
        quality = target.quality[0]
        found[name] = {
            "row": name,
            "target": ROWS[name],
            "size_bytes": sizes[name],
            "weight_error": errors[name],
            "bits_per_weight": target.bits_per_weight,
            "perplexity": quality.target.value,
            "source_perplexity": quality.source.value,
            "convention": quality.convention,
            "kl_mean": quality.kl_mean,
            "kl_error": quality.kl_error,
            "top1_agreement": quality.top1_agreement,
        }
    return found


RATIOS = {
    "process_cpu": "process_cpu_seconds",
    "step_cpu": "step_cpu_seconds",
    "peak_rss": "peak_rss_bytes",
    "size": "size_bytes",
    "weight_error": "weight_error",
    "kl": "kl_mean",
}


def comparison(pair: Pair, own: Mapping[str, Any], theirs: Mapping[str, Any], large: bool) -> dict[str, Any]:
    """Ratios quantkit / peer of whatever both have, and whether they are what they must be."""
    ratios = {
        name: own[key] / theirs[key] for name, key in RATIOS.items() if own.get(key) and theirs.get(key)
    }
    limits: dict[str, float] = {}
    if pair.same:
        limits["process_cpu"] = 1.0
        if large:
            limits |= {"step_cpu": 1.0, "peak_rss": 0.5}
    if not large:
        limits |= {k: v for k, v in (("weight_error", pair.error), ("kl", pair.kl)) if v is not None}
    goals = [
        {"what": name, "limit": limit, "found": ratios[name], "met": ratios[name] <= limit}
        for name, limit in limits.items()
        if name in ratios
    ]
    return {
        "row": pair.row,
        "peer": pair.peer,
        "theirs": pair.theirs,
        "same": pair.same,
        **ratios,
        "goals": goals,
    }


def compared(found: Mapping[Run, Mapping[str, Any]], large: bool) -> list[dict[str, Any]]:
    made = []
    for pair in LARGE if large else PAIRS:
        own, theirs = found.get(Run(OURS, pair.row, large)), found.get(Run(pair.peer, pair.theirs, large))
        if own is not None and theirs is not None and "failed" not in {*own, *theirs}:
            made.append(comparison(pair, own, theirs, large))
    return made


def pythons(given: Sequence[str]) -> dict[str, str]:
    """Python of each peer, from ``PEER=PYTHON`` or a folder of virtual environments."""
    found = {}
    for text in given:
        name, equals, python = text.partition("=")
        if equals and name in PEERS:
            found[name] = python
        elif not equals and Path(text).is_dir():
            inside = {peer: Path(text) / peer / "bin" / "python" for peer in PEERS}
            found |= {peer: str(python.absolute()) for peer, python in inside.items() if python.exists()}
        else:
            raise SystemExit(f"{text!r} is neither PEER=PYTHON nor a folder; peers: {', '.join(PEERS)}")
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", default=[], metavar="DIR|PEER=PYTHON")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--no-large", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    peers = pythons(given.peers)
    refused = possible(given.rows)
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    names = [name for name in given.rows if name not in refused]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        setting = Setting(Path(folder), {OURS: sys.executable, **peers}, given.threads)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.texts", str(setting.texts)], cwd=ROOT, check=True
        )
        large_bytes = None if given.no_large else make_large(setting.large)
        todo = runs(names, list(peers), not given.no_large)
        with ThreadPoolExecutor(given.jobs) as pool:
            results = pool.map(functools.partial(carry_out, setting=setting), todo)
            found = dict(zip(todo, results, strict=True))
        for name, quality in qualities(names, setting.base).items():
            found.setdefault(Run(OURS, name), {}).update(quality)
    # what is recorded names peers and not where they lie
    sys.argv[1:] = [
        placeless(word.partition("=")[0] + "=PYTHON" if "=" in word else word) for word in sys.argv[1:]
    ]
    comparisons = {large: compared(found, large) for large in (False, True)}
    save(
        "data_free",
        {
            "threads": given.threads,
            "jobs": given.jobs,
            "peers": versions(found),
            "rows": listed(found, large=False),
            "refused": refused,
            "ratios": comparisons[False],
            "large_checkpoint_bytes": large_bytes,
            "large_rows": listed(found, large=True),
            "large_ratios": comparisons[True],
        },
    )
    for c in (*comparisons[False], *comparisons[True]):
        missed = [f"{g['what']} {g['found']:.2f} > {g['limit']:g}" for g in c["goals"] if not g["met"]]
        if missed:
            print(f"short of the goal: {c['row']} beside {c['peer']} {c['theirs']}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
