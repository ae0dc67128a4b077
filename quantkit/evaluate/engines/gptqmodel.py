"""gptqmodel's own loader, which reads GPTQ weights that Transformers does not ask it about."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from quantkit.evaluate.engines.request import Request
from quantkit.evaluate.engines.transformers import peak_bytes, run

__all__ = ["begin", "logits", "peak_bytes"]


def begin(request: Request) -> str:
    import torch

    import_module("gptqmodel")
    torch.set_num_threads(request.threads)
    return version("gptqmodel")


def logits(request: Request) -> npt.NDArray[np.float32]:
    """What follows each token; float16 is what the loader insists on, the products are float32."""
    import torch

    library = import_module("gptqmodel")
    model = library.GPTQModel.load(
        request.path,
        device=request.device,
        backend=library.BACKEND.GPTQ_TORCH,
        dtype=torch.float16,
        trust_remote_code=False,
    ).model
    return run(model.float(), request)
