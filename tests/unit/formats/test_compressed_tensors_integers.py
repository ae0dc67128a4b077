"""Integer weights: the worked numbers of the format, byte for byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch

from quantkit.errors import UnsupportedError
from quantkit.formats.compressed_tensors import FORMAT
from quantkit.model.graph import Weight
from quantkit.protocols import Assigned, FormatFacts
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize


def config(scheme: Scheme) -> dict[str, Any]:
    """The config of a model of one weight."""
    facts = FormatFacts((Assigned(Weight("x.weight", (64, 64)), scheme),), scheme, (), False, "rtn", "1.2.3")
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config(facts)))
    return found


def sha16(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def encode(q: Affine, scheme: Scheme) -> dict[str, torch.Tensor]:
    return FORMAT.encode(QuantizedLinear("x.weight", q), scheme)


def unsigned(t: torch.Tensor) -> list[int]:
    return [n & 0xFFFFFFFF for n in t.flatten().tolist()]


def test_int4_row_by_hand() -> None:
    # −8 … −1, 0 … 7 with 8 added are the sixteen hexadecimal digits
    q = Affine(torch.arange(-8, 8).view(1, 16).to(torch.int8), 4, torch.ones(1, 1), (1, 16))
    tensors = encode(q, Scheme(4))
    assert unsigned(tensors["x.weight_packed"]) == [0x76543210, 0xFEDCBA98]
    assert tensors["x.weight_shape"].tolist() == [1, 16]
    assert list(tensors) == ["x.weight_packed", "x.weight_scale", "x.weight_shape"]


def test_zero_points_are_packed_along_the_outputs_by_hand() -> None:
    # −8 −1 0 7 1 2 3 4 with 8 added: 0 7 8 F 9 A B C, one word for eight outputs
    zero = torch.tensor([[0], [7], [8], [15], [9], [10], [11], [12]], dtype=torch.uint8)
    q = Affine(torch.zeros(8, 8, dtype=torch.uint8), 4, torch.ones(8, 1), (1, 8), zero)
    found = encode(q, Scheme(4, sym=False))["x.weight_zero_point"]
    assert found.shape == (1, 1)
    assert unsigned(found) == [0xCBA9F870]


def test_eight_bits_in_groups_by_hand() -> None:
    q = Affine(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8), 8, torch.ones(1, 1), (1, 4))
    assert unsigned(encode(q, Scheme(8, 4))["x.weight_packed"]) == [0xFF807F00]


# bits: sha256 of weight_packed and weight_zero_point
VECTORS = {
    2: ("1d0ee724c985b516", "ac162410ec68d5d7"),
    3: ("9d3bcd6121e8a084", "80026a55fec39639"),
    4: ("a865ea29960e473d", "c93368520cae1e3f"),
    5: ("9417289f59673964", "09f49f71a84c5e35"),
    6: ("3df17e5fba475f12", "464c01338f061046"),
    7: ("1628cd59fa7fcdf5", "f262e18392b73534"),
    8: ("cccae9f929e612a6", "588fd6822c57f903"),
}


@pytest.mark.parametrize("bits", VECTORS)
def test_reference_vectors(bits: int) -> None:
    i, o, g = torch.arange(64), torch.arange(32), torch.arange(2)
    codes = (7 * i[None] + 3 * o[:, None]) % (1 << bits)
    zeros = ((5 * g[None] + o[:, None]) % (1 << bits)).to(torch.uint8)
    scale = torch.ones(32, 2)
    tensors = encode(Affine(codes.to(torch.uint8), bits, scale, (1, 32), zeros), Scheme(bits, 32, sym=False))
    assert (sha16(tensors["x.weight_packed"]), sha16(tensors["x.weight_zero_point"])) == VECTORS[bits]
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    tensors = encode(Affine(signed, bits, scale, (1, 32)), Scheme(bits, 32))
    assert sha16(tensors["x.weight_packed"]) == VECTORS[bits][0]
    assert "x.weight_zero_point" not in tensors


@pytest.mark.parametrize("per_tensor, shape", [(False, (3, 1)), (True, (1,))])
def test_eight_bits_per_row_or_tensor_are_plain_int8(per_tensor: bool, shape: tuple[int, ...]) -> None:
    codes = torch.tensor([[-128, 127], [0, 1], [2, 3]], dtype=torch.int8)
    scale = torch.ones(1, 1) if per_tensor else torch.ones(3, 1)
    tensors = encode(
        Affine(codes, 8, scale, (3, 2) if per_tensor else (1, 2)), Scheme(8, per_tensor=per_tensor)
    )
    assert torch.equal(tensors["x.weight"], codes)
    assert tensors["x.weight_scale"].shape == shape
    assert len(tensors) == 2


def test_the_library_itself_packs_the_same_words() -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors"
    )
    codes = torch.randint(-4, 4, (8, 96), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    for bits in (3, 4, 8):
        q = Affine(codes, bits, torch.ones(8, 3), (1, 32))
        assert torch.equal(encode(q, Scheme(bits, 32))["x.weight_packed"], helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_narrow_rows_are_read_with_the_bits_of_the_config(bits: int, rng: torch.Generator) -> None:
    """Below 32 codes several widths take the same number of words."""
    codes = torch.randint(0, 1 << bits, (4, 8), generator=rng).to(torch.uint8)
    zero = torch.zeros(4, 1, dtype=torch.uint8)
    scheme = Scheme(bits, sym=False)
    tensors = encode(Affine(codes, bits, torch.ones(4, 1), (1, 8), zero), scheme)
    found = FORMAT.decode("x.weight", tensors, config(scheme)).weight
    assert isinstance(found, Affine)
    assert found.bits == bits and torch.equal(found.codes, codes)


def test_words_that_fit_no_width_are_refused() -> None:
    tensors = {
        "x.weight_packed": torch.zeros(4, 77, dtype=torch.int32),
        "x.weight_scale": torch.ones(4, 1),
        "x.weight_shape": torch.tensor([4, 64]),
    }
    with pytest.raises(UnsupportedError, match="77 words for 64 codes"):
        FORMAT.decode("x.weight", tensors, config(Scheme(4)))


def test_zero_points_of_unpacked_codes_are_signed() -> None:
    tensors = {
        "x.weight": torch.tensor([[-128, 3], [127, -1]], dtype=torch.int8),
        "x.weight_scale": torch.tensor([[0.5], [2.0]]),
        "x.weight_zero_point": torch.tensor([[-28], [7]], dtype=torch.int8),
    }
    found = FORMAT.decode("x.weight", tensors, config(Scheme(8)))
    assert dequantize(found.weight).tolist() == [[-50.0, 15.5], [240.0, -16.0]]


def test_words_with_empty_rests_are_read() -> None:
    """Up to version 0.17 the library put ten codes of 3 bits into a word."""
    codes = torch.randint(0, 8, (4, 64), generator=torch.Generator().manual_seed(3))
    words = torch.zeros(4, 7, dtype=torch.int64)
    for i in range(64):
        words[:, i // 10] |= codes[:, i] << 3 * (i % 10)
    tensors = {
        "x.weight_packed": words.to(torch.int32),
        "x.weight_scale": torch.ones(4, 1),
        "x.weight_shape": torch.tensor([4, 64]),
    }
    found = FORMAT.decode("x.weight", tensors, config(Scheme(3)))
    assert torch.equal(dequantize(found.weight), codes.float() - 4)
