from __future__ import annotations

import pytest
import torch

from quantkit.calibrate import statistics
from quantkit.calibrate.record import Recorder, Wanted
from quantkit.calibrate.statistics import SAMPLE_ROWS, Need, nbytes, update, zero

CPU = torch.device("cpu")
ALL = Need.SQUARES | Need.ABSMAX | Need.ABSSUM | Need.GRAM | Need.SAMPLE


def test_two_tokens_by_hand() -> None:
    found = update(zero(2, ALL, CPU), torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    assert found.tokens == 2
    assert found.squares is not None and found.squares.tolist() == [10.0, 4.25]
    assert found.absmax is not None and found.absmax.tolist() == [3.0, 2.0]
    assert found.abssum is not None and found.abssum.tolist() == [4.0, 2.5]
    # 1·1 + 3·3, −2·1 + ½·3, 4 + ¼
    assert found.gram is not None and found.gram.tolist() == [[10.0, -0.5], [-0.5, 4.25]]
    assert found.sample is not None
    assert sorted(found.sample.tolist()) == [[1.0, -2.0], [3.0, 0.5]]
    assert found.importance().tolist() == [5.0, 2.125]


def test_merging_by_hand() -> None:
    a = update(zero(2, ALL, CPU), torch.tensor([[1.0, -2.0]]))
    b = update(zero(2, ALL, CPU), torch.tensor([[3.0, 0.5], [0.0, 1.0]]))
    both = a + b
    assert both.tokens == 3
    assert both.squares is not None and both.squares.tolist() == [10.0, 5.25]
    assert both.absmax is not None and both.absmax.tolist() == [3.0, 2.0]
    assert both.abssum is not None and both.abssum.tolist() == [4.0, 3.5]
    assert both.gram is not None and both.gram.tolist() == [[10.0, -0.5], [-0.5, 5.25]]
    assert both.sample is not None and both.sample.shape == (3, 2)


def test_importance_of_a_gram_is_its_diagonal() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert update(zero(2, Need.GRAM, CPU), x).importance().tolist() == [5.0, 2.125]
    assert zero(2, Need.GRAM, CPU).importance().tolist() == [0.0, 0.0]


def test_importance_needs_squares_or_a_gram() -> None:
    with pytest.raises(ValueError, match="neither squares nor a gram"):
        zero(2, Need.ABSMAX, CPU).importance()


def test_statistics_of_different_needs_do_not_merge() -> None:
    with pytest.raises(ValueError, match="different needs"):
        zero(2, Need.GRAM, CPU) + zero(2, Need.SQUARES, CPU)


def test_only_what_is_needed_is_kept() -> None:
    found = update(zero(3, Need.SQUARES, CPU), torch.ones(4, 3))
    assert found.gram is None and found.absmax is None and found.abssum is None and found.sample is None
    nothing = update(zero(3, Need.NOTHING, CPU), torch.ones(4, 3))
    assert nothing.tokens == 4 and nothing.squares is None


def test_leading_dimensions_are_tokens_and_half_precision_is_summed_in_fp32() -> None:
    x = torch.full((2, 100, 4), 300.0, dtype=torch.float16)  # 300² overflows fp16
    found = update(zero(4, Need.SQUARES | Need.GRAM, CPU), x)
    assert found.tokens == 200
    assert found.squares is not None and found.squares.tolist() == [200 * 90000.0] * 4
    assert found.gram is not None and found.gram.dtype == torch.float32
    assert float(found.gram[0, 3]) == 200 * 90000.0


def test_no_tokens_change_nothing() -> None:
    before = update(zero(2, ALL, CPU), torch.tensor([[1.0, -2.0]]))
    after = update(before, torch.empty(0, 2))
    assert after.tokens == 1
    assert after.absmax is not None and after.absmax.tolist() == [1.0, 2.0]
    assert after.sample is not None and after.sample.shape == (1, 2)


def test_activations_are_not_modified(rng: torch.Generator) -> None:
    x = torch.randn(10, 4, generator=rng)
    kept = x.clone()
    found = update(zero(4, ALL, CPU), x)
    assert found.sample is not None
    found.sample.zero_()
    assert torch.equal(x, kept)


def test_the_sample_is_bounded_and_does_not_depend_on_order_or_shards(rng: torch.Generator) -> None:
    x = torch.randn(900, 3, generator=rng)
    whole = update(zero(3, Need.SAMPLE, CPU), x).sample
    shuffled = zero(3, Need.SAMPLE, CPU)
    for part in x[torch.randperm(900, generator=rng)].split(77):
        shuffled = update(shuffled, part)
    left, right = (update(zero(3, Need.SAMPLE, CPU), part) for part in x.split(450))
    assert whole is not None and whole.shape == (SAMPLE_ROWS, 3)
    for other in (shuffled.sample, (left + right).sample, (right + left).sample):
        assert other is not None and torch.equal(other, whole)


def test_the_sample_is_not_a_prefix_nor_biased(rng: torch.Generator) -> None:
    # rows numbered in their first channel: a fair sample has a mean near the middle
    x = torch.stack((torch.arange(8192.0), torch.randn(8192, generator=rng)), 1)
    found = update(zero(2, Need.SAMPLE, CPU), x).sample
    assert found is not None
    assert len(set(found[:, 0].tolist())) == SAMPLE_ROWS
    # standard error of the mean of 256 draws: 8192 / √12 / 16 = 148
    assert abs(float(found[:, 0].mean()) - 4096) < 4 * 148


def test_bytes_are_those_of_the_tensors() -> None:
    x = torch.randn(SAMPLE_ROWS, 5, generator=torch.Generator().manual_seed(0))
    for need in (ALL, Need.GRAM, Need.SQUARES | Need.SAMPLE, Need.NOTHING):
        found = update(zero(5, need, CPU), x)
        kept = (found.squares, found.absmax, found.abssum, found.gram, found.sample)
        assert nbytes(5, need) == sum(t.nbytes for t in kept if t is not None)
    both = zero(5, Need.GRAM | Need.CROSS | Need.HELDOUT, CPU)
    assert nbytes(5, Need.GRAM | Need.CROSS | Need.HELDOUT) == 4 * 25 * 4
    assert both.held is not None and both.held.cross is not None


def test_a_recorder_keeps_what_is_wanted_and_gives_it_up() -> None:
    recorder = Recorder({"a": Wanted(2, Need.SQUARES)}, CPU)
    recorder("a", torch.ones(2, 5, 2))
    recorder("a", torch.ones(1, 2))
    recorder("b", torch.ones(1, 3))
    found = recorder.take("a")
    assert found.tokens == 11
    assert found.squares is not None and found.squares.tolist() == [11.0, 11.0]
    with pytest.raises(KeyError):
        recorder.take("a")
    with pytest.raises(KeyError):
        recorder.take("b")


def test_the_hash_depends_on_every_channel() -> None:
    x = torch.zeros(4, 8)
    x[1, 0] = x[2, 7] = 1.0
    x[3, 7] = 2.0
    assert len(set(statistics._hashes(x).tolist())) == 4


def test_held_out_tokens_are_in_the_whole_and_can_be_taken_apart() -> None:
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    found = update(zero(2, Need.GRAM | Need.SQUARES | Need.HELDOUT, CPU), x)
    assert found.split() == (found, found)
    found = update(found, y, held_out=True)
    rest, held = found.split()
    assert (found.tokens, rest.tokens, held.tokens) == (3, 2, 1)
    assert found.gram is not None and rest.gram is not None and held.gram is not None
    assert found.gram.tolist() == [[35.0, 44.0], [44.0, 56.0]]
    assert rest.gram.tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert held.gram.tolist() == [[25.0, 30.0], [30.0, 36.0]]
    assert rest.squares is not None and rest.squares.tolist() == [10.0, 20.0]


def test_a_cross_gram_pairs_both_streams() -> None:
    recorder = Recorder({"a": Wanted(2, Need.GRAM | Need.CROSS)}, CPU)
    assert recorder.pairs
    recorder.pair("a", torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    recorder("a", torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    found = recorder.take("a")
    assert found.cross is not None and found.cross.tolist() == [[3.0, 4.0], [10.0, 12.0]]
    lone = Recorder({"a": Wanted(2, Need.CROSS)}, CPU)
    with pytest.raises(ValueError, match="untouched"):
        lone("a", torch.ones(1, 2))


def test_a_prior_counts_as_so_many_tokens_of_the_pool() -> None:
    need = Need.GRAM | Need.SQUARES | Need.ABSMAX
    own = update(zero(2, need, CPU), torch.tensor([[2.0, 0.0]]))
    pool = update(zero(2, need, CPU), torch.tensor([[1.0, 1.0], [1.0, -3.0]]))
    found = own.with_prior(pool, 4)
    assert (found.tokens, found.prior) == (5, 4)
    # two tokens of the pool count twice
    assert found.gram is not None and found.gram.tolist() == [[4.0 + 4.0, -4.0], [-4.0, 20.0]]
    assert found.squares is not None and found.squares.tolist() == [8.0, 20.0]
    assert found.absmax is not None and found.absmax.tolist() == [2.0, 0.0]
    diagonal = own.with_prior(update(zero(2, Need.SQUARES, CPU), torch.tensor([[1.0, 3.0]])), 2)
    assert diagonal.gram is not None and diagonal.gram.tolist() == [[6.0, 0.0], [0.0, 18.0]]
    assert found.through(torch.ones(2)).prior == 4
    unseen = zero(2, need, CPU).with_prior(pool, 2)
    assert unseen.tokens == 2 and unseen.absmax is not None and unseen.absmax.tolist() == [1.0, 3.0]
    assert own.with_prior(zero(2, need, CPU), 4) is own


def test_pools_are_fed_by_every_expert_while_they_are_open() -> None:
    recorder = Recorder(
        {"e0": Wanted(1, Need.SQUARES)}, CPU, {"e#": Wanted(1, Need.SQUARES)}, {"e0": "e#", "e1": "e#"}
    )
    recorder.pooling = True
    recorder("e0", torch.tensor([[1.0]]))
    recorder("e1", torch.tensor([[2.0]]))
    recorder.pooling = False
    recorder("e1", torch.tensor([[9.0]]))
    found = recorder.pool("e1")
    assert found is not None and (found.tokens, found.squares.tolist()) == (2, [5.0])  # type: ignore[union-attr]
    assert recorder.pool("other") is None


def test_evened_worked_by_hand() -> None:
    # a mean diagonal of (1 + 3) / 2 = 2, half of which is 1
    found = statistics.update(
        statistics.zero(2, Need.GRAM | Need.SQUARES, CPU), torch.tensor([[1.0, 3.0**0.5]])
    )
    evened = found.evened(0.5)
    assert evened.gram is not None and evened.squares is not None
    torch.testing.assert_close(evened.gram, torch.tensor([[2.0, 3.0**0.5], [3.0**0.5, 4.0]]))
    torch.testing.assert_close(evened.squares, torch.tensor([2.0, 4.0]))
    assert found.gram is not None and float(found.gram[0, 0]) == 1.0
