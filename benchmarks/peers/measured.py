"""What every script measures in the same way: processor time, memory, weight error, perplexity and KL.

Imports are over when a step begins; a step is from the source folder to the quantized folder:

    step        load + quantize + save
    process     the same with the interpreter's start and all imports

Peak memory is the kernel's high-water mark of this process (VmHWM; `ru_maxrss` would start at the peak of
the process that launched it). Quality is measured after these are taken, on the folder as it was saved,
in fp32, with the quantizer's own forward pass, beside the fp32 source:

    KL(P ‖ Q) = Σ_v p(v)·(log p(v) − log q(v))   mean over every position of a window but the last
    error     = Σ ‖Ŵ − W‖² / Σ ‖W‖²              over all weights that were quantized
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Weights = Iterator[tuple[str, Tensor]]
Loaded = tuple[nn.Module, Weights | None]
BATCH = 8


def cpu_seconds() -> float:
    """Of this process, all threads, from its start."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def memory(key: str) -> int:
    """Bytes of a line of the kernel's status of this process: VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


class Descendants:
    """Processor seconds and memory of the processes that this one starts, looked at every 20 ms.

    The kernel adds a child's time to its parent only when the parent waits for it, which pools that kill
    their workers never do.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._ticks: dict[int, int] = {}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Descendants:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    @property
    def cpu_seconds(self) -> float:
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            pages = [self._look(pid) for pid in _children(os.getpid())]
            if pages:
                children = sum(pages) * os.sysconf("SC_PAGE_SIZE")
                self.peak_bytes = max(self.peak_bytes, children + memory("VmRSS"))

    def _look(self, pid: int) -> int:
        """Resident pages of a child, whose time is noted; 0 when it is gone."""
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            self._ticks[pid] = int(after_name[11]) + int(after_name[12])
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return 0


def _children(pid: int) -> list[int]:
    """All processes below `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += below
        for child in below:
            found += _children(child)
    return found


@dataclass
class Steps:
    """Processor seconds of named parts of the work."""

    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = cpu_seconds()
        yield
        self.cpu[name] = cpu_seconds() - began


@dataclass
class Job:
    """One row: where to read, where to write, what to calibrate on (rows × tokens, or None).

    kept    a model that `make` leaves in memory for `load`
    """

    source: Path
    out: Path
    settings: Mapping[str, Any]
    calibration: Tensor | None
    steps: Steps
    kept: nn.Module | None = None


@dataclass(frozen=True)
class Script:
    """What a quantizer's script offers.

    rows      what each row asks for
    packages  whose versions count
    make      source folder → quantized folder, its parts timed with `job.steps`
    load      the quantized folder as a model that computes in fp32, and (checkpoint name, dequantized fp32
              weight) of everything that was quantized, or None where it is not the source's weight that
              was rounded; without `load`, quality is measured elsewhere
    """

    rows: Mapping[str, Mapping[str, Any]]
    packages: tuple[str, ...]
    make: Callable[[Job], None]
    load: Callable[[Job], Loaded] | None = None


def run(script: Script) -> None:
    """The command line of a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=list(script.rows))
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="tokens and reference states; without: no quality")
    parser.add_argument("--calibrate", type=int, metavar="N", help="on the first N rows of the tokens only")
    parser.add_argument("--cost-only", action="store_true", help="no quality")
    given = parser.parse_args()
    calibration = None
    if given.texts is not None:
        with safe_open(given.texts, "pt") as texts:
            calibration = texts.get_tensor("calibration").long()[: given.calibrate]
    job = Job(given.source, given.out, script.rows[given.row], calibration, Steps())
    before, began, started = memory("VmRSS"), cpu_seconds(), time.monotonic()
    with Descendants() as others:
        script.make(job)
    wall, ended = time.monotonic() - started, cpu_seconds() + others.cpu_seconds
    found: dict[str, Any] = {
        "row": given.row,
        "versions": {name: version(name) for name in script.packages},
        "threads": torch.get_num_threads(),
        "process_cpu_seconds": ended,
        "step_cpu_seconds": ended - began,
        "parts_cpu_seconds": job.steps.cpu,
        "step_wall_seconds": wall,
        "rss_before_bytes": before,
        "peak_rss_bytes": max(memory("VmHWM"), others.peak_bytes),
        "size_bytes": sum(f.stat().st_size for f in weight_files(given.out)),
    }
    if given.texts is not None and script.load is not None and not given.cost_only:
        with torch.no_grad():
            model, weights = script.load(job)
            model.eval()
            # first: some engines repack their weights when the model runs
            found["weight_error"] = weight_error(job.source, weights)
            found |= scores(model, given.texts)
    given.result.write_text(json.dumps(found) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """Of the result, not of what a tool keeps beside it."""
    inside = [file.relative_to(folder) for file in folder.rglob("*.safetensors")]
    return [folder / file for file in inside if not any(part.startswith(".") for part in file.parts)]


def scores(model: nn.Module, texts: Path) -> dict[str, float]:
    """Perplexity of both models and mean KL, log-softmax in fp32, sums in fp64."""
    nll = source_nll = kl = 0.0
    count = 0
    with safe_open(texts, "pt") as file:
        tokens, states, head = (file.get_tensor(n) for n in ("evaluation", "states", "head"))
    for rows, hidden in zip(tokens.long().split(BATCH), states.split(BATCH), strict=True):
        predicted = torch.log_softmax(model(rows, use_cache=False).logits[:, :-1].float(), -1)
        reference = torch.log_softmax(hidden.float() @ head.float().T, -1)
        following = rows[:, 1:, None]
        nll -= float(predicted.gather(-1, following).double().sum())
        source_nll -= float(reference.gather(-1, following).double().sum())
        kl += float((reference.exp() * (reference - predicted)).sum(-1).double().sum())
        count += following.numel()
    return {
        "perplexity": math.exp(min(nll / count, 700.0)),
        "source_perplexity": math.exp(source_nll / count),
        "kl_mean": kl / count,
    }


def weight_error(source: Path, weights: Weights | None) -> float | None:
    """Relative squared error of all quantized weights together."""
    if weights is None:
        return None
    files = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            files |= {name: file for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    error = power = 0.0
    for name, found in weights:
        with safe_open(files[name], "pt") as opened:
            weight = opened.get_tensor(name).double()
        error += float((found.double() - weight).square().sum())
        power += float(weight.square().sum())
    if power == 0:
        raise SystemExit("no weight was quantized")
    return error / power


def linear_weights(model: nn.Module, dense: Callable[[nn.Module], Tensor | None]) -> Weights:
    """The weights of the modules for which `dense` has one, under their names in the checkpoint."""
    for name, module in model.named_modules():
        weight = dense(module)
        if weight is not None:
            yield f"{name}.weight", weight.detach().float()
