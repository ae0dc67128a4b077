"""`export`: a quantized checkpoint in another format. Codes and scales move, nothing is rounded.

Everything is checked before a byte is written. Afterwards every weight is read back from the new files,
multiplied out and compared with the old one, bit for bit; only then does the folder get its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.folder import CONFIG
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError, UnsupportedError, UsageError
from quantkit.hub.fetch import Source
from quantkit.hub.manifest import Manifest, find_manifest, read_manifest
from quantkit.model.build import build_graph
from quantkit.model.graph import ModelGraph
from quantkit.progress import SILENT, Progress
from quantkit.recipe.plan import key_of
from quantkit.recipe.plugins import format_info
from quantkit.recipe.sizes import format_size
from quantkit.run.export import building, free_or_ours, write_manifest
from quantkit.run.files import parameters
from quantkit.run.folder import PackedFolder
from quantkit.run.gguf import Moved, block_type
from quantkit.run.manifest import origin, versions
from quantkit.run.proof import Made, Proof, prove
from quantkit.run.quantized import Dequantized, QuantizedCheckpoint, dequantized, open_quantized
from quantkit.run.streams import sha256_file
from quantkit.run.survey import Found, schemes_for, survey
from quantkit.table import Table

GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class Repacked:
    """What `repack` made. `moved` counts weights by (scheme before, scheme after)."""

    source: str
    target: str
    folder: Path
    size_bytes: int
    proof: Proof
    moved: tuple[tuple[str, str, int], ...]
    left_out: Mapping[str, str]
    loads: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "target": self.target,
            "folder": self.folder.name,
            "size_bytes": self.size_bytes,
            "lossless": True,
            "proof": asdict(self.proof),
            "moved": [{"from": a, "to": b, "weights": n} for a, b, n in self.moved],
            "left_out": dict(self.left_out),
            "loads": list(self.loads),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], folder: Path) -> Repacked:
        """Inverse of `to_json`."""
        return cls(
            source=found["source"],
            target=found["target"],
            folder=folder,
            size_bytes=found["size_bytes"],
            proof=Proof(**found["proof"]),
            moved=tuple((m["from"], m["to"], m["weights"]) for m in found["moved"]),
            left_out=found["left_out"],
            loads=tuple(found["loads"]),
            notes=tuple(found["notes"]),
        )

    def table(self) -> Table:
        p = self.proof
        notes = [
            f"written to `{self.folder}`",
            f"lossless: {p.weights:,} weights, {p.codes:,} codes: dequantized values identical in every bit",
            f"sha256 of the values before {p.before}",
            f"sha256 of the values after  {p.after}",
            f"{p.copied:,} other tensors carried over unchanged",
        ]
        if self.left_out:
            reasons = Counter(self.left_out.values())
            notes.append("left out: " + ", ".join(f"{n:,} × {why}" for why, n in reasons.items()))
        if self.loads:
            notes.append(f"loads in {', '.join(self.loads)}")
        rows = tuple((f"{n:,}", before, after) for before, after, n in self.moved)
        title = f"{self.source} → {self.target} · {format_size(self.size_bytes)}"
        return Table(title, ("weights", "from", "to"), rows, (*notes, *self.notes))


def repack(
    source: Path,
    to: str,
    output: Path | None = None,
    *,
    on_exists: str = "resume",
    name: str | None = None,
    progress: Progress = SILENT,
) -> Repacked:
    """Store the quantized checkpoint `source` as `to`: ``FORMAT[:SCHEME]`` or ``gguf:q4_0`` and the like.

    Without `output` the result lies beside the source. `name` is what the source is called, where that is not
    its folder's name. UsageError when the source is not quantized,
    UnsupportedError with the reasons when a value would change, VerifyError when one did.
    """
    checkpoint = Checkpoint.open(source.parent if source.suffix == ".gguf" else source)
    quantized = open_quantized(checkpoint)
    if quantized is None:
        raise UsageError(
            f"`{name or source}` is not quantized: there are no codes to move",
            remedy=f"quantize it: quantkit convert {name or source} --to {to}",
        )
    _check_inputs(quantized)
    progress.step("plan", f"{name or source.name} → {to}")
    view = dequantized(quantized)
    graph = build_graph(view)
    found = survey(quantized, graph)
    made = _plan(to, quantized, view, graph, found)
    folder = output if output is not None else _beside(source, to)
    key = key_of({"repack": made.name, "source": view.fingerprint(), "quantkit": __version__})
    if free_or_ours(folder, on_exists, key):
        return Repacked.from_json(read_manifest(folder).repacked or {}, folder)
    with building(folder, made.size_bytes) as partial:
        progress.step("export", made.name)
        made.write(partial)
        progress.step("verify", made.name)
        proof = prove(quantized, view, graph, made.values(partial))
        called = name or source.resolve().name
        result = _result(called, folder, view, found, made, proof)
        write_manifest(partial, _manifest(view, graph, made, result, key, progress))
    progress.finish()
    return result


def _plan(
    to: str, source: QuantizedCheckpoint, view: Dequantized, graph: ModelGraph, found: Sequence[Found]
) -> Made:
    """What will be made; everything that stands in the way is raised here, before anything is written."""
    wanted, _, preset = to.strip().lower().partition(":")
    known = find_manifest(view.path)
    if wanted == GGUF:
        title = (view.path.resolve().name if known is None else known.source.id).rpartition("/")[2]
        return Moved.plan(source, view, graph, block_type(preset or "q4_0"), title)
    try:
        info = format_info(wanted)
    except RecipeError as error:
        raise RecipeError(error.message, remedy=error.remedy) from None
    schemes = schemes_for(source, found, info.name, view.dtype, info.parse(preset) if preset else None)
    method, act_order = "unknown" if known is None else known.method, any(f.column_groups for f in found)
    return PackedFolder.plan(info.name, source, view, graph, schemes, method=method, act_order=act_order)


def _result(
    source: str, folder: Path, view: Dequantized, found: Sequence[Found], made: Made, proof: Proof
) -> Repacked:
    moved = Counter((f.name, made.scheme_name(f.weight.key)) for f in found)
    loads, notes = made.engines()
    return Repacked(
        source=source,
        target=made.name,
        folder=folder,
        size_bytes=made.size_bytes,
        proof=proof,
        moved=tuple((before, after, n) for (before, after), n in moved.items()),
        left_out=view.dropped,
        loads=loads,
        notes=notes,
    )


def _check_inputs(source: QuantizedCheckpoint) -> None:
    """What is rounded while the model runs cannot be moved."""
    groups: Mapping[str, Any] = source.config.get("config_groups") or {}
    if any(group.get("input_activations") for group in groups.values()):
        raise UnsupportedError(
            "the model rounds the inputs of its weights while it runs (input_activations), which only "
            "compressed_tensors can say",
            remedy="convert the original checkpoint to a weight-only scheme",
        )
    if source.config.get("kv_cache_scheme"):
        raise UnsupportedError(
            "the checkpoint holds scales of a key-value cache, which export does not carry over",
            remedy="convert the original checkpoint with kv_cache",
        )


def _beside(source: Path, to: str) -> Path:
    """Where a result lies by default: `out/gptq-w4g128` gives `out/gptq-w4g128-awq`."""
    path = source.resolve()
    return path.with_name(f"{path.name}-{to.strip().lower().replace(':', '-')}")


def _manifest(
    view: Dequantized, graph: ModelGraph, made: Made, result: Repacked, key: str, progress: Progress
) -> Manifest:
    """That of the source where there is one: the values are the same, so is what was measured of them."""
    bits = made.size_bytes * 8 / parameters(view, graph)
    known = find_manifest(view.path)
    if known is None:
        source = Source(view.path, None, None, str(view.path))
        known = Manifest(
            key=key,
            quantkit=__version__,
            name=result.target,
            format="",
            scheme="",
            method="unknown",
            size_bytes=0,
            bits_per_weight=0,
            fallbacks=0,
            source=origin(source, view, graph, view.fingerprint()),
            quality=(),
            calibration=None,
            made={"options": {}, "feedback": False, "transforms": [], "kv_cache": None, "mix": {}},
            kept=(),
            engines=(),
            notes=(),
            recipe="",
            versions=versions(),
        )
    elif known.quality and not _as_measured(view.path, known):
        progress.warn(f"what was measured is left out: the files of `{view.path}` changed since")
        known = replace(known, quality=())
    return replace(
        known,
        key=key,
        quantkit=__version__,
        name=result.target,
        format=result.target.partition("-")[0],
        scheme=result.target.partition("-")[2],
        size_bytes=made.size_bytes,
        bits_per_weight=bits,
        kept=made.kept(),
        engines=result.loads,
        notes=result.notes,
        repacked=result.to_json(),
    )


def _as_measured(folder: Path, known: Manifest) -> bool:
    """Whether weights and configuration are those that the manifest was written for."""
    told = {n: s for n, s in known.files.items() if n == CONFIG or n.endswith(".safetensors")}
    return all((folder / n).is_file() and sha256_file(folder / n) == s.sha256 for n, s in told.items())
