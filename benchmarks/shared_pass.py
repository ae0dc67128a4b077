"""What several targets cost in one sweep, beside each alone.

    python -m benchmarks.shared_pass [--repeat 3] [--source demo]

Times whole conversions, one after the other in one process after a warm-up, and reports the ratio of
the joint run to the slower one alone, pair by pair; files are compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import quantkit
from benchmarks.record import save

TARGETS = ("gptq:w4g128", "gptq:w4g128@method=rtn")


def recipe(source: str, out: Path, *targets: str) -> quantkit.Recipe:
    return quantkit.Recipe(
        source=source,
        targets=tuple(t for text in targets for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        calibration=quantkit.Calibration(set="embedded", rows=128, length=512),
        eval=quantkit.Eval(
            perplexity=(quantkit.EvalText(data="embedded", style="gptq", context=512, chunks=32),)
        ),
    )


def timed(source: str, out: Path, *targets: str) -> float:
    began = time.perf_counter()
    quantkit.convert(recipe(source, out, *targets))
    return time.perf_counter() - began


def weights(out: Path) -> dict[str, str]:
    found = sorted(out.glob("*/*.safetensors"))
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--source", default="demo")
    given = parser.parse_args()
    ratios, pairs = [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        timed(given.source, base / "warm", *TARGETS)
        for n in range(given.repeat):
            alone = {t: timed(given.source, base / f"{n}-{i}", t) for i, t in enumerate(TARGETS)}
            joint = timed(given.source, base / f"{n}-joint", *TARGETS)
            separate = {k: v for i in range(len(TARGETS)) for k, v in weights(base / f"{n}-{i}").items()}
            if weights(base / f"{n}-joint") != separate:
                raise SystemExit("the joint run wrote other bytes than the separate ones")
            ratios.append(joint / max(alone.values()))
            pairs.append({"alone_s": alone, "joint_s": joint, "ratio": ratios[-1]})
    save(
        "shared_pass",
        {
            "source": given.source,
            "median_ratio": statistics.median(ratios),
            "runs": pairs,
            "identical_bytes": True,
        },
    )
    print(f"joint run / slower alone: median {statistics.median(ratios):.2f} of {given.repeat}")


if __name__ == "__main__":
    main()
