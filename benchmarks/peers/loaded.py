"""Folders in the format of compressed-tensors, which llm-compressor and auto-round write, loaded by its engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from benchmarks.peers.measured import Weights


def load(folder: Path, *, bf16: bool = False, dense: bool = False, inputs: bool = True) -> nn.Module:
    """The model with its weights decompressed, computing in fp32; inputs are rounded if the folder says so.

    bf16    the 4-bit floats decompress to bf16 only
    dense   decompressed while loading: zero points of packed integers fail otherwise (0.18 … 0.20)
    inputs  False: left alone, whatever the folder says
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if bf16 else torch.float32, **options
    )
    # weights are decompressed when the model first runs
    model(torch.zeros(1, 128, dtype=torch.long))
    if not inputs:
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_scheme.input_activations = None
    return nn.Module.float(model)


def weights(model: nn.Module) -> Weights:
    """The decompressed weights: of every linear but the head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield f"{name}.weight", module.weight.detach().float()
