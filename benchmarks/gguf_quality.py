"""GGUF files beside llama.cpp's own: same source, same types, same importance matrix, same bytes.

    python -m benchmarks.gguf_quality [--types TYPE …] [--calibrate N] [--chunks N] [--no-engine]

One sweep makes all files of quantkit: its default, and rounded to nearest on scales searched by importance
(`-weighted`), which is what llama.cpp's quantizer does too. llama.cpp quantizes our F16 file with the
importance matrix of the same 160 × 512 tokens. All files are measured in one way: read by quantkit, run in
fp32 beside the source, on the second halves of 64 windows of 512 tokens, as `llama-perplexity` scores. Then
llama.cpp itself runs every file on the same tokens. *Weighted error* is Σ importance · (ŵ − w)² of a tensor:
rows `-weighted` beside llama.cpp's, tensor by tensor.

Needs `llama-cpp-python`. The results file is written after every type.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import quantkit
from benchmarks.peers import llamacpp
from benchmarks.peers.texts import CALIBRATION, EVALUATION, SOURCE
from benchmarks.processes import OURS, goals, print_missed
from benchmarks.protocol import recipe
from benchmarks.record import save
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.gguf import container
from quantkit.gguf.blocks import TYPES, unpack
from quantkit.gguf.imatrix import Imatrix
from quantkit.gguf.mixes import MIXES
from quantkit.run.rows import evaluation_rows
from quantkit.run.score import Scored, score
from quantkit.tensors import dequantize

NAME = "gguf_quality"
# type → KL that the protocol's page gives for llama.cpp's own tools (engine with 8-bit inputs, F16 baseline)
ROWS: dict[str, float | None] = {
    "q8_0": 0.000314,
    "q6_k": 0.00185,
    "q5_k_m": 0.00374,
    "q4_k_m": 0.01113,
    "q4_0": None,
    "iq4_xs": 0.01393,
    "q3_k_m": 0.03542,
    "iq3_s": 0.04362,
    "iq3_xxs": None,
    "q2_k": 0.15304,
    "iq2_m": None,
    "iq2_xs": 0.20836,
    "iq2_xxs": None,
    "iq1_m": None,
}
# type → largest KL beside llama.cpp's that will do
GOALS = {"q4_k_m": 0.75, "q3_k_m": 0.6, "q2_k": 0.6, "iq3_s": 0.6, "iq2_xs": 0.6}
WEIGHTED = "-weighted"
FLOATS = "f16"


@dataclass(frozen=True)
class Setting:
    """What all rows share. `windows` are token rows whose positions count from `score_from` on."""

    base: Path
    imatrix: Imatrix
    evaluation: quantkit.EvalText
    windows: Sequence[Sequence[int]]
    score_from: int
    engine: bool

    @property
    def floats(self) -> Path:
        """The source as one F16 file."""
        return self.file(FLOATS)

    def file(self, row: str) -> Path:
        """Of one of quantkit's rows."""
        (found,) = (self.base / row).glob("*.gguf")
        return found


def own_rows(types: Sequence[str]) -> dict[str, str]:
    """Row → shorthand; the default first. What is rounded to nearest by default has one row."""
    found = {}
    for name in types:
        found[name] = f"gguf:{name}"
        if quantkit.parse_targets(found[name])[0].method != "rtn":
            found[name + WEIGHTED] = f"gguf:{name}@method=rtn,scales=weighted"
    return found


def make(types: Sequence[str], base: Path, calibration: quantkit.Calibration) -> Imatrix:
    """All files of quantkit in one sweep; the importance matrix of the same tokens."""
    rows = {FLOATS: f"gguf:{FLOATS}", **own_rows(types)}
    asked = recipe(rows, base, calibration=calibration)
    quantkit.convert(replace(asked, eval=quantkit.Eval(enabled=False)))
    return quantkit.collect_imatrix(str(SOURCE), base / "imatrix.gguf", calibration=calibration).imatrix


def measured_rows(name: str, setting: Setting) -> list[dict[str, Any]]:
    """quantkit's rows of a type and llama.cpp's, scored together."""
    theirs = setting.base / f"{name}.gguf"
    llamacpp.quantize(setting.floats, theirs, MIXES[name], setting.imatrix)
    files = {(OURS, row): setting.file(row) for row in own_rows([name])}
    files[llamacpp.NAME, name] = theirs
    scored = score(
        [str(file) for file in files.values()],
        baseline=str(SOURCE),
        texts=(setting.evaluation,),
        offline=True,
    )
    rows = []
    for ((tool, row), file), model in zip(files.items(), scored.models, strict=True):
        engine = llamacpp.perplexity(file, setting.windows, setting.score_from) if setting.engine else None
        rows.append({"tool": tool, "row": row, **quality(model), "engine_perplexity": engine})
    rows[-1] |= {"reference_kl": ROWS[name], "weighted_error": weighted_errors(name, theirs, setting)}
    theirs.unlink()
    return rows


def quality(model: Scored) -> dict[str, Any]:
    (found,) = model.scores
    if found.beside is None:
        raise ValueError("nothing to compare with")
    return {
        "size_bytes": model.size_bytes,
        "bits_per_weight": model.bits_per_weight,
        "perplexity": found.perplexity.value,
        "source_perplexity": found.beside.source.value,
        "kl_mean": found.beside.kl_mean,
        "kl_error": found.beside.kl_error,
        "top1_agreement": found.beside.top1_agreement,
    }


def weighted_errors(name: str, theirs: Path, setting: Setting) -> dict[str, Any]:
    """Ratios quantkit's nearest / llama.cpp of Σ importance · (ŵ − w)², over tensors of the same type."""
    *_, row = own_rows([name])
    own = setting.file(row)
    weights = dict(tensors(setting.floats, setting.imatrix))
    kinds = [types(file) for file in (own, theirs)]
    same = [name for name in weights if kinds[0][name] == kinds[1][name]]
    found = {}
    for file in (own, theirs):
        for name, values in tensors(file, setting.imatrix):
            importance = setting.imatrix.entries[name].importance()[0]
            error = float(((values - weights[name]).square() * importance).sum(dtype=torch.float64))
            found[file, name] = error
    ratios = [found[own, name] / found[theirs, name] for name in same if found[theirs, name]]
    return {
        "tensors": len(ratios),
        "worse": sum(ratio > 1 for ratio in ratios),
        "worst": max(ratios, default=None),
        "median": median(ratios) if ratios else None,
    }


def types(file: Path) -> Mapping[str, str]:
    return {name: tensor.kind for name, tensor in container.open_file(file).tensors.items()}


def tensors(file: Path, imatrix: Imatrix) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 values) of what the importance matrix knows."""
    opened = container.open_file(file)
    for name in imatrix.entries:
        data = opened.read_bytes(name)
        yield name, dequantize(unpack(data.flatten(0, -2), TYPES[opened.tensors[name].kind])).float()


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every row of quantkit beside llama.cpp's of its type."""
    made = []
    theirs = {r["row"]: r for r in rows if r["tool"] == llamacpp.NAME}
    for own in (r for r in rows if r["tool"] == OURS):
        name = own["row"].removesuffix(WEIGHTED)
        other = theirs[name]
        figures = {
            "kl": own["kl_mean"] / other["kl_mean"],
            "size": own["size_bytes"] / other["size_bytes"],
        }
        limits = {"kl": GOALS[name]} if own["row"] in GOALS else {}
        names = {"row": own["row"], "peer": llamacpp.NAME, "theirs": name}
        made.append({**names, **figures, "goals": goals(figures, limits)})
    return made


def write(rows: Sequence[Mapping[str, Any]], convention: str, calibration: quantkit.Calibration) -> None:
    save(
        NAME,
        {
            "peers": llamacpp.VERSIONS,
            "convention": convention,
            "calibration_rows": calibration.rows,
            "rows": list(rows),
            "ratios": compared(rows),
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="TYPE")
    parser.add_argument("--calibrate", type=int, default=160, metavar="N", help="fewer rows, for a trial")
    parser.add_argument("--chunks", type=int, default=64, help="fewer windows, for a trial")
    parser.add_argument("--no-engine", action="store_true", help="files are not run in llama.cpp")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    calibration = replace(CALIBRATION, rows=given.calibrate)
    evaluation = replace(EVALUATION, style="llamacpp", chunks=given.chunks)
    ((evaluated, windows),) = evaluation_rows((evaluation,), load_tokenizer(SOURCE))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        imatrix = make(given.types, Path(folder), calibration)
        setting = Setting(
            *(Path(folder), imatrix, evaluation),
            *(windows.tokens.tolist(), evaluated.score_from, not given.no_engine),
        )
        for name in given.types:
            rows += (made := measured_rows(name, setting))
            cells = (f"{r['tool']} {r['row']} {r['kl_mean']:.5f} ({r['perplexity']:.3f})" for r in made)
            print(f"{name}: {', '.join(cells)}", flush=True)
            write(rows, evaluated.convention, calibration)
    print_missed(compared(rows))


if __name__ == "__main__":
    main()
