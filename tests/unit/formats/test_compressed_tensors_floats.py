"""Float weights: e4m3 with scales of every shape, and e2m1 in pairs with mxfp4 and nvfp4 scales."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorInfo
from quantkit.errors import UnsupportedError
from quantkit.formats.compressed_tensors import FORMAT
from quantkit.model.graph import Weight
from quantkit.numerics.levels import E2M1
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize
from tests.quantized import same

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
TABLE = torch.tensor(E2M1)
MXFP4, NVFP4 = parse_scheme("mxfp4"), parse_scheme("nvfp4")


def config(scheme: Scheme) -> dict[str, Any]:
    """The config of a model of one weight."""
    facts = FormatFacts((Assigned(Weight("x.weight", (64, 64)), scheme),), scheme, (), False, "rtn", "1.2.3")
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config(facts)))
    return found


def encode(q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    return FORMAT.encode(QuantizedLinear("x.weight", q), scheme)


def mxfp4(codes: Tensor, scale: Tensor) -> Codebook:
    return Codebook(codes.to(torch.uint8), 4, TABLE, scale.to(E8M0), (1, 32))


def nvfp4(codes: Tensor, scale: Tensor, outer: float = 0.25) -> Codebook:
    fine = Float(scale.to(E4M3), 8, torch.tensor([[outer]]), (scale.shape[0], scale.shape[1]))
    return Codebook(codes.to(torch.uint8), 4, TABLE, fine, (1, 16))


def random_float(name: str, shape: tuple[int, int], rng: torch.Generator) -> QuantizedTensor:
    """Any values of a scheme, scales in float16."""
    scheme = parse_scheme(name)
    rows, columns = scheme.group(shape)
    groups = (-(-shape[0] // rows), shape[1] // columns)
    codes = torch.randint(0, 16, shape, generator=rng)
    if name == "mxfp4":
        return mxfp4(codes, 2.0 ** torch.randint(-9, 5, groups, generator=rng))
    if name == "nvfp4":
        return nvfp4(codes, torch.rand(groups, generator=rng) * 400 + 0.1)
    values = (torch.randn(shape, generator=rng) * 100).to(E4M3)
    return Float(values, 8, torch.rand(groups, generator=rng).half() + 0.01, (rows, columns))


def test_every_e2m1_code_by_hand() -> None:
    # 0, .5, 1 … 6 and their negatives are the codes 0 … 15; of two the first is in the low half
    tensors = encode(mxfp4(torch.arange(32).view(1, 32) % 16, torch.ones(1, 1)), MXFP4)
    assert tensors["x.weight_packed"].tolist() == [list(bytes.fromhex("1032547698BADCFE" * 2))]
    # one is 2^(127 − 127)
    assert tensors["x.weight_scale"].tolist() == [[127]]
    assert list(tensors) == ["x.weight_packed", "x.weight_scale"]


def test_powers_of_two_are_stored_as_exponents() -> None:
    q = mxfp4(torch.zeros(1, 96, dtype=torch.uint8), torch.tensor([[0.25, 1.0, 2.0**7]]))
    assert encode(q, MXFP4)["x.weight_scale"].tolist() == [[125, 127, 134]]


def test_reference_vector() -> None:
    i, o = torch.arange(64), torch.arange(32)
    q = nvfp4((7 * i[None] + 3 * o[:, None]) % 16, torch.ones(32, 4))
    packed = encode(q, NVFP4)["x.weight_packed"]
    assert packed.shape == (32, 32) and packed.flatten()[:6].tolist() == [112, 94, 60, 26, 248, 214]
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == "a865ea29960e473d"


def test_the_scale_of_the_tensor_is_stored_as_what_divides() -> None:
    # 6 (code 7) · 448 / 1024
    tensors = encode(nvfp4(torch.full((1, 16), 7), torch.tensor([[448.0]]), 2.0**-10), NVFP4)
    assert list(tensors) == ["x.weight_packed", "x.weight_scale", "x.weight_global_scale"]
    assert tensors["x.weight_global_scale"].tolist() == [1024.0]
    assert tensors["x.weight_global_scale"].dtype == torch.float32
    found = FORMAT.decode("x.weight", tensors, config(NVFP4)).weight
    assert dequantize(found).unique().tolist() == [2.625]


def test_a_scale_that_a_division_does_not_give_back_is_refused() -> None:
    outer = torch.tensor(0.003)
    assert outer.reciprocal().reciprocal() != outer
    with pytest.raises(UnsupportedError, match=r"`x\.weight`.*does not survive"):
        encode(nvfp4(torch.zeros(1, 16), torch.ones(1, 1), float(outer)), NVFP4)


def test_every_scale_that_is_a_reciprocal_survives(rng: torch.Generator) -> None:
    divisors = torch.rand(1000, generator=rng) * 10 ** (torch.rand(1000, generator=rng) * 8 - 4)
    scales = divisors.reciprocal()
    assert torch.equal(scales.reciprocal().reciprocal(), scales)


@pytest.mark.parametrize(
    "name, shape, stored",
    [
        ("fp8", (3, 8), (3, 1)),
        ("fp8", (1, 8), (1, 1)),
        ("fp8_tensor", (3, 8), (1,)),
        ("fp8_block", (256, 384), (2, 3)),
        ("fp8_block", (130, 128), (2, 1)),  # the last block is cut short
        ("fp8_block", (3, 128), (1, 1)),
    ],
)
def test_e4m3_scales_keep_their_shape(
    name: str, shape: tuple[int, int], stored: tuple[int, ...], rng: torch.Generator
) -> None:
    q, scheme = random_float(name, shape, rng), parse_scheme(name)
    tensors = encode(q, scheme)
    assert list(tensors) == ["x.weight", "x.weight_scale"]
    assert tensors["x.weight"].dtype == E4M3 and tensors["x.weight_scale"].shape == stored
    found = FORMAT.decode("x.weight", tensors, config(scheme))
    assert same(found.weight, q) and found.input_scale is None


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "fp8_block", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(256, 256), (40, 128), (1, 256)])
def test_decode_inverts_encode_and_layout_says_what_it_makes(
    name: str, shape: tuple[int, int], rng: torch.Generator
) -> None:
    q, scheme = random_float(name, shape, rng), parse_scheme(name)
    tensors = encode(q, scheme)
    weight = Weight("x.weight", shape)
    planned = [(s.name, s.dtype, s.shape) for s in FORMAT.layout(weight, scheme)]
    assert planned == [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    assert all(t.is_contiguous() for t in tensors.values())
    assert same(FORMAT.decode("x.weight", tensors, config(scheme)).weight, q)
    dtypes = {torch.uint8: "U8", E4M3: "F8_E4M3", torch.float32: "F32", torch.float16: "F16"}
    infos = {n: TensorInfo(n, dtypes[t.dtype], tuple(t.shape), None, 0, 0) for n, t in tensors.items()}  # type: ignore[arg-type]
    assert FORMAT.measure("x.weight", infos, config(scheme)) == (shape, scheme.bits)
    assert {FORMAT.base_name(n) for n in tensors if n != "x.weight"} == {"x.weight"}


def test_exponents_as_scales_of_e4m3_are_read() -> None:
    """mxfp8, which llm-compressor writes."""
    tensors = {
        "x.weight": torch.ones(1, 64).to(E4M3),
        "x.weight_scale": torch.tensor([[126, 128]], dtype=torch.uint8),
    }
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}
    found = dequantize(FORMAT.decode("x.weight", tensors, {"config_groups": {"group_0": group}}).weight)
    assert found.unique().tolist() == [0.5, 2.0] and found[0, 0] == 0.5


@pytest.mark.parametrize(
    "name, q",
    [
        ("fp8", Affine(torch.zeros(2, 32, dtype=torch.int8), 8, torch.ones(2, 1), (1, 32))),
        ("fp8", Float(torch.zeros(2, 32).to(torch.float8_e5m2), 8, torch.ones(2, 1), (1, 32))),
        ("mxfp4", Codebook(torch.zeros(2, 32, dtype=torch.uint8), 4, TABLE, torch.ones(2, 1), (1, 32))),
        ("mxfp4", replace(mxfp4(torch.zeros(2, 32), torch.ones(2, 1)), table=-TABLE)),
        ("nvfp4", mxfp4(torch.zeros(2, 32), torch.ones(2, 1))),
        ("nvfp4", nvfp4(torch.zeros(1, 16), -torch.ones(1, 1))),
        ("w4g32", mxfp4(torch.zeros(2, 32), torch.ones(2, 1))),
    ],
    ids=["integers", "e5m2", "plain scales", "another table", "no second level", "negative", "no integers"],
)
def test_other_numbers_than_the_scheme_says_are_refused(name: str, q: QuantizedTensor) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot store `x\.weight`"):
        encode(q, parse_scheme(name))


def test_the_library_itself_packs_the_same_bytes() -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.helpers", reason="needs compressed-tensors"
    )
    codes = torch.arange(256).view(4, 64) * 7 % 16
    packed = helpers.pack_fp4_to_uint8(TABLE[codes].to(torch.bfloat16))
    assert torch.equal(encode(mxfp4(codes, torch.ones(4, 2)), MXFP4)["x.weight_packed"], packed)


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "fp8_block", "mxfp4", "nvfp4"])
def test_the_library_itself_reads_our_weights(name: str, rng: torch.Generator) -> None:
    """It computes 4-bit floats in float32 and keeps bfloat16, and e4m3 in the dtype of the scale."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor

    q, scheme = random_float(name, (256, 256), rng), parse_scheme(name)
    if isinstance(q, Float):
        assert isinstance(q.scale, Tensor)
        q = replace(q, scale=q.scale.float())
    group = library.QuantizationConfig.model_validate(config(scheme)).config_groups["group_0"]
    state = {n.removeprefix("x."): t for n, t in encode(q, scheme).items()}
    found = BaseCompressor.get_value_from_registry(group.format).decompress(state, group)["weight"]
    assert torch.equal(found, dequantize(q).to(found.dtype))
