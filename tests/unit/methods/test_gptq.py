"""What gptq decides for itself: refinements and corrections are taken where held-out tokens gain by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.statistics import Need, Statistics, update, zero
from quantkit.errors import RecipeError
from quantkit.methods.gptq import Gptq, Params
from quantkit.schemes import parse_scheme
from quantkit.tensors import dequantize

SCHEME = parse_scheme("w2g16")
WIDTH = 32
CPU = torch.device("cpu")


def inputs(rng: torch.Generator, tokens: int, mixed: Tensor) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=rng) @ mixed


def seen(need: Need, x: Tensor, held: Tensor, reference: Tensor | None = None) -> Statistics:
    """Statistics of x and of the held-out tokens; `reference` stands beside all of them."""
    count = x.shape[0]
    first, last = (None, None) if reference is None else (reference[:count], reference[count:])
    stats = update(zero(WIDTH, need, CPU), x, reference=first)
    return update(stats, held, held_out=True, reference=last)


def solved(params: Params, stats: Statistics, weight: Tensor) -> tuple[Tensor, dict[str, float]]:
    quantizer = Gptq(params)
    outcome = quantizer.quantize(weight, quantizer.prepare(stats, SCHEME), SCHEME)
    return dequantize(outcome.weight), dict(outcome.facts)


@pytest.fixture
def weight(rng: torch.Generator) -> Tensor:
    return torch.randn(24, WIDTH, generator=rng)


def test_refinements_that_prove_themselves_are_taken(rng: torch.Generator, weight: Tensor) -> None:
    mixed = torch.randn(WIDTH, WIDTH, generator=rng)
    stats = seen(Gptq(Params()).needs, inputs(rng, 2000, mixed), inputs(rng, 400, mixed))
    found, facts = solved(Params(), stats, weight)
    assert facts == {"refinements": 2.0}
    whole, no_facts = solved(Params(accept=False), stats, weight)
    assert torch.equal(found, whole) and not no_facts
    rough, _ = solved(Params(polish=0), stats, weight)
    fresh = inputs(rng, 500, mixed)
    assert float(((found - weight) @ fresh.T).norm()) < float(((rough - weight) @ fresh.T).norm())


def test_refinements_to_the_wrong_text_are_refused(rng: torch.Generator, weight: Tensor) -> None:
    # few tokens to choose from, and the held-out ones excite other directions
    x = inputs(rng, 300, torch.randn(WIDTH, WIDTH, generator=rng))
    held = 10 * inputs(rng, 3000, torch.randn(WIDTH, WIDTH, generator=rng) * torch.linspace(0.01, 3, WIDTH))
    stats = seen(Gptq(Params()).needs, x, held)
    rest, apart = stats.split()
    assert rest.tokens == 300 and apart.gram is not None
    quantizer = Gptq(Params())
    prepared = quantizer.prepare(stats, SCHEME)
    assert prepared.stats is stats
    found = dequantize(quantizer.quantize(weight, prepared, SCHEME).weight)
    stages = {}
    for polish, refit in ((0, 0), (2, 0), (2, 2)):
        trial, _ = solved(Params(polish=polish, refit=refit, accept=False), replace(rest, held=None), weight)
        stages[polish + refit] = float((((trial - weight) @ apart.gram) * (trial - weight)).sum())
    best = min(stages, key=lambda stage: stages[stage])
    params = Params(polish=min(best, 2), refit=max(best - 2, 0), accept=False)
    assert torch.equal(found, solved(params, stats, weight)[0])
    assert best < 4, "the case is to refuse something"


def test_a_correction_is_taken_where_the_stream_has_drifted(rng: torch.Generator, weight: Tensor) -> None:
    params = Params(corrected=0.5)
    mixed = torch.randn(WIDTH, WIDTH, generator=rng)
    untouched = inputs(rng, 2400, mixed)
    drifted = untouched @ (torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=rng))
    stats = seen(Gptq(params).needs, drifted[:2000], drifted[2000:], untouched)
    found, facts = solved(params, stats, weight)
    plain, _ = solved(Params(), replace(stats, cross=None), weight)
    wanted = untouched @ weight.T
    assert facts["corrected"] == 0.5
    assert float((drifted @ found.T - wanted).norm()) < 0.8 * float((drifted @ plain.T - wanted).norm())
    # where nothing has drifted there is nothing to correct
    still = seen(Gptq(params).needs, untouched[:2000], untouched[2000:], untouched)
    same, _ = solved(params, still, weight)
    assert torch.equal(same, solved(Params(), replace(still, cross=None), weight)[0])


def test_few_held_out_tokens_decide_nothing(rng: torch.Generator, weight: Tensor) -> None:
    mixed = torch.randn(WIDTH, WIDTH, generator=rng)
    stats = seen(Gptq(Params()).needs, inputs(rng, 500, mixed), inputs(rng, 20, mixed))
    _, facts = solved(Params(), stats, weight)
    assert not facts


def test_parameters_are_checked() -> None:
    for wrong in ({"refit": -1}, {"corrected": 1.5}, {"polish": -1}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            Params(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="plain fixes"):
        Params(plain=True, refit=3)
    assert (Params(plain=True).refit, Params(plain=True).accept) == (0, False)
