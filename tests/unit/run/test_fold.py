"""What a norm divides by, its columns multiply by: by hand, then on whole models that must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.record import Recorder, Wanted
from quantkit.calibrate.statistics import Need, Statistics
from quantkit.model.graph import Block, Part, Rows, Site, Vector, Weight
from quantkit.model.runtime import LoadedBlock
from quantkit.recipe.plan import Described, TargetPlan, resolve
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Recipe
from quantkit.run.fold import Proof, _divided, fold_site
from quantkit.run.folded import (
    Fold,
    divide_rows,
    matrix_of,
    power_of_two,
    rewritten,
    rounding,
    row_scalable,
)
from quantkit.schemes import Scheme, parse_scheme
from quantkit.tensors import Affine, QuantizedLinear, dequantize
from tests.quantized import ALL_NEEDS, random_linear

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Divided:
    factors: Tensor
    tensors: dict[str, Tensor]


def fold(wanted: list[float], vector: Tensor, offset: float = 0.0, bias: Tensor | None = None) -> Divided:
    held = {"norm.weight": vector} | ({} if bias is None else {"norm.bias": bias})
    named = Vector("norm.weight", None if bias is None else "norm.bias", offset)
    return Divided(*_divided(torch.tensor(wanted), named, held))


def test_division_by_hand() -> None:
    found = fold([2.0, 0.5, 1.0], torch.tensor([2.0, 4.0, -3.0]))
    assert found.factors.tolist() == [2.0, 0.5, 1.0]
    assert found.tensors["norm.weight"].tolist() == [1.0, 8.0, -3.0]
    assert list(found.tensors) == ["norm.weight"]


def test_columns_take_up_the_rounding_of_the_vector() -> None:
    # ⅓ in bf16 is 171/512: the columns are multiplied by 512/171 and not by 3
    found = fold([3.0, 2.0], torch.tensor([1.0, 1.0], dtype=BF16))
    stored = found.tensors["norm.weight"]
    assert stored.dtype == BF16 and stored.tolist() == [171 / 512, 0.5]
    assert found.factors.tolist() == pytest.approx([512 / 171, 2.0], rel=1e-7)


def test_norms_that_add_one_by_hand() -> None:
    # 1 + ½ = 1.5, a third of it ½, stored as −½; 1 + 0 halved and doubled; 1 − 3 = −2
    found = fold([3.0, 2.0, 0.5, 4.0], torch.tensor([0.5, 0.0, 0.0, -3.0]), offset=1.0)
    assert found.tensors["norm.weight"].tolist() == [-0.5, -0.5, 1.0, -1.5]
    assert found.factors.tolist() == [3.0, 2.0, 0.5, 4.0]
    # bf16 has steps of 1/256 below 1: 1/300 becomes 1 − 255/256
    found = fold([300.0], torch.tensor([0.0], dtype=BF16), offset=1.0)
    assert found.tensors["norm.weight"].tolist() == [-255 / 256] and found.factors.tolist() == [256.0]


def test_inputs_that_are_off_or_would_be_switched_off_are_left_alone() -> None:
    found = fold([4.0, 4.0], torch.tensor([0.0, 1.0]), bias=torch.tensor([3.0, 3.0]))
    assert found.factors.tolist() == [1.0, 4.0]
    assert found.tensors["norm.weight"].tolist() == [0.0, 0.25]
    assert found.tensors["norm.bias"].tolist() == [3.0, 0.75]
    # 1/700 rounds to 1 − 1, which would lose the input
    found = fold([700.0, 2.0], torch.tensor([0.0, 0.0], dtype=BF16), offset=1.0)
    assert found.tensors["norm.weight"].tolist() == [0.0, -0.5] and found.factors.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_vector_times_column_stays(dtype: torch.dtype, offset: float, rng: torch.Generator) -> None:
    vector = torch.randn(200, generator=rng).to(dtype)
    wanted = torch.exp(torch.randn(200, generator=rng) * 2)
    found = fold(wanted.tolist(), vector, offset)
    stored = found.tensors["norm.weight"]
    assert stored.dtype == dtype and bool(torch.isfinite(found.factors).all())
    assert bool((found.factors > 0).all())
    torch.testing.assert_close(
        (stored.float() + offset) * found.factors, vector.float() + offset, rtol=1e-6, atol=0
    )


def test_a_bias_is_divided_by_what_the_columns_are_multiplied_by() -> None:
    vector, bias = torch.tensor([1.0, 4.0], dtype=BF16), torch.tensor([6.0, -3.0], dtype=BF16)
    found = fold([3.0, 0.5], vector, bias=bias)
    # 6 · 171/512 = 2.00390625, which bf16 rounds to 2
    assert found.tensors["norm.bias"].tolist() == [2.0, -6.0]
    assert found.tensors["norm.bias"].dtype == BF16
    exact = fold([3.0, 0.5], vector.float(), bias=bias.float())
    assert exact.tensors["norm.bias"].tolist() == pytest.approx([2.0, -6.0])


# --- rows --------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    # two rows, groups of two; −1.5 and 3 are scales times codes
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16)
    codes = torch.tensor([[-3, 1, 3, 0], [1, 2, 4, -4]], dtype=torch.int8)
    before = QuantizedLinear("w", Affine(codes, 4, scale, (1, 2)))
    after = divide_rows(before, torch.tensor([2.0, 0.5]))
    assert isinstance(after.weight, Affine) and after.weight.codes is codes
    assert isinstance(after.weight.scale, Tensor) and after.weight.scale.dtype == torch.float16
    assert after.weight.scale.tolist() == [[0.25, 0.5], [4.0, 0.5]]
    assert dequantize(after.weight).tolist() == [[-0.75, 0.25, 1.5, 0], [4.0, 8.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    "scheme",
    [
        *("w4g32", "w4g32_asym", "w3", "w8", "w4g32_asymf", "nf4", "fp4", "fp8", "mxfp4"),
        *("w8a8", "w8a8_mixed", "fp8a8"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_of_every_grid(scheme: str, dtype: str, rng: torch.Generator) -> None:
    own = replace(parse_scheme(scheme), scale_dtype=dtype)
    assert row_scalable(own) is None
    before = random_linear("w", (12, 64), own, rng)
    divisors = torch.exp2(torch.rand(12, generator=rng) * 4 - 2)
    divisors = divisors.log2().round().exp2() if power_of_two(own) else divisors
    after = divide_rows(before, divisors)
    exact = dequantize(before.weight) / divisors[:, None]
    torch.testing.assert_close(dequantize(after.weight), exact, rtol=2**-7, atol=1e-6)
    assert after.weight.group == before.weight.group
    if power_of_two(own):
        assert torch.equal(dequantize(after.weight), exact)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("nf4_dq", "scales that are quantized themselves"),
        ("nvfp4", "scales of 8 bits"),
        ("w8_tensor", "scales that rows share"),
        ("fp8_block", "scales that rows share"),
        ("w4g4_asymf_axis0", "scales that rows share"),
    ],
)
def test_rows_that_cannot_be_divided(scheme: str, reason: str, rng: torch.Generator) -> None:
    own = parse_scheme(scheme)
    assert row_scalable(own) == reason
    linear = random_linear("w", (8, 128), own, rng)
    with pytest.raises(ValueError, match=r"share scales|quantized themselves"):
        divide_rows(linear, torch.full((8,), 2.0))


def test_a_scale_that_leaves_its_dtype_is_noticed() -> None:
    scale = torch.tensor([[1e-4], [0.0]], dtype=torch.float16)
    linear = QuantizedLinear("w", Affine(torch.ones(2, 4, dtype=torch.int8), 4, scale, (1, 4)))
    assert rounding(linear, torch.tensor([2.0, 3.0])) < 2**-9
    assert rounding(linear, torch.tensor([3000.0, 3.0])) > 2**-7
    assert rounding(linear, torch.tensor([1e-10, 3.0])) == float("inf")


def test_matrices_in_file_tensors() -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    plain = Weight("w", (3, 4), part=Part(1))
    turned = Weight("w", (4, 3), part=Part(0, transposed=True))
    assert torch.equal(matrix_of(plain, stack), stack[1])
    assert torch.equal(matrix_of(turned, stack), stack[0].T)
    assert torch.equal(matrix_of(Weight("w", (4, 3), part=Part(None, transposed=True)), stack[1]), stack[1].T)
    matrix_of(turned, stack)[3, 0] = -1
    assert stack[0, 0, 3] == -1


# --- on whole models -------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """A transform whose factors are random, so that nothing is legal by chance."""

    reach: float = 1.0

    @property
    def needs(self) -> Need:
        return Need.NOTHING

    def accepts(self, scheme: Scheme) -> str | None:
        return None

    def factors(
        self, weight: Tensor, stats: Statistics, scheme: Scheme, quantizer: object, ties: Tensor | None
    ) -> Tensor | None:
        drawn = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[0]))
        return torch.exp2((drawn if ties is None else drawn[ties]) * 2 * self.reach - self.reach)


def statistics(model: Any, index: int, states: Tensor) -> dict[str, Statistics]:
    """What every site of a block sees."""
    sites = model.graph.blocks[index].sites
    recorder = Recorder({s.id: Wanted(s.width, ALL_NEEDS) for s in sites}, states.device)
    model.runtime.load(index).run(states, recorder)
    return {site.id: recorder.take(site.id) for site in sites}


def proof_of(model: Any, block: Block) -> Proof:
    states = model.states(block.index)
    return Proof(block, lambda: model.runtime.load(block.index), lambda: states)


def attempt(model: Any, block: Block, site: Site, target: TargetPlan) -> Fold | str | None:
    """The fold at a site of `block`, all weights having codes."""
    stats = statistics(model, block.index, model.states(block.index))
    linears = codes(block, target)
    changed = replace(block, sites=tuple(site if s.id == site.id else s for s in block.sites))
    return fold_site(site, stats[site.id], target, model.runtime, proof_of(model, changed), linears)


def codes(block: Block, target: TargetPlan) -> dict[str, QuantizedLinear]:
    schemes = {w.key: (w, s) for w in block.weights() if (s := target.scheme_of(w)) is not None}
    rng = torch.Generator().manual_seed(3)
    return {key: random_linear(key, w.shape, scheme, rng) for key, (w, scheme) in schemes.items()}


@dataclass(frozen=True)
class Rescaled:
    """A block after all its folds: what was made, what was refused, how much it changed."""

    folds: dict[str, Fold]
    refused: dict[str, str]
    change: float


def rescaled(model: Any, block: Block, target: TargetPlan) -> Rescaled:
    """All folds of a block, in order, together in the float model."""
    stats, proof = statistics(model, block.index, model.states(block.index)), proof_of(model, block)
    linears = codes(block, target)
    folds: dict[str, Fold] = {}
    refused: dict[str, str] = {}
    for site in block.sites:
        if block.together(site)[0] != site:
            continue
        found = fold_site(site, stats[site.id], target, model.runtime, proof, linears)
        if isinstance(found, Fold):
            folds[site.id] = found
        elif found is not None:
            refused[site.id] = found
    return Rescaled(folds, refused, proof.change(list(folds.values()), model.runtime))


def scaled_target(model: Any, text: str = "gptq:w4g32", reach: float = 1.0) -> TargetPlan:
    """Every weight in the scheme of `text`, whether or not the format can hold it in this model."""
    resolved = resolve(Recipe("x", parse_targets(text)), model.graph, Described.of(model.checkpoint), "0")
    target = resolved.targets[0]
    schemes = {weight.key: target.default for weight in model.graph.weights()}
    return replace(target, schemes=schemes, transforms=(Scaling(reach),))


def roles(block: Block, ids: Iterable[str]) -> list[str]:
    return [s.weights[0].role for s in block.sites if s.id in set(ids)]


@pytest.mark.parametrize(
    ("family", "made", "refused"),
    [
        ("llama", ["q", "o", "gate", "down"], []),
        ("qwen2", ["q", "o", "gate", "down"], []),
        ("gemma2", ["q", "o", "gate", "down"], []),
        ("gemma3_text", ["q", "o", "gate", "down"], []),
        ("phi3", ["qkv", "o", "gate_up", "down"], []),
        ("cohere", ["q", "o", "down"], []),
        ("olmo2", ["o", "down"], []),
        # ReLU passes a factor on, GELU does not
        ("opt", ["q", "o", "up", "down"], []),
        ("gpt2", ["qkv", "o", "up"], ["down"]),
        ("starcoder2", ["q", "o", "up"], ["down"]),
        ("mixtral", ["q", "o", "gate", *["down"] * 4], []),
        ("qwen3_moe", ["q", "o", "gate", *["down"] * 4], []),
        ("deepseek_v3", ["q", "q", "other", "gate", *["down"] * 5], []),
        # its experts clip, add one to what they multiply with and interleave gates
        ("gpt_oss", ["q", "o", "gate_up"], ["down"] * 4),
    ],
)
def test_the_model_computes_the_same(
    family: str, made: list[str], refused: list[str], model_of: Callable[..., Any]
) -> None:
    """Every fold that is made, of every kind, and all of a block at once."""
    model = model_of(family)
    for block in model.graph.blocks[1:]:
        found = rescaled(model, block, scaled_target(model))
        assert roles(block, found.folds) == made
        assert roles(block, found.refused) == refused
        assert all("the block would change by" in reason for reason in found.refused.values())
        assert found.change < 1e-5
        for fold in found.folds.values():
            assert float(fold.factors.max() / fold.factors.min()) > 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral", "phi3"])
def test_files_of_16_bits_take_it_too(family: str, model_of: Callable[..., Any]) -> None:
    model = model_of(family, BF16)
    block = model.graph.blocks[0]
    found = rescaled(model, block, scaled_target(model))
    assert not found.refused and len(found.folds) >= 4
    # biases are rounded once more: 8 bits
    assert found.change < (2**-8 if family == "opt" else 1e-5)


def test_values_that_heads_share_get_one_factor(model_of: Callable[..., Any]) -> None:
    """4 query heads of 16 channels on 2 heads of values."""
    model = model_of("llama")
    block = model.graph.blocks[0]
    o = block.sites[1]
    found = attempt(model, block, o, scaled_target(model))
    assert isinstance(found, Fold)
    by_head = found.factors.view(4, 16)
    assert torch.equal(by_head[0], by_head[1]) and torch.equal(by_head[2], by_head[3])
    assert not torch.equal(by_head[1], by_head[2])
    (key,) = found.rows
    assert key.endswith("v_proj.weight")
    assert torch.equal(found.rows[key], torch.cat((by_head[0], by_head[2])))
    assert isinstance(o.producer, Rows)
    wrong = replace(o, producer=replace(o.producer, span=8))
    refused = attempt(model, block, wrong, scaled_target(model))
    assert isinstance(refused, str) and "the block would change by" in refused


def test_fused_rows_and_their_part_of_the_bias(model_of: Callable[..., Any]) -> None:
    model = model_of("gpt2")
    block = model.graph.blocks[0]
    found = attempt(model, block, block.sites[1], scaled_target(model))
    assert isinstance(found, Fold)
    key, bias = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"
    expected = torch.cat((torch.ones(128), found.factors))
    assert torch.equal(found.rows[key], expected)
    torch.testing.assert_close(found.tensors[bias], model.runtime.read_tensor(bias) / expected)


def test_routers_follow_the_norm(model_of: Callable[..., Any]) -> None:
    model = model_of("mixtral")
    block, target = model.graph.blocks[0], scaled_target(model)
    first = next(s for s in block.sites if s.readers)
    found = attempt(model, block, first, target)
    assert isinstance(found, Fold)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert len(found.columns) == 4 * 2 + 1 and found.columns[-1] == router
    tensors = rewritten([found], block, target, model.runtime)
    assert set(tensors) == {router, "model.layers.0.post_attention_layernorm.weight"}
    torch.testing.assert_close(tensors[router], model.runtime.read_tensor(router) * found.factors)
    without = attempt(model, block, replace(first, readers=()), target)
    assert isinstance(without, str) and "the block would change by" in without


def test_experts_are_proven_together(model_of: Callable[..., Any]) -> None:
    model = model_of("mixtral")
    block, target = model.graph.blocks[0], scaled_target(model)
    loads = 0

    def load() -> LoadedBlock:
        nonlocal loads
        loads += 1
        loaded: LoadedBlock = model.runtime.load(0)
        return loaded

    states = model.states(0)
    stats, proof = statistics(model, 0, states), Proof(block, load, lambda: states)
    for site in block.sites[-4:]:
        found = fold_site(site, stats[site.id], target, model.runtime, proof, codes(block, target))
        assert isinstance(found, Fold)
    assert loads == 1
    (change,) = proof.known.values()
    assert change < 1e-5


def test_a_producer_that_does_not_produce_is_refused_with_the_change(model_of: Callable[..., Any]) -> None:
    """The graph names none then; were it wrong, the proof would say so."""
    model = model_of("llama")
    block, target = model.graph.blocks[0], scaled_target(model)
    o, down = block.sites[1], block.sites[3]
    norm = Vector("model.layers.0.post_attention_layernorm.weight")
    gate = Rows("model.layers.0.mlp.gate_proj.weight")
    for site in (replace(o, producer=norm), replace(down, producer=gate)):
        found = attempt(model, block, site, target)
        assert isinstance(found, str) and found.startswith("not rescaled: the block would change by ")
        assert float(found.rpartition(" ")[2]) > 1e-3
    for site in (o, down):
        assert attempt(model, block, replace(site, producer=None), target) is None


@pytest.mark.parametrize(("index", "role"), [(0, "q"), (1, "o"), (3, "down")])
def test_a_bias_that_the_graph_missed_is_refused(index: int, role: str, model_of: Callable[..., Any]) -> None:
    model = model_of("opt")
    block = model.graph.blocks[0]
    site = block.sites[index]
    assert site.weights[0].role == role and site.producer is not None and site.producer.bias is not None
    missed = replace(site, producer=replace(site.producer, bias=None))
    found = attempt(model, block, missed, scaled_target(model))
    assert isinstance(found, str) and "the block would change" in found


# --- what targets can have -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "role", "reason"),
    [
        ("bnb:nf4g32_dq", "down", "has scales that are quantized themselves"),
        ("ct:w8_tensor", "o", "has scales that rows share"),
        ("ct:w8@kv_cache=int8", "o", "the scales of the key-value cache belong to values as they are"),
        ("ct:w8@kv_cache=int8", "down", None),
        ("ct:mxfp4", "down", None),
    ],
)
def test_rows_need_scales_of_their_own(
    text: str, role: str, reason: str | None, model_of: Callable[..., Any]
) -> None:
    model = model_of("llama")
    block = model.graph.blocks[0]
    site = next(s for s in block.sites if s.weights[0].role == role)
    found = attempt(model, block, site, scaled_target(model, text))
    if reason is None:
        assert isinstance(found, Fold)
        powers = found.factors.log2()
        assert torch.equal(powers, powers.round()) == (text == "ct:mxfp4")
    else:
        assert isinstance(found, str) and found.startswith("not rescaled: ") and found.endswith(reason)


@pytest.mark.parametrize("text", ["ct:w8a8", "ct:w8a8_static", "ct:fp8a8"])
def test_rounded_inputs_are_rescaled_behind_norms_only(text: str, model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    block, target = model.graph.blocks[0], scaled_target(model, text)
    found = rescaled(model, block, target)
    assert roles(block, found.folds) == ["q", "gate"] and not found.refused


def test_rows_whose_scales_would_leave_their_dtype_are_left(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    block = model.graph.blocks[0]
    found = attempt(model, block, block.sites[3], scaled_target(model, "gptq:w4g32", reach=30.0))
    assert found == (
        "not rescaled: scales of `model.layers.0.mlp.up_proj.weight` would leave the range of their dtype"
    )


def test_weights_that_a_rule_keeps_are_rewritten(model_of: Callable[..., Any]) -> None:
    """Columns and rows of one kept matrix: both reach its tensor, and not the choice of factors."""
    model = model_of("gpt2", BF16)
    block, target = model.graph.blocks[0], scaled_target(model)
    up = "transformer.h.0.mlp.c_fc.weight"
    assert attempt(model, block, block.sites[2], target) is not None
    kept = replace(target, schemes={**target.schemes, up: None})
    assert attempt(model, block, block.sites[2], kept) is None
    columns, rows = torch.rand(64) + 0.5, torch.rand(96) + 0.5
    folds = [Fold(columns, (up,)), Fold(torch.ones(96), (), rows={up: rows})]
    tensors = rewritten(folds, block, kept, model.runtime)
    held = model.runtime.read_tensor(up).float()
    assert tensors[up].dtype == BF16 and tensors[up].shape == (64, 96)
    torch.testing.assert_close(tensors[up].float(), held * columns[:, None] / rows, rtol=2**-7, atol=0)
    assert rewritten(folds, block, target, model.runtime) == {}


def test_kept_weights_beside_quantized_ones(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    block, target = model.graph.blocks[0], scaled_target(model)
    q, v = block.sites[0].weights[0].key, block.sites[0].weights[2].key
    mixed = replace(target, schemes={**target.schemes, q: None, v: None})
    found = rescaled(model, block, mixed)
    assert len(found.folds) == 4 and found.change < 1e-5
    tensors = rewritten(list(found.folds.values()), block, mixed, model.runtime)
    first, second = found.folds[block.sites[0].id], found.folds[block.sites[1].id]
    expected = model.runtime.read_tensor(v) * first.factors / second.rows[v][:, None]
    torch.testing.assert_close(tensors[v], expected)
    torch.testing.assert_close(tensors[q], model.runtime.read_tensor(q) * first.factors)


def test_nothing_to_do_is_no_fold(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    block = model.graph.blocks[0]
    site, target = block.sites[0], scaled_target(model)
    assert attempt(model, block, site, replace(target, transforms=())) is None
    kept = replace(target, schemes=dict.fromkeys(target.schemes))
    assert attempt(model, block, site, kept) is None
    q = site.weights[0].key
    other = replace(target, schemes={**target.schemes, q: parse_scheme("w8g32")})
    assert attempt(model, block, site, other) == "not rescaled: weights of one input differ in scheme"


def test_transforms_follow_one_another(model_of: Callable[..., Any]) -> None:
    """Each sees what those before it left; the fold is the product of all."""
    model = model_of("llama")
    block = model.graph.blocks[0]
    site = block.sites[0]
    seen: list[tuple[Tensor, Tensor]] = []

    class Fixed:
        def __init__(self, factor: float | None) -> None:
            self.factor = factor

        def factors(
            self, weight: Tensor, stats: Statistics, scheme: object, quantizer: object, ties: Tensor | None
        ) -> Tensor | None:
            assert stats.absmax is not None and quantizer is target.quantizer and ties is None
            seen.append((weight, stats.absmax))
            return None if self.factor is None else torch.full((weight.shape[1],), self.factor)

    transforms = (Fixed(2.0), Fixed(None), Fixed(4.0))
    target = replace(model.target("gptq:w4g32"), transforms=transforms)
    found = attempt(model, block, site, target)
    assert isinstance(found, Fold)
    torch.testing.assert_close(found.factors, torch.full((site.width,), 8.0))
    for (weight, absmax), factor in zip(seen, (1, 2, 2), strict=True):
        assert torch.equal(weight, torch.cat([model.runtime.read(w) for w in site.weights]) * factor)
        torch.testing.assert_close(absmax, seen[0][1] / factor)
    assert attempt(model, block, site, replace(target, transforms=(Fixed(None),))) is None
