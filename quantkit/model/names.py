"""Names on disk against names at run time, and where every element goes.

Transformers renames, stacks, joins and transposes tensors while loading. Its own conversion mapping
is run here over `Traced` tensors, which have no data and remember where their elements came from, so
the result holds for any mapping. Loading, reading back and replacing weights all follow the tiles.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.graph import Role
from quantkit.model.tiles import Tile, Traced

# Role → endings of module names, numbers left out; the first ending that fits decides.
_ROLES: Mapping[Role, tuple[str, ...]] = {
    "router": ("router", "router.layer", "router.classifier", "gate", "gate.wg", "shared_expert_gate"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"),
    "q": ("q_proj", "q_a_proj", "q_b_proj", "wq", "query"),
    "k": ("k_proj", "wk", "key"),
    "v": ("v_proj", "wv", "value"),
    "o": (
        "o_proj",
        "out_proj",
        "attn.c_proj",
        "attention.dense",
        "self_attention.dense",
        "self_attn.dense",
        "wo",
    ),
    "gate_up": ("gate_up_proj", "gate_and_up_proj", "block_sparse_moe.input_linear"),
    "gate": ("gate_proj", "experts.w1", "feed_forward.w1", "mlp.w1"),
    "up": ("up_proj", "experts.w3", "feed_forward.w3", "mlp.w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in"),
    "down": (
        "down_proj",
        "experts.w2",
        "feed_forward.w2",
        "mlp.w2",
        "fc2",
        "mlp.c_proj",
        "dense_4h_to_h",
        "fc_out",
        "block_sparse_moe.output_linear",
    ),
}

# Tensors that older files carry and no model reads any more: rule → pattern of the checkpoint name.
_STALE = (
    ("rotary inv_freq buffer", r"(^|\.)rotary_emb\.inv_freq$|\.rope\.freqs$"),
    ("buffer (attention mask)", r"\.(attn|attention|crossattention)\.(masked_)?bias$"),
    ("buffer (position ids)", r"(^|\.)position_ids$"),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about names.

    tiles     runtime name → the tiles that fill it
    tied      runtime name → runtime name it shares storage with
    dropped   checkpoint name → rule by which it is not carried over
    duplicates   dropped checkpoint name → the checkpoint name with the same values
    """

    tiles: Mapping[str, tuple[Tile, ...]]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    duplicates: Mapping[str, str]

    def by_source(self, prefix: str) -> dict[str, list[Tile]]:
        """Checkpoint name → its tiles in the parameters whose runtime names begin with `prefix`."""
        found: dict[str, list[Tile]] = {}
        for target, tiles in self.tiles.items():
            if target.startswith(prefix):
                for tile in tiles:
                    found.setdefault(tile.source, []).append(tile)
        return found


def role_of(module: str) -> Role:
    """Role of a matrix inside a block, from its module name; "other" when nothing matches."""
    path = "." + re.sub(r"\.\d+(?=\.)|(\.weight)?\[\d+\]$", "", module)
    for role, endings in _ROLES.items():
        if path.endswith(tuple(f".{ending}" for ending in endings)):
            return role
    return "other"


@dataclass(frozen=True, slots=True)
class Match:
    """Checkpoint tensors against parameters, before sharing is settled; the lists are complaints."""

    filled: Mapping[str, tuple[Tile, ...]]
    dropped: Mapping[str, str]
    wanted: tuple[str, ...]
    orphans: tuple[str, ...]
    wrong: tuple[str, ...]


def match_names(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Match:
    """Match checkpoint tensors (name → shape) with the parameters of a meta `model`."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    filled: dict[str, tuple[Tile, ...]] = {}
    dropped: dict[str, str] = {}
    orphans: list[str] = []
    wrong: list[str] = []
    for target, transform in _conversions(model, shapes, wanted).items():
        for name, traced in _converted(model, target, transform).items():
            if name not in wanted:
                sources = sorted({tile.source for tile in traced.tiles})
                orphans += [source for source in sources if not _drop(model, source, dropped)]
            elif tuple(traced.shape) != wanted[name]:
                wrong.append(f"`{name}` has shape {tuple(traced.shape)}, the config says {wanted[name]}")
            else:
                filled[name] = tuple(replace(tile, target=name) for tile in traced.tiles)
    return Match(filled, dropped, tuple(wanted), tuple(orphans), tuple(wrong))


def settle(match: Match, shared: Mapping[str, str]) -> Layout:
    """The layout, given which runtime names share storage (later name → earlier name).

    SourceError lists the checkpoint tensors that nothing uses, the parameters that nothing fills,
    and wrong shapes.
    """
    filled, tied, duplicates = dict(match.filled), dict[str, str](), dict[str, str]()
    for twin, original in shared.items():
        if twin in filled and original in filled:
            duplicates[filled.pop(twin)[0].source] = filled[original][0].source
        if twin in filled:
            tied[original] = twin
        elif original in filled:
            tied[twin] = original
    dropped = dict(match.dropped) | {a: f"tied duplicate of {b}" for a, b in duplicates.items()}
    missing = [name for name in match.wanted if name not in filled and name not in tied]
    wrong_names = {text.split("`")[1] for text in match.wrong}
    _complain(match.orphans, [name for name in missing if name not in wrong_names], match.wrong)
    return Layout(filled, tied, dropped, duplicates)


def _drop(model: PreTrainedModel, name: str, dropped: dict[str, str]) -> bool:
    # Foreign class attribute: None, or patterns of tensors that Transformers knows and ignores.
    ignored: Iterable[str] = model._keys_to_ignore_on_load_unexpected or ()
    rules = [*_STALE, *((f"not used by {type(model).__name__} in Transformers", p) for p in ignored)]
    rule = next((rule for rule, pattern in rules if re.search(pattern, name)), None)
    if rule is not None:
        dropped[name] = rule
    return rule is not None


def _complain(orphans: Sequence[str], missing: Sequence[str], wrong: Sequence[str]) -> None:
    parts = []
    if orphans:
        parts.append(f"{len(orphans):,} tensors that the model does not use: {_listed(orphans)}")
    if missing:
        parts.append(f"{len(missing):,} parameters that no tensor fills: {_listed(missing)}")
    if wrong:
        parts.append(f"{len(wrong):,} wrong shapes: {'; '.join(wrong[:8])}")
    if parts:
        raise SourceError(
            "the checkpoint does not fit its config.json: " + "; ".join(parts),
            remedy="check that config.json belongs to these weights and that no file is missing",
        )


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def _conversions(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, object]
) -> dict[str, WeightRenaming | WeightConverter]:
    """First runtime name → its transform with the sources collected, as Transformers does on loading."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = dict(wanted)
    collected: dict[str, WeightRenaming | WeightConverter] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in collected:
            fresh = WeightRenaming(name, target) if pattern is None else copy.deepcopy(by_pattern[pattern])
            collected[target] = fresh
        traced: Any = Traced.whole(name, shapes[name])  # Transformers takes tensors where it says futures
        collected[target].add_tensor(target, name, pattern or name, traced)
    return collected


def _converted(
    model: PreTrainedModel, target: str, transform: WeightRenaming | WeightConverter
) -> dict[str, Traced]:
    """Runtime name → traced tensor, by Transformers' own conversion."""
    collected = sum(len(tensors) for tensors in transform.collected_tensors.values())
    try:
        result = transform.convert(target, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise SourceError(
            f"`{target}` cannot be assembled from its {collected:,} tensors in the checkpoint: {error}",
            remedy="check that no file is missing",
        ) from error
    pieces: dict[str, Traced] = {}
    for name, value in result.items():
        piece = value[0] if isinstance(value, list) else value
        if isinstance(piece, Traced):
            pieces[name] = piece
        else:
            raise UnsupportedError(
                f"`{name}` is made from checkpoint tensors by {transform}, which quantkit cannot follow",
                remedy="save the model once with Transformers' save_pretrained and use that folder",
            )
    return pieces
