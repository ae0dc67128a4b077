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
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import quantkit
from benchmarks.peers.measured import weight_error, weight_files
from benchmarks.peers.pairs import LARGE, PAIRS, PEERS, Pair
from benchmarks.peers.quantkit import ROWS, UNCOSTED, weights
from benchmarks.peers.texts import SOURCE
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
from benchmarks.protocol import recipe, refused
from benchmarks.record import save


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


def texts_for(run: Run, setting: Setting) -> list[str]:
    """Tokens for the peers, which measure their quality as well; quantkit's is measured on one sweep."""
    return [] if run.large or run.script == OURS else ["--texts", str(setting.texts)]


def qualities(names: Sequence[str], base: Path) -> dict[str, dict[str, Any]]:
    """Perplexity, KL and weight error of all rows, from one sweep."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        report = quantkit.convert(recipe({name: ROWS[name] for name in names}, Path(folder)))
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


def comparison(pair: Pair, own: Mapping[str, Any], theirs: Mapping[str, Any], large: bool) -> dict[str, Any]:
    """Ratios quantkit / peer of whatever both have, and whether they are what they must be."""
    found = ratios(own, theirs)
    limits: dict[str, float] = {}
    if pair.same:
        limits["process_cpu"] = 1.0
        if large:
            limits |= {"step_cpu": 1.0, "peak_rss": 0.5}
    if not large:
        limits |= {k: v for k, v in (("weight_error", pair.error), ("kl", pair.kl)) if v is not None}
    return {
        "row": pair.row,
        "peer": pair.peer,
        "theirs": pair.theirs,
        "same": pair.same,
        **found,
        "goals": goals(found, limits),
    }


def compared(found: Mapping[Run, Mapping[str, Any]], large: bool) -> list[dict[str, Any]]:
    made = []
    for pair in LARGE if large else PAIRS:
        own, theirs = found.get(Run(OURS, pair.row, large)), found.get(Run(pair.peer, pair.theirs, large))
        if own is not None and theirs is not None and "failed" not in {*own, *theirs}:
            made.append(comparison(pair, own, theirs, large))
    return made


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
    peers = pythons(given.peers, PEERS)
    refusals = refused({name: ROWS[name] for name in given.rows})
    for name, reason in refusals.items():
        print(f"{name}: {reason}")
    names = [name for name in given.rows if name not in refusals]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        setting = Setting(Path(folder), {OURS: sys.executable, **peers}, given.threads)
        setting.write_texts()
        large_bytes = None if given.no_large else make_large(setting.large)
        todo = runs(names, list(peers), not given.no_large)
        with ThreadPoolExecutor(given.jobs) as pool:
            results = pool.map(lambda run: carry_out(run, setting, texts_for(run, setting)), todo)
            found = dict(zip(todo, results, strict=True))
        for name, quality in qualities(names, setting.base).items():
            found.setdefault(Run(OURS, name), {}).update(quality)
    comparisons = {large: compared(found, large) for large in (False, True)}
    save(
        "data_free",
        {
            "threads": given.threads,
            "jobs": given.jobs,
            "peers": versions(found),
            "rows": listed(found, large=False),
            "refused": refusals,
            "ratios": comparisons[False],
            "large_checkpoint_bytes": large_bytes,
            "large_rows": listed(found, large=True),
            "large_ratios": comparisons[True],
        },
    )
    print_missed([*comparisons[False], *comparisons[True]])


if __name__ == "__main__":
    main()
