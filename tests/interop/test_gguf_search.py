"""llama.cpp's quantizers are matched to the byte where they follow a rule and beaten where they search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.gguf.blocks import TYPES, pack
from quantkit.numerics.superblocks.grids import SUPERBLOCKS, codes, values
from quantkit.numerics.superblocks.plans import PLANS, Effort
from quantkit.numerics.superblocks.reference import REFERENCES, reference
from quantkit.numerics.superblocks.search import nearest, search
from quantkit.tensors import dequantize
from tests.interop.ggml import Ggml

pytestmark = pytest.mark.interop

WIDTH = 512
SHAPES = ("gaussian", "laplace", "student", "ternary", "sparse")


def weights(shape: str, rng: torch.Generator, rows: int = 48) -> Tensor:
    w = torch.randn(rows, WIDTH, generator=rng)
    match shape:
        case "laplace":
            w = w * torch.rand(rows, WIDTH, generator=rng).log().neg().sqrt()
        case "student":
            w = w / torch.randn(rows, WIDTH, 4, generator=rng).square().mean(2).sqrt()
        case "ternary":
            w = w.round().clamp(-1, 1)
        case "sparse":
            w = w * (torch.rand(rows, WIDTH, generator=rng) < 0.1)
            w[5] = 0
    return w * 0.02


def importance(rng: torch.Generator) -> Tensor:
    return torch.exp(torch.randn(WIDTH, generator=rng))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", REFERENCES)
def test_rules_give_the_same_bytes(kind: str, shape: str, rng: torch.Generator) -> None:
    w = weights(shape, rng)
    # ties between codes are many among weights of few digits
    w[::2] = w[::2].to(torch.float16).float()
    assert torch.equal(pack(reference(kind, w), TYPES[kind]), Ggml.load().quantize(kind, w))


@pytest.mark.parametrize("kind", SUPERBLOCKS)
def test_the_library_decodes_what_was_meant(kind: str, rng: torch.Generator) -> None:
    w = weights("student", rng)
    found = nearest(kind, w, importance(rng)) if kind in PLANS["best"] else reference(kind, w)
    decoded = Ggml.load().dequantize(kind, pack(found, TYPES[kind]), WIDTH)
    assert torch.equal(decoded, dequantize(found))


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLANS["best"])
def test_weighted_errors_are_smaller(kind: str, shape: str, effort: Effort, rng: torch.Generator) -> None:
    w, v = weights(shape, rng), importance(rng)
    ggml = Ggml.load()
    theirs = ggml.dequantize(kind, ggml.quantize(kind, w, v), WIDTH)
    ours = dequantize(nearest(kind, w, v, effort))
    error, bound = (((w - y).double().square() * v).sum(1) for y in (ours, theirs))
    # float16 scales and the floor of importances leave traces where there is next to no error
    trace = 1e-6 * (w.double().square() * v).sum(1)
    assert float(error.sum()) <= float((bound + trace).sum())


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q6_k"])
def test_the_librarys_own_objective_can_be_had(kind: str, rng: torch.Generator) -> None:
    # it weighs errors by importance · √(σ² + w²), per weight; q6_k by importance alone
    w, v = weights("laplace", rng), importance(rng)
    ggml = Ggml.load()
    theirs = ggml.dequantize(kind, ggml.quantize(kind, w, v), WIDTH)
    columns = SUPERBLOCKS[kind].columns
    flat = w.view(-1, columns)
    spread = flat.square().mean(1, keepdim=True) * (2 if columns == 256 else 1)
    own = v.expand_as(w).reshape(-1, columns) * ((spread + flat.square()).sqrt() if kind != "q6_k" else 1)
    found = search(kind, flat, own)
    ours = values(kind, codes(kind, flat, found), found)
    error, bound = (((flat - y.view_as(flat)).square() * own).sum() for y in (ours, theirs))
    assert float(error) < float(bound)
