"""Convert and evaluate on a GPU: quality, peak memory, and time per block against the FLOP floor.

    python -m benchmarks.gpu.run [--device cuda] [--skip-large]

Two models: the embedded one (perplexity must agree with the CPU's) and a randomly initialised Llama
of 1 B shape (time and memory). The floor counts forward passes (2·parameters·tokens), grams
(2·tokens·in²), factorisations (⅔·in³) and feedback with polish (out·in²·(1 + 2·sweeps)), all at the
matrix rate measured just before in the dtype of the forward pass.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import quantkit
from benchmarks.memory import write_checkpoint
from benchmarks.record import save
from quantkit.progress import BlockInfo, Silent

LENGTH, POLISH = 2048, 3
TARGETS = ("gptq:w4g128", "gptq:w4g128@method=rtn", "compressed_tensors:w8@method=rtn")


class Timed(Silent):
    """Keeps the seconds of every block."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def block(self, index: int, info: BlockInfo) -> None:
        self.seconds.append(info.seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, best of three batches of ten."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        began = clock(device)
        for _ in range(10):
            a @ a
        best = max(best, 10 * 2 * size**3 / (clock(device) - began))
    return best


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(recipe: quantkit.Recipe, device: torch.device) -> dict[str, Any]:
    """Convert, with the peak of allocated memory where the device counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = Timed()
    began = clock(device)
    report = quantkit.convert(recipe, progress=timed)
    total = clock(device) - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seconds": total,
        "seconds_per_block": timed.seconds,
        "max_memory_allocated_bytes": peak,
        "targets": {
            t.name: {"bits_per_weight": t.bits_per_weight, "quality": [q.to_json() for q in t.quality]}
            for t in report.targets
        },
    }


def embedded(device: str, out: Path) -> quantkit.Recipe:
    return quantkit.Recipe(
        source="demo",
        targets=tuple(t for text in TARGETS for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        device=quantkit.Device(map=device),
        calibration=quantkit.Calibration(set="embedded", rows=128, length=512),
        eval=quantkit.Eval(perplexity=(quantkit.EvalText(data="embedded", style="gptq", context=512),)),
        engine_check=False,
    )


def large(device: str, source: Path, out: Path, rows: int) -> quantkit.Recipe:
    return quantkit.Recipe(
        source=str(source),
        targets=tuple(t for text in TARGETS[:1] for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        device=quantkit.Device(map=device, batch_tokens=16384),
        calibration=quantkit.Calibration(set="embedded", rows=rows, length=LENGTH),
        eval=quantkit.Eval(
            perplexity=(quantkit.EvalText(data="embedded", style="gptq", context=2048, chunks=8),)
        ),
        engine_check=False,
    )


def floor(config: LlamaConfig, tokens: int) -> dict[str, float]:
    """FLOP of one block by stage."""
    d, i = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    sites = [(d, d + 2 * kv), (d, d), (d, 2 * i), (i, d)]
    return {
        "forward": sum(2.0 * n * m * tokens for n, m in sites),
        "gram": sum(2.0 * n * n * tokens for n, _ in sites),
        "factorisation": sum(2 / 3 * n**3 for n, _ in sites),
        "feedback_and_polish": sum(m * n * n * (1.0 + 2 * POLISH) for n, m in sites),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 2,048 tokens")
    given = parser.parse_args()
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content: dict[str, Any] = {"device": name}
    with tempfile.TemporaryDirectory() as folder:
        content["embedded"] = run(embedded(given.device, Path(folder) / "demo"), device)
        if not given.skip_large:
            config = LlamaConfig(
                vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=given.blocks,
                num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
                tie_word_embeddings=False,
            )  # fmt: skip
            source = Path(folder) / "llama-1b-random"
            source.mkdir()
            size = write_checkpoint(source, config)
            found = run(large(given.device, source, Path(folder) / "large", given.rows), device)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
            flop = floor(config, given.rows * LENGTH)
            least = sum(flop.values()) / rate
            median = sorted(found["seconds_per_block"])[len(found["seconds_per_block"]) // 2]
            content["large"] = {
                "checkpoint_bytes": size, "calibration_tokens": given.rows * LENGTH, "flop_per_block": flop,
                "matrix_flop_per_second": rate, "floor_seconds_per_block": least,
                "median_seconds_per_block": median, "times_floor": median / least, **found,
            }  # fmt: skip
            print(f"1B shape: {median:.2f} s per block, {median / least:.1f} × the FLOP floor")
    save("gpu" if device.type == "cuda" else "gpu-script-on-cpu", content)


if __name__ == "__main__":
    main()
