"""Whether a quantization config says what the tensors of a checkpoint are: engines go by it, we do less.

What can be told from tensors is told from them; the formats know which keys speak of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.reader import Checkpoint, TensorInfo
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.names import match_names
from quantkit.model.skeleton import config_of, meta_model
from quantkit.model.stored import StoredModel, StoredWeight
from quantkit.run.dialects import read_config, stated_configs
from quantkit.run.quantized import Matched, QuantizedCheckpoint, matched
from quantkit.run.verification import Verification
from quantkit.tensors import QuantizedLinear

# keys of which tensors say too little: configs beside each other agree on them
_SILENT = ("checkpoint_format", "version")


def stored_weight(quantized: QuantizedCheckpoint, linear: QuantizedLinear) -> StoredWeight:
    """What is to be known of a decoded weight once its codes are gone."""
    infos = quantized.checkpoint.tensors
    return StoredWeight.of(linear, {part: infos[part] for part in quantized.parts[linear.name]})


def check_quantization(
    report: Verification, quantized: QuantizedCheckpoint, weights: Sequence[StoredWeight]
) -> None:
    """Put every config of the folder beside what its weights are, and what is stored around them."""
    found = matched(quantized)
    stored = _stored_model(quantized, found, weights)
    checkpoint = quantized.checkpoint
    inside = {part for found in quantized.parts.values() for part in found}
    beside = {name: info for name, info in checkpoint.tensors.items() if name not in inside}
    report.problems += _stray_codes(found, beside, smallest=2)
    configs = list(stated_configs(checkpoint.path, checkpoint.config))
    (first, _), *others = configs
    report.problems += [
        f"`{first}`: {text}" for text in quantized.reader.disagreements(stored, quantized.config)
    ]
    for file, config in others:
        report.problems += [f"`{file}`: {text}" for text in _beside(quantized, stored, config, first)]
    report.checks["config"] = f"{', '.join(f'`{file}`' for file, _ in configs)} beside the tensors"


def check_plain(report: Verification, checkpoint: Checkpoint) -> None:
    """Codes in a checkpoint that says nothing of quantization."""
    if all(info.torch_dtype.is_floating_point for info in checkpoint.tensors.values()):
        return
    try:
        model = meta_model(config_of(checkpoint), torch.float32)
    except (SourceError, UnsupportedError):
        return
    infos = checkpoint.tensors
    match = match_names(model, {name: info.shape for name, info in infos.items()})
    report.problems += _stray_codes(Matched(infos, model, match), infos, smallest=1)


def _beside(
    quantized: QuantizedCheckpoint, stored: StoredModel, config: Mapping[str, Any], first: str
) -> Iterator[str]:
    """What is wrong with a further config; tools that know its name read it before `first`."""
    try:
        format_name, own = read_config(config)
    except (SourceError, UnsupportedError) as error:
        yield error.message
        return
    if format_name != quantized.format_name:
        yield f"`quant_method` stands for {format_name}, but `{first}` says {quantized.format_name}"
        return
    for key in _SILENT:
        if key in config and own.get(key) != quantized.config.get(key, own.get(key)):
            yield f"`{key}` is {config[key]!r}, but `{first}` says {quantized.config.get(key)!r}"
    yield from quantized.reader.disagreements(stored, own)


def _stored_model(
    quantized: QuantizedCheckpoint, found: Matched, weights: Sequence[StoredWeight]
) -> StoredModel:
    linears = {
        f"{path}.weight": path
        for path, module in found.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    paths = {
        tiles[0].source: linears[target]
        for target, tiles in found.match.filled.items()
        if target in linears and len({tile.source for tile in tiles}) == 1
    }
    tensors = quantized.checkpoint.tensors
    return StoredModel(
        weights=tuple(replace(weight, runs_as=paths.get(weight.name)) for weight in weights),
        kept={
            name.removesuffix(".weight"): path
            for name, path in paths.items()
            if name in tensors and name not in quantized.parts and tensors[name].torch_dtype.is_floating_point
        },
        heads=_heads(found, paths),
        tensors=frozenset(tensors),
    )


def _heads(found: Matched, paths: Mapping[str, str]) -> frozenset[str]:
    find: Any = found.model.get_output_embeddings
    head = find()
    own = {path for path, module in found.model.named_modules() if module is head}
    return frozenset(own | {name.removesuffix(".weight") for name, path in paths.items() if path in own})


def _stray_codes(found: Matched, beside: Mapping[str, TensorInfo], *, smallest: int) -> Iterator[str]:
    """Parameters that are stored as integers, or in fewer bytes than `smallest`, by tensors of their own."""
    parameters = {name for name, _ in found.model.named_parameters()}
    sources = {
        tile.source: None
        for target, tiles in found.match.filled.items()
        if target in parameters
        for tile in tiles
        if tile.source in beside
    }
    for name in sources:
        kind = beside[name].torch_dtype
        if not kind.is_floating_point or kind.itemsize < smallest:
            yield (
                f"`{name}` holds codes ({beside[name].dtype}), and no file holds scales for them: "
                "engines would take the codes for weights"
            )
