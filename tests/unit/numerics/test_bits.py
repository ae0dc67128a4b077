from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from quantkit.numerics.bits import pack, packed_width, unpack


def words(*values: int) -> torch.Tensor:
    """int32 words written as unsigned hexadecimal numbers."""
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32).copy())


def sha16(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


# (codes, bits, words): the worked examples of the GPTQ and compressed-tensors layouts
EXAMPLES = {
    "4 bits, 1 to 8": ([1, 2, 3, 4, 5, 6, 7, 8], 4, [0x87654321]),
    "2 bits": ([0, 1, 2, 3] * 4, 2, [0xE4E4E4E4]),
    "8 bits": ([1, 128, 255, 7], 8, [0x07FF8001]),
    # code 10 (= 2, binary 010) has its low two bits at bits 30 and 31 of word 0, its high bit in word 1
    "3 bits straddle words": ([0, 1, 2, 3, 4, 5, 6, 7] * 4, 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    "3 bits, 5n mod 8": ([5 * n % 8 for n in range(32)], 3, [0xA878CEA8, 0xCEA878CE, 0x78CEA878]),
    "int4 row -8 to 7, 8 added": (list(range(16)), 4, [0x76543210, 0xFEDCBA98]),
    "int8 -128 -1 0 127, 128 added": ([0, 127, 128, 255], 8, [0xFF807F00]),
    "the last word is padded with zeros": ([3, 1], 3, [0b001_011]),
}


@pytest.mark.parametrize("codes, bits, expected", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_worked_examples(codes: list[int], bits: int, expected: list[int]) -> None:
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, words(*expected))
    assert unpack(packed, bits, len(codes)).tolist() == codes


def reference_codes(bits: int) -> torch.Tensor:
    """(in 64, out 32): q[i, o] = (7i + 3o) mod 2^bits."""
    i, o = torch.arange(64)[:, None], torch.arange(32)[None]
    return (7 * i + 3 * o) % (1 << bits)


# bits: sha256 of gptq qweight, of its zero points as v1 and v2
GPTQ = {
    2: ("5dc5ee578024eee5", "b279e0e41734e3c9", "73b843c221edd716"),
    3: ("a98cf3a0d3ced38d", "45e4062ace29ffd9", "bb658ea27af06b24"),
    4: ("a92cb148a78a7475", "bfa1de6afa2751de", "7043b475aa0de4c2"),
    8: ("9e083b267fe10c3c", "9fc02f00a58d26f3", "d03549a6203f2ec0"),
}


@pytest.mark.parametrize("bits", GPTQ)
def test_reference_vectors_packed_along_the_inputs_as_gptq_does(bits: int) -> None:
    weight, v1, v2 = GPTQ[bits]
    assert sha16(pack(reference_codes(bits).T, bits).T) == weight
    g, o = torch.arange(2)[:, None], torch.arange(32)[None]
    zero = 1 + (5 * g + o) % ((1 << bits) - 1)
    assert sha16(pack(zero - 1, bits)) == v1
    assert sha16(pack(zero, bits)) == v2


# bits: sha256 of compressed-tensors weight_packed and weight_zero_point
PACK_QUANTIZED = {
    2: ("1d0ee724c985b516", "ac162410ec68d5d7"),
    3: ("9d3bcd6121e8a084", "80026a55fec39639"),
    4: ("a865ea29960e473d", "c93368520cae1e3f"),
    5: ("9417289f59673964", "09f49f71a84c5e35"),
    6: ("3df17e5fba475f12", "464c01338f061046"),
    7: ("1628cd59fa7fcdf5", "f262e18392b73534"),
    8: ("cccae9f929e612a6", "588fd6822c57f903"),
}


@pytest.mark.parametrize("bits", PACK_QUANTIZED)
def test_reference_vectors_packed_along_each_row_as_compressed_tensors_does(bits: int) -> None:
    weight, zeros = PACK_QUANTIZED[bits]
    assert sha16(pack(reference_codes(bits).T, bits)) == weight
    o, g = torch.arange(32)[:, None], torch.arange(2)[None]
    zero = (5 * g + o) % (1 << bits)
    assert sha16(pack(zero.T, bits).T) == zeros


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64, 95])
def test_unpack_inverts_pack(bits: int, count: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, count), generator=rng)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_width(count, bits))
    found = unpack(packed, bits, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_agree_with_a_plain_bit_stream(bits: int, rng: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, (50,), generator=rng)
    stream = sum(int(code) << (n * bits) for n, code in enumerate(codes))
    count = packed_width(50, bits)
    expected = [(stream >> (32 * n)) & 0xFFFFFFFF for n in range(count)]
    assert torch.equal(pack(codes, bits), words(*expected))


def test_32_codes_fill_exactly_as_many_words_as_they_have_bits() -> None:
    assert [packed_width(32, bits) for bits in range(1, 9)] == list(range(1, 9))
    assert packed_width(33, 4) == 5
    assert packed_width(0, 4) == 0
