"""What scaled an activation: every way to write a norm, and everything that spoils it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.model.observe import Observer
from quantkit.model.producers import Heads, Producer, Producers

OUT, IN, TOKENS = 5, 3, 4


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(IN))
        self.bias = nn.Parameter(torch.ones(IN))


def found(run: Callable[[Norm, Tensor, Tensor], object]) -> list[Producer | None]:
    """What made the activation of every product that `run` does with a matrix, in order."""
    norm, w, x = Norm(), torch.zeros(OUT, IN), torch.zeros(2, TOKENS, IN)
    producers = Producers(dict(norm.named_parameters()))
    seen: list[Producer | None] = []
    with Observer({"w": w}, lambda p: seen.append(producers.of(p.x)), producers.after):
        run(norm, x, w)
    return [producers.unspoiled(producer) for producer in seen]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (lambda n, x: F.layer_norm(x, (IN,), n.weight, n.bias), Producer("weight", bias="bias")),
        (lambda n, x: F.layer_norm(x, (IN,), bias=n.bias, weight=n.weight), Producer("weight", bias="bias")),
        (lambda n, x: F.layer_norm(x, (IN,), n.weight), Producer("weight")),
        (lambda n, x: F.layer_norm(x, (IN,), n.weight + 1, n.bias), Producer("weight", 1.0, "bias")),
        (lambda n, x: F.rms_norm(x, (IN,), n.weight, 1e-6), Producer("weight")),
        (lambda n, x: n.weight * x.to(torch.float32), Producer("weight")),
        (lambda n, x: x * n.weight, Producer("weight")),
        (lambda n, x: (x * (1.0 + n.weight.float())).type_as(x), Producer("weight", 1.0)),
        (lambda n, x: x * n.weight.view(1, 1, -1) + n.bias, Producer("weight", bias="bias")),
        (lambda n, x: n.bias + x * n.weight, Producer("weight", bias="bias")),
        (lambda n, x: (x * n.weight).view(-1, IN), Producer("weight")),
        # what is not understood
        (lambda n, x: x, None),
        (lambda n, x: x * torch.ones(IN), None),
        (lambda n, x: x * n.weight.exp(), None),
        (lambda n, x: x * (2 - n.weight), None),
        (lambda n, x: x * n.weight[:1], None),
        (lambda n, x: x * n.weight + n.bias + n.bias, None),
        (lambda n, x: torch.add(x * n.weight, n.bias, alpha=2), None),
        (lambda n, x: F.layer_norm(x, (IN,), n.weight, n.bias * 2), None),
        (lambda n, x: F.layer_norm(x, (IN,), None, n.bias), None),
    ],
)
def test_norms(norm: Callable[[Norm, Tensor], Tensor], expected: Producer | None) -> None:
    assert found(lambda n, x, w: F.linear(norm(n, x), w)) == [expected]


def test_several_products_may_use_the_result() -> None:
    def run(n: Norm, x: Tensor, w: Tensor) -> None:
        y = x * n.weight
        F.linear(y, w)
        F.linear(y.view(-1, IN), w)
        F.linear(x, w)

    assert found(run) == [Producer("weight"), Producer("weight"), None]


@pytest.mark.parametrize(
    "pick",
    [
        lambda y: y[0],
        lambda y: y[:, 2],
        lambda y: y[1, :3],
        lambda y: y[None],
        lambda y: y.view(-1, IN)[torch.tensor([3, 3, 0])],
        lambda y: y[torch.tensor([0, 1]), torch.tensor([2, 2])],
        lambda y: y[torch.tensor([[True, False, True, True]] * 2)],
    ],
)
def test_tokens_may_be_picked(pick: Callable[[Tensor], Tensor]) -> None:
    """As experts get theirs: all channels, whatever the tokens."""

    def run(n: Norm, x: Tensor, w: Tensor) -> None:
        F.linear(pick(x * n.weight), w)

    assert found(run) == [Producer("weight")]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n, x, y: torch.relu(y),
        lambda n, x, y: x + y,
        lambda n, x, y: y[0].relu(),
        lambda n, x, y: y[0, 1, 2],
        lambda n, x, y: y[..., :2],
        lambda n, x, y: y[..., 0, :],
        lambda n, x, y: y[None, :, :, torch.tensor([0])],
        lambda n, x, y: y[y.new_zeros(2, TOKENS, IN).bool()],
        lambda n, x, y: torch.arange(IN)[y.long()],
        lambda n, x, y: y * n.bias,
        lambda n, x, y: y + 1,
        lambda n, x, y: x * n.weight,
        lambda n, x, y: x * n.weight.exp(),
        lambda n, x, y: F.layer_norm(x, (IN,), n.bias, n.weight),
    ],
)
def test_another_use_spoils_it(spoil: Callable[[Norm, Tensor, Tensor], object]) -> None:
    def run(n: Norm, x: Tensor, w: Tensor) -> None:
        y = x * n.weight
        F.linear(y, w)
        spoil(n, x, y)

    assert found(run) == [None]


def test_a_bias_used_twice_spoils_it() -> None:
    def run(n: Norm, x: Tensor, w: Tensor) -> None:
        F.linear(F.layer_norm(x, (IN,), n.weight, n.bias), w)
        torch.relu(x + n.bias)

    assert found(run) == [None]


def test_what_a_block_returns_is_spoiled() -> None:
    norm, w = Norm(), torch.zeros(OUT, IN)
    producers = Producers(dict(norm.named_parameters()))
    seen: list[Producer | None] = []
    with Observer({"w": w}, lambda p: seen.append(producers.of(p.x)), producers.after):
        y = torch.zeros(TOKENS, IN) * norm.weight
        F.linear(y, w)
    assert producers.unspoiled(seen[0]) == Producer("weight")
    producers.returned([None, y])
    assert producers.unspoiled(seen[0]) is None


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (lambda h: h.reshape(2, TOKENS, -1), (6, IN)),
        (lambda h: h.view(2, TOKENS, 6 * IN), (6, IN)),
        (lambda h: h.flatten(2), (6, IN)),
        (lambda h: h.mT.contiguous().mT.reshape(2 * TOKENS, -1), (6, IN)),
        (lambda h: h.reshape(2, TOKENS, -1).contiguous() * torch.rand(6 * IN), (6, IN)),
        (lambda h: h.reshape(2 * TOKENS, 6, IN), None),
        (lambda h: h.reshape(2, -1), None),
        (lambda h: h.reshape(2, TOKENS, -1).cumsum(-1), None),
        (lambda h: h[:, :, 0], None),
    ],
)
def test_heads_set_side_by_side(join: Callable[[Tensor], Tensor], expected: tuple[int, int] | None) -> None:
    heads = Heads()
    with Observer({}, lambda product: None, lambda func, args, _, out: heads.after(func, args, out)):
        x = join(torch.zeros(2, TOKENS, 6, IN))
    assert heads.of(x) == expected
