"""What each step of GPTQ brings: layer loss, KL and perplexity at 4, 3 and 2 bits on two architectures.

    python -m benchmarks.ablation [--rows MODEL:SCHEME …] [--only STEP …] [--keep] [--second-model DIR]

Steps are taken in the order of the table, each with all before it; one sweep makes all rows of a model and a
scheme, on one set of statistics. Layer loss is the mean over weights of ‖(Ŵ − W)Xᵀ‖² / ‖WXᵀ‖² on calibration
tokens (rows on their own stream: of that stream). Texts: the protocol of `../shared/models/README.md`. The
second model is trained first if its folder is not there, see `benchmarks.second_model`. Results are written
after every sweep; `--keep` goes on with the rows that the file has.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import quantkit
from benchmarks.peers.texts import CALIBRATION, EVALUATION, SOURCE
from benchmarks.protocol import recipe, refused
from benchmarks.record import load, save
from benchmarks.second_model import FOLDER, second_model
from quantkit.methods import gptq
from quantkit.progress import BlockInfo, Silent
from quantkit.run.report import TargetReport

NAME = "ablation"


# The share of the corrected target that GPTQ's own documentation recommends.
_SHARE = 0.25


@dataclass(frozen=True)
class Step:
    """What is added, and the options of the target that has it and all before it."""

    name: str
    adds: str
    options: str


def _steps() -> tuple[Step, ...]:
    """Those whose options this quantkit has; a refinement that it lacks needs no switching off."""
    known = {field.name for field in dataclasses.fields(gptq.Params)}

    def without(*names: str) -> str:
        values = {"polish": "0", "refit": "0", "accept": "false"}
        return "".join(f",{name}={values[name]}" for name in names if name in known)

    rescaled, unrefined = "method=gptq,transforms=awq", without("polish", "refit", "accept")
    found = [
        Step("rtn", "round to nearest, absmax scales", "method=rtn,scales=absmax"),
        Step("scales", "importance-weighted scales", "method=rtn,scales=weighted"),
        Step("feedback", "error feedback, file order", f"method=gptq,act_order=off{unrefined}"),
        Step("order", "group-aware order", f"method=gptq{unrefined}"),
        Step("pre-scale", "columns rescaled (AWQ)", f"{rescaled}{unrefined}"),
        Step("polish", "coordinate descent", f"{rescaled}{without('refit', 'accept')}"),
        Step("refit", "scales refitted to the codes", f"{rescaled}{without('accept')}"),
        Step("accept", "refinements judged on held-out tokens", rescaled),
        Step("stream", "calibrated on its own stream", f"{rescaled},feedback=true"),
        Step("corrected", "corrected target", f"{rescaled},feedback=true,corrected={_SHARE}"),
        Step("default", "the default: without rescaling", "method=gptq"),
        Step("default-stream", "the default on its own stream", "method=gptq,feedback=true"),
        Step("default-corrected", "and corrected", f"method=gptq,feedback=true,corrected={_SHARE}"),
    ]
    return tuple(step for step in found if "corrected" in known or "corrected=" not in step.options)


STEPS = {step.name: step for step in _steps()}
MODELS = {
    "wiki-llama-7m": ("gptq", ("w4g128", "w3g128", "w2g64")),
    "qwen3-moe": ("compressed_tensors", ("w4g64", "w3g64", "w2g64")),
}
ROWS = tuple(f"{model}:{scheme}" for model, (_, schemes) in MODELS.items() for scheme in schemes)


class Printed(Silent):
    """A line per block."""

    def block(self, index: int, info: BlockInfo) -> None:
        print(f"  block {index}: {info.seconds:.0f} s", flush=True)


def targets(row: str, steps: Sequence[str]) -> dict[str, str]:
    """Shorthands by step."""
    model, _, scheme = row.partition(":")
    return {name: f"{MODELS[model][0]}:{scheme}@{STEPS[name].options}" for name in steps}


def measured(step: str, target: TargetReport) -> dict[str, Any]:
    (quality,) = target.quality
    losses = [tensor.error for tensor in target.tensors if tensor.metric == "output"]
    return {
        "step": step,
        "adds": STEPS[step].adds,
        "options": STEPS[step].options,
        "bits_per_weight": target.bits_per_weight,
        "layer_loss": sum(losses) / len(losses) if losses else None,
        "kl_mean": quality.kl_mean,
        "kl_error": quality.kl_error,
        "perplexity": quality.target.value,
        "source_perplexity": quality.source.value,
        "perplexity_ratio": quality.ratio.value,
        "perplexity_ratio_error": quality.ratio.error,
        "helped": target.fallbacks,
    }


def sweep(source: Path, shorthands: Mapping[str, str], small: bool) -> list[dict[str, Any]]:
    """All steps of one model and scheme. `small`: a trial of the script."""
    calibration, evaluation = CALIBRATION, EVALUATION
    if small:
        calibration = dataclasses.replace(calibration, rows=8, length=128)
        evaluation = dataclasses.replace(evaluation, context=128, chunks=4)
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe(shorthands, Path(folder), source=source, calibration=calibration, evaluation=evaluation)
        report = quantkit.convert(plan, progress=Printed())
    found = [measured(step, target) for step, target in zip(shorthands, report.targets, strict=True)]
    for row in found:
        loss = "" if row["layer_loss"] is None else f"layer loss {row['layer_loss']:.5f}"
        print(f"  {row['step']:18} {loss} KL {row['kl_mean']:.5f} perplexity {row['perplexity']:.3f}")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="MODEL:SCHEME")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=list(STEPS), metavar="STEP")
    parser.add_argument("--keep", action="store_true", help="rows that the results file has")
    parser.add_argument("--second-model", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="few tokens: a trial of the script")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    sweeps: list[dict[str, Any]] = load(NAME).get("sweeps", []) if given.keep else []
    done = {found["row"] for found in sweeps}
    for row in given.rows:
        if row in done:
            continue
        source = SOURCE if row.startswith("wiki-llama-7m") else second_model(given.second_model)
        shorthands = targets(row, given.only)
        refusals = refused(shorthands, source)
        print(f"{row}: {len(shorthands) - len(refusals)} targets", flush=True)
        possible = {step: text for step, text in shorthands.items() if step not in refusals}
        sweeps.append({"row": row, "refused": refusals, "steps": sweep(source, possible, given.small)})
        save(NAME, {"calibration_rows": CALIBRATION.rows, "sweeps": sweeps})


if __name__ == "__main__":
    main()
