"""What a file is called, and what it says of the model's name, size, licence and origin.

    {Name}-{Size}-{Finetune}-{Version}-{ENCODING}.gguf, parts optional
llama.cpp finds ``repo:Q4_K_M`` by the end of a file's name and passes over names of side files
(projectors, imatrices, draft heads), so no model is called like one. Nothing here knows a path of the
machine: names come from the caller, the rest from the model card and its settings for generation. Who
quantizes it is not known here: who publishes it says so on the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit.checkpoint.card import HUB, inherited, listed
from quantkit.checkpoint.card import read as read_card
from quantkit.checkpoint.strict_json import parse_object
from quantkit.gguf.container import Typed, Value, library

_QUANTIZATION_VERSION = 2
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# What a source may already say at the end of its name.
_ENCODED = re.compile(r"[-._](gguf|f32|b?f16|fp16|mxfp4(_moe)?|i?q\d(_[0-9a-z]+)+|tq[12]_0)$", re.IGNORECASE)
_SIDE_FILES = (
    (re.compile(r"(mm)(proj)", re.IGNORECASE), r"\1-\2"),
    (re.compile(r"(i)(matrix)", re.IGNORECASE), r"\1-\2"),
    (re.compile(r"(mtp|eagle3|dflash|dspark)-", re.IGNORECASE), r"\1."),
)
# key of generation_config.json → (key of ours, whether it counts)
_SAMPLING = MappingProxyType(
    {
        "temperature": ("temp", False),
        "top_k": ("top_k", True),
        "top_p": ("top_p", False),
        "min_p": ("min_p", False),
    }
)


@dataclass(frozen=True, slots=True)
class Size:
    """Weights of a model; `in_experts` are those of all experts together."""

    parameters: int
    in_experts: int = 0
    experts: int = 0

    @property
    def label(self) -> str:
        """``8B``, ``0.6B``, or ``8x7B``: how many experts, and the model with one of them."""
        each = self.in_experts // self.experts if self.experts else 0
        rest = self.parameters - self.in_experts
        return str(library().size_label(self.parameters, rest, each, self.experts))


def file_stem(model: str, encoding: str) -> str:
    """``Qwen3-8B-Q4_K_M``; `model` is a Hub id or a name, `encoding` that of a mix or type."""
    name = _UNSAFE.sub("-", model.rstrip("/").rpartition("/")[2]).strip("-._")
    while (shorter := _ENCODED.sub("", name)) != name:
        name = shorter
    stem = f"{name or 'model'}-{encoding.upper()}"
    for called, instead in _SIDE_FILES:
        stem = called.sub(instead, stem)
    return stem


def general(
    model: str,
    size: Size,
    file_type: int,
    folder: Path,
    repository: str | None = None,
    card: Path | None = None,
) -> dict[str, Value]:
    """The ``general.*`` keys of a file.

    `model` is a name and `repository` the Hub id of the source if it has one; the settings for generation are
    read from `folder`, what a card says from `card`.
    """
    said = {} if card is None else inherited(read_card(card))
    name = (repository or model).rstrip("/").rpartition("/")[2] or "model"
    found: dict[str, Value] = {
        "type": "model",
        **_names(name, size),
        **_origin(repository),
        **_texts(said),
        **_sampling(folder / "generation_config.json"),
        "file_type": file_type,
        "quantization_version": _QUANTIZATION_VERSION,
    }
    return {f"general.{key}": value for key, value in found.items()}


def _names(name: str, size: Size) -> dict[str, Value]:
    """The parts that llama.cpp's converter sees in a name: ``Llama-3.1-8B-Instruct``."""
    metadata = library().Metadata
    _, _, base, finetune, version, label = metadata.get_model_id_components(name, size.parameters)
    known = {"basename": base, "finetune": finetune, "version": version}
    parts: dict[str, Value] = {key: text for key, text in known.items() if text}
    return {"name": metadata.id_to_title(name), **parts, "size_label": label or size.label}


def _origin(repository: str | None) -> dict[str, Value]:
    """The repository that the file is made from, which is its base model: a folder has no name for others."""
    if repository is None:
        return {}
    title, url = library().Metadata.id_to_title, f"{HUB}/{repository}"
    organization, _, name = repository.partition("/")
    return {
        "organization": title(organization),
        "source.repo_url": url,
        "base_model.count": 1,
        "base_model.0.name": title(name),
        "base_model.0.organization": title(organization),
        "base_model.0.repo_url": url,
    }


def _texts(card: Mapping[str, Any]) -> dict[str, Value]:
    """Licence, tags and languages."""
    out: dict[str, Value] = {}
    if licence := listed(card.get("license")):
        out["license"] = ",".join(licence)
    for key, ours in (("license_name", "license.name"), ("license_link", "license.link")):
        if found := listed(card.get(key)):
            out[ours] = found[0]
    tags = [*listed(card.get("tags")), *listed(card.get("pipeline_tag"))]
    for ours, texts in (("tags", tags), ("languages", listed(card.get("language")))):
        if texts:
            out[ours] = list(dict.fromkeys(texts))
    return out


def _sampling(path: Path) -> dict[str, Value]:
    """How the model's authors sample, which llama.cpp then does by default."""
    try:
        config = parse_object(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if config.get("do_sample") is False:
        return {}
    out: dict[str, Value] = {}
    for key, (ours, counts) in _SAMPLING.items():
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1 << 31:
            continue
        out[f"sampling.{ours}"] = Typed(int(value), "int32") if counts else float(value)
    return out
