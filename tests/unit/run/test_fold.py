"""What a norm divides by, its columns multiply by: by hand, then on whole models that must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.record import Recorder
from quantkit.calibrate.statistics import Statistics
from quantkit.model.graph import Site
from quantkit.recipe.plan import TargetPlan
from quantkit.run.fold import Fold, Proof, _fold, fold_site
from tests.models import tiny_tokens
from tests.quantized import ALL_NEEDS

BF16 = torch.bfloat16
SMOOTH = "compressed_tensors:w8a8@transforms=smoothquant,alpha=0.5"


def fold(wanted: list[float], vector: Tensor, offset: float = 0.0, bias: Tensor | None = None) -> Fold:
    vectors = {"norm.weight": vector} | ({} if bias is None else {"norm.bias": bias})
    return _fold(torch.tensor(wanted), "norm.weight", vectors, offset)


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


# --- on whole models -------------------------------------------------------------


def statistics(model: Any, index: int, states: Tensor) -> dict[str, Statistics]:
    """What every site of a block sees."""
    sites = model.graph.blocks[index].sites
    recorder = Recorder({s.id: s.width for s in sites}, {s.id: ALL_NEEDS for s in sites}, states.device)
    model.runtime.load(index).run(states, recorder)
    return {site.id: recorder.take(site.id) for site in sites}


def attempt(model: Any, index: int, site: Site, target: TargetPlan) -> Fold | str | None:
    states = model.states(index)
    stats = statistics(model, index, states)
    own = next(v for k, v in stats.items() if v.gram is not None and v.gram.shape[0] == site.width)
    proof = Proof(lambda: model.runtime.load(index), lambda: states)
    return fold_site(site, stats.get(site.id, own), target, model.runtime, proof)


@pytest.mark.parametrize(
    ("family", "dtype", "close"),
    [
        ("llama", torch.float32, 1e-4),
        ("llama", BF16, 1e-4),
        ("gemma2", torch.float32, 1e-4),
        ("gemma2", BF16, 1e-4),
        ("opt", torch.float32, 1e-4),
        # a bias is rounded once more: 8 bits
        ("opt", BF16, 2**-8),
    ],
)
def test_the_model_computes_the_same(
    family: str, dtype: torch.dtype, close: float, model_of: Callable[..., Any]
) -> None:
    model = model_of(family, dtype)
    target = model.target(SMOOTH)
    plain = hidden = model.runtime.embed(tiny_tokens())
    for block in model.graph.blocks:
        weights: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        folded = []
        for site in block.sites:
            found = attempt(model, block.index, site, target)
            assert not isinstance(found, str), found
            assert (found is None) == (site.producer is None)
            if found is None:
                continue
            folded.append(site.id)
            assert float(found.factors.max() / found.factors.min()) > 1.5, "nothing was tried"
            weights |= {w.key: model.runtime.read(w) * found.factors for w in site.weights}
            tensors |= found.tensors
        assert len(folded) == 2, "attention and the first half of the MLP follow norms"
        loaded = model.runtime.load(block.index)
        plain = loaded.run(plain)
        with loaded.replaced(weights, tensors):
            hidden = loaded.run(hidden)
    expected, logits = model.runtime.logits(plain), model.runtime.logits(hidden)
    assert not torch.equal(logits, expected)
    assert float((logits - expected).norm() / expected.norm()) < close


def test_a_producer_that_others_notice_is_refused_with_the_change(model_of: Callable[..., Any]) -> None:
    """The graph names none then; were it wrong, the proof would say so."""
    for family, chosen in (("llama", "o_proj"), ("mixtral", "experts.0.w1")):
        model = model_of(family)
        block = model.graph.blocks[0]
        site = next(s for s in block.sites if any(chosen in w.name for w in s.weights))
        target = model.target(SMOOTH)
        assert site.producer is None and attempt(model, 0, site, target) is None
        norm = next(n for n in block.kept if n.endswith("post_attention_layernorm.weight"))
        found = attempt(model, 0, replace(site, producer=norm), target)
        assert isinstance(found, str) and found.startswith("not rescaled: the block would change by ")
        assert float(found.rpartition(" ")[2]) > 1e-3


def test_a_bias_that_the_graph_missed_is_refused(model_of: Callable[..., Any]) -> None:
    model = model_of("opt")
    site = model.graph.blocks[0].sites[0]
    assert site.producer_bias is not None
    found = attempt(model, 0, replace(site, producer_bias=None), model.target(SMOOTH))
    assert isinstance(found, str) and "the block would change" in found


def test_nothing_to_do_is_no_fold(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    site = model.graph.blocks[0].sites[0]
    target = model.target(SMOOTH)
    assert attempt(model, 0, site, model.target("compressed_tensors:w8a8")) is None
    kept = replace(target, schemes=dict.fromkeys(target.schemes))
    assert attempt(model, 0, site, kept) is None
    q = site.weights[0].key
    mixed = replace(target, schemes={**target.schemes, q: None})
    assert attempt(model, 0, site, mixed) == "not rescaled: weights of one input differ in scheme"
    other = replace(target, schemes={**target.schemes, q: target.scheme_of(site.weights[1])})
    assert isinstance(attempt(model, 0, site, other), Fold)


def test_transforms_follow_one_another(model_of: Callable[..., Any]) -> None:
    """Each sees what those before it left; the fold is the product of all."""
    model = model_of("llama")
    site = model.graph.blocks[0].sites[0]
    seen: list[tuple[Tensor, Tensor]] = []

    class Fixed:
        def __init__(self, factor: float | None) -> None:
            self.factor = factor

        def factors(self, weight: Tensor, stats: Statistics, scheme: object) -> Tensor | None:
            assert stats.absmax is not None
            seen.append((weight, stats.absmax))
            return None if self.factor is None else torch.full((weight.shape[1],), self.factor)

    transforms = (Fixed(2.0), Fixed(None), Fixed(4.0))
    target = replace(model.target(SMOOTH), transforms=transforms)
    found = attempt(model, 0, site, target)
    assert isinstance(found, Fold)
    torch.testing.assert_close(found.factors, torch.full((site.width,), 8.0))
    for (weight, absmax), factor in zip(seen, (1, 2, 2), strict=True):
        assert torch.equal(weight, torch.cat([model.runtime.read(w) for w in site.weights]) * factor)
        torch.testing.assert_close(absmax, seen[0][1] / factor)
    assert attempt(model, 0, site, replace(target, transforms=(Fixed(None),))) is None
