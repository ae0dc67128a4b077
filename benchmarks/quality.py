"""Quality of methods at equal bits on the trained reference checkpoint, beside its measured rows.

    python -m benchmarks.quality [--rows ROW …]

Protocol of `../shared/models/README.md`: calibration on the first 160 rows of 512 tokens of the first
900,000 characters of WikiText-2's validation text, evaluation on the first 64 windows of 512 tokens of
its test text, everything outside the blocks in bf16, fp32 compute. One sweep makes all rows of a table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import quantkit
from benchmarks.protocol import recipe
from benchmarks.record import save
from quantkit.run.report import TargetReport

# name → (shorthand, reference KL, reference perplexity) where the reference has such a row
ROWS: dict[str, tuple[str, float | None, float | None]] = {
    "w8 absmax": ("compressed_tensors:w8@method=rtn,scales=absmax", None, None),
    "w8 gptq": ("compressed_tensors:w8@method=gptq", None, None),
    "w4g128 rtn absmax": ("gptq:w4g128@method=rtn,scales=absmax", 0.0228, 64.87),
    "w4g128 rtn weighted": ("gptq:w4g128@method=rtn,scales=weighted", 0.0159, 64.65),
    "w4g128 gptq absmax": ("gptq:w4g128@plain=true", 0.0136, 64.49),
    "w4g128 gptq mse": ("gptq:w4g128@scales=mse,act_order=off,polish=0", 0.0100, 64.13),
    "w4g128 gptq weighted": ("gptq:w4g128@act_order=off,polish=0", 0.0095, 64.16),
    "w4g128 gptq group-aware": ("gptq:w4g128@act_order=group_aware,polish=0", 0.0093, 64.03),
    "w4g128 gptq default": ("gptq:w4g128", 0.0087, 64.07),
    "w4g128 gptq static": ("gptq:w4g128@act_order=static", None, None),
    "w4g128 gptq free": ("gptq:w4g128@act_order=free", None, None),
    "w4g128 gptq default feedback": ("gptq:w4g128@feedback=true", None, None),
    "w4g128 asym default": ("gptq:w4g128_asym", None, None),
    "w3g128 rtn absmax": ("gptq:w3g128@method=rtn,scales=absmax", 0.1253, 69.33),
    "w3g128 gptq absmax": ("gptq:w3g128@plain=true", 0.0802, 67.69),
    "w3g128 gptq default": ("gptq:w3g128", 0.0337, 64.95),
    "w3g128 gptq static": ("gptq:w3g128@act_order=static", None, None),
    "w2g64 rtn absmax": ("gptq:w2g64@method=rtn,scales=absmax", 1.467, 231.5),
    "w2g64 gptq absmax": ("gptq:w2g64@plain=true", 1.128, 167.6),
    "w2g64 gptq default": ("gptq:w2g64", 0.1596, 71.04),
    "w2g64 gptq static": ("gptq:w2g64@act_order=static", None, None),
}


def row(name: str, target: TargetReport) -> dict[str, Any]:
    quality = target.quality[0]
    _, kl, perplexity = ROWS[name]
    return {
        "row": name,
        "target": ROWS[name][0],
        "bits_per_weight": target.bits_per_weight,
        "perplexity": quality.target.value,
        "perplexity_ratio": quality.ratio.value,
        "perplexity_ratio_error": quality.ratio.error,
        "kl_mean": quality.kl_mean,
        "kl_error": quality.kl_error,
        "top1_agreement": quality.top1_agreement,
        "reference_kl": kl,
        "reference_perplexity": perplexity,
        "kl_over_reference": None if kl is None else quality.kl_mean / kl,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    names = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        shorthands = {name.replace(" ", "-"): ROWS[name][0] for name in names}
        report = quantkit.convert(recipe(shorthands, Path(folder)))
    rows = [row(name, target) for name, target in zip(names, report.targets, strict=True)]
    for found in rows:
        reference = f"{found['reference_kl']}" if found["reference_kl"] else "–"
        print(
            f"{found['row']:34} KL {found['kl_mean']:.5f} (reference {reference})"
            f"  perplexity {found['perplexity']:.3f}"
        )
    source = report.targets[0].quality[0]
    save("quality", {"convention": source.convention, "source_perplexity": source.source.value, "rows": rows})


if __name__ == "__main__":
    main()
