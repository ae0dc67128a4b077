from __future__ import annotations

import math

import pytest
import torch

from quantkit.evaluate.scores import TokenScores, beside_source, perplexity, quality, source_nll


def logits(*probabilities: float) -> torch.Tensor:
    """(1, vocab) logits of a distribution, moved by a constant that softmax forgets."""
    return torch.tensor([probabilities]).log() + 3.0


def test_one_token_by_hand() -> None:
    # P = (½, ¼, ¼), Q = (¼, ½, ¼), next token 0: NLL = ln 4; KL = ½ ln 2 + ¼ ln ½ = ¼ ln 2
    nll, kl, agrees = beside_source(logits(0.5, 0.25, 0.25), logits(0.25, 0.5, 0.25), torch.tensor([0]))
    torch.testing.assert_close(nll, torch.tensor([math.log(4)]))
    torch.testing.assert_close(kl, torch.tensor([0.25 * math.log(2)]))
    assert agrees.tolist() == [0.0]
    torch.testing.assert_close(
        source_nll(logits(0.5, 0.25, 0.25), torch.tensor([0])), torch.tensor([math.log(2)])
    )


def test_kl_is_not_symmetric_and_p_is_the_source() -> None:
    p, q = logits(0.5, 0.25, 0.25), logits(0.9, 0.05, 0.05)
    _, forward, _ = beside_source(p, q, torch.tensor([1]))
    expected = 0.5 * math.log(0.5 / 0.9) + 2 * 0.25 * math.log(0.25 / 0.05)
    torch.testing.assert_close(forward, torch.tensor([expected]))
    _, backward, _ = beside_source(q, p, torch.tensor([1]))
    assert abs(float(backward - forward)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_beside_itself(dtype: torch.dtype, rng: torch.Generator) -> None:
    made = (torch.randn(50, 1000, generator=rng) * 5).to(dtype)
    following = torch.randint(0, 1000, (50,), generator=rng)
    nll, kl, agrees = beside_source(made, made.clone(), following)
    assert float(kl.abs().max()) < 1e-6
    assert float(agrees.min()) == 1.0
    torch.testing.assert_close(nll, source_nll(made, following), atol=1e-5, rtol=1e-5)
    assert nll.dtype == kl.dtype == agrees.dtype == torch.float32


def test_kl_is_never_negative_beyond_rounding(rng: torch.Generator) -> None:
    p = torch.randn(200, 64, generator=rng) * 3
    q = p + 1e-3 * torch.randn(200, 64, generator=rng)
    _, kl, _ = beside_source(p, q, torch.zeros(200))
    assert float(kl.min()) > -1e-6


def test_the_first_of_equal_tokens_counts_for_both() -> None:
    tied = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    other = torch.tensor([[0.0, 5.0, 5.0], [0.0, 4.0, 5.0]])
    _, _, agrees = beside_source(tied, other, torch.tensor([0, 0]))
    assert agrees.tolist() == [1.0, 0.0]


def test_perplexity_by_hand() -> None:
    # windows with mean NLL ln 2 and ln 8: mean ln 4; standard error (ln 8 − ln 2)/√2/√2 = ln 2
    nll = torch.tensor([[math.log(2)] * 3, [math.log(8)] * 3])
    found = perplexity(nll)
    assert found.value == pytest.approx(4.0)
    assert found.error == pytest.approx(4.0 * math.log(2))


def test_one_window_has_no_error() -> None:
    assert perplexity(torch.ones(1, 5)).error == 0.0
    assert perplexity(torch.ones(1, 5)).value == pytest.approx(math.e)


def scores(nll: torch.Tensor, kl: torch.Tensor, agrees: torch.Tensor) -> TokenScores:
    return TokenScores(nll, kl, agrees)


def test_quality_by_hand() -> None:
    source = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    target = torch.tensor([[1.5, 1.5], [3.5, 3.5]])
    kl = torch.tensor([[0.0, 0.4], [0.2, 1.0]])
    found = quality("text", source, scores(target, kl, torch.tensor([[1.0, 0.0], [1.0, 1.0]])))
    assert (found.convention, found.windows, found.tokens) == ("text", 2, 4)
    assert found.source.value == pytest.approx(math.exp(2))
    assert found.target.value == pytest.approx(math.exp(2.5))
    assert found.ratio.value == pytest.approx(math.exp(0.5))
    # both windows moved alike: the paired error is nothing, that of each perplexity is not
    assert found.ratio.error == pytest.approx(0.0, abs=1e-12)
    assert found.source.error == pytest.approx(math.exp(2))
    # window means .2 and .6: mean .4, error .4/√2/√2 = .2
    assert found.kl_mean == pytest.approx(0.4)
    assert found.kl_error == pytest.approx(0.2)
    assert found.kl_median == pytest.approx(0.2)
    assert found.kl_max == pytest.approx(1.0)
    assert found.top1_agreement == 0.75
    assert found.to_json()["ratio"] == {"value": found.ratio.value, "error": found.ratio.error}


def test_quantiles_of_a_thousand_tokens() -> None:
    kl = torch.arange(1000, dtype=torch.float32).flip(0).view(10, 100)
    found = quality("text", torch.zeros(10, 100), scores(torch.zeros(10, 100), kl, torch.ones(10, 100)))
    assert (found.kl_median, found.kl_p99, found.kl_max) == (499.0, 989.0, 999.0)


def test_the_paired_error_is_about_the_difference(rng: torch.Generator) -> None:
    source = 3 + torch.randn(40, 1, generator=rng).expand(40, 20)
    nll = source + 0.1 + 0.01 * torch.randn(40, 20, generator=rng)
    found = quality("text", source, scores(nll, torch.zeros(40, 20), torch.ones(40, 20)))
    assert found.ratio.value == pytest.approx(math.exp(0.1), rel=1e-2)
    assert found.ratio.error < 0.01 < 10 * found.ratio.error + 0.1
    assert found.target.error > 20 * found.ratio.error
