"""Where the time of a GPTQ conversion goes, stage by stage, against the operations that each stage must do.

    python -m benchmarks.time_split [--rows block …] [--target gptq:w4g128] [--hidden 4096] [--intermediate 11008]

`block` is one decoder block of a Llama 4,096 wide with random weights, `model` the reference checkpoint under
the protocol of `../shared/models/README.md`. Whole conversions run in this process with the real functions
wrapped: processor seconds of a stage are its own, without those of stages it calls. Operations are counted
from shapes, 2 for a multiplication with its addition:

    forward        2·tokens·weights + 4·tokens·length·width of attention
    gram           2·tokens·in²                     of every site, held-out tokens twice
    factorisation  in³/3                            once more without the held-out tokens
    feedback       out·in²
    polish         2·out·in²                        once to start, then once a pass
    refit          2·out·in²                        a time
    judging        2·rows·in²                       on the rows of the trial

Beside them stands what one plain matrix product of the machine reaches. `share_at_262144_tokens` is what
follows for 128 rows of 2,048 tokens, where forward pass and gram count for more.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig

import quantkit
from benchmarks.memory import write_checkpoint
from benchmarks.peers.texts import CALIBRATION, SOURCE
from benchmarks.record import load, save
from quantkit.calibrate import statistics
from quantkit.methods import gptq
from quantkit.model.runtime import LoadedBlock, Runtime
from quantkit.numerics import cholesky, grids, solve
from quantkit.numerics.curvature import Curvature
from quantkit.numerics.polish import polish
from quantkit.run import quantize
from quantkit.run.export import Exporter
from quantkit.run.store import RunStore

NAME = "time_split"
MANY_TOKENS = 262144
BY_TOKENS = ("forward", "gram")
Operations = Callable[..., float]


class Meter:
    """Processor seconds, operations and calls by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.outputs = 0  # of the weights that are polished
        self._open = ["other"]
        self._since = time.process_time()

    @property
    def stage(self) -> str:
        return self._open[-1]

    @contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        self.tick()
        self._open.append(stage)
        self.calls[stage] += 1
        try:
            yield
        finally:
            self.tick()
            self._open.pop()

    def tick(self) -> None:
        """Time until now is that of the innermost stage."""
        now = time.process_time()
        self.seconds[self.stage] += now - self._since
        self._since = now

    def wrapped(self, stage: str, function: Callable[..., Any], operations: Operations | None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.inside(stage):
                found = function(*args, **kwargs)
            if operations is not None:
                self.operations[stage] += operations(*args, **kwargs)
            return found

        return call

    def product(self, curvature: Curvature, start: int, stop: int) -> None:
        """Rows of a gram asked for by the polish meet all its weights."""
        if self.stage == "polish":
            self.operations["polish"] += 2.0 * (stop - start) * curvature.width * self.outputs


def forward(loaded: LoadedBlock, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> float:
    tokens, length = hidden.shape[0] * hidden.shape[1], hidden.shape[1]
    shapes = [weight.shape for weight in loaded.block.weights()]
    attention = next(w.shape[1] for w in loaded.block.weights() if w.name.endswith("o_proj.weight"))
    return 2.0 * tokens * sum(out * width for out, width in shapes) + 4.0 * tokens * length * attention


def gram(stats: statistics.Statistics, x: torch.Tensor, **_kwargs: Any) -> float:
    return 0.0 if stats.gram is None else 2.0 * x.numel() * x.shape[-1]


def factorisation(curvature: Curvature, _damp: float) -> float:
    return curvature.width**3 / 3


def feedback(w_io: torch.Tensor, *_args: Any) -> float:
    return float(w_io.shape[1]) * w_io.shape[0] ** 2


def refit(units_io: torch.Tensor, *_args: Any) -> float:
    return 2.0 * units_io.shape[1] * units_io.shape[0] ** 2


def judging(weight: torch.Tensor, *_args: Any) -> float:
    return 2.0 * weight.shape[0] * weight.shape[1] ** 2


# owner, name there, stage, operations
WRAPPED: tuple[tuple[Any, str, str, Operations | None], ...] = (
    (LoadedBlock, "run", "forward", forward),
    (statistics, "update", "gram", gram),
    (cholesky, "factor", "factorisation", factorisation),
    (grids, "choose", "scale search", None),
    (solve, "round_with_feedback", "feedback", feedback),
    (solve, "refit", "refit", refit),
    (gptq, "loss", "judging", judging),
    (quantize, "relative_error", "error figures", None),
    (Runtime, "load", "reading", None),
    (Runtime, "read", "reading", None),
    (RunStore, "commit", "packing", None),
    (Exporter, "export", "packing", None),
)


@contextmanager
def metered() -> Iterator[Meter]:
    """The stages of everything inside."""
    meter = Meter()
    rows = Curvature.rows

    def asked(curvature: Curvature, start: int, stop: int) -> torch.Tensor:
        meter.product(curvature, start, stop)
        return rows(curvature, start, stop)

    def polished(codes_io: torch.Tensor, *args: Any) -> None:
        meter.outputs = codes_io.shape[1]
        with meter.inside("polish"):
            polish(codes_io, *args)

    with ExitStack() as patches:
        for owner, name, stage, operations in WRAPPED:
            function = getattr(owner, name)
            patches.enter_context(patch.object(owner, name, meter.wrapped(stage, function, operations)))
        patches.enter_context(patch.object(Curvature, "rows", asked))
        patches.enter_context(patch.object(solve, "polish", polished))
        yield meter
        meter.tick()


def split(source: Path, target: str, calibration: quantkit.Calibration, batch_tokens: int) -> dict[str, Any]:
    """Stages of one conversion without evaluation."""
    with tempfile.TemporaryDirectory() as out:
        plan = quantkit.Recipe(
            source=str(source),
            targets=quantkit.parse_targets(target),
            output=quantkit.Output(dir=out),
            calibration=calibration,
            device=quantkit.Device(batch_tokens=batch_tokens),
            eval=quantkit.Eval(enabled=False),
            engine_check=False,
        )
        with metered() as meter:
            quantkit.convert(plan)
    tokens = calibration.rows * (calibration.length or 0)
    many = {
        stage: seconds * (MANY_TOKENS / tokens if stage in BY_TOKENS else 1)
        for stage, seconds in meter.seconds.items()
    }
    stages: list[dict[str, Any]] = []
    for stage, seconds in sorted(meter.seconds.items(), key=lambda item: -item[1]):
        operations = meter.operations.get(stage)
        stages.append(
            {
                "stage": stage,
                "cpu_seconds": seconds,
                "share": seconds / sum(meter.seconds.values()),
                f"share_at_{MANY_TOKENS}_tokens": many[stage] / sum(many.values()),
                "calls": meter.calls[stage],
                "operations": operations,
                "gflops": None if not operations or not seconds else operations / seconds / 1e9,
            }
        )
        rate = "" if not operations or not seconds else f"{operations / seconds / 1e9:8.1f} GFLOP/s"
        print(f"  {stage:15} {seconds:8.2f} s {100 * stages[-1]['share']:5.1f} % {rate}", flush=True)
    return {"target": target, "tokens": tokens, "cpu_seconds": sum(meter.seconds.values()), "stages": stages}


def product_rate(width: int = 2048) -> float:
    """GFLOP a processor second of one fp32 matrix product, the best of five."""
    a, b = torch.randn(width, width), torch.randn(width, width)
    best = math.inf
    for _ in range(5):
        began = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - began)
    return 2 * width**3 / best / 1e9


def block_split(given: argparse.Namespace) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=1,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=given.hidden // 128,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    calibration = dataclasses.replace(CALIBRATION, rows=given.calibrate, length=512)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        source = Path(folder) / "block"
        source.mkdir()
        write_checkpoint(source, config)
        # so small that some are held out even of few tokens
        found = split(source, given.target, calibration, batch_tokens=512)
    return {"hidden": given.hidden, "intermediate": given.intermediate, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = ("block", "model")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=rows, metavar="ROW")
    parser.add_argument("--keep", action="store_true", help="rows that the results file has")
    parser.add_argument("--target", default="gptq:w4g128")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument(
        "--calibrate", type=int, default=8, metavar="N", help="rows of 512 tokens, of the block"
    )
    parser.add_argument("--model-calibrate", type=int, default=CALIBRATION.rows, metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = load(NAME).get("splits", {}) if given.keep else {}
    for row in given.rows:
        if row in found:
            continue
        print(row, flush=True)
        if row == "block":
            found[row] = block_split(given)
        else:
            few = dataclasses.replace(CALIBRATION, rows=given.model_calibrate)
            found[row] = split(SOURCE, given.target, few, quantkit.Device().batch_tokens)
        save(NAME, {"threads": given.threads, "product_gflops": product_rate(), "splits": found})


if __name__ == "__main__":
    main()
