"""hqq's own quantizer and its own files; transformers 5 has no integration for it.

Run by `python -m benchmarks.data_free --peers hqq=PYTHON`.
"""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 (an import that would fall into the step)

from benchmarks.peers.measured import Job, Loaded, Script, linear_weights, run

ROWS: dict[str, dict[str, Any]] = {
    **{f"w{bits}g64": {"nbits": bits, "group_size": 64, "axis": 1} for bits in (8, 4, 3, 2)},
    "w1g32": {"nbits": 1, "group_size": 32, "axis": 1},
    "w4g64_axis0": {"nbits": 4, "group_size": 64, "axis": 0},
}


def make(job: Job) -> None:
    with job.steps("load"):
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype="auto")
    with job.steps("quantize"):
        AutoHQQHFModel.quantize_model(
            model, BaseQuantizeConfig(**job.settings), compute_dtype=torch.float16, device="cpu"
        )
    with job.steps("save"):
        AutoHQQHFModel.save_to_safetensors(model, str(job.out), verbose=False)
    job.kept = model


def load(job: Job) -> Loaded:
    """The model in memory: the scales and zero points of the file, computing in fp32."""
    for module in job.kept.modules():
        if isinstance(module, HQQLinear):
            module.compute_dtype = module.meta["compute_dtype"] = torch.float32
            module.meta["scale"], module.meta["zero"] = (
                module.meta["scale"].float(),
                module.meta["zero"].float(),
            )
    return nn.Module.float(job.kept), linear_weights(job.kept, dense)


def dense(module: nn.Module) -> Tensor | None:
    return module.dequantize() if isinstance(module, HQQLinear) else None


if __name__ == "__main__":
    run(Script(ROWS, ("hqq", "transformers", "torch"), make, load))
