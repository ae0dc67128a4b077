"""What several targets cost in one sweep, beside each alone.

    python -m benchmarks.shared_pass [--rows shared_pass shared_pass_calibrated shared_pass_gguf]
        [--repeat 3] [--source demo]

Times whole conversions, one after the other in one process after a warm-up, and reports the ratio of
the joint run to the slowest alone, round by round; files are compared byte for byte. Each row has a results
file of its name, written after every round.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import quantkit
from benchmarks.record import save

_TEN = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0")
# results file → (targets of one run, largest ratio that will do)
ROWS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "shared_pass": (("gptq:w4g128", "gptq:w4g128@method=rtn"), None),
    "shared_pass_calibrated": (
        ("gptq:w4g128", "awq:w4g128_asym@transforms=awq", "compressed_tensors:w4g128"),
        1.3,
    ),
    "shared_pass_gguf": (tuple(f"gguf:{preset}" for preset in _TEN), 3.0),
}


def recipe(source: str, out: Path, *targets: str) -> quantkit.Recipe:
    return quantkit.Recipe(
        source=source,
        targets=tuple(t for text in targets for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        calibration=quantkit.Calibration(set="embedded", rows=128, length=512),
        eval=quantkit.Eval(
            perplexity=(quantkit.EvalText(data="embedded", style="gptq", context=512, chunks=32),)
        ),
        engine_check=False,
    )


def timed(source: str, out: Path, *targets: str) -> float:
    began = time.perf_counter()
    quantkit.convert(recipe(source, out, *targets))
    return time.perf_counter() - began


def weights(out: Path) -> dict[str, str]:
    found = sorted(p for kind in ("safetensors", "gguf") for p in out.glob(f"*/*.{kind}"))
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def one_round(source: str, base: Path, targets: tuple[str, ...]) -> dict[str, Any]:
    """Each target alone, then all of them."""
    alone = {target: timed(source, base / str(i), target) for i, target in enumerate(targets)}
    joint = timed(source, base / "joint", *targets)
    separate = {k: v for i in range(len(targets)) for k, v in weights(base / str(i)).items()}
    if weights(base / "joint") != separate:
        raise SystemExit("the joint run wrote other bytes than the separate ones")
    return {"alone_s": alone, "joint_s": joint, "ratio": joint / max(alone.values())}


def compare(name: str, source: str, repeat: int) -> None:
    targets, goal = ROWS[name]
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        timed(source, Path(folder) / "warm", *targets)
        for n in range(repeat):
            rounds.append(one_round(source, Path(folder) / f"round{n}", targets))
            median = statistics.median(found["ratio"] for found in rounds)
            save(
                name,
                {
                    "source": source,
                    "median_ratio": median,
                    "goal": goal,
                    "runs": rounds,
                    "identical_bytes": True,
                },
            )
            print(f"{name}: joint run / slowest alone: median {median:.2f} of {len(rounds)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--source", default="demo")
    given = parser.parse_args()
    for name in given.rows:
        compare(name, given.source, given.repeat)


if __name__ == "__main__":
    main()
