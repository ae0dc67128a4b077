"""bitsandbytes through transformers, as people use it: quantized while loading, then saved.

Run by `python -m benchmarks.data_free --peers bitsandbytes=PYTHON`.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama import modeling_llama  # noqa: F401 (an import that would fall into the step)

from benchmarks.peers.measured import Job, Loaded, Script, linear_weights, run

ROWS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def make(job: Job) -> None:
    with job.steps("load and quantize"):
        config = BitsAndBytesConfig(**job.settings)
        model = AutoModelForCausalLM.from_pretrained(
            job.source, quantization_config=config, dtype="auto", device_map="cpu"
        )
    with job.steps("save"):
        model.save_pretrained(job.out)


def load(job: Job) -> Loaded:
    # transformers keeps the dtype of the file, whatever is asked for, and refuses to convert a quantized model
    model = nn.Module.float(AutoModelForCausalLM.from_pretrained(job.out, device_map="cpu"))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # the file says bfloat16, to which each dequantized weight would be rounded
            module.weight.quant_state.dtype = torch.float32
            module.compute_dtype = torch.float32
    return model, linear_weights(model, dense)


def dense(module: nn.Module) -> Tensor | None:
    match module:
        case bnb.nn.Linear4bit():
            return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        case bnb.nn.Linear8bitLt():
            return bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
        case _:
            return None


if __name__ == "__main__":
    run(Script(ROWS, ("bitsandbytes", "transformers", "torch"), make, load))
