"""``python native.py OUT FOLDER…``: logits of each folder through gptqmodel's own loader.

A process of its own, because gptqmodel rewrites the model classes of Transformers when it loads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

from tests.models import tiny_tokens


def main(out: str, *folders: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        # float16 is what it insists on; multiplying in float32 afterwards leaves less noise
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
        with torch.no_grad():
            found[Path(folder).name] = model.float()(tiny_tokens()).logits.contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
