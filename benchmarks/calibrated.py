"""GPTQ and AWQ beside gptqmodel and llm-compressor: same model, same text, same bits and groups.

    python -m benchmarks.calibrated --peers gptqmodel=PYTHON llm_compressor=PYTHON
        [--rows SCHEME …] [--only TOOL …] [--no-large] [--keep]

Every row is a process that turns the source folder into a quantized folder at its tool's defaults, in as
many threads (`--threads`, one by default) for all; 160 × 512 tokens of the protocol. What is saved is then
measured in one way for all: read by quantkit, run in fp32, beside the source. A random Llama of 252 M
parameters (32 × 512 tokens) shows time and memory where imports do not hide them.

Results are written after every row; `--keep` goes on with the rows that the file has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import quantkit
from benchmarks.peers.measured import weight_files
from benchmarks.peers.quantkit import CALIBRATED
from benchmarks.peers.texts import EVALUATION, SOURCE
from benchmarks.processes import (
    OURS,
    Run,
    Setting,
    carry_out,
    goals,
    listed,
    make_large,
    print_missed,
    pythons,
    ratios,
    versions,
)
from benchmarks.protocol import refused
from benchmarks.record import load, save
from quantkit.run.score import score

NAME = "calibrated"
# scheme → largest KL beside another tool's that will do
GOALS: dict[str, float | None] = {"w4g128": 0.65, "w3g128": 0.5, "w2g64": 0.3, "w4g128_asym": None}
CPU, MEMORY = 1 / 3, 1 / 2
ONE_METHOD = {"gptqmodel": "{}", "llm_compressor": "{}-gptq"}
AWQ = {"gptqmodel": "{}-awq", "llm_compressor": "{}-awq"}
LARGE_SCHEME, LARGE_ROWS = "w4g128", 32


def own_rows(scheme: str) -> list[str]:
    """The default first."""
    return [row for row in CALIBRATED if row.split("-")[1] == scheme]


def peer_rows(scheme: str) -> dict[str, str]:
    """By tool."""
    names = AWQ if scheme.endswith("_asym") else ONE_METHOD
    return {tool: name.format(scheme) for tool, name in names.items()}


def runs(schemes: Sequence[str], tools: Sequence[str], large: bool) -> list[Run]:
    """quantkit's rows and the peers' in turn, so that what is compared runs close together; the peers' AWQ, by
    far the slowest, at the end."""

    def of(scheme: str) -> list[Run]:
        peers = [Run(tool, row) for tool, row in peer_rows(scheme).items()]
        return peers + [Run(OURS, row) for row in own_rows(scheme)]

    found = [run for scheme in schemes if not scheme.endswith("_asym") for run in of(scheme)]
    if large:
        found += [Run(tool, row, large=True) for tool, row in peer_rows(LARGE_SCHEME).items()]
        found += [Run(OURS, own_rows(LARGE_SCHEME)[0], large=True)]
    found += [run for scheme in schemes if scheme.endswith("_asym") for run in of(scheme)]
    return [run for run in found if run.script in tools]


def quality(out: Path) -> dict[str, Any]:
    """Of what any tool saved there."""
    (folder,) = {file.parent for file in weight_files(out)}
    try:
        (model,) = score([str(folder)], baseline=str(SOURCE), texts=(EVALUATION,), offline=True).models
    except quantkit.QuantkitError as error:
        return {"failed": str(error)}
    (found,) = model.scores
    if found.beside is None:
        raise ValueError("nothing to compare with")
    return {
        "bits_per_weight": model.bits_per_weight,
        "convention": found.convention,
        "perplexity": found.perplexity.value,
        "source_perplexity": found.beside.source.value,
        "kl_mean": found.beside.kl_mean,
        "kl_error": found.beside.kl_error,
        "top1_agreement": found.beside.top1_agreement,
    }


def measured(run: Run, setting: Setting, rows: int) -> dict[str, Any]:
    options = ["--texts", str(setting.texts), "--cost-only", "--calibrate"]
    if run.large:
        return carry_out(run, setting, [*options, str(min(rows, LARGE_ROWS))])
    return carry_out(run, setting, [*options, str(rows)], quality)


def compared(found: Mapping[Run, Mapping[str, Any]], large: bool) -> list[dict[str, Any]]:
    """Every row of quantkit beside every peer's of its scheme; the default must keep all goals."""
    made = []
    for scheme in [LARGE_SCHEME] if large else GOALS:
        for row in own_rows(scheme):
            for tool, theirs in peer_rows(scheme).items():
                own, other = found.get(Run(OURS, row, large), {}), found.get(Run(tool, theirs, large), {})
                if "failed" not in own and "failed" not in other and own and other:
                    figures = ratios(own, other)
                    limits = _limits(scheme, row, large)
                    names = {"row": row, "peer": tool, "theirs": theirs}
                    made.append({**names, **figures, "goals": goals(figures, limits)})
    return made


def _limits(scheme: str, row: str, large: bool) -> dict[str, float]:
    most = GOALS[scheme]
    if most is None or row.endswith("-weighted"):
        return {}
    costs = {"process_cpu": CPU, "peak_rss": MEMORY} if row == own_rows(scheme)[0] else {}
    return costs | ({"step_cpu": CPU} if large else {"kl": most})


def kept() -> dict[Run, dict[str, Any]]:
    """What an earlier run left, without what failed."""
    before = load(NAME)
    rows = [(r, False) for r in before.get("rows", ())] + [(r, True) for r in before.get("large_rows", ())]
    return {
        Run(r["tool"], r["row"], large): {
            **{key: value for key, value in r.items() if key != "tool"},
            **({} if r["tool"] == OURS else {"versions": before["peers"][r["tool"]]}),
        }
        for r, large in rows
        if "failed" not in r
    }


def write(found: Mapping[Run, Mapping[str, Any]], setting: Setting, refusals: Mapping[str, str]) -> None:
    comparisons = {large: compared(found, large) for large in (False, True)}
    save(
        NAME,
        {
            "threads": setting.threads,
            "peers": versions(found),
            "rows": listed(found, large=False),
            "refused": refusals,
            "ratios": comparisons[False],
            "large_calibration_rows": LARGE_ROWS,
            "large_rows": listed(found, large=True),
            "large_ratios": comparisons[True],
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = (OURS, *ONE_METHOD)
    parser.add_argument("--peers", nargs="+", default=[], metavar="DIR|PEER=PYTHON")
    parser.add_argument("--rows", nargs="+", default=list(GOALS), choices=list(GOALS), metavar="SCHEME")
    parser.add_argument("--only", nargs="+", default=list(tools), choices=tools, metavar="TOOL")
    parser.add_argument("--no-large", action="store_true")
    parser.add_argument("--keep", action="store_true", help="rows that the results file has")
    parser.add_argument("--calibrate", type=int, default=160, metavar="N", help="fewer rows, for a trial")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=5400, help="after which a process is given up")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    peers = pythons(given.peers, list(ONE_METHOD))
    tools = [tool for tool in given.only if tool == OURS or tool in peers]
    refusals = refused(CALIBRATED)
    found = kept() if given.keep else {}
    todo = [
        run
        for run in runs(given.rows, tools, not given.no_large)
        if run not in found and not (run.script == OURS and run.row in refusals)
    ]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        setting = Setting(Path(folder), {OURS: sys.executable, **peers}, given.threads, given.seconds)
        setting.write_texts()
        if any(run.large for run in todo):
            make_large(setting.large)
        with ThreadPoolExecutor(given.jobs) as pool:
            results = pool.map(lambda run: measured(run, setting, given.calibrate), todo)
            for run, row in zip(todo, results, strict=True):
                found[run] = row
                write(found, setting, refusals)
    print_missed([*compared(found, large=False), *compared(found, large=True)])


if __name__ == "__main__":
    main()
