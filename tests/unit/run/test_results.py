from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.run import results
from quantkit.run.results import BlockResult
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, Codebook, Float, QuantizedLinear, QuantizedTensor, dequantize
from tests.quantized import random_affine, random_linear, random_quantized, same

# one of every kind that a method makes: tables, floats, nested and outer scales, powers of two, tiles
SCHEMES = (
    *("w4g32", "w1g16_asymf", "w4g32_asymf", "w3g8_asymf_axis0", "nf4", "nf4_dq", "fp4_dq", "fp8"),
    *("fp8_tensor", "fp8_block", "mxfp4", "nvfp4", "w8a8", "w8a8_static", "w8a8_mixed", "fp8a8_static"),
)


def examples() -> dict[str, QuantizedTensor]:
    """Every member of the union, plain and nested."""
    rng = torch.Generator().manual_seed(5)
    sym, asym = random_affine((6, 32), Scheme(4, 8), rng), random_affine((6, 32), Scheme(3, 8, False), rng)
    inner = random_affine((6, 4), Scheme(6, 4, False), rng)
    eight_bit_floats = torch.randn(6, 32, generator=rng).to(torch.float8_e4m3fn)
    table, picks = torch.randn(16, generator=rng), torch.randint(0, 16, (6, 32), generator=rng)
    powers = torch.exp2(torch.randint(-20, 20, (6, 4), generator=rng).float()).to(torch.float8_e8m0fnu)
    return {
        "symmetric": sym,
        "asymmetric": asym,
        "one scale": random_affine((6, 32), Scheme(8, per_tensor=True), rng),
        "bfloat16 scales": replace(sym, scale=sym.scale.to(torch.bfloat16)),  # type: ignore[union-attr]
        "regrouped": replace(asym, column_group=torch.randperm(32, generator=rng).to(torch.int32) // 8),
        "fractional": replace(asym, zero_point=torch.randn(6, 4, generator=rng).to(torch.float16)),
        "offset": replace(asym, zero_point=None, offset=torch.randn(6, 4, generator=rng)),
        "nested": replace(asym, scale=inner, zero_point=None, offset=replace(inner, bits=7)),
        "nested twice": replace(sym, scale=replace(inner, scale=random_affine((6, 1), Scheme(8), rng))),
        "floats": Float(eight_bit_floats, 8, torch.rand(6, 4, generator=rng), (1, 8)),
        "floats on a float scale": Float(
            eight_bit_floats,
            8,
            Float(torch.rand(6, 4, generator=rng).to(torch.float8_e4m3fn), 8, torch.ones(1, 1), (6, 4)),
            (1, 8),
        ),
        "codebook": Codebook(picks.to(torch.uint8), 4, table, torch.rand(6, 4, generator=rng), (1, 8)),
        "codebook under codes": Codebook(picks.to(torch.uint8), 4, table, inner, (1, 8)),
        "codebook of powers": Codebook(picks.to(torch.uint8), 4, table, powers, (1, 8)),
        "shifted codebook": Codebook(picks.to(torch.uint8), 4, table, inner, (1, 8), torch.tensor([0.25])),
        "ragged": random_affine((3, 7), Scheme(5), rng),
        "special values": replace(sym, scale=torch.full((6, 4), -0.0, dtype=torch.float16)),
        **{name: random_quantized((24, 128), parse_scheme(name), rng) for name in SCHEMES},
    }


EXAMPLES = examples()


def one(q: QuantizedTensor, name: str = "a") -> BlockResult:
    return BlockResult([QuantizedLinear(name, q)])


def encoded(result: BlockResult, extra: Mapping[str, object]) -> bytes:
    whole = results.Encoded(result, extra)
    data = b"".join(whole)
    assert len(data) == whole.size
    return data


def alike(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    return a.name == b.name and same(a.weight, b.weight) and same(a.input_scale, b.input_scale)


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip_is_equal_in_every_bit(name: str, tmp_path: Path) -> None:
    given_linear = QuantizedLinear("model.layers.0.x.weight", EXAMPLES[name])
    data = encoded(BlockResult([given_linear]), {"seconds": 1.5})
    (found,) = results.decode(data).linears
    assert alike(found, given_linear)
    assert torch.equal(dequantize(found.weight), dequantize(given_linear.weight))
    (tmp_path / "block").write_bytes(data)
    assert results.extra(tmp_path / "block") == {"seconds": 1.5}


def test_many_weights_keep_their_order_and_the_same_bytes() -> None:
    linears = [QuantizedLinear(f"w{9 - n}", q) for n, q in enumerate(EXAMPLES.values())]
    data = encoded(BlockResult(linears), {})
    assert data == encoded(BlockResult(linears), {})
    found = results.decode(data)
    assert [f.name for f in found.linears] == [linear.name for linear in linears]
    assert all(alike(a, b) for a, b in zip(found.linears, linears, strict=True))
    assert found.by_name().keys() == {linear.name for linear in linears} and found.tensors == {}


def test_scales_of_inputs_travel_along(rng: torch.Generator) -> None:
    linears = [
        random_linear(name, (4, 128), parse_scheme(name), rng)
        for name in ("w8a8", "w8a8_static", "fp8a8_static")
    ]
    linears[1] = replace(linears[1], input_scale=torch.tensor([0.7], dtype=torch.bfloat16))
    found = results.decode(encoded(BlockResult(linears), {})).linears
    assert all(alike(a, b) for a, b in zip(found, linears, strict=True))
    assert [f.input_scale is None for f in found] == [True, False, False]


def test_tensors_beside_the_weights_travel_along(rng: torch.Generator) -> None:
    """A norm that a transform rewrote and the scales of a cache, in the dtypes of the file."""
    tensors = {
        "model.layers.0.input_layernorm.weight": torch.randn(8, generator=rng).to(torch.bfloat16),
        "model.layers.0.self_attn.k_scale": torch.tensor([0.25]),
        "model.layers.0.self_attn.v_scale": torch.tensor([-0.0], dtype=torch.float16),
    }
    # a weight of the same name and one whose parts look alike are no tensors
    linears = [random_linear(name, (4, 32), Scheme(4, 8), rng) for name in (*tensors, "tensor")]
    found = results.decode(encoded(BlockResult(linears, tensors), {}))
    assert found.tensors.keys() == tensors.keys()
    assert all(same(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(alike(a, b) for a, b in zip(found.linears, linears, strict=True))
    alone = results.decode(encoded(BlockResult([], tensors), {}))
    assert alone.linears == [] and alone.tensors.keys() == tensors.keys()


def test_weights_may_share_tensors() -> None:
    q = EXAMPLES["regrouped"]
    scale = torch.tensor([0.5])
    both = [QuantizedLinear("a", q, scale), QuantizedLinear("b", q, scale)]
    found = results.decode(encoded(BlockResult(both), {})).linears
    assert all(alike(a, b) for a, b in zip(found, both, strict=True))


def test_slices_of_a_stack_are_written_alone() -> None:
    stack = random_affine((400, 64), Scheme(4, 8), torch.Generator().manual_seed(1))
    assert isinstance(stack.scale, torch.Tensor)
    part = replace(stack, codes=stack.codes[4:6], scale=stack.scale[4:6])
    data = encoded(one(part), {})
    assert len(data) < 2000
    assert same(results.decode(data).linears[0].weight, part)


def test_a_block_without_weights(tmp_path: Path) -> None:
    data = encoded(BlockResult([]), {"note": "Größe"})
    assert results.decode(data) == BlockResult([])
    (tmp_path / "block").write_bytes(data)
    assert results.extra(tmp_path / "block") == {"note": "Größe"}


@pytest.mark.parametrize(("scheme", "bits"), [("w3", 3), ("nf4_dq", 4 + 8 / 64), ("nvfp4", 4.5), ("fp8", 8)])
def test_codes_are_packed_densely(scheme: str, bits: float, rng: torch.Generator) -> None:
    wide = random_quantized((64, 1024), parse_scheme(scheme), rng)
    size = 64 * 1024 * bits / 8
    # headers, and what there is one of for each row or weight
    assert size < len(encoded(one(wide), {})) < size + 2500


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 40), st.integers(0, 99))
def test_every_width_survives(bits: int, sym: bool, width: int, seed: int) -> None:
    q: Affine = random_affine((2, width), Scheme(bits, sym=sym), torch.Generator().manual_seed(seed))
    (found,) = results.decode(encoded(one(q), {})).linears
    assert same(found.weight, q)
