"""`convert`: plan → sweep → evaluate → export → verify, for every target of a recipe at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.atomic import write_text
from quantkit.errors import UsageError, VerifyError
from quantkit.evaluate.quality import Quality
from quantkit.hub.manifest import Kept, Manifest, read_manifest
from quantkit.model.runtime import Runtime
from quantkit.progress import SILENT, Progress
from quantkit.recipe.dump import dump
from quantkit.recipe.plan import TargetPlan, key_of
from quantkit.recipe.spec import Recipe
from quantkit.run import budget
from quantkit.run.advance import Streams
from quantkit.run.ends import stages
from quantkit.run.engine_check import check_target
from quantkit.run.export import Exporter, free_or_ours, to_json_text
from quantkit.run.files import parameters
from quantkit.run.gguf_file import GgufFile
from quantkit.run.gguf_source import tokenizer_folder
from quantkit.run.manifest import kept_beside, kept_inside, origin, recipe_text, settings, versions
from quantkit.run.measure import measure
from quantkit.run.plan import Plan, plan
from quantkit.run.quantize import TensorMetrics
from quantkit.run.report import Report, TargetReport
from quantkit.run.rows import build_rows
from quantkit.run.store import RunStore
from quantkit.run.sweep import Sweep, SweepPlan
from quantkit.run.verify import verify_files

STORE = ".quantkit"
# Raised whenever what is measured changes, so that stores made before are measured again.
SCORES_VERSION = 2


def convert(
    recipe: Recipe,
    *,
    progress: Progress = SILENT,
    restart: bool = False,
    offline: bool = False,
    cache_dir: Path | None = None,
    stop: Event | None = None,
) -> Report:
    """Carry out a recipe and return what was made and measured.

    Running the same recipe again continues where an earlier run was killed, to identical bytes;
    `restart` does everything anew. When `stop` is set, the run ends after the next commit with
    Interrupted. Raises the errors of `quantkit.errors`; nothing half-written carries a final name.
    A broken gate does not raise, nor an engine that does not agree: the files are there, and
    `Report.broken_gates` and `Report.unsound` name it.
    """
    progress.step("plan", recipe.source)
    made = plan(recipe, offline=offline, cache_dir=cache_dir, progress=progress)
    made.check()
    for warning in (*made.warnings, *(f"{t.name}: {note}" for t in made.targets for note in t.notes)):
        progress.warn(warning)
    run = _Run(made, progress)
    store = RunStore.open(run.out / STORE, restart=restart)
    try:
        return run.carry_out(store, stop or Event())
    finally:
        store.close()


class _Run:
    """One call of `convert`: the plan, the rows and the keys that follow from them."""

    def __init__(self, made: Plan, progress: Progress) -> None:
        self._plan, self._progress = made, progress
        self._recipe = made.recipe
        self.out = Path(made.recipe.output.dir)
        self._device = budget.device(self._recipe.device.map)
        self._dtype = budget.compute_dtype(self._recipe.device.dtype, self._device)
        progress.step("calibrate", self._calibration_detail())
        self._rows = build_rows(
            self._recipe,
            tokenizer_folder(made.checkpoint),
            calibrate=made.needs_calibration and made.known is None,
            length=made.length,
        )
        self._fingerprint = made.checkpoint.fingerprint()
        self._origin = origin(made.source, made.checkpoint, made.graph, self._fingerprint)
        self._keys = {t.name: key_of(self._target_facts(t)) for t in made.targets}
        conventions = [e.convention for e, _ in self._rows.evaluation]
        measured = {**self._compute_facts(), "scores": SCORES_VERSION, "evaluation": conventions}
        seen = None if self._rows.calibration is None else self._rows.calibration.sha256
        # what a target scores depends on neither the calibration rows nor its neighbours; streams do
        self._scores_key = key_of(measured)
        self._streams_key = key_of({**measured, "calibration": seen})

    def carry_out(self, store: RunStore, stop: Event) -> Report:
        """Sweep, evaluate, export; every step is skipped when its result is there already."""
        folders = {t.name: self.out / t.name for t in self._plan.targets}
        manifest_keys = {
            t.name: key_of({"target": self._keys[t.name], "scores": self._scores_key})
            for t in self._plan.targets
        }
        whole = {
            name: free_or_ours(folders[name], self._recipe.output.on_exists, key)
            for name, key in manifest_keys.items()
        }
        finals = {t.name: store.final(self._keys[t.name], self._scores_key) for t in self._plan.targets}
        if any(found is None for found in finals.values()):
            self._sweep(store, stop)
            finals = {t.name: store.final(self._keys[t.name], self._scores_key) for t in self._plan.targets}
        exporter = Exporter(self._plan.checkpoint, self._plan.graph, store)
        reports = []
        for target in self._plan.targets:
            reports.append(self._target_report(target, store, finals[target.name]))
            if not whole[target.name]:
                self._progress.step("export", target.name)
                manifest = self._manifest(target, reports[-1], manifest_keys[target.name])
                key, files = self._keys[target.name], self._plan.files[target.name]
                exporter.export(target, key, files, folders[target.name], manifest, self._verify)
        store.drop_streams()
        if self._recipe.engine_check:
            for i, report in enumerate(reports):
                folder = folders[report.name]
                key = read_manifest(folder).files_key
                self._progress.step("verify", f"{report.name} in its engine")
                checks = check_target(folder, key, device=self._device.type, progress=self._progress)
                reports[i] = dataclasses.replace(report, checks=checks)
        finished = self._finish(tuple(reports))
        self._progress.finish()
        return finished

    def _verify(self, folder: Path) -> None:
        """VerifyError unless the files of a target are whole and have the tokens of the source."""
        found = verify_files(folder, tokens_of=self._plan.checkpoint, progress=self._progress)
        if not found.sound:
            raise VerifyError(
                "\n  ".join((f"`{folder.name}` is not sound:", *found.problems)),
                remedy="run again, and report it if it happens again",
            )

    def _sweep(self, store: RunStore, stop: Event) -> None:
        graph = self._plan.graph
        runtime = Runtime(self._plan.checkpoint, graph, dtype=self._dtype, device=self._device)
        batch_tokens = self._recipe.device.batch_tokens
        # not the width of the embedding: some models widen it before the first block
        hidden = graph.blocks[0].sites[0].width
        streams = Streams(store, hidden, self._dtype, self._device, batch_tokens)
        what = SweepPlan(
            self._plan.targets,
            self._keys,
            self._streams_key,
            self._rows.collecting,
            tuple(rows for _, rows in self._rows.evaluation),
            self._plan.estimate.statistics,
            self._plan.known,
        )
        self._progress.step(
            "sweep", f"{len(graph.blocks)} blocks, {', '.join(t.name for t in self._plan.targets)}"
        )
        sweep = Sweep(what, runtime, graph.blocks, store, streams)
        sweep.run(self._progress, stop)
        keys = list(dict.fromkeys(self._keys[t.name] for t in self._plan.targets))
        found: Mapping[str, Sequence[Quality]] = {key: [] for key in keys}
        if self._rows.evaluation:
            self._progress.step("evaluate", ", ".join(e.convention for e, _ in self._rows.evaluation))
            found = measure(runtime, streams, len(graph.blocks), self._rows.evaluation, keys, sweep.ends)
        store.commit_final(self._scores_key, {key: [q.to_json() for q in qs] for key, qs in found.items()})

    def _calibration_detail(self) -> str:
        c = self._recipe.calibration
        if not self._plan.needs_calibration:
            return "no target needs it"
        if c.imatrix is not None:
            return f"mean squares of {Path(c.imatrix).name}"
        return f"{c.rows:,} × {self._plan.length:,} tokens of {c.source}"

    def _compute_facts(self) -> dict[str, Any]:
        return {
            "source": self._fingerprint,
            "dtype": str(self._dtype),
            "device": self._device.type,
            "batch_tokens": self._recipe.device.batch_tokens,
        }

    def _target_facts(self, target: TargetPlan) -> dict[str, Any]:
        """All that can change a target's codes."""
        calibration = self._rows.calibration
        seen = calibration.sha256 if calibration is not None and target.calibrated else None
        if self._plan.known is not None and target.calibrated:
            seen = self._plan.known.sha256
        compute = self._compute_facts() if target.calibrated else {"source": self._fingerprint}
        return {**target.describe(), **compute, "calibration": seen}

    def _target_report(self, target: TargetPlan, store: RunStore, final: Any) -> TargetReport:
        key = self._keys[target.name]
        tensors = [
            TensorMetrics(**row)
            for stage in stages(target, self._plan.graph)
            for row in store.metrics(key, stage)["tensors"]
        ]
        return TargetReport(
            name=target.name,
            folder=target.name,
            method=target.target.method,
            scheme=target.default.name,
            size_bytes=self._plan.files[target.name].total_bytes,
            bits_per_weight=self._plan.bits_per_weight(target),
            tensors=tuple(tensors),
            quality=tuple(Quality.from_json(q) for q in final or ()),
        )

    def _manifest(self, target: TargetPlan, report: TargetReport, key: str) -> Manifest:
        asked = target.target
        loads, notes = target.format.engines(target.facts)
        return Manifest(
            key=key,
            quantkit=__version__,
            name=target.name,
            format=asked.format,
            scheme=report.scheme,
            method=report.method,
            size_bytes=report.size_bytes,
            bits_per_weight=report.bits_per_weight,
            fallbacks=report.fallbacks,
            source=self._origin,
            quality=report.quality,
            calibration=self._calibration_json() if target.calibrated else None,
            made={
                **settings(asked),
                "device": self._device.type,
                "dtype": str(self._dtype).removeprefix("torch."),
            },
            kept=self._kept(target),
            engines=tuple(loads),
            notes=(*target.notes, *notes),
            recipe=recipe_text(self._recipe, asked, self._plan.source),
            versions=versions(),
        )

    def _kept(self, target: TargetPlan) -> tuple[Kept, ...]:
        files = self._plan.files[target.name]
        if isinstance(files, GgufFile):
            return kept_inside(files)
        return kept_beside(target, self._plan.checkpoint, self._plan.graph)

    def _calibration_json(self) -> dict[str, Any] | None:
        """What a manifest says about what was known of inputs."""
        known = self._plan.known
        if known is not None:
            return known.to_json()
        found = self._rows.calibration_json()
        return None if found is None else {**found, "seed": self._recipe.calibration.seed}

    def _finish(self, targets: tuple[TargetReport, ...]) -> Report:
        checkpoint, graph = self._plan.checkpoint, self._plan.graph
        size = checkpoint.size_bytes
        bpw = size * 8 / parameters(checkpoint, graph)
        report = Report(
            self._plan.source.name, size, bpw, self._calibration_json(), targets, self._recipe.eval.gates
        )
        write_text(self.out / "report.json", to_json_text(report.to_json()))
        resolved = dataclasses.replace(self._recipe, source=self._plan.source.pinned)
        write_text(self.out / "recipe.resolved.yaml", dump(resolved))
        return report


def only(recipe: Recipe, chosen: Sequence[str], skipped: Sequence[str]) -> Recipe:
    """The recipe with some of its targets; UsageError for a name it does not have."""
    names = [t.name for t in recipe.targets]
    for name in (*chosen, *skipped):
        if name not in names:
            raise UsageError(f"the recipe has no target '{name}'", remedy=f"its targets: {', '.join(names)}")
    kept = tuple(t for t in recipe.targets if (not chosen or t.name in chosen) and t.name not in skipped)
    if not kept:
        raise UsageError("no target is left", remedy="check --only and --skip")
    return dataclasses.replace(recipe, targets=kept)
