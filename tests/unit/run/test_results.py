from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.run import results
from quantkit.schemes import Scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize
from tests.quantized import random_affine, same


def examples() -> dict[str, QuantizedTensor]:
    """Every member of the union, plain and nested."""
    rng = torch.Generator().manual_seed(5)
    sym, asym = random_affine((6, 32), Scheme(4, 8), rng), random_affine((6, 32), Scheme(3, 8, False), rng)
    inner = random_affine((6, 4), Scheme(6, 4, False), rng)
    eight_bit_floats = torch.randn(6, 32, generator=rng).to(torch.float8_e4m3fn)
    table, picks = torch.randn(16, generator=rng), torch.randint(0, 16, (6, 32), generator=rng)
    return {
        "symmetric": sym,
        "asymmetric": asym,
        "one scale": random_affine((6, 32), Scheme(8, per_tensor=True), rng),
        "bfloat16 scales": replace(sym, scale=sym.scale.to(torch.bfloat16)),  # type: ignore[union-attr]
        "regrouped": replace(asym, column_group=torch.randperm(32, generator=rng).to(torch.int32) // 8),
        "offset": replace(asym, zero_point=None, offset=torch.randn(6, 4, generator=rng)),
        "nested": replace(asym, scale=inner, zero_point=None, offset=replace(inner, bits=7)),
        "nested twice": replace(sym, scale=replace(inner, scale=random_affine((6, 1), Scheme(8), rng))),
        "floats": Float(eight_bit_floats, 8, torch.rand(6, 4, generator=rng), (1, 8)),
        "floats on a float scale": Float(
            eight_bit_floats,
            8,
            Float(torch.rand(6, 4).to(torch.float8_e4m3fn), 8, torch.ones(1, 1), (6, 4)),
            (1, 8),
        ),
        "codebook": Codebook(picks.to(torch.uint8), 4, table, torch.rand(6, 4, generator=rng), (1, 8)),
        "codebook under codes": Codebook(picks.to(torch.uint8), 4, table, inner, (1, 8)),
        "ragged": random_affine((3, 7), Scheme(5), rng),
        "special values": replace(sym, scale=torch.full((6, 4), -0.0, dtype=torch.float16)),
    }


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip_is_equal_in_every_bit(name: str) -> None:
    given_linear = QuantizedLinear("model.layers.0.x.weight", EXAMPLES[name])
    data = results.to_bytes([given_linear], {"seconds": 1.5})
    (found,) = results.from_bytes(data)
    assert found.name == given_linear.name
    assert same(found.weight, given_linear.weight)
    assert torch.equal(dequantize(found.weight), dequantize(given_linear.weight))
    assert results.extra(data) == {"seconds": 1.5}


def test_many_weights_keep_their_order_and_the_same_bytes() -> None:
    linears = [QuantizedLinear(f"w{9 - n}", q) for n, q in enumerate(EXAMPLES.values())]
    data = results.to_bytes(linears, {})
    assert data == results.to_bytes(linears, {})
    found = results.from_bytes(data)
    assert [f.name for f in found] == [linear.name for linear in linears]
    assert all(same(a.weight, b.weight) for a, b in zip(found, linears, strict=True))


def test_weights_may_share_tensors() -> None:
    q = EXAMPLES["regrouped"]
    found = results.from_bytes(results.to_bytes([QuantizedLinear("a", q), QuantizedLinear("b", q)], {}))
    assert same(found[0].weight, q) and same(found[1].weight, q)


def test_slices_of_a_stack_are_written_alone() -> None:
    stack = random_affine((400, 64), Scheme(4, 8), torch.Generator().manual_seed(1))
    assert isinstance(stack.scale, torch.Tensor)
    part = replace(stack, codes=stack.codes[4:6], scale=stack.scale[4:6])
    data = results.to_bytes([QuantizedLinear("a", part)], {})
    assert len(data) < 2000
    assert same(results.from_bytes(data)[0].weight, part)


def test_a_block_without_weights() -> None:
    data = results.to_bytes([], {"note": "Größe"})
    assert results.from_bytes(data) == []
    assert results.extra(data) == {"note": "Größe"}


def test_codes_are_packed_densely() -> None:
    wide = random_affine((64, 1024), Scheme(3), torch.Generator().manual_seed(1))
    data = results.to_bytes([QuantizedLinear("a", wide)], {})
    assert 64 * 1024 * 3 // 8 < len(data) < 64 * 1024 * 3 // 8 + 1000


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 40), st.integers(0, 99))
def test_every_width_survives(bits: int, sym: bool, width: int, seed: int) -> None:
    q: Affine = random_affine((2, width), Scheme(bits, sym=sym), torch.Generator().manual_seed(seed))
    (found,) = results.from_bytes(results.to_bytes([QuantizedLinear("a", q)], {}))
    assert same(found.weight, q)
