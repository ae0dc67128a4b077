"""Transformers, with the package that each kind of quantized weights needs there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import folder
from quantkit.errors import VerifyError
from quantkit.evaluate.engines.request import Request

# quant_method → packages
_BESIDE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gptq": ("gptqmodel", "optimum"),
        "awq": ("gptqmodel",),
        "auto-round": ("auto-round",),
        "compressed-tensors": ("compressed-tensors",),
        "bitsandbytes": ("bitsandbytes",),
    }
)
_WRONG = (
    ("missing_keys", "tensors that no file fills, so that it makes them up"),
    ("unexpected_keys", "tensors that it has no place for"),
    ("mismatched_keys", "tensors of another shape"),
    ("error_msgs", "errors"),
)


def begin(request: Request) -> str:
    """Import what loads the model, so that none of it counts as memory of the model."""
    import torch
    import transformers

    torch.set_num_threads(request.threads)
    import_module("transformers.modeling_utils")
    packages = _BESIDE.get(str(_quantization(request).get("quant_method")), ())
    for package in packages:
        import_module(package.replace("-", "_"))
    beside = [f"{package} {found}" for package in packages if (found := _version(package))]
    return ", ".join([transformers.__version__, *beside])


def logits(request: Request) -> npt.NDArray[np.float32]:
    """What follows each token. VerifyError when a tensor of the files or of the model is left over."""
    import torch
    from transformers import AutoModelForCausalLM

    quantization = _quantization(request)
    own_dtype = request.dtype == "stored" or quantization.get("quant_method") == "bitsandbytes"
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        request.path,
        dtype="auto" if own_dtype else torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        **({} if request.device == "cpu" else {"device_map": {"": request.device}}),
        **_options(quantization),
    )
    for key, what in _WRONG:
        if info.get(key):
            raise VerifyError(f"Transformers found {what}: {_listed(info[key])}")
    if own_dtype and request.dtype == "float32":
        _compute_in_float32(model)
    return run(model, request)


def run(model: Any, request: Request) -> npt.NDArray[np.float32]:
    """The logits of a model that is loaded."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([request.ids], device=request.device)
        found: npt.NDArray[np.float32] = model.eval()(ids, use_cache=False).logits[0].float().cpu().numpy()
    return found


def peak_bytes(request: Request) -> int:
    """Memory of the GPU that it has taken at most."""
    import torch

    return torch.cuda.max_memory_allocated(request.device)


def _quantization(request: Request) -> Mapping[str, Any]:
    config = folder.read_json(Path(request.path) / folder.CONFIG)
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _options(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """How Transformers must be asked for these weights, beside their path."""
    method = quantization.get("quant_method")
    # on its slow and plain kernels: the automatic ones are compiled first
    if method == "gptq":
        from transformers import GPTQConfig

        return {"quantization_config": GPTQConfig(bits=quantization.get("bits", 4), backend="gptq_torch")}
    if method == "awq":
        from transformers import AwqConfig
        from transformers.utils.quantization_config import AwqBackend

        return {"quantization_config": AwqConfig(backend=AwqBackend.TORCH_AWQ)}
    if method == "compressed-tensors" and only_dequantized(quantization):
        from transformers.utils.quantization_config import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


def only_dequantized(quantization: Mapping[str, Any]) -> bool:
    """Weights that it reads whole or not at all: packed with zero points, or 4-bit floats beside float32."""
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    return any(
        not w.get("symmetric", True) or (w.get("type") == "float" and w.get("num_bits") == 4) for w in weights
    )


def _compute_in_float32(model: Any) -> None:
    """With bitsandbytes, norms and embeddings keep the stored dtype whatever it is told."""
    import torch

    linear = import_module("bitsandbytes").nn.Linear4bit
    for module in model.modules():
        if isinstance(module, linear):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for _, tensor in own:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()


def _listed(found: Any) -> str:
    names = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in found]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
