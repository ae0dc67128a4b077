"""gptqmodel's GPTQ and AWQ as its `QuantizeConfig` has them by default.

Run by `python -m benchmarks.calibrated --peers gptqmodel=PYTHON`.
"""

from __future__ import annotations

import os
from typing import Any

# read when gptqmodel is imported: its pools ask for two workers, whatever there is, and compiling costs more
# than it saves at these sizes
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers.models.llama import modeling_llama  # noqa: F401 (an import that would fall into the step)

from benchmarks.peers.measured import Job, Script, run

ROWS: dict[str, dict[str, Any]] = {
    **{
        f"w{bits}g{group}": {"bits": bits, "group_size": group}
        for bits, group in ((4, 128), (3, 128), (2, 64))
    },
    # its own choice of a kernel is CUDA's
    "w4g128_asym-awq": {"bits": 4, "group_size": 128, "sym": False, "quant_method": "awq", "format": "gemm"},
}
BATCH = 4


def make(job: Job) -> None:
    if job.calibration is None:
        raise SystemExit("gptqmodel needs calibration: give --texts")
    awq = job.settings.get("quant_method") == "awq"
    with job.steps("load"):
        model = GPTQModel.load(str(job.source), QuantizeConfig(**job.settings), device="cpu")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.calibration]
    with job.steps("quantize"):
        model.quantize(rows, batch_size=BATCH, backend=BACKEND.AWQ_TORCH if awq else BACKEND.AUTO)
    with job.steps("save"):
        model.save(str(job.out))


if __name__ == "__main__":
    run(Script(ROWS, ("gptqmodel", "transformers", "torch"), make))
