"""What `quantkit.json` says of a target: told by the plan, the report and the files themselves."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Mapping

from quantkit.checkpoint.header import NAMES
from quantkit.checkpoint.reader import Checkpoint
from quantkit.hub.fetch import Source
from quantkit.hub.manifest import Kept, Origin, pattern_of
from quantkit.hub.side_files import card_of
from quantkit.model.graph import Block, ModelGraph
from quantkit.recipe.anonymous import anonymous
from quantkit.recipe.dump import dump
from quantkit.recipe.spec import Recipe, Target
from quantkit.run.files import Packing, entries, parameters
from quantkit.run.gguf_file import GgufFile
from quantkit.run.gguf_source import GgufCheckpoint
from quantkit.run.quantized import Dequantized

_COMPUTING = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
_FLOATS = ("f32", "f16", "bf16")
_CACHE_ITEM = 2  # bytes of a number of the key-value cache in 16 bits


def origin(source: Source, checkpoint: Checkpoint, graph: ModelGraph, fingerprint: str) -> Origin:
    """The checkpoint that is quantized, and what its model card says."""
    architectures = checkpoint.config.get("architectures") or [""]
    size, count = checkpoint.size_bytes, parameters(checkpoint, graph)
    return Origin(
        id=source.name,
        revision=source.revision,
        fingerprint=fingerprint,
        architecture=str(architectures[0]),
        model_type=checkpoint.model_type,
        parameters=count,
        size_bytes=size,
        bits_per_weight=size * 8 / count,
        dtype=checkpoint.dtype,
        context=_context(checkpoint),
        cache_bytes=_cache_bytes(checkpoint, graph),
        quantized=_quantized(checkpoint),
        card=card_of(checkpoint.path),
    )


def kept_beside(target: Packing, checkpoint: Checkpoint, graph: ModelGraph) -> tuple[Kept, ...]:
    """What a folder of safetensors holds as floats of the source."""
    copied = (entry for entry in entries(target, checkpoint, graph) if entry.copied is not None)
    return _together((s.name, NAMES[s.dtype], math.prod(s.shape)) for entry in copied for s in entry.specs)


def kept_inside(file: GgufFile) -> tuple[Kept, ...]:
    """What a GGUF file holds as floats."""
    floats = (stored for stored in file.tensors if stored.kind in _FLOATS)
    return _together((s.name, s.kind.upper(), math.prod(s.shape)) for s in floats)


def recipe_text(recipe: Recipe, target: Target, source: Source) -> str:
    """YAML of the recipe with one target alone, without paths of the machine."""
    name = source.pinned if source.revision else source.name
    return dump(anonymous(dataclasses.replace(recipe, targets=(target,)), name))


def settings(target: Target) -> dict[str, object]:
    """What a target was asked to be made with."""
    return {
        "options": dict(target.options),
        "feedback": target.feedback,
        "transforms": [dataclasses.asdict(transform) for transform in target.transforms],
        "kv_cache": target.kv_cache,
        "mix": dict(target.mix),
    }


def versions() -> Mapping[str, str]:
    """The packages that compute, those that are installed."""
    found = {}
    for name in _COMPUTING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _together(floats: Iterable[tuple[str, str, int]]) -> tuple[Kept, ...]:
    """Of (name, dtype, elements): blocks and experts of one name together."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, dtype, size in floats:
        found.setdefault((pattern_of(name), dtype), []).append(size)
    return tuple(Kept(pattern, len(n), sum(n), dtype) for (pattern, dtype), n in found.items())


def _context(checkpoint: Checkpoint) -> int | None:
    value = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    return value if isinstance(value, int) and value > 0 else None


def _cache_bytes(checkpoint: Checkpoint, graph: ModelGraph) -> int | None:
    """Per token in 16 bits; None where a block keeps something else, or only what is within a window."""
    kinds = checkpoint.config.get("layer_types") or ()
    windowed = checkpoint.config.get("sliding_window") and checkpoint.config.get("use_sliding_window", True)
    if windowed or any(kind != "full_attention" for kind in kinds):
        return None
    widths = [_cache_width(block) for block in graph.blocks]
    known = [width for width in widths if width is not None]
    return _CACHE_ITEM * sum(known) if len(known) == len(widths) else None


def _cache_width(block: Block) -> int | None:
    """Keys and values of one token, None where they cannot be told from the weights."""
    rows = {weight.role: weight.shape for weight in block.weights()}
    if "k" in rows and "v" in rows:
        return rows["k"][0] + rows["v"][0]
    if "qkv" in rows and "o" in rows:
        return rows["qkv"][0] - rows["o"][1]
    return None


def _quantized(checkpoint: Checkpoint) -> str | None:
    """What the source is stored in when it is not floats."""
    if isinstance(checkpoint, GgufCheckpoint) and checkpoint.types:
        return f"gguf, {' and '.join(checkpoint.types)}"
    if isinstance(checkpoint, Dequantized):
        quantized = checkpoint.quantized
        bits = sorted({quantized.measure(name)[1] for name in quantized.parts})
        return f"{quantized.format_name}, {' and '.join(map(str, bits))} bits"
    return None
