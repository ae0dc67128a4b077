"""The observer: every spelling of a product, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantkit.model.observe import Multiplications, Observer, Product, identity

OUT, IN, TOKENS = 5, 3, 4


def products(run: Callable[[], object], **parameters: Tensor) -> list[Product]:
    found: list[Product] = []
    with Observer(parameters, found.append):
        run()
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(x, w, torch.zeros(OUT, device=x.device)),
        lambda x, w: F.linear(input=x, weight=w),
        lambda x, w: x @ w.T,
        lambda x, w: x.matmul(w.mT),
        lambda x, w: torch.matmul(x, w.transpose(0, 1)),
        lambda x, w: torch.mm(x, w.t()),
        lambda x, w: torch.addmm(torch.zeros(OUT, device=x.device), x, w.t()),
        lambda x, w: torch.bmm(x[None], w.t()[None]),
        lambda x, w: w @ x.T,
    ],
)
def test_spellings_of_a_linear_product(multiply: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    x, w = torch.zeros(TOKENS, IN, device=device), torch.zeros(OUT, IN, device=device)
    (seen,) = products(lambda: multiply(x, w), w=w)
    assert (seen.parameter, seen.first, seen.last) == ("w", 0, OUT * IN - 1)
    assert seen.stride_in == 1  # neighbours along in_features lie next to each other: (out, in)
    assert seen.x.shape[-2:] == (TOKENS, IN)
    assert identity(seen.x) == identity(x)


def test_stored_the_other_way_round() -> None:
    x, w = torch.zeros(TOKENS, IN), torch.zeros(IN, OUT)
    (seen,) = products(lambda: torch.addmm(torch.zeros(OUT), x, w), w=w)
    assert seen.stride_in == OUT


def test_slices_and_experts_are_placed() -> None:
    x, w = torch.zeros(TOKENS, IN), torch.zeros(4, OUT, IN)
    (seen,) = products(lambda: F.linear(x, w[torch.tensor(2)]), w=w)
    assert (seen.first, seen.last) == (2 * OUT * IN, 3 * OUT * IN - 1)
    (rows,) = products(lambda: F.linear(x, w[1, 2:4]), w=w)
    assert (rows.first, rows.last) == (OUT * IN + 2 * IN, OUT * IN + 4 * IN - 1)


def test_batched_products_give_each_matrix_its_own_slice() -> None:
    x, w = torch.rand(4, TOKENS, IN), torch.zeros(4, IN, OUT)
    seen = products(lambda: torch.bmm(x, w), w=w)
    assert [(p.index, p.first) for p in seen] == [(e, e * IN * OUT) for e in range(4)]
    assert all(torch.equal(p.x, x[p.index]) for p in seen)
    shared = products(lambda: x[0] @ w, w=w)
    assert [identity(p.x) for p in shared] == [identity(x[0])] * 4


def test_grouped_products_on_meta() -> None:
    x, w = torch.zeros(TOKENS, IN, device="meta"), torch.zeros(4, OUT, IN, device="meta")
    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    out: list[Tensor] = []
    seen = products(lambda: out.append(F.grouped_mm(x, w.transpose(-2, -1), offs=ends)), w=w)
    assert [(p.index, p.stride_in) for p in seen] == [(e, 1) for e in range(4)]
    assert tuple(out[0].shape) == (TOKENS, OUT)


def test_what_is_not_a_product_of_a_known_matrix_is_ignored() -> None:
    x, w, v = torch.zeros(TOKENS, IN), torch.zeros(OUT, IN), torch.zeros(IN)
    assert products(lambda: (w * 2, x @ x.T, w @ w.T, x * v), w=w, v=v) == []


def test_results_are_untouched() -> None:
    x, w = torch.rand(TOKENS, IN), torch.rand(OUT, IN)
    expected = F.linear(x, w)
    with Observer({"w": w}, lambda _product: None):
        assert torch.equal(F.linear(x, w), expected)


def test_calls_of_attention_are_counted() -> None:
    x = torch.zeros(1, 2, TOKENS, IN)
    with Observer({}, lambda _product: None) as observer:
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
        F.scaled_dot_product_attention(query=x, key=x, value=x)
    assert observer.attentions == 2


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(input=x, weight=w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.addmm(torch.zeros(OUT), x, w.t()),
        lambda x, w: (w @ x.T).T,
        lambda x, w: torch.bmm(x[None], w.t()[None])[0],
        lambda x, w: torch.mm(x, mat2=w.t()),
        lambda x, w: F.linear(w, x).T,
    ],
)
def test_a_product_can_be_fed_with_another_activation(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = torch.rand(TOKENS, IN), torch.rand(OUT, IN)
    assert torch.allclose(_doubled(lambda: multiply(x, w), w), 2 * x @ w.T)


def _doubled(run: Callable[[], Tensor], w: Tensor) -> Tensor:
    """The result of `run` with every activation that meets `w` doubled."""

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = Multiplications({"w": w}).find(func, args, kwargs or {})
            if found is None:
                return func(*args, **(kwargs or {}))
            args, kwargs = found.fed(found.x * 2)
            return func(*args, **kwargs)

    with Doubling():
        return run()
