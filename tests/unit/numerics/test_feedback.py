from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import feedback
from quantkit.numerics.cholesky import Factor, factor
from quantkit.numerics.curvature import curvature
from quantkit.numerics.feedback import DynamicGroups, StaticGroups, batch_width, round_with_feedback
from quantkit.numerics.levels import Integers
from tests.quantized import absmax, activations, steps

W4, U4 = Integers(4, True), Integers(4, False)
W3 = Integers(3, True)

# The worked cases follow the published loop: e_j = (w_j − q_j) / U_jj, then w_k −= e_j·U_jk for k > j, with
# H⁻¹ = Uᵀ·U. In this factor column j only touches column j + 1. The code is given R = U⁻¹.
UPPER = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.5]])


def factor_of(upper: Tensor) -> Factor:
    """The factor whose inverse is `upper`, the matrix that the published loop uses."""
    return Factor(torch.linalg.inv(upper).flip((0, 1)).contiguous(), None)


def one_grid(rows: int, columns: int, scale: float = 1.0) -> StaticGroups:
    return StaticGroups(torch.full((rows, 1), scale), None, torch.zeros(columns, dtype=torch.long))


def test_a_2_by_4_case_by_hand() -> None:
    # row 0: .6 → 1, e = −.4/2 = −.2     second weight .6 + .2·1  = .8
    #        .8 → 1, e = −.2             third         .6 + .2·½  = .7
    #        .7 → 1, e = −.3             fourth        .6 + .3·½  = .75
    #       .75 → 1, e = −.25/½ = −.5    Σe² = .04 + .04 + .09 + .25 = .42
    # row 1: 1.4 → 1, e = .4/2 = .2      second −.6 − .2·1  = −.8
    #        −.8 → −1, e = .2            third  2.55 − .2·½ = 2.45
    #       2.45 → 2, e = .45            fourth −1.3 − .45·½ = −1.525
    #     −1.525 → −2, e = .475/½ = .95  Σe² = .04 + .04 + .2025 + .9025 = 1.185
    # (rounding alone gives 3 and −1 in the last two places of row 1)
    w = torch.tensor([[0.6, 0.6, 0.6, 0.6], [1.4, -0.6, 2.55, -1.3]])
    for batch in (1, 2, 3, 4, 128):
        w_io = w.T.contiguous()
        found = round_with_feedback(w_io, factor_of(UPPER), one_grid(2, 4), W4, batch)
        assert found.codes_io.T.tolist() == [[1, 1, 1, 1], [1, -1, 2, -2]]
        torch.testing.assert_close(found.loss_o, torch.tensor([0.42, 1.185]))
        assert torch.equal(w_io, w.T)


def test_groups_are_fitted_on_compensated_weights_by_hand() -> None:
    # 3 bits, groups of 2, scale max|w| / 3; unit factor with ½ above the diagonal
    # row 0: scale 1: 3 → 3 (e = 0); 1.4 → 1 (e = .4); third becomes 2.1 − .2 = 1.9
    #        the second group is [1.9, .3]: scale 1.9/3; 1.9 → 3 (e = 0); .3/.633 = .47 → 0 (e = .3)
    # row 1: scale 1: −3 → −3; .6 → 1 (e = −.4); third becomes .8 + .2 = 1.0
    #        the second group is [1.0, 2.4]: scale .8; 1.25 → 1 (e = .2); 2.4 − .1 = 2.3 → 3 (e = −.1)
    upper = torch.eye(4) + torch.diag(torch.full((3,), 0.5), 1)
    w = torch.tensor([[3.0, 1.4, 2.1, 0.3], [-3.0, 0.6, 0.8, 2.4]])
    seen = []

    def fit(group: Tensor, members: slice) -> tuple[Tensor, None]:
        seen.append((members.start, members.stop))
        return absmax(group, 3)[0], None

    groups = DynamicGroups(fit, 2)
    found = round_with_feedback(w.T.contiguous(), factor_of(upper), groups, W3, batch_width(2, 128))
    assert seen == [(0, 2), (2, 4)]
    assert found.codes_io.T.tolist() == [[3, 1, 3, 0], [-3, 1, 1, 3]]
    scale, zero = groups.tables()
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1.9 / 3], [1.0, 0.8]]))
    assert zero is None
    torch.testing.assert_close(found.loss_o, torch.tensor([0.16 + 0.09, 0.16 + 0.04 + 0.01]))


def test_act_order_by_hand() -> None:
    # diagonal 1, 3, 2, 3: columns are taken as 1, 3, 2, 0 and equals keep the order of the file
    order = feedback.descending(torch.tensor([1.0, 3.0, 2.0, 3.0]))
    assert order.tolist() == [1, 3, 2, 0]
    # groups {0, 1} and {2, 3} have scales 1 and 2; in processing order the scales are 1, 2, 2, 1
    # column 1: .6 → 1, e = −.4          column 3 becomes 2.6 + .2 = 2.8
    # column 3: 2.8/2 = 1.4 → 1 (2), e = .8     column 2 becomes 3.2 − .4 = 2.8
    # column 2: 2.8/2 → 1 (2), e = .8    column 0 becomes −.2 − .4 = −.6
    # column 0: −.6 → −1, e = .4         Σe² = .16 + .64 + .64 + .16 = 1.6
    upper = torch.eye(4) + torch.diag(torch.full((3,), 0.5), 1)
    w = torch.tensor([[-0.2, 0.6, 3.2, 2.6]])
    static = StaticGroups(torch.tensor([[1.0, 2.0]]), None, torch.tensor([0, 0, 1, 1])[order])
    found = round_with_feedback(w.T[order].contiguous(), factor_of(upper), static, W4)
    assert found.codes_io.flatten().tolist() == [1, 1, 1, -1]
    torch.testing.assert_close(found.loss_o, torch.tensor([1.6]))


def test_group_aware_order_tears_no_group_apart() -> None:
    # largest diagonals of the groups: 2, 5, 4; inside a group the largest first
    order = feedback.group_aware(torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 4.0]), 2)
    assert order.tolist() == [2, 3, 4, 5, 1, 0]
    assert feedback.natural(3, torch.device("cpu")).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "group, expected", [(1, 128), (32, 128), (96, 96), (33, 99), (128, 128), (256, 256), (192, 192)]
)
def test_a_batch_holds_whole_groups(group: int, expected: int) -> None:
    assert batch_width(group, 128) == expected


def instance(rng: torch.Generator, out: int = 5, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, damped gram H, U with H⁻¹ = Uᵀ·U) in fp64, so that only the algorithm is compared."""
    x = activations(width, 4 * width, rng)
    gram = (x.T @ x / x.shape[0]).double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    return torch.randn(out, width, generator=rng).double(), gram, upper


def published(
    w: Tensor, upper: Tensor, fit: feedback.Fit, group: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, loss) of algorithm 1 as printed: column by column, the rest compensated each time."""
    w, (out, width) = w.clone(), w.shape
    codes, loss, scales = torch.zeros_like(w), torch.zeros(out).double(), []
    for j in range(width):
        if j % group == 0:
            scales.append(fit(w[:, j : j + group], slice(j, j + group))[0][:, 0])
        codes[:, j] = steps(w[:, j], scales[-1], None, bits)
        error = (w[:, j] - codes[:, j] * scales[-1]) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        loss += error.square()
    return codes, torch.stack(scales, 1), loss


@pytest.mark.parametrize("group", [24, 8, 6, 1])
def test_codes_scales_and_loss_are_those_of_the_published_loop(group: int, rng: torch.Generator) -> None:
    """Form A (compensate the rest, factor of the inverse) equals form B (LDLQ, the original weights)."""
    w, _, upper = instance(rng)

    def fit(part: Tensor, members: slice) -> tuple[Tensor, None]:
        return part.abs().amax(1, keepdim=True) / 7, None

    codes, scales, loss = published(w, upper, fit, group, 4)
    for batch in (batch_width(group, 12), batch_width(group, 128)):
        groups = DynamicGroups(fit, group)
        found = round_with_feedback(w.T.contiguous(), factor_of(upper), groups, W4, batch)
        assert torch.equal(found.codes_io.T, codes)
        torch.testing.assert_close(groups.tables()[0], scales)
        torch.testing.assert_close(found.loss_o, loss)


def test_the_reported_loss_is_the_quadratic_form(rng: torch.Generator) -> None:
    w, gram, _ = instance(rng)
    factored = factor(curvature(gram.float(), 1, shrink=False), 0.0)
    scale = absmax(w.float(), 4)[0]
    grid = StaticGroups(scale, None, torch.zeros(24, dtype=torch.long))
    found = round_with_feedback(w.T.float().contiguous(), factored, grid, W4, 8)
    delta = (found.codes_io.T * scale).double() - w
    expected = torch.einsum("oi,ij,oj->o", delta, gram, delta)
    assert float(((found.loss_o - expected) / expected).abs().max()) < 1e-5


def test_with_a_diagonal_gram_feedback_is_rounding(rng: torch.Generator) -> None:
    w = torch.randn(6, 20, generator=rng)
    diagonal = torch.rand(20, generator=rng) + 0.1
    found_factor = factor(curvature(torch.diag(diagonal), 1, shrink=False), 0.01)
    scale = absmax(w, 3)[0]
    grid = StaticGroups(scale, None, torch.zeros(20).long())
    found = round_with_feedback(w.T.contiguous(), found_factor, grid, W3, 8)
    assert torch.equal(found.codes_io.T, steps(w, scale, None, 3))


def test_lazy_batches_change_nothing(rng: torch.Generator) -> None:
    w, _, upper = instance(rng, width=40)
    grid = one_grid(5, 40, 0.3)
    results = [
        round_with_feedback(w.T.contiguous(), factor_of(upper), grid, W4, batch) for batch in (1, 7, 40, 128)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes_io, results[0].codes_io)
        torch.testing.assert_close(other.loss_o, results[0].loss_o)


def test_asymmetric_groups_use_their_zero_points(rng: torch.Generator) -> None:
    w, gram, upper = instance(rng, width=8)

    def fit(group: Tensor, members: slice) -> tuple[Tensor, Tensor | None]:
        return absmax(group.float(), 4, zero=True)

    groups = DynamicGroups(fit, 4)
    found = round_with_feedback(
        w.T.contiguous(), factor_of(upper), groups, Integers(4, False), batch_width(4, 128)
    )
    scale, zero = groups.tables()
    assert zero is not None
    codes = found.codes_io.T.view(5, 2, 4)
    assert float(codes.min()) >= 0 and float(codes.max()) <= 15
    delta = (scale[..., None] * (codes - zero[..., None])).view(5, 8) - w
    torch.testing.assert_close(found.loss_o, torch.einsum("oi,ij,oj->o", delta, gram, delta))
