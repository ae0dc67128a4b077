"""The decoder blocks of a model: finding them, standing in for them, watching them once.

Nothing here knows an architecture. A block is an entry of the model's largest list of modules, and
what it is called with is whatever the model's own forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache

from quantkit.errors import UnsupportedError
from quantkit.model.observe import Observer, Product, identity
from quantkit.model.producers import Heads, Producer, Producers

# Attributes in which blocks of one kind differ without being different.
_COUNTERS = frozenset({"layer_idx", "layer_id", "layer_number", "idx"})


@dataclass(frozen=True, slots=True)
class Call:
    """How the model called a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on `device`."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (self.args, dict(self.kwargs)))
        return Call(args, kwargs)


Visitor = Callable[[int, Tensor, Call], Tensor]


@dataclass(frozen=True, slots=True)
class Use:
    """A product seen on the meta device; `activation` numbers what fed it, within its block.

    producer   what scaled the activation, None when that is unknown or noticed elsewhere too
    heads      (heads, width of a head) where the activation is heads side by side, else None
    """

    parameter: str
    first: int
    last: int
    stride_in: int
    index: int
    activation: int
    producer: Producer | None
    heads: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run of a block showed: its products in order, whether it returns a tuple, and how often it
    called scaled dot-product attention."""

    uses: tuple[Use, ...]
    returns_tuple: bool
    attentions: int


class Stub(nn.Module):
    """Stands where a block was: hands its call to the visitor, answers for the block's attributes."""

    def __init__(self, index: int, block: nn.Module, visit: Callable[[int, Tensor, Call], Any]) -> None:
        super().__init__()
        self.index = index
        self.visit = visit
        # In a tuple so that the block does not become a child of the model again.
        self.held = (block,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.visit(self.index, args[0], Call(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self.visit(self.index, hidden, Call((), kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["held"][0], name)


def find_blocks(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """The list of decoder blocks: of the outermost module lists, the one with most parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    prefix, blocks = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return prefix, tuple(blocks)


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that do the same products: classes, names, shapes and plain settings."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple(
                (k, v)
                for k, v in vars(module).items()
                if isinstance(v, (bool, int, float, str)) and k not in _COUNTERS
            ),
        )
        for name, module in block.named_modules()
    )


def trace(
    blocks: Sequence[nn.Module], run: Callable[[Visitor, Tensor], object], embedded: tuple[Tensor, Tensor]
) -> tuple[Trace, ...]:
    """Watch every block on meta; blocks of one structure are run once.

    `run` makes the model's forward over embedded tokens, with its blocks handed to a visitor. It is
    run twice, with different tokens, to see that blocks are told the same about any.
    """
    known: dict[tuple[Any, ...], Trace] = {}
    traces: list[Trace] = []
    calls: tuple[list[Call], list[Call]] = ([], [])

    passed: list[Tensor] = []

    def watch(index: int, hidden: Tensor, call: Call) -> Any:
        if index != len(traces):
            raise UnsupportedError(f"the model calls block {index} where block {len(traces)} was expected")
        if passed and hidden is not passed[-1]:
            raise UnsupportedError(
                f"the model changes the hidden states between blocks {index - 1} and {index}"
            )
        passed.append(hidden)
        key = _structure(blocks[index])
        if key not in known:
            known[key] = _observed(blocks[index], hidden.to("meta"), call.to(torch.device("meta")))
        traces.append(known[key])
        calls[0].append(call)
        return (hidden,) if known[key].returns_tuple else hidden

    def pass_by(index: int, hidden: Tensor, call: Call) -> Any:
        calls[1].append(call)
        return (hidden,) if traces[index].returns_tuple else hidden

    with torch.no_grad():
        run(watch, embedded[0])
        if len(traces) != len(blocks):
            raise UnsupportedError(f"the model called {len(traces)} blocks of its {len(blocks)}")
        run(pass_by, embedded[1])
    check_independent(*calls)
    return tuple(traces)


def _observed(block: nn.Module, hidden: Tensor, call: Call) -> Trace:
    """Run `block` on meta and note its products in order, and the form of what it returns."""
    uses: list[Use] = []
    kept: list[Tensor] = []  # activations stay alive, so that no storage is taken twice
    numbers: dict[tuple[int, int, int], int] = {}
    parameters = dict(block.named_parameters())
    producers, heads = Producers(parameters), Heads()

    def seen(p: Product) -> None:
        kept.append(p.x)
        number = numbers.setdefault(identity(p.x), len(numbers))
        made, joined = producers.of(p.x), heads.of(p.x)
        uses.append(Use(p.parameter, p.first, p.last, p.stride_in, p.index, number, made, joined))

    def called(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        producers.after(func, args, kwargs, out)
        heads.after(func, args, out)

    observer = Observer(parameters, seen, called)
    with observer:
        result = block(hidden, *call.args, **call.kwargs)
    producers.returned(tree_leaves(result))
    clean = (replace(u, producer=producers.unspoiled(u.producer)) for u in uses)
    return Trace(tuple(clean), isinstance(result, tuple), observer.attentions)


def check_independent(first: Sequence[Call], second: Sequence[Call]) -> None:
    """Blocks must be told the same about different tokens, because what they are told is kept by shape."""
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        leaves = [tree_leaves((call.args, dict(call.kwargs))) for call in (a, b)]
        if any(isinstance(leaf, Cache) for leaf in leaves[0]):
            raise UnsupportedError(f"block {index} keeps a cache although it was told not to")
        if len(leaves[0]) != len(leaves[1]) or not all(map(_equal, *leaves)):
            raise UnsupportedError(
                f"block {index} is told more about the tokens than its hidden states, "
                "so the model cannot be run block by block"
            )


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
