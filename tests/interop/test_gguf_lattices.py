"""Weighted errors of our codebook types against those of llama.cpp with the same importances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.gguf.tables import grid
from quantkit.numerics.lattices import KINDS, nearest
from quantkit.tensors import dequantize
from tests.interop.ggml import Ggml

pytestmark = [pytest.mark.interop]

TRAINED = Path(__file__).parents[2].parent / "shared" / "models" / "wiki-llama-7m" / "model.safetensors"
ROWS = 48


def importances(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(7)).exp()


def made(name: str) -> Tensor:
    rng = torch.Generator().manual_seed(8)
    w = torch.randn(ROWS, 512, generator=rng)
    if name == "laplace":
        w = w * torch.rand(ROWS, 512, generator=rng).clamp(min=1e-6).log().neg().mul(2).sqrt()
    return 0.02 * w


def compared(name: str, w: Tensor) -> float:
    """Our weighted error as a share of llama.cpp's."""
    v = importances(w.shape[1])
    ours = dequantize(nearest(KINDS[name], grid(name), w, v))
    ggml = Ggml.load()
    theirs = ggml.dequantize(name, ggml.quantize(name, w, v), w.shape[1])
    return float((v * (w - ours).square()).sum() / (v * (w - theirs).square()).sum())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
def test_made_weights_err_a_tenth_less(name: str, distribution: str) -> None:
    assert compared(name, made(distribution)) < 0.9


@pytest.mark.parametrize("name", KINDS)
def test_no_tensor_of_a_trained_model_errs_more(name: str) -> None:
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} of the trained model is not there")
    trained = {n: w for n, w in load_file(TRAINED).items() if n.endswith("proj.weight") and ".0." in n}
    shares = {n: compared(name, w[:ROWS].float()) for n, w in trained.items()}
    assert max(shares.values()) < 1.0, shares
