"""Which of ggml's types every matrix of a model gets, when a preset's rules give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.allocate import gguf_mix
from quantkit.errors import RecipeError
from quantkit.gguf.architectures import Model, Placed
from quantkit.gguf.mixes import MIXES
from quantkit.gguf.types import TYPES
from quantkit.model.graph import ModelGraph, Weight
from quantkit.recipe.spec import Rule
from quantkit.schemes import Scheme, parse_scheme


@dataclass(frozen=True, slots=True)
class Assignment:
    """schemes   by `Weight.key`, None where a rule keeps the source's dtype
    notes     fallbacks: what was given and why
    problems  what cannot be
    """

    schemes: Mapping[str, Scheme | None]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def assign(
    default: Scheme,
    params: gguf_mix.Params,
    rules: tuple[Rule, ...],
    model: Model,
    graph: ModelGraph,
    shapes: Mapping[str, tuple[int, ...]],
    importance: bool,
) -> Assignment:
    """Types of all matrices by the rules of `default.mix`, after the recipe's own.

    importance: whether mean squares of inputs are known, which changes what presets give. UnsupportedError
    where the model has no place in GGUF.
    """
    placed = [p for p in model.placements(graph, shapes) if p.matrix]
    ruled = _Ruled(rules, graph)
    fixed: dict[str, str] = {}
    kept: set[str] = set()
    problems: list[str] = []
    for tensor in placed:
        try:
            found = ruled.decide(tensor, default)
        except RecipeError as error:
            problems.append(f"`{tensor.name}`: {error.message}")
            continue
        if found is not None and found.scheme is None:
            kept.add(tensor.name)
        elif found is not None and found.scheme is not None and found.scheme.numbers in TYPES:
            fixed[tensor.name] = found.scheme.numbers
        elif found is not None and found.scheme is not None:
            problems.append(
                f"`{tensor.name}` cannot be {found.scheme.name}: gguf stores ggml's types, as q4_k and q6_k"
            )
    heads, kv_heads = model.heads
    facts = gguf_mix.Facts(model.architecture, model.blocks, heads, kv_heads, model.experts)
    items = [gguf_mix.Item(p.name, p.shape) for p in placed]
    # rules count and see what is kept, too: a model whose head is kept is not one without a head
    fixed |= dict.fromkeys(kept, "f32")
    choices = gguf_mix.assign(MIXES[default.mix], items, facts, params, imatrix=importance, fixed=fixed)
    choices = {name: choice for name, choice in choices.items() if name not in kept}
    schemes: dict[str, Scheme | None] = {}
    for tensor in placed:
        choice = choices.get(tensor.name)
        scheme = None
        if choice is not None:
            scheme = replace(parse_scheme(choice.type), scale_dtype=default.scale_dtype)
        for source in tensor.sources:
            schemes[source.key] = _larger(schemes.get(source.key), scheme)
    notes: dict[str, int] = {}
    for choice in choices.values():
        if choice.why is not None:
            notes[choice.why] = notes.get(choice.why, 0) + 1
    told = tuple(f"{count:,} tensor{'s' * (count > 1)}: {why}" for why, count in notes.items())
    return Assignment(schemes, told, tuple(problems))


def _larger(a: Scheme | None, b: Scheme | None) -> Scheme | None:
    """A weight that is written twice (an embedding that is the head too) is made once, with the more bits."""
    if a is None or b is None:
        return b if a is None else a
    per_weight = [TYPES[s.numbers].nbytes / TYPES[s.numbers].elements for s in (a, b)]
    return a if per_weight[0] >= per_weight[1] else b


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rule says of a tensor; no scheme: it keeps the dtype of the source."""

    scheme: Scheme | None


class _Ruled:
    """What the recipe's rules say about tensors of the file, by the names of their sources or their own."""

    def __init__(self, rules: tuple[Rule, ...], graph: ModelGraph) -> None:
        self._rules, self._total = rules, len(graph.blocks)
        self._weights: dict[str, tuple[Weight, int | None]] = {w.key: (w, None) for w in graph.outer}
        for block in graph.blocks:
            self._weights |= {w.key: (w, block.index) for w in block.weights()}

    def decide(self, tensor: Placed, default: Scheme) -> _Said | None:
        """None where no rule matches. RecipeError where experts of a stack differ."""
        found = [self._one(source.key, tensor.name, default) for source in tensor.sources]
        if any(other != found[0] for other in found):
            raise RecipeError("rules give the experts of one tensor different types")
        return found[0]

    def _one(self, key: str, name: str, default: Scheme) -> _Said | None:
        weight, block = self._weights[key]
        own = name.removesuffix(".weight")
        for rule in self._rules:
            if rule.matches(weight.module, block, self._total) or rule.matches(own, block, self._total):
                return _Said(rule.apply(default))
        return None


def names(
    model: Model, graph: ModelGraph, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, int | None]]:
    """(what rules may call a matrix of a file, beside the name that the source has for it, its block)."""
    found = (p.name.removesuffix(".weight") for p in model.placements(graph, shapes) if p.matrix)
    return [(name, int(name.split(".")[1]) if name.startswith("blk.") else None) for name in found]
