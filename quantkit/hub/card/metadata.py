"""The front matter of a card: what the Hub reads, inherited from the source and measured by us."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from quantkit.calibrate.text import WIKITEXT_REVISION
from quantkit.checkpoint.card import hub_ids, inherited, listed
from quantkit.errors import RecipeError
from quantkit.evaluate.quality import Quality
from quantkit.hub.card.front_matter import BY, dump
from quantkit.hub.card.measured import Convention
from quantkit.hub.card.page import Page, Variant
from quantkit.hub.card.validation import problems
from quantkit.schemes import parse_scheme

__all__ = ["front_matter", "metadata", "model_index", "problems"]

_PIPELINE = "text-generation"
# Tags that the Hub derives, and those of libraries that the new files are not for.
_DERIVED = re.compile(
    r"(base_model|license|region|dataset|arxiv|doi|language|pipeline_tag|library_name):.*"
    r"|endpoints_compatible|autotrain_compatible|text-generation-inference|eval-results|model-index|custom_code"
    r"|transformers|safetensors|pytorch|tf|tensorflow|jax|onnx|openvino|mlx|gguf|ggml|llama\.cpp|vllm",
    re.IGNORECASE,
)
_TABLES = {"fp8": "fp8", "nf4": "nf4", "fp4": "fp4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}


def front_matter(page: Page) -> str:
    """The YAML with the lines around it."""
    return f"---\n{dump(metadata(page))}---\n"


def metadata(page: Page) -> dict[str, Any]:
    """Keys in the order they are written; what is not known is not there."""
    card, licence = inherited(page.source.card), page.licence
    bases = hub_ids(list(licence.base_models))
    found: dict[str, Any] = {
        "base_model": bases[0] if len(bases) == 1 else bases,
        "base_model_relation": "quantized" if bases else None,
        "library_name": _library(page),
        "license": [licence.id, *licence.more] if licence.more else licence.id,
        "license_name": licence.name,
        "license_link": licence.link,
        "language": listed(card.get("language")),
        "pipeline_tag": next(iter(listed(card.get("pipeline_tag"))), _PIPELINE),
        "tags": _tags(page, listed(card.get("tags"))),
        "datasets": listed(card.get("datasets")),
        "quantized_by": page.publisher,
        "quantkit": _provenance(page),
        "model-index": model_index(page),
    }
    return {key: value for key, value in found.items() if value not in (None, [], {}, "")}


def model_index(page: Page) -> list[dict[str, Any]]:
    """One entry per variant that was measured."""
    name = page.repo.rpartition("/")[2]
    several = len(page.listed) > 1
    entries = []
    for variant, label in zip(page.listed, page.labels(), strict=True):
        results = [_result(variant, q) for q in variant.manifest.quality]
        called = (
            (variant.stem if variant.gguf and not page.siblings else f"{name} {label}") if several else name
        )
        if results:
            entries.append({"name": called, "results": results})
    return entries


def _library(page: Page) -> str:
    """What loads the files, as the Hub calls it: its button to use the model goes by that."""
    return _LIBRARIES.get(page.listed[0].manifest.format, "transformers")


# transformers refuses folders of hqq
_LIBRARIES: Mapping[str, str] = MappingProxyType({"gguf": "gguf", "hqq": "hqq"})


def _tags(page: Page, of_source: Sequence[str]) -> list[str]:
    of_content = [tag for tag in of_source if not _DERIVED.fullmatch(tag)]
    own = [tag for variant in page.listed for tag in _own_tags(variant)]
    return list(
        dict.fromkeys([*own, *of_content, *(["conversational"] if page.template is not None else [])])
    )


def _own_tags(variant: Variant) -> Iterator[str]:
    made = variant.manifest
    yield BY
    yield made.format.replace("_", "-")
    if made.calibration is not None and "imatrix" in made.calibration:
        yield "imatrix"
    if variant.gguf:
        return
    try:
        scheme = parse_scheme(made.scheme)
    except RecipeError:
        return
    yield f"{scheme.bits}-bit"
    if scheme.numbers in _TABLES:
        yield _TABLES[scheme.numbers]


def _provenance(page: Page) -> dict[str, Any]:
    """What finds and verifies our own repositories again."""
    made = [v.manifest for v in page.listed]
    found: dict[str, list[Any]] = {
        "version": [m.quantkit for m in made],
        "recipe_sha256": [_sum(m.recipe) for m in made],
        "format": [m.format for m in made],
        "bpw": [round(m.bits_per_weight, 4) for m in made],
    }
    told = {key: values for key, values in found.items() if any(value is not None for value in values)}
    out = {key: _one_or_each(values, page.labels()) for key, values in told.items()}
    return out if page.source.revision is None else {**out, "source_revision": page.source.revision}


def _sum(recipe: str) -> str | None:
    """None for a target whose codes another tool made: it has no recipe."""
    return hashlib.sha256(recipe.encode()).hexdigest() if recipe else None


def _one_or_each(values: Sequence[Any], labels: Sequence[str]) -> Any:
    """The value that all share, or each by the label of its variant."""
    return values[0] if len(set(values)) == 1 else dict(zip(labels, values, strict=True))


def _result(variant: Variant, quality: Quality) -> dict[str, Any]:
    known = Convention.of(quality.convention)
    how = f" ({known.style}-{known.context})" if known else ""
    args = {
        "convention": quality.convention,
        "windows": quality.windows,
        "tokens": quality.tokens,
        "engine": f"{BY} {variant.manifest.quantkit}",
    }
    if known:
        args = {"n_ctx": known.context, **args}
    return {
        "task": {"type": _PIPELINE},
        "dataset": _dataset(known, quality.convention),
        "metrics": [
            {
                "type": "perplexity",
                "name": f"perplexity{how}",
                "value": quality.target.value,
                "args": {**args, "standard_error": quality.target.error, "source": quality.source.value},
            },
            {
                "type": "kl_divergence",
                "name": f"mean KL divergence from the source, nats per token{how}",
                "value": quality.kl_mean,
                "args": {**args, "standard_error": quality.kl_error},
            },
            {
                "type": "top1_agreement",
                "name": f"share of tokens whose most likely one is the source's{how}",
                "value": quality.top1_agreement,
                "args": dict(args),
            },
        ],
    }


def _dataset(known: Convention | None, convention: str) -> dict[str, str]:
    if known is not None and known.text == "wikitext2":
        return {
            "type": "Salesforce/wikitext",
            "name": "WikiText-2 (raw, test)",
            "config": "wikitext-2-raw-v1",
            "split": "test",
            "revision": WIKITEXT_REVISION,
        }
    name = known.text if known is not None else convention
    # no dataset of the Hub: a type that names one would lead readers to another text
    return {"type": "local-text", "name": "embedded in quantkit" if name == "embedded" else name}
