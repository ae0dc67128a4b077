"""What the real engine makes of the files: whether it loads them, and computes what quantkit reads there.

Both run the same tokens, and their next-token probabilities are compared:

    KL(P ‖ Q), p from quantkit's own reading of the files, q from the engine, mean over positions

Where both only round differently it is small. On the embedded model and one of 7 M weights it is below 1e-6
for GPTQ, AWQ, HQQ and symmetric compressed-tensors, at most 4e-5 for bitsandbytes' 4 bits on a processor that
computes in bfloat16, and 2e-4 to 1.2e-3 wherever inputs are rounded to 8 bits a little differently: LLM.int8,
and every quantized type of llama.cpp, coarse or fine. One matrix of 28 read with the wrong groups or zero
points gives 0.02, all of them 4 and more. LIMIT lies between.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantkit import resources
from quantkit.calibrate.documents import read_text
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.checkpoint.atomic import write_text
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NumericsError, SourceError, UnsupportedError
from quantkit.evaluate.engines import Answer, Request, ask
from quantkit.evaluate.scores import beside_source
from quantkit.hub.manifest import CHECKS, Check, checks_json, read_checks
from quantkit.model.build import build_graph
from quantkit.model.runtime import Runtime
from quantkit.progress import SILENT, Progress
from quantkit.run import budget
from quantkit.run.engine_choice import Chosen, choose
from quantkit.run.export import to_json_text
from quantkit.run.gguf_source import find_gguf, tokenizer_folder
from quantkit.run.inputs import Runs, runs_of
from quantkit.run.quantized import Dequantized, open_source

LIMIT = 0.01  # nats per token
TOKENS = 128
# a language has words of one character at least
_CHARACTERS = 40 * TOKENS
# seconds that an engine may take: to start, and for every byte of the files
_START, _PER_BYTE = 300.0, 5e-8


@dataclass(frozen=True, slots=True)
class Looked:
    """What engines made of the files, and what was not looked at, with the reason."""

    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def check_engine(path: Path, *, device: str = "cpu", progress: Progress = SILENT) -> Looked:
    """Load a folder or a GGUF file in the engine it is for, and compare what both compute.

    An engine that fails or crashes is a check with a problem. One that takes too long, or more memory than
    there is, says nothing about the files: that is a note, as is whatever cannot be looked at. UsageError
    for a device that is not there.
    """
    on = budget.device(device)
    try:
        checkpoint = open_source(path)
    except (SourceError, UnsupportedError) as error:
        return Looked(notes=(f"no engine was run: {error.message}",))
    chosen = choose(checkpoint, on)
    if isinstance(chosen, str):
        return Looked(notes=(chosen,))
    ids = _ids(checkpoint)
    if ids is None:
        return Looked(notes=(f"{chosen.fit.name} was not run: the files do not say which tokens there are",))
    return _look(path, checkpoint, chosen, ids, progress)


def _look(path: Path, checkpoint: Checkpoint, chosen: Chosen, ids: Tensor, progress: Progress) -> Looked:
    """Run what was chosen."""
    name, notes, own = chosen.fit.name, [], None
    progress.step("verify", f"{ids.numel():,} tokens in {name}")
    try:
        own = own_logits(checkpoint, ids, chosen.device)
    except (UnsupportedError, NumericsError) as error:
        notes.append(f"{name} was run and nothing compared with it: {error.message}")
    budget.release_memory()
    file = find_gguf(path)
    request = Request(
        chosen.fit.engine,
        str((path if file is None else file).absolute()),
        tuple(ids.tolist()),
        str(chosen.device),
        torch.get_num_threads(),
        chosen.dtype,
        _START + _PER_BYTE * checkpoint.size_bytes,
    )
    answer, found = ask(request)
    if answer.stage == "starting":
        return Looked(notes=(*notes, f"{name} does not start here: {answer.problem}"))
    if answer.starved or answer.late:
        return Looked(notes=(*notes, f"not run in {name} to the end: {answer.problem}"))
    return Looked((_judged(chosen, answer, found, own),), tuple(notes))


def check_target(
    folder: Path, key: str, *, device: str = "cpu", progress: Progress = SILENT
) -> tuple[Check, ...]:
    """What `checks.json` in `folder` says of files with this `files_key`; else new checks, kept there.

    What is not looked at is told to `progress`, and looked for again the next time, as is what was not sound:
    the engine may be another by then. RunError when the disk refuses.
    """
    try:
        known = read_checks(folder, key)
    except SourceError:
        known = None
    if known is not None and all(check.problem is None for check in known):
        return known
    looked = check_engine(folder, device=device, progress=progress)
    for note in looked.notes:
        progress.warn(f"{folder.name}: {note}")
    if looked.checks:
        write_text(folder / CHECKS, to_json_text(checks_json(key, looked.checks)))
    return looked.checks


def own_logits(checkpoint: Checkpoint, ids: Tensor, device: torch.device) -> Tensor:
    """(tokens, vocabulary) fp32 that quantkit computes from the files, one block in memory at a time.

    UnsupportedError for what cannot be emulated, NumericsError for tensors that are not finite.
    """
    runs = runs_of(checkpoint.quantized) if isinstance(checkpoint, Dequantized) else Runs()
    graph = build_graph(checkpoint)
    runtime = Runtime(checkpoint, graph, dtype=torch.float32, device=device)
    states = runtime.embed(ids[None])
    runtime.release_embed()
    for block in graph.blocks:
        loaded = runtime.load(block.index)
        states = loaded.run(states, rounding=runs.roundings_of(block), cache=runs.cache_of(block))
    return runtime.logits(states)[0].float().cpu()


def _ids(checkpoint: Checkpoint) -> Tensor | None:
    """Tokens of a text that ships with quantkit, random ones where the model has no tokenizer that loads.

    None when it cannot be told which tokens there are.
    """
    config = checkpoint.config
    vocabulary, longest = config.get("vocab_size"), config.get("max_position_embeddings")
    count = min(TOKENS, longest) if isinstance(longest, int) and longest > 0 else TOKENS
    try:
        tokenizer = load_tokenizer(tokenizer_folder(checkpoint))
        text = read_text(resources.folder("calibration") / "embedded-eval.txt", _CHARACTERS)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:count], dtype=torch.int64)
        if ids.numel() and (not isinstance(vocabulary, int) or int(ids.max()) < vocabulary):
            return ids
    except (SourceError, UnsupportedError):
        pass
    if not isinstance(vocabulary, int) or vocabulary <= 0:
        return None
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def _judged(
    chosen: Chosen, answer: Answer, found: npt.NDArray[np.float32] | None, own: Tensor | None
) -> Check:
    def check(problem: str | None, **measured: float | int | None) -> Check:
        return Check(
            chosen.fit.name,
            answer.version,
            chosen.device.type,
            problem,
            tokens=0 if found is None else found.shape[0],
            peak_bytes=answer.peak_bytes,
            kl_mean=measured.get("kl"),
            top1_agreement=measured.get("top1"),
        )

    if found is None:
        return check(answer.problem)
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        return check(f"its logits are not finite from token {place:,} on")
    if own is None:
        return check(None)
    if found.shape != own.shape:
        return check(f"it predicts {found.shape[1]:,} tokens, the files have {own.shape[1]:,}")
    theirs = torch.from_numpy(found)
    _, kl, agrees = beside_source(own, theirs, torch.zeros(len(own), dtype=torch.int64))
    mean, top1 = float(kl.double().mean()), float(agrees.double().mean())
    if mean <= LIMIT:
        return check(None, kl=mean, top1=top1)
    problem = (
        f"it computes something else than the files say: KL {mean:.3g} nats per token (at most {LIMIT:g} is "
        f"rounding), {top1:.0%} of the most likely tokens alike; it reads them otherwise, or its weights are "
        "damaged"
    )
    return check(problem, kl=mean, top1=top1)
