"""The hqq library: Transformers 5 cannot load HQQ, and the library's loader reads pickles.

Its layers read tensors by name, so a model of them is all that loading takes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.errors import VerifyError
from quantkit.evaluate.engines.request import Request
from quantkit.evaluate.engines.transformers import peak_bytes, run

__all__ = ["begin", "logits", "peak_bytes"]
_CODES = ".W_q"


def begin(request: Request) -> str:
    import torch

    import_module("transformers.modeling_utils")
    import_module("hqq.core.quantize")
    torch.set_num_threads(request.threads)
    return version("hqq")


def logits(request: Request) -> npt.NDArray[np.float32]:
    """What follows each token. VerifyError when a tensor of the files or of the model is left over."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantkit.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(Path(request.path))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    config = AutoConfig.from_pretrained(request.path, trust_remote_code=False, local_files_only=True)
    # its loader is for what saved the config, not for us
    config.__dict__.pop("quantization_config", None)
    loader: Any = AutoModelForCausalLM
    with import_module("accelerate").init_empty_weights():
        model = loader.from_config(config, trust_remote_code=False)
    linear = import_module("hqq.core.quantize").HQQLinear
    for name in [name.removesuffix(_CODES) for name in tensors if name.endswith(_CODES)]:
        own = linear(None, None, compute_dtype=torch.float32, device=request.device)
        model.set_submodule(name, own)
    left = model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing or left.unexpected_keys:
        what = "misses" if missing else "has no place for"
        raise VerifyError(f"the model {what} `{(missing or left.unexpected_keys)[0]}`")
    return run(model.to(device=request.device, dtype=torch.float32), request)
