"""How fast weights become GGUF's types, beside llama.cpp's own quantizers in as many threads.

    python -m benchmarks.gguf_speed [--types TYPE …] [--weights M] [--device cuda] [--no-files]

A matrix of Gaussian rows of 4,096 weights and one importance per column become rows of bytes: by
`ggml_quantize_chunk`, and by `gguf.rounding.nearest` and `gguf.blocks.pack`, in turn, the best of three.
Both are called once before. Rows `…-fast` search with less effort, rows `…-convention` are rounded without an importance, where both must give the
same bytes. *Error* is Σ importance · (ŵ − w)². On a GPU (`--device cuda`) quantkit's side runs there, from
weights in its memory to bytes in the machine's, beside llama.cpp on the processor.

Then whole files of a random Llama: a conversion that rounds to nearest by a given importance matrix, from the
source folder to the checked file, beside `llama_model_quantize` on the F16 file.

Needs `llama-cpp-python`. The results file is written after every row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import quantkit
from benchmarks.memory import write_checkpoint
from benchmarks.peers import llamacpp
from benchmarks.peers.texts import SOURCE
from benchmarks.record import save
from quantkit.gguf import imatrix, rounding
from quantkit.gguf.blocks import TYPES, pack, unpack
from quantkit.gguf.mixes import MIXES
from quantkit.schemes import parse_scheme
from quantkit.tensors import dequantize
from tests.interop.ggml import Ggml

NAME = "gguf_speed"
WIDTH = 4096
CONVENTION, FAST = "-convention", "-fast"
# llama.cpp rounds these in one pass, whatever is known of inputs: there is nothing to search
PLAIN = ("f16", "bf16", "q8_0", "tq1_0", "tq2_0", "mxfp4")
BY_BYTES = ("q4_0", "q4_1", "q5_0", "q5_1")
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ROWS = (
    *PLAIN,
    *(row for name in BY_BYTES for row in (name, name + CONVENTION)),
    *(row for name in K_QUANTS for row in (name, name + FAST)),
    *("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
)
# smallest throughput beside llama.cpp's that will do
GOAL, K_GOAL, GPU_GOAL = 1.0, 2.0, 20.0
FILES = ("q8_0", "q6_k", "q4_k_m", "q2_k", "iq3_s")
REPEAT = 3


@dataclass(frozen=True)
class Matter:
    """What is quantized: weight (rows, WIDTH) fp32 and importance (WIDTH,), and where quantkit works."""

    weight: Tensor
    importance: Tensor
    device: torch.device
    threads: int

    @classmethod
    def drawn(cls, weights: float, device: str, threads: int) -> Matter:
        rng = torch.Generator().manual_seed(0)
        rows = max(threads, round(weights * 1e6 / WIDTH))
        weight = 0.02 * torch.randn(rows, WIDTH, generator=rng)
        return cls(weight, torch.randn(WIDTH, generator=rng).exp(), torch.device(device), threads)

    def few(self) -> Matter:
        """Enough of it to fill tables and load kernels."""
        return Matter(self.weight[: max(4, self.threads)], self.importance, self.device, self.threads)


def own(row: str, matter: Matter) -> Callable[[], Tensor]:
    """Packed bytes by quantkit, to be timed."""
    name, effort = row.removesuffix(CONVENTION).removesuffix(FAST), "fast" if row.endswith(FAST) else "best"
    scheme = parse_scheme(name)
    weight, importance = matter.weight.to(matter.device), matter.importance.to(matter.device)
    known = None if row.endswith(CONVENTION) or name in PLAIN else importance

    def run() -> Tensor:
        q = (
            rounding.convention(weight, scheme)
            if known is None
            else rounding.nearest(weight, scheme, known, effort)
        )
        return pack(q, TYPES[name]).cpu()

    return run


def theirs(row: str, matter: Matter) -> Callable[[], Tensor]:
    """The same by llama.cpp, rows split over threads."""
    ggml, name = Ggml.load(), row.removesuffix(CONVENTION).removesuffix(FAST)
    known = None if row.endswith(CONVENTION) or name in PLAIN else matter.importance
    parts = matter.weight.chunk(matter.threads)

    def run() -> Tensor:
        with ThreadPoolExecutor(len(parts)) as pool:
            return torch.cat(list(pool.map(lambda part: ggml.quantize(name, part, known), parts)))

    return run


def measured(row: str, matter: Matter) -> dict[str, Any]:
    """Throughputs in million weights per second, and errors."""
    for side in (own, theirs):
        side(row, matter.few())()
    sides = {"own": own(row, matter), "theirs": theirs(row, matter)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    packed = {}
    for _ in range(REPEAT):
        for name, run in sides.items():
            began = time.perf_counter()
            packed[name] = run()
            seconds[name].append(time.perf_counter() - began)
    kind = row.removesuffix(CONVENTION).removesuffix(FAST)
    found = {name: matter.weight.numel() / min(values) / 1e6 for name, values in seconds.items()}
    errors = {name: weighted_error(kind, data, matter) for name, data in packed.items()}
    ratio = found["own"] / found["theirs"]
    goal = GPU_GOAL if matter.device.type == "cuda" else K_GOAL if kind in K_QUANTS else GOAL
    return {
        "row": row,
        "own_mweights_per_s": found["own"],
        "theirs_mweights_per_s": found["theirs"],
        "ratio": ratio,
        "goal": goal,
        "met": ratio >= goal,
        "error_ratio": errors["own"] / errors["theirs"] if errors["theirs"] else None,
        "same_bytes": torch.equal(packed["own"], packed["theirs"]),
    }


def weighted_error(name: str, packed: Tensor, matter: Matter) -> float:
    values = dequantize(unpack(packed, TYPES[name]))
    return float(((values - matter.weight).square() * matter.importance).sum(dtype=torch.float64))


def make_source(folder: Path) -> None:
    """A random Llama of 109 M parameters with the protocol's tokenizer."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    write_checkpoint(folder, config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SOURCE / file, folder / file)


class Files:
    """Whole conversions of a random model, with what both sides start from."""

    def __init__(self, base: Path, threads: int) -> None:
        self._base, self._threads = base, threads
        self._source, self._known = base / "source", base / "imatrix.gguf"
        make_source(self._source)
        calibration = quantkit.Calibration(set="embedded", rows=4, length=512)
        quantkit.collect_imatrix(str(self._source), self._known, calibration=calibration)
        self._imatrix = imatrix.read(self._known)
        self._floats = self._convert("gguf:f16")

    def _convert(self, target: str) -> Path:
        out = self._base / "own"
        shutil.rmtree(out, ignore_errors=True)
        quantkit.convert(
            quantkit.Recipe(
                source=str(self._source),
                targets=quantkit.parse_targets(target),
                output=quantkit.Output(dir=str(out)),
                calibration=quantkit.Calibration(imatrix=str(self._known)),
                eval=quantkit.Eval(enabled=False),
                engine_check=False,
            )
        )
        (found,) = out.glob("*/*.gguf")
        return found.replace(self._base / found.name)

    def measured(self, name: str) -> dict[str, Any]:
        """Seconds of one conversion by either side."""
        scales = "" if name == "q8_0" else "@method=rtn,scales=weighted"
        began = time.perf_counter()
        made = self._convert(f"gguf:{name}{scales}")
        between = time.perf_counter()
        other = self._base / "theirs.gguf"
        llamacpp.quantize(self._floats, other, MIXES[name], self._imatrix, self._threads)
        ended = time.perf_counter()
        sizes = made.stat().st_size, other.stat().st_size
        made.unlink()
        return {
            "row": name,
            "own_s": between - began,
            "theirs_s": ended - between,
            "ratio": (ended - between) / (between - began),
            "own_bytes": sizes[0],
            "theirs_bytes": sizes[1],
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", default=list(ROWS), choices=ROWS, metavar="TYPE")
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=list(MIXES), metavar="TYPE")
    parser.add_argument("--weights", type=float, default=8, metavar="M", help="million weights of a matrix")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--device", default="cpu", help="where quantkit works")
    parser.add_argument("--no-files", action="store_true", help="matrices only")
    return parser.parse_args()


def show(found: dict[str, Any]) -> None:
    error = found.get("error_ratio")
    told = "" if error is None else f", error {error:.3f}"
    print(f"{found['row']:18} {found['ratio']:6.2f} × llama.cpp{told}", flush=True)


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    matter = Matter.drawn(given.weights, given.device, given.threads)
    rows: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []

    def write() -> None:
        where = torch.cuda.get_device_name() if matter.device.type == "cuda" else "cpu"
        content = {"peers": llamacpp.VERSIONS, "threads": given.threads, "device": where}
        save(NAME, {**content, "weights": matter.weight.numel(), "rows": rows, "files": files})

    for row in given.types:
        rows.append(measured(row, matter))
        show(rows[-1])
        write()
    if given.no_files:
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        whole = Files(Path(folder), given.threads)
        for name in given.files:
            files.append(whole.measured(name))
            show(files[-1])
            write()


if __name__ == "__main__":
    main()
