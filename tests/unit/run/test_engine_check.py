"""What engines make of files: fakes that fail in every way, and Transformers on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UsageError
from quantkit.evaluate.engines import Answer, Request
from quantkit.hub.manifest import Check, read_checks
from quantkit.progress import Silent
from quantkit.run import budget, engine_check, engine_choice
from quantkit.run.engine_check import TOKENS, check_engine, check_target, own_logits
from quantkit.run.quantized import open_source
from tests.gguf_files import byte_tokenizer, write_gguf
from tests.models import save_tiny, tiny_model

needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None or find_spec("accelerate") is None,
    reason="needs quantkit[compressed-tensors]",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits of a tiny random model hardly differ: its head is made large, so that wrong weights show."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("model") / "source", vocab_size=420)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 8
    save_file(tensors, file, {"format": "pt"})
    return byte_tokenizer(folder)


@dataclass
class Fake:
    """Answers in place of an engine: with what it was given, or with quantkit's own logits."""

    answer: Answer = field(default_factory=lambda: Answer("done", "9.9", peak_bytes=123))
    logits: Any = None
    requests: list[Request] = field(default_factory=list)

    def ask(self, request: Request) -> tuple[Answer, Any]:
        self.requests.append(request)
        if self.answer.stage != "done":
            return self.answer, None
        if self.logits is not None:
            return self.answer, self.logits
        own = own_logits(open_source(Path(request.path)), torch.tensor(request.ids), torch.device("cpu"))
        return self.answer, own.numpy()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(engine_check, "ask", made.ask)
    return made


class Told(Silent):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_an_engine_that_agrees(fake: Fake, source: Path) -> None:
    looked = check_engine(source)
    assert looked.notes == ()
    (check,) = looked.checks
    expected = Check("transformers", "9.9", "cpu", None, TOKENS, 0.0, 1.0, 123)
    assert replace(check, kl_mean=round(check.kl_mean or 0.0, 6)) == expected
    (request,) = fake.requests
    assert (
        request.engine == "transformers" and request.dtype == "float32" and Path(request.path).is_absolute()
    )
    assert len(set(request.ids)) > 20 and max(request.ids) < 420, "tokens of a text"


def test_a_model_without_a_tokenizer_gets_random_tokens(fake: Fake, tmp_path: Path) -> None:
    check_engine(save_tiny("llama", tmp_path / "bare"))
    check_engine(save_tiny("llama", tmp_path / "again"))
    first, second = (request.ids for request in fake.requests)
    assert first == second and len(set(first)) > 60 and max(first) < 160


def test_other_logits_are_a_problem(fake: Fake, source: Path) -> None:
    fake.logits = np.random.default_rng(1).normal(size=(TOKENS, 420)).astype(np.float32)
    (check,) = check_engine(source).checks
    assert check.problem is not None and "computes something else than the files say: KL" in check.problem
    assert check.kl_mean is not None and check.kl_mean > 0.01 and check.top1_agreement is not None


def test_logits_that_are_not_finite(fake: Fake, source: Path) -> None:
    fake.logits = np.zeros((TOKENS, 420), dtype=np.float32)
    fake.logits[7:, 3] = np.nan
    (check,) = check_engine(source).checks
    assert check.problem == "its logits are not finite from token 7 on" and check.kl_mean is None


def test_another_vocabulary(fake: Fake, source: Path) -> None:
    fake.logits = np.zeros((TOKENS, 421), dtype=np.float32)
    (check,) = check_engine(source).checks
    assert check.problem == "it predicts 421 tokens, the files have 420"


def test_an_engine_that_fails(fake: Fake, source: Path) -> None:
    fake.answer = Answer("loading", "9.9", problem="it crashed (SIGSEGV)")
    (check,) = check_engine(source).checks
    assert check == Check("transformers", "9.9", "cpu", "it crashed (SIGSEGV)")


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (Answer("starting", problem="ImportError: no"), "transformers does not start here: ImportError: no"),
        (Answer("loading", problem="killed", starved=True), "not run in transformers to the end: killed"),
    ],
)
def test_what_says_nothing_about_the_files_is_a_note(
    answer: Answer, note: str, fake: Fake, source: Path
) -> None:
    fake.answer = answer
    looked = check_engine(source)
    assert looked.checks == () and looked.notes == (note,)


def test_what_cannot_be_emulated_is_run_and_not_compared(
    fake: Fake, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.logits = np.zeros((TOKENS, 420), dtype=np.float32)

    def refuse(*_: Any) -> Any:
        raise engine_check.UnsupportedError("its inputs are rounded to 4 bits")

    monkeypatch.setattr(engine_check, "own_logits", refuse)
    looked = check_engine(source)
    assert looked.checks == (Check("transformers", "9.9", "cpu", None, TOKENS, peak_bytes=123),)
    assert looked.notes == (
        "transformers was run and nothing compared with it: its inputs are rounded to 4 bits",
    )


def test_a_model_that_is_too_large(fake: Fake, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Checkpoint.open(source).size_bytes
    monkeypatch.setattr(engine_choice, "_BESIDE", 0)
    monkeypatch.setattr(budget, "available", lambda on: size)
    check_engine(source)
    monkeypatch.setattr(budget, "available", lambda on: size - 1)
    looked = check_engine(source)
    assert len(fake.requests) == 1 and looked.checks == ()
    assert looked.notes[0].startswith("transformers was not run: it takes about ")


def test_floats_stay_as_they_are_stored_where_memory_is_short(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "half"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    size = Checkpoint.open(folder).size_bytes
    monkeypatch.setattr(engine_choice, "_BESIDE", 0)
    for free, dtype in ((2 * size, "float32"), (2 * size - 1, "stored")):
        monkeypatch.setattr(budget, "available", lambda on, free=free: free)
        check_engine(folder)
        assert fake.requests[-1].dtype == dtype


def test_a_device_that_is_not_there(source: Path) -> None:
    with pytest.raises(UsageError, match="cuda:31"):
        check_engine(source, device="cuda:31")


# ------------------------------------------------------------------------------- which engine, which packages
@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of several formats."""
    out = tmp_path_factory.mktemp("made")
    targets = (
        *("gptq:w4g32@method=rtn,name=gptq", "awq:w4g32@method=rtn,name=awq", "hqq:w4g32@name=hqq"),
        *("bitsandbytes:nf4g32@method=rtn,name=nf4", "compressed_tensors:w4g32@method=rtn,name=packed"),
    )
    asked = quantkit.Recipe(
        source=str(source),
        targets=tuple(t for text in targets for t in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        eval=quantkit.Eval(enabled=False),
        engine_check=False,
    )
    quantkit.convert(asked)
    return out


@pytest.mark.parametrize(
    ("name", "engine", "module", "label", "install"),
    [
        ("gptq", "transformers", "gptqmodel", "transformers+gptqmodel", "quantkit[gptq]"),
        ("awq", "transformers", "gptqmodel", "transformers+gptqmodel", "quantkit[awq]"),
        ("nf4", "transformers", "bitsandbytes", "transformers", "quantkit[bitsandbytes]"),
        ("packed", "transformers", "compressed_tensors", "transformers", "quantkit[compressed-tensors]"),
        ("hqq", "hqq", "hqq", "hqq", "quantkit[hqq]"),
    ],
)
def test_the_engine_of_a_format(
    name: str,
    engine: str,
    module: str,
    label: str,
    install: str,
    fake: Fake,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: object())
    (check,) = check_engine(made / name).checks
    assert check.engine == label and check.problem is None and fake.requests[0].engine == engine
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None if name == module else object())
    looked = check_engine(made / name)
    assert looked.checks == () and len(fake.requests) == 1
    assert looked.notes == (f"{label} was not run: it needs {module}; pip install '{install}'",)


def test_gguf_files_are_for_llama_cpp(
    fake: Fake, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: object())
    file = write_gguf(source, tmp_path / "x.gguf", "q8_0")
    for path in (file, tmp_path):
        (check,) = check_engine(path).checks
        assert check.engine == "llama.cpp" and check.problem is None
        assert fake.requests[-1].engine == "llamacpp" and fake.requests[-1].path == str(file)
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    (note,) = check_engine(file).notes
    assert note == "llama.cpp was not run: it needs llama_cpp; pip install 'llama-cpp-python'"


@pytest.mark.parametrize(
    ("engines", "note"),
    [
        (["gptqmodel", "vLLM"], None),
        (["vLLM"], "as quantkit.json says; vLLM can"),
        ([], "as quantkit.json says; no engine is known that can"),
    ],
)
def test_engines_that_the_manifest_leaves_out_are_not_tried(
    engines: Sequence[str],
    note: str | None,
    fake: Fake,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: object())
    folder = shutil.copytree(made / "gptq", tmp_path / "gptq")
    manifest = json.loads((folder / "quantkit.json").read_text())
    (folder / "quantkit.json").write_text(json.dumps({**manifest, "engines": engines}))
    looked = check_engine(folder)
    if note is None:
        assert fake.requests[0].engine == "gptqmodel" and looked.checks[0].engine == "gptqmodel"
    else:
        assert looked.notes[0].endswith(note) and not fake.requests


def test_a_config_that_engines_do_not_look_for(fake: Fake, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "gptq", tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "they look for the quantization in config.json" in check_engine(folder).notes[0]


# ------------------------------------------------------------------------------------------------ checks.json
def test_checks_are_made_once(fake: Fake, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "target")
    first = check_target(folder, "key")
    assert len(first) == 1 and read_checks(folder, "key") == first
    assert check_target(folder, "key") == first and len(fake.requests) == 1
    assert check_target(folder, "another") == first and len(fake.requests) == 2
    assert read_checks(folder, "key") is None
    (folder / "checks.json").write_text("{}")
    assert check_target(folder, "another") == first and len(fake.requests) == 3


def test_what_was_not_looked_at_is_told_and_not_kept(
    fake: Fake, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    folder, told = shutil.copytree(made / "hqq", tmp_path / "hqq"), Told()
    assert check_target(folder, "key", progress=told) == ()
    assert told.warnings == ["hqq: hqq was not run: it needs hqq and accelerate; pip install 'quantkit[hqq]'"]
    assert not (folder / "checks.json").exists()


def test_an_engine_that_is_too_slow_here_says_nothing_about_the_files(
    fake: Fake, source: Path, tmp_path: Path
) -> None:
    fake.answer = Answer("loading", "9.9", "it gave no answer within 300 s", late=True)
    folder, told = shutil.copytree(source, tmp_path / "target"), Told()
    assert check_target(folder, "key", progress=told) == ()
    (said,) = told.warnings
    assert said.endswith("not run in transformers to the end: it gave no answer within 300 s")
    assert not (folder / "checks.json").exists()


def test_what_was_not_sound_is_looked_at_again(fake: Fake, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "target")
    fake.answer = Answer("loading", "9.9", "ImportError: of that day")
    assert check_target(folder, "key")[0].problem == "ImportError: of that day"
    fake.answer = Answer("done", "10.0")
    (again,) = check_target(folder, "key")
    assert again.problem is None and read_checks(folder, "key") == (again,)


# ------------------------------------------------------------------------------------------ the real engine
def ignore_a_weight(folder: Path) -> None:
    """The engine takes the module for one of floats, and finds no weight for it; quantkit reads it."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))


@needs_compressed_tensors
@pytest.mark.parametrize(
    ("change", "problem"), [(None, None), (ignore_a_weight, "Transformers found tensors that no file fills")]
)
def test_compressed_tensors_in_transformers(
    change: Callable[[Path], None] | None, problem: str | None, made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "packed", tmp_path / "packed")
    if change is not None:
        change(folder)
    looked = check_engine(folder)
    (check,) = looked.checks
    if problem is not None:
        assert check.problem is not None and problem in check.problem
        return
    assert looked.notes == () and check.problem is None and "compressed-tensors" in check.version
    assert check.kl_mean is not None and check.kl_mean < 1e-6 and check.top1_agreement == 1.0
    assert check.peak_bytes is not None and 1e5 < check.peak_bytes < 3e8
