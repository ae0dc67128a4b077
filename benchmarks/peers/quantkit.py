"""quantkit itself, one target at a time and nothing measured on the way: what a peer's script does.

Run by `python -m benchmarks.data_free`, which measures quality on what one sweep over all targets makes, and
by `benchmarks.calibrated`, which measures what is saved.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import quantkit.run.convert  # noqa: F401 (an import that would fall into the step)
from benchmarks.peers.measured import Job, Script, Weights, run
from benchmarks.peers.texts import CALIBRATION
from quantkit import Eval, Output, Recipe, convert, parse_targets, registry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.tensors import dequantize

_CT, _BNB = "compressed_tensors", "bitsandbytes"


_CHOICES = {
    "mse": "method=rtn,scales=mse",
    "weighted": "method=rtn,scales=weighted",
    "gptq": "method=gptq",
}


def _chosen(name: str, target: str, *choices: str, plain: str = "method=rtn") -> dict[str, str]:
    """One grid: rounded plainly, and with codes chosen otherwise."""
    return {
        name: f"{target}@{plain}",
        **{f"{name}-{choice}": f"{target}@{_CHOICES[choice]}" for choice in choices},
    }


# row → shorthand of the target
ROWS: dict[str, str] = {
    "w8": f"{_CT}:w8@method=rtn",
    "w8g128": f"{_CT}:w8g128@method=rtn",
    **_chosen("w4g128", f"{_CT}:w4g128", *_CHOICES),
    "w4g128-absmax": f"{_CT}:w4g128@method=rtn,scales=absmax",
    **_chosen("w4g128_asym", f"{_CT}:w4g128_asym", "gptq"),
    "fp8": f"{_CT}:fp8@method=rtn",
    "fp8_tensor": f"{_CT}:fp8_tensor@method=rtn",
    "fp8_block": f"{_CT}:fp8_block@method=rtn",
    "fp8a8": f"{_CT}:fp8a8@method=rtn",
    "fp8a8_block": f"{_CT}:fp8a8_block@method=rtn",
    "fp8a8_tensor_static": f"{_CT}:fp8a8_tensor_static@method=rtn",
    "fp8a8-kv": f"{_CT}:fp8a8@method=rtn,kv_cache=fp8",
    **_chosen("mxfp4", f"{_CT}:mxfp4", *_CHOICES),
    **_chosen("nvfp4", f"{_CT}:nvfp4", *_CHOICES),
    "w8a8": f"{_CT}:w8a8@method=rtn",
    "w8a8_static": f"{_CT}:w8a8_static@method=rtn",
    "w8a8-smoothquant": f"{_CT}:w8a8@method=rtn,transforms=smoothquant",
    "w8a8_static-smoothquant": f"{_CT}:w8a8_static@method=rtn,transforms=smoothquant",
    **_chosen("nf4", f"{_BNB}:nf4", *_CHOICES),
    **_chosen("nf4_dq", f"{_BNB}:nf4_dq", "mse", "gptq"),
    **_chosen("fp4", f"{_BNB}:fp4", "gptq"),
    "int8": f"{_BNB}:int8@report_outliers=false",
    "int8-outliers": f"{_BNB}:int8",
    "hqq-w8g64": "hqq:w8g64@method=hqq",
    **_chosen("hqq-w4g64", "hqq:w4g64", *_CHOICES, plain="method=hqq"),
    **_chosen("hqq-w3g64", "hqq:w3g64", "weighted", "gptq", plain="method=hqq"),
    **_chosen("hqq-w2g64", "hqq:w2g64", "weighted", "gptq", plain="method=hqq"),
    "hqq-w1g32": "hqq:w1g32@method=hqq",
    "hqq-w4g64_axis0": "hqq:w4g64_axis0@method=hqq",
}
# Calibrated rows cost what running the text through the model costs: of the chosen codes these stand for all.
UNCOSTED = (
    *("w4g128_asym-gptq", "nf4_dq-gptq", "fp4-gptq"),
    *(f"hqq-w{bits}g64-{choice}" for bits in (3, 2) for choice in ("weighted", "gptq")),
)
# of benchmarks.calibrated
CALIBRATED: dict[str, str] = {
    **{
        f"gptq-{scheme}{suffix}": f"gptq:{scheme}{words}"
        for scheme in ("w4g128", "w3g128", "w2g64")
        for suffix, words in (
            ("", ""),
            ("-awq", "@transforms=awq"),
            ("-corrected", "@corrected=0.25,feedback=true"),
            ("-signround", "@method=signround,feedback=true"),
            ("-weighted", "@method=rtn,scales=weighted"),
        )
    },
    "awq-w4g128_asym": "awq:w4g128_asym@method=rtn,scales=weighted,transforms=awq",
    "awq-w4g128_asym-gptq": "awq:w4g128_asym@transforms=awq",
}


def make(job: Job) -> None:
    (target,) = parse_targets(job.settings["target"])
    calibration = CALIBRATION
    if job.calibration is not None:
        # the same text and as many rows of it; its own tokens
        calibration = replace(CALIBRATION, rows=len(job.calibration))
    with job.steps("load, quantize and save"):
        convert(
            Recipe(
                source=str(job.source),
                targets=(target,),
                output=Output(dir=str(job.out)),
                calibration=calibration,
                eval=Eval(enabled=False),
                engine_check=False,
            )
        )


def weights(folder: Path, row: str) -> Weights | None:
    """What the format's own reader finds in a folder; none where a fold rescaled what was rounded."""
    (target,) = parse_targets(ROWS[row])
    if target.transforms:
        return None
    checkpoint = Checkpoint.open(folder)
    form = registry.load("formats", target.format).FORMAT
    config = checkpoint.config["quantization_config"]
    packed: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        base = form.base_name(name)
        if base is not None:
            # of some formats one part has the name of the weight itself
            packed.setdefault(base, set()).update({base, name} & checkpoint.tensors.keys())
    return (
        (base, dequantize(form.decode(base, {part: checkpoint.read(part) for part in parts}, config).weight))
        for base, parts in packed.items()
    )


if __name__ == "__main__":
    rows = {row: {"target": target} for row, target in (ROWS | CALIBRATED).items()}
    run(Script(rows, ("torch", "transformers"), make))
