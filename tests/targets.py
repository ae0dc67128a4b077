"""Folders of targets as `quantkit convert` leaves them, tiny, with a manifest and no model behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quantkit.hub.manifest import CHECKS, MANIFEST, Check, FileSum, Manifest, Origin, checks_json

ORIGIN = Origin(
    id="org/tiny",
    revision="0123456789abcdef0123456789abcdef01234567",
    fingerprint="f" * 16,
    architecture="LlamaForCausalLM",
    model_type="llama",
    parameters=1000,
    size_bytes=2000,
    bits_per_weight=16.0,
    dtype="bfloat16",
    context=2048,
    cache_bytes=64,
    quantized=None,
    card={"license": "apache-2.0"},
)


def manifest(
    name: str, format: str, scheme: str, files: Mapping[str, bytes] | None = None, *, bits: float = 4.25
) -> Manifest:
    """What says that `files` are a target."""
    sums = {n: FileSum(len(c), hashlib.sha256(c).hexdigest()) for n, c in (files or {}).items()}
    return Manifest(
        key=f"key-{name}",
        quantkit="0.1",
        name=name,
        format=format,
        scheme=scheme,
        method="gptq",
        size_bytes=sum(told.bytes for told in sums.values()),
        bits_per_weight=bits,
        fallbacks=0,
        source=ORIGIN,
        quality=(),
        calibration={"rows": 4, "length": 8, "sha256": "c" * 64, "sources": []},
        made={},
        kept=(),
        engines=(),
        notes=(),
        recipe=f"source: org/tiny\ntargets: [{format}:{scheme}]\n",
        versions={"torch": "2.0"},
        files=sums,
    )


def target(
    root: Path,
    name: str,
    format: str,
    scheme: str,
    files: Mapping[str, bytes],
    *,
    bits: float = 4.25,
    problem: str | None = None,
) -> tuple[Path, Manifest]:
    """The folder of a target and its manifest."""
    folder = root / name
    folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / path).write_bytes(content)
    made = manifest(name, format, scheme, files, bits=bits)
    (folder / MANIFEST).write_text(json.dumps(made.to_json(), indent=2) + "\n")
    (folder / "README.md").write_text("A card for this folder alone.\n")
    checks = (Check("llama.cpp", "1", "cpu", problem, tokens=8, kl_mean=0.0, top1_agreement=1.0),)
    (folder / CHECKS).write_text(json.dumps(checks_json(made.files_key, checks)))
    return folder, made


def gguf(root: Path, kind: str, content: bytes = b"", **more: bytes) -> tuple[Path, Manifest]:
    """A target with one GGUF file and a licence."""
    files = {f"Tiny-{kind.upper()}.gguf": content or b"GGUF\0" + kind.encode() * 20, "LICENSE": b"Apache"}
    return target(root, f"gguf-{kind}", "gguf", kind, {**files, **more})


def gptq(root: Path, name: str = "gptq-w4g128", *, shards: int = 2) -> tuple[Path, Manifest]:
    """A target of safetensors with settings and a tokenizer."""
    files = {
        f"model-{i:05d}-of-{shards:05d}.safetensors": b"\0tensor %d" % i * 30 for i in range(1, shards + 1)
    }
    files |= {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "LICENSE": b"Apache"}
    return target(root, name, "gptq", "w4g128", files)


def changed(folder: Path, made: Manifest, name: str, content: bytes) -> Manifest:
    """The target made anew with another content of one file."""
    (folder / name).write_bytes(content)
    sums = {**made.files, name: FileSum(len(content), hashlib.sha256(content).hexdigest())}
    again = replace(made, files=sums)
    (folder / MANIFEST).write_text(json.dumps(again.to_json()))
    return again
