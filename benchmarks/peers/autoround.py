"""auto-round without its learning: `iters=0`, rounding to nearest with or without its searched scales.

Run by `python -m benchmarks.data_free --peers autoround=PYTHON`.
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 (an import that would fall into the step)

from benchmarks.peers import loaded
from benchmarks.peers.measured import Job, Loaded, Script, linear_weights, run

CALIBRATED = {"disable_opt_rtn": False, "calibrated": True}
# compiled kernels, its default, cost more than they save at these sizes
PLAIN = {"disable_opt_rtn": True, "enable_torch_compile": False}
WEIGHTS_ONLY = {"act_bits": 16, "format": "llm_compressor"}
ROWS: dict[str, dict[str, Any]] = {
    "w4g128-plain": {"scheme": "W4A16", **PLAIN},
    "w4g128": {"scheme": "W4A16", **CALIBRATED},
    "w4g128_asym-plain": {"scheme": "W4A16", "sym": False, **PLAIN},
    "w8g128": {"scheme": "W8A16", **PLAIN},
    "mxfp4-plain": {"scheme": "MXFP4", **PLAIN, **WEIGHTS_ONLY},
    "mxfp4": {"scheme": "MXFP4", **CALIBRATED, **WEIGHTS_ONLY},
    "nvfp4": {"scheme": "NVFP4", **CALIBRATED, **WEIGHTS_ONLY},
    "fp8a8_block": {"scheme": "FP8_BLOCK", **PLAIN, "format": "llm_compressor"},
    "w8a8": {"scheme": "INT8", **PLAIN, "format": "llm_compressor"},
}
BATCH = 8


def make(job: Job) -> None:
    settings = {"format": "auto_round", **job.settings}
    layout, calibrated = settings.pop("format"), settings.pop("calibrated", False)
    if calibrated and job.calibration is not None:
        rows, length = job.calibration.shape
        batches = [{"input_ids": part} for part in job.calibration.split(BATCH)]
        settings |= {"dataset": batches, "nsamples": rows, "seqlen": length, "batch_size": BATCH}
    with job.steps("load, quantize and save"):
        rounder = AutoRound(str(job.source), iters=0, device_map="cpu", **settings)
        rounder.quantize_and_save(str(job.out), format=layout)


def load(job: Job) -> Loaded:
    (folder,) = {file.parent for file in job.out.rglob("*.safetensors")}
    if job.settings.get("format") == "llm_compressor":
        # it writes that inputs are rounded to 4 bits too, even when told not to
        weights_only = job.settings.get("act_bits") == 16
        model = loaded.load(folder, bf16=weights_only, inputs=not weights_only)
        return model, loaded.weights(model)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return nn.Module.float(found), linear_weights(found, dense)


def dense(module: nn.Module) -> Tensor | None:
    """What the engine multiplies by: its answer to unit vectors."""
    return module(torch.eye(module.infeatures)).T if type(module).__name__ == "QuantLinear" else None


if __name__ == "__main__":
    run(Script(ROWS, ("auto-round", "transformers", "torch"), make, load))
