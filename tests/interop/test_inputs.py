"""Rounded inputs against the libraries that round them: compressed-tensors and bitsandbytes, on the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.numerics.inputs import cache_round, cache_scale, input_scale, round_inputs
from quantkit.schemes import parse_scheme
from tests.interop.engines import engine_warnings

needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs quantkit[compressed-tensors]"
)
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytestmark = pytest.mark.interop

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def activations(dtype: torch.dtype, rows: int = 2) -> Tensor:
    """Wide-ranging inputs with a token of zeros and one of tiny values."""
    x = torch.randn(rows, 5, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-1, 1, 256)
    x[0, 1] = 0
    x[-1, 2] *= 1e-4
    return x.to(dtype)


@needs_compressed_tensors
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("preset", "args"),
    [
        ("w8a8", {"type": "int", "strategy": "token"}),
        ("fp8a8", {"type": "float", "strategy": "token"}),
        ("fp8a8_block", {"type": "float", "strategy": "group", "group_size": 128}),
    ],
)
def test_dynamic_inputs_are_bit_identical(preset: str, args: dict[str, Any], dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = activations(dtype)
    theirs = QuantizationArgs(num_bits=8, symmetric=True, dynamic=True, **args)
    scale, zero = compute_dynamic_scales_and_zp(x, theirs, nn.Linear(1, 1))
    expected = fake_quantize(x, scale, zero, theirs)
    assert torch.equal(round_inputs(x, parse_scheme(preset)), expected)


@needs_compressed_tensors
@pytest.mark.parametrize("preset", ["w8a8_static", "fp8a8_static"])
def test_static_inputs_and_caches_are_bit_identical(preset: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = activations(torch.float32)
    integers = preset.startswith("w8")
    theirs = QuantizationArgs(num_bits=8, type="int" if integers else "float", strategy="tensor")
    scale, zero = calculate_qparams(x.amin().view(1), x.amax().view(1), theirs)
    kind = "int8" if integers else "fp8"
    assert torch.equal(cache_scale(x.abs().amax(), kind), scale)  # type: ignore[arg-type]
    expected = fake_quantize(x, scale, zero, theirs)
    assert torch.equal(cache_round(x, kind, scale), expected)  # type: ignore[arg-type]
    scheme = parse_scheme(preset)
    own = input_scale(x.abs().amax((0, 1)), scheme)
    assert torch.equal(own, scale.to(torch.float16))
    found = round_inputs(x, scheme, own)
    torch.testing.assert_close(found, fake_quantize(x, own.float(), zero, theirs), rtol=0, atol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("threshold", [6.0, 2.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_products(dtype: torch.dtype, threshold: float) -> None:
    with engine_warnings():
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(256, 32, bias=False, has_fp16_weights=False, threshold=threshold)
        values = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu").eval()
        x = activations(dtype, rows=1)
        with torch.no_grad():
            engine = layer(x)
        codes, scales, columns = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
            x[0].to(torch.float16), threshold=threshold
        )
    weight = layer.state.CB.float() * layer.state.SCB.float()[:, None] / 127
    found = round_inputs(x, parse_scheme(f"w8a8_mixed{threshold:g}"))
    kept = [] if columns is None else columns.tolist()
    expected = codes.float() * (torch.where(scales == 0, 1, scales)[:, None] / 127)
    expected[:, kept] = x[0, :, kept].float()
    assert torch.equal(found[0].float(), expected.to(dtype).float())
    assert bool(kept) == (threshold > 0)
    # the engine rounds weights of outlier columns and its result to the dtype of x, and 1/127² to 6 digits
    error = (found.float() @ weight.T - engine.float()).abs().max() / engine.float().abs().max()
    assert error <= {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
