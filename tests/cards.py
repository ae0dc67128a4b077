"""Manifests and pages made by hand, for tests of what is written from them."""

from __future__ import annotations

import dataclasses
from typing import Any

from quantkit.evaluate.quality import Perplexity, Quality
from quantkit.hub.card.page import PUBLIC, Page, Variant
from quantkit.hub.licences import Licence
from quantkit.hub.manifest import Check, FileSum, Kept, Manifest, Origin

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONVENTION = "wikitext2/llamacpp-512@9c3e5a10"
PARAMETERS = 1_235_814_400
LICENCE = Licence("apache-2.0", None, None, ("org/Tiny-1B-Instruct",), False, (), (), ())
# scheme, bits per weight, mean KL, same top-1
GGUF = (
    ("q3_k_m", 4.00, 0.0731, 0.8912),
    ("q4_k_m", 4.89, 0.0214, 0.9377),
    ("q5_k_m", 5.70, 0.00712, 0.9641),
    ("q6_k", 6.56, 0.00203, 0.9803),
    ("q8_0", 8.50, 0.000412, 0.9911),
)
RECIPE = """\
quantkit: 1
source: org/Tiny-1B-Instruct@0123456789abcdef0123456789abcdef01234567
targets:
- format: gguf
  scheme: q4_k_m
  method:
    gptq: {damp: 0.01, scales: weighted, act_order: group_aware, polish: 2, refit: 2}
  feedback: false
  name: gguf-q4_k_m
output: {dir: out, on_exists: resume}
calibration: {set: wikitext103, rows: 256, length: 2048, seed: 7, template: raw}
eval:
  enabled: true
  perplexity:
  - {data: wikitext2, style: llamacpp, context: 512}
"""


def origin(**changes: Any) -> Origin:
    """A model of the Hub with a billion parameters."""
    found = Origin(
        id="org/Tiny-1B-Instruct",
        revision=REVISION,
        fingerprint="97288da87d96a7eeeb5087efc128cf5df5ee848e2a6d68ac0b66fac9f74bc98b",
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=PARAMETERS,
        size_bytes=2 * PARAMETERS,
        bits_per_weight=16.0,
        dtype="bfloat16",
        context=131072,
        cache_bytes=32768,
        quantized=None,
        card={
            "license": "apache-2.0",
            "language": ["en", "no"],
            "pipeline_tag": "text-generation",
            "tags": ["chat", "transformers", "arxiv:2407.21783", "region:us"],
            "datasets": ["org/training-text"],
        },
    )
    return dataclasses.replace(found, **changes)


def quality(kl: float = 0.0214, top1: float = 0.9377, **changes: Any) -> Quality:
    """A target whose perplexity grows with its KL divergence."""
    found = Quality(
        convention=CONVENTION,
        windows=565,
        tokens=144_075,
        source=Perplexity(13.1627, 0.0947),
        target=Perplexity(13.1627 * (1 + kl), 0.0961),
        ratio=Perplexity(1 + kl, 0.0011),
        kl_mean=kl,
        kl_error=kl / 80,
        kl_median=kl / 3,
        kl_p99=kl * 8,
        kl_p999=kl * 23,
        kl_max=kl * 200,
        top1_agreement=top1,
    )
    return dataclasses.replace(found, **changes)


def check(**changes: Any) -> Check:
    """llama.cpp agrees."""
    found = Check("llama.cpp", "0.3.36", "cpu", None, 2048, 0.000137, 0.9951, 1_534_210_048)
    return dataclasses.replace(found, **changes)


def manifest(**changes: Any) -> Manifest:
    """`gguf:q4_k_m`, measured; `source` may be given as a mapping of changes."""
    size = 778_000_000
    found = Manifest(
        key="643c06a389d26f32",
        quantkit="0.1.0",
        name="gguf-q4_k_m",
        format="gguf",
        scheme="q4_k_m",
        method="gptq",
        size_bytes=size,
        bits_per_weight=4.89,
        fallbacks=0,
        source=origin(),
        quality=(quality(),),
        calibration={
            "rows": 256,
            "length": 2048,
            "sha256": "9e20f6b48d9d8316bef2f93c9a638914a07aded3f12908497154d0959b3305bc",
            "sources": [
                {
                    "name": "Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3:"
                    "wikitext-103-raw-v1/train",
                    "rows": 256,
                    "licence": "CC BY-SA 3.0",
                }
            ],
        },
        made={
            "options": {"damp": 0.01, "scales": "weighted", "act_order": "group_aware", "plain": False},
            "feedback": False,
            "transforms": [],
            "kv_cache": None,
        },
        kept=(Kept("blk.*.attn_norm", 16, 32768, "F32"), Kept("blk.*.ffn_norm", 16, 32768, "F32")),
        engines=("llama.cpp", "Ollama", "LM Studio"),
        notes=(),
        recipe=RECIPE,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        files={"Tiny-1B-Instruct-Q4_K_M.gguf": FileSum(size, "64de" * 16)},
    )
    if isinstance(changes.get("source"), dict):
        changes["source"] = origin(**changes["source"])
    return dataclasses.replace(found, **changes)


def variant(made: Manifest | None = None, **changes: Any) -> Variant:
    """`made` with its files in the root of the repository."""
    made = made or manifest()
    weights = tuple(name for name in made.files if name.endswith((".gguf", ".safetensors")))
    return dataclasses.replace(Variant(made, (check(),), weights, None), **changes)


def gguf(scheme: str, bits: float, kl: float | None = None, top1: float = 0.9, **changes: Any) -> Variant:
    """A GGUF file of `bits` per weight; `kl` None: not measured."""
    size = int(PARAMETERS * bits / 8)
    name = f"Tiny-1B-Instruct-{scheme.upper()}.gguf"
    made = manifest(
        name=f"gguf-{scheme}",
        scheme=scheme,
        size_bytes=size,
        bits_per_weight=bits,
        quality=() if kl is None else (quality(kl, top1),),
        files={name: FileSum(size, f"{size:064x}")},
        recipe=RECIPE.replace("q4_k_m", scheme),
        **changes,
    )
    return variant(made, checks=(check(peak_bytes=size + 600_000_000, kl_mean=0.000137),))


def gptq(**changes: Any) -> Variant:
    """`gptq:w4g128` in two shards."""
    shard = 420_000_000
    files = {f"model-0000{n}-of-00002.safetensors": FileSum(shard, f"{n:064x}") for n in (1, 2)}
    return variant(
        manifest(
            name="gptq-w4g128",
            format="gptq",
            scheme="w4g128",
            size_bytes=2 * shard,
            bits_per_weight=5.44,
            engines=("transformers+gptqmodel", "gptqmodel", "vLLM", "SGLang", "ExLlamaV2"),
            notes=("transformers ignores per-weight bits and group sizes; gptqmodel and vLLM read them",),
            kept=(
                Kept("model.embed_tokens.weight", 1, 262_668_288, "bfloat16"),
                Kept("model.layers.*.input_layernorm.weight", 16, 32768, "bfloat16"),
                Kept("model.norm.weight", 1, 2048, "bfloat16"),
            ),
            files=files,
            **changes,
        ),
        checks=(check(engine="transformers+gptqmodel", version="5.23.0", peak_bytes=1_980_000_000),),
    )


def page(*variants: Variant, **changes: Any) -> Page:
    """Their card in the main branch; without any that of one measured GGUF file."""
    found = {
        "repo": "alice/Tiny-1B-Instruct-GGUF",
        "endpoint": PUBLIC,
        "variants": variants or (variant(),),
        "publisher": "alice",
        "licence": LICENCE,
        **changes,
    }
    return Page(**found)
