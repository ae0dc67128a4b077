"""GGUF file types: ``q4_k_m`` is mostly q4_k, and more bits where llama.cpp has found them to pay.

Which tensor gets which type is llama.cpp's choice (its quantizer confirms it in tests); here it is tables:
for each mix and part of a block, pairs of place and type, the first place that holds decides, and the
default type of the mix where none does. Places count ("the first eighth of the ffn_down"), so tensors are
visited in llama.cpp's order, by block and name. A type that does not divide a row is replaced last,
whatever chose it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from quantkit.gguf.mixes import MIXES, ROW, Mix, parse_type
from quantkit.gguf.types import TYPES

SUMMARY = "llama.cpp's own mixes of types, tensor by tensor"

_FLOATS = frozenset(("f32", "f16", "bf16"))


@dataclass(frozen=True, slots=True)
class Params:
    """What a target changes about its mix: ``gguf:q4_k_m@output=q8_0,embedding=q6_k``."""

    pure: Annotated[bool, "every tensor gets the mix's default type, but for the two below"] = False
    output: Annotated[
        str | None, "type of output.weight, and of token_embd.weight where that is both; null: the mix's"
    ] = None
    embedding: Annotated[str | None, "type of token_embd.weight; null: the mix's, or `output` if tied"] = None

    def __post_init__(self) -> None:
        if self.output is not None:
            object.__setattr__(self, "output", parse_type(self.output))
        if self.embedding is not None:
            object.__setattr__(self, "embedding", parse_type(self.embedding))


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules ask about a model; `architecture` is llama.cpp's name of it, heads are those of a block."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def seventy_billion(self) -> bool:
        """What llama.cpp takes for a model of 70 billion weights, whatever it has."""
        many = _SEVENTY_BILLION.get(self.architecture) == self.blocks
        return many and (self.architecture != "llama" or self.heads != self.kv_heads)


_SEVENTY_BILLION = MappingProxyType({"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68})


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor by its name in the file; `shape` is (out, in) or (experts, out, in)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A tensor's type, and `why` it is not the one that was meant: its rows do not fit."""

    type: str
    why: str | None = None


# ------------------------------------------------------------------------------------------------ places
@dataclass(frozen=True, slots=True)
class _Place:
    """`index` of `count` alike: how many came before, or the number of the block in models of experts."""

    index: int
    count: int
    facts: Facts
    imatrix: bool


_Where = Callable[[_Place], bool]
_Row = tuple[tuple[_Where, str], ...]
_Rows = Mapping[str, _Row]


def _everywhere(_: _Place) -> bool:
    return True


def _first(count: int) -> _Where:
    return lambda place: place.index < count


def _share(divisor: int) -> _Where:
    return lambda place: place.index < place.count // divisor


def _middle(place: _Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _spread(place: _Place) -> bool:
    """The first and the last eighth, and every third between."""
    return not _middle(place) or (place.index - place.count // 8) % 3 == 2


def _shared(place: _Place) -> bool:
    """Four query heads or more read the same keys and values: those are small, and bits cheap."""
    return place.facts.sharing >= 4


def _shared_or_experts(place: _Place) -> bool:
    return place.facts.sharing >= 4 or place.facts.experts >= 4


def _imatrix(place: _Place) -> bool:
    return place.imatrix


def _no_imatrix(place: _Place) -> bool:
    return not place.imatrix


def _both(one: _Where, other: _Where) -> _Where:
    return lambda place: one(place) and other(place)


def _all(kind: str) -> _Row:
    return ((_everywhere, kind),)


# ------------------------------------------------------------------------------------------------ tables
_LOWEST = frozenset(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"))
_V4: _Rows = {"attn_v": ((_shared, "q4_k"),)}
_IQ2: _Rows = {
    "attn_v": ((_shared_or_experts, "q4_k"), (_everywhere, "q2_k")),
    "ffn_down": ((_share(8), "q2_k"),),
}
_IQ2_MORE: _Rows = {
    "attn_v": ((_shared_or_experts, "q4_k"), (_everywhere, "iq3_s")),
    "attn_output": _all("iq3_s"),
    "ffn_down": ((_share(8), "iq3_s"),),
}
_IQ4: _Rows = {"attn_v": ((_shared, "q5_k"),), "ffn_down": ((_both(_no_imatrix, _share(8)), "q5_k"),)}
_SPREAD_Q6: _Rows = {"attn_v": ((_spread, "q6_k"),), "ffn_down": ((_spread, "q6_k"),)}
_RULES: Mapping[str, _Rows] = MappingProxyType(
    {
        "iq1_s": {**_IQ2, "attn_output": _all("iq2_xxs")},
        "iq1_m": {**_IQ2, "attn_output": _all("iq2_xxs")},
        "iq2_xxs": _IQ2,
        "iq2_xs": _IQ2,
        "iq2_s": _IQ2_MORE,
        "iq2_m": _IQ2_MORE,
        "q2_k": {
            "attn_v": ((_shared, "q4_k"), (_everywhere, "q3_k")),
            "attn_output": _all("q3_k"),
            "ffn_down": _all("q3_k"),
        },
        "q2_k_s": {**_V4, "ffn_down": ((_share(8), "q4_k"),)},
        "iq3_xxs": {
            "attn_v": ((_shared, "q4_k"), (_no_imatrix, "iq3_s")),
            "attn_q": _all("iq2_s"),
            "attn_k": _all("iq2_s"),
            "attn_output": _all("iq3_s"),
            "ffn_down": ((_both(_no_imatrix, _share(8)), "q4_k"), (_no_imatrix, "q3_k")),
        },
        "iq3_xs": {
            **_V4,
            "attn_q": _all("iq3_xxs"),
            "attn_k": _all("iq3_xxs"),
            "ffn_gate": ((_middle, "iq3_xxs"),),
            "ffn_up": ((_middle, "iq3_xxs"),),
        },
        "iq3_s": _V4,
        "iq3_m": {"attn_v": _all("q4_k"), "attn_output": _all("q4_k"), "ffn_down": ((_share(8), "q4_k"),)},
        "q3_k_m": {
            "attn_v": ((_first(2), "q5_k"), (_everywhere, "q4_k")),
            "attn_output": _all("q4_k"),
            "ffn_down": ((_share(16), "q5_k"), (_everywhere, "q4_k")),
        },
        "q3_k_l": {"attn_v": _all("q5_k"), "attn_output": _all("q5_k"), "ffn_down": _all("q5_k")},
        "iq4_xs": _IQ4,
        "iq4_nl": _IQ4,
        "q4_0": {"ffn_down": ((_both(_imatrix, _share(8)), "q4_1"),)},
        "q4_k_s": {"attn_v": ((_first(4), "q5_k"),), "ffn_down": ((_share(8), "q5_k"),)},
        "q4_k_m": _SPREAD_Q6,
        "q5_0": {"ffn_down": ((_both(_imatrix, _share(8)), "q5_1"),)},
        "q5_k_m": _SPREAD_Q6,
    }
)
# What is different in Falcon.
_FALCON: Mapping[str, _Rows] = MappingProxyType(
    {
        "q2_k": {"attn_output": ()},
        "iq3_xxs": {"attn_output": ()},
        "iq3_m": {"attn_output": ()},
        "q3_k_m": {"attn_output": (), "ffn_down": ((_share(16), "q5_k"), (_spread, "q4_k"))},
        "q3_k_l": {"attn_output": _all("q4_k"), "ffn_down": _all("q4_k")},
        "q4_k_s": {"ffn_down": ()},
        "q4_k_m": {"ffn_down": ((_share(16), "q6_k"), (_spread, "q5_k"))},
    }
)
# What is different in models of exactly eight experts: attention is small beside them, and bits cheap.
_EIGHT_LOWEST: _Rows = {"attn_k": _all("q4_k"), "attn_output": _all("q5_k")}
_EIGHT_LARGE: _Rows = {"attn_v": _all("q8_0"), "attn_k": _all("q8_0"), "attn_output": ()}
_EIGHT_SMALL: _Rows = {**_EIGHT_LARGE, "attn_output": _all("q5_k")}
_SMALL = (
    *("q2_k", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "q3_k_s", "q3_k_m"),
    *("iq4_nl", "iq4_xs", "q4_k_s", "q4_k_m"),
)
_EIGHT: Mapping[str, _Rows] = MappingProxyType(
    {
        **{name: _EIGHT_LOWEST if name in _LOWEST else _EIGHT_LARGE for name in MIXES},
        **{name: _EIGHT_SMALL for name in _SMALL},
        "iq3_m": {**_EIGHT_SMALL, "ffn_down": ((_spread, "q4_k"),)},
    }
)
_EMBEDDING: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), "q2_k"),
        **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
        **dict.fromkeys(("tq1_0", "tq2_0"), "q4_k"),
    }
)
# What takes the place of a type that does not divide a row; f16 where that does not either.
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), "iq4_nl"),
        **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
        **{"iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
    }
)

# ------------------------------------------------------------------------------------------------- names
_OUTPUT, _EMBEDDINGS = "output.weight", ("token_embd.weight", "per_layer_token_embd.weight")
# The first that is found in a name says which part of the model it is.
_PARTS = (
    *(("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v")),
    *(("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output")),
    *(("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down")),
)
# Stay floats wherever in a name: routers, and matrices too small or too delicate to round.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d"),
    *("shortconv.conv.weight", "attn_rel_b.weight", "position_embd", "token_types"),
)


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp rounds this tensor: matrices of weights, but for a few kinds."""
    leading = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return len(shape) - leading >= 2 and name.endswith("weight") and not any(kept in name for kept in _KEPT)


def _part(name: str) -> str:
    if name == _OUTPUT:
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((part for text, part in _PARTS if text in name), "other")


def _visited(item: Item) -> tuple[int, str]:
    """llama.cpp's order: by number of the block, first what belongs to none (−1), then by name."""
    found = re.match(r"blk\.(\d+)\.", item.name)
    return (int(found[1]) if found else -1), item.name


# --------------------------------------------------------------------------------------------- decisions
def assign(
    mix: Mix,
    items: Sequence[Item],
    facts: Facts,
    params: Params | None = None,
    *,
    imatrix: bool,
    fixed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Choice]:
    """The type of every item, in llama.cpp's order; `imatrix`: inputs have been measured.

    `items` are all `quantizable` tensors of the model. `fixed` are types by name that stand in for rules
    (rules do not count those tensors), and `params` stands above both.
    """
    params = params or Params()
    rules = _rules(mix, facts)
    parts = {item.name: _part(item.name) for item in items}
    values = sum(part == "attn_v" for part in parts.values())
    tied = _OUTPUT not in parts
    seen: Counter[str] = Counter()
    choices = {}
    for item in sorted(items, key=_visited):
        part = parts[item.name]
        kind = _asked(item.name, params, tied) or fixed.get(item.name)
        kind = kind or (mix.default if params.pure else _uncounted(mix, item, facts, tied))
        if kind is None:
            by_block = part.startswith("ffn") and facts.experts > 1 and mix.name not in _LOWEST
            index = _visited(item)[0] if by_block else seen[part]
            place = _Place(index, values if part == "attn_v" else facts.blocks, facts, imatrix)
            kind = next((kind for where, kind in rules.get(part, ()) if where(place)), mix.default)
            seen[part] += 1
        choices[item.name] = _fitting(kind, item.shape[-1])
    return choices


def _asked(name: str, params: Params, tied: bool) -> str | None:
    """The type that the target gives to this end of the model."""
    if name in _EMBEDDINGS:
        return params.embedding or (params.output if tied else None)
    return params.output if name == _OUTPUT else None


def _uncounted(mix: Mix, item: Item, facts: Facts, tied: bool) -> str | None:
    """The type where it is the same in every block, or there are no blocks; None: the rules say."""
    part = _part(item.name)
    if mix.name in _FLOATS:
        return mix.default
    if part == "output" or (part == "embedding" and tied):
        return _output(mix, item.shape[-1], facts)
    if mix.name == "mxfp4_moe":
        stacked = len(item.shape) == 3 and item.shape[0] > 1
        return "mxfp4" if stacked else "q8_0"
    return _EMBEDDING.get(mix.name, mix.default) if part == "embedding" else None


def _output(mix: Mix, width: int, facts: Facts) -> str:
    if mix.name in ("mxfp4_moe", "q8_0") or facts.architecture == "falcon" or width % ROW[mix.default]:
        return "q8_0"
    return "q5_k" if mix.name in _LOWEST or mix.name == "iq3_xxs" else "q6_k"


def _rules(mix: Mix, facts: Facts) -> _Rows:
    """The rows of `mix` for such a model."""
    rows = dict(_RULES.get(mix.name, {}))
    if facts.architecture == "falcon":
        rows |= _FALCON.get(mix.name, {})
    if facts.experts == 8:
        rows |= _EIGHT[mix.name]
    if facts.seventy_billion and mix.name not in _LOWEST:
        # many query heads read the same values there
        row = (*rows.get("attn_v", ()), (_everywhere, mix.default))
        rows["attn_v"] = tuple((where, "q5_k" if kind in ("q3_k", "q4_k") else kind) for where, kind in row)
    return rows


def _fitting(kind: str, width: int) -> Choice:
    """`kind`, or what takes its place in rows of `width` weights."""
    if width % ROW[kind] == 0:
        return Choice(kind)
    other = _INSTEAD.get(kind, "f16")
    if width % ROW[other]:
        other = "f16"
    return Choice(other, f"row length {width:,} is not a multiple of {ROW[kind]}: {other} instead of {kind}")


def typical_bits(mix: Mix) -> float:
    """Bits per weight of Llama 3.1 8B in this mix, norms left out."""
    blocks, hidden, inner, vocabulary = 32, 4096, 14336, 128_256
    shapes = {
        **{f"attn_{part}": (hidden, hidden) for part in ("q", "output")},
        **{f"attn_{part}": (1024, hidden) for part in ("k", "v")},
        **{f"ffn_{part}": (inner, hidden) for part in ("gate", "up")},
        "ffn_down": (hidden, inner),
    }
    items = [Item(name, (vocabulary, hidden)) for name in (_OUTPUT, _EMBEDDINGS[0])]
    items += [Item(f"blk.{i}.{name}.weight", shape) for i in range(blocks) for name, shape in shapes.items()]
    choices = assign(mix, items, Facts("llama", blocks, 32, 8), imatrix=True)
    size = sum(item.shape[0] * TYPES[choices[item.name].type].row_bytes(item.shape[1]) for item in items)
    return 8 * size / sum(item.shape[0] * item.shape[1] for item in items)
