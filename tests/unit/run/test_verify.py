"""`verify` finds what is wrong, and says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import Eval, Output, Recipe, parse_targets
from quantkit.calibrate import chat
from quantkit.errors import SourceError
from quantkit.hub.manifest import Check
from quantkit.run import verify as whole
from quantkit.run.convert import convert
from quantkit.run.engine_check import Looked
from quantkit.run.streams import sha256_file
from tests.gguf_files import byte_tokenizer, write_gguf
from tests.models import save_tiny

verify = partial(whole.verify, engine=False)
SCALES = "model.layers.0.mlp.up_proj.scales"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source"), vocab_size=420)


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    targets = parse_targets("gptq:w4g32@method=rtn,name=made")
    asked = Recipe(str(source), targets, output=Output(dir=str(out)), eval=Eval(enabled=False))
    convert(replace(asked, engine_check=False))
    return out / "made"


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A GPTQ folder to damage."""
    return shutil.copytree(original, tmp_path / "made")


@pytest.fixture
def changed(made: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """The folder with other tensors, and without the sums that would give them away."""

    def change(how: Callable[[dict[str, Tensor]], None]) -> Path:
        file = made / "model.safetensors"
        tensors = load_file(file)
        how(tensors)
        save_file(tensors, file, {"format": "pt"})
        (made / "quantkit.json").unlink()
        return made

    return change


def test_whole_files(made: Path, source: Path) -> None:
    found = verify(made, against=str(source))
    assert found.sound and found.notes == []
    assert found.checks["sums"].startswith("4 files")
    assert found.checks["weights"] == "14 quantized (gptq), all decoded"
    assert all(0.02 < d.error < 0.2 for d in found.differences)
    document = json.loads(json.dumps(found.to_json()))
    assert document["status"] == "ok" and len(document["differences"]) == 14
    first, second = found.tables()
    assert first.title == "made · sound" and len(second.rows) == 10


def test_a_checkpoint_of_floats(source: Path) -> None:
    found = verify(source, against=str(source))
    assert found.sound and "weights" not in found.checks
    assert found.notes == ["no quantkit.json: the sums of the files are not known"]


def test_one_bit(made: Path) -> None:
    data = bytearray((made / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (made / "model.safetensors").write_bytes(data)
    found = verify(made)
    assert [p for p in found.problems if "`model.safetensors` changed since it was written" in p]


def test_missing_and_shortened_files(made: Path) -> None:
    (made / "quantize_config.json").unlink()
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    found = verify(made)
    assert "`quantize_config.json` is missing" in found.problems
    assert any("bytes; " in p and "were written" in p for p in found.problems)
    assert any("is truncated" in p for p in found.problems)
    assert found.to_json()["status"] == "damaged"


def test_a_manifest_of_somebody_else(made: Path) -> None:
    (made / "quantkit.json").write_text('{"files": []}')
    assert any("is not what quantkit writes" in p for p in verify(made).problems)
    listed = {"../secret": {"bytes": 1, "sha256": "0"}}
    (made / "quantkit.json").write_text(json.dumps({"files": listed}))
    assert "`../secret` is missing" in verify(made).problems


def test_values_that_are_not_finite(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES][1, 3] = float("inf")
        tensors[NORM][7] = float("nan")

    found = verify(changed(damage))
    assert f"`{NORM}` is nan at index [7]" in found.problems
    assert "`model.layers.0.mlp.up_proj.weight (scale)` is inf at index [3, 1]" in found.problems
    assert len(found.problems) == 2


def test_group_numbers_out_of_range(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES.replace("scales", "g_idx")][0] = 77

    (problem,) = verify(changed(damage)).problems
    assert "group numbers from 0 to 77 where there are 2 groups" in problem


def test_tensors_that_are_missing_or_left_over(changed: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["model.layers.9.norm"] = torch.ones(3)

    (problem,) = verify(changed(damage)).problems
    assert NORM in problem and "`model.layers.9.norm`" in problem


def test_shapes_that_the_config_contradicts(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    found = verify(made)
    assert any("wrong shapes" in problem for problem in found.problems)


def test_weights_of_another_model(changed: Callable[..., Path], source: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES] *= -1

    (problem,) = verify(changed(mix), against=str(source)).problems
    assert problem == "`model.layers.0.mlp.up_proj.weight` has nothing in common with the source's"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        verify(tmp_path / "absent")


# ------------------------------------------------------------------------------------ what quantkit.json says
def test_what_is_kept_is_what_the_manifest_says(made: Path) -> None:
    assert verify(made).checks["coverage"].startswith("kept as floats as quantkit.json says: ")
    manifest = json.loads((made / "quantkit.json").read_text())
    (head,) = (k for k in manifest["kept"] if k["pattern"] == "lm_head.weight")
    manifest["kept"].remove(head)
    manifest["kept"].append({**head, "pattern": "model.layers.*.mlp.up_proj.weight", "count": 2})
    (made / "quantkit.json").write_text(json.dumps(manifest))
    found = verify(made)
    assert found.problems == [
        "`model.layers.*.mlp.up_proj.weight`: quantkit.json says that 2 tensors of "
        f"{head['parameters']:,} parameters are kept as floats; the files have 0 of 0",
        "`lm_head.weight` is kept as floats, which quantkit.json does not say",
    ]


def test_cards_and_checks_are_no_part_of_what_was_written(made: Path) -> None:
    manifest = json.loads((made / "quantkit.json").read_text())
    manifest["files"] |= {name: {"bytes": 1, "sha256": "0"} for name in ("README.md", "checks.json")}
    (made / "quantkit.json").write_text(json.dumps(manifest))
    (made / "README.md").write_text("My own words.")
    found = verify(made)
    assert found.sound and found.checks["sums"] == "4 files of quantkit.json"


@pytest.fixture
def repository(source: Path, tmp_path: Path) -> Path:
    """Two targets in one folder, as `push` puts them; of the second and of a side file nothing is here."""
    folder = tmp_path / "repository"
    folder.mkdir()
    like = byte_tokenizer(shutil.copytree(source, tmp_path / "like"))
    file = write_gguf(like, folder / "one.gguf", "q8_0")
    sums = {"one.gguf": {"bytes": file.stat().st_size, "sha256": sha256_file(file)}}
    sums |= {name: {"bytes": 9, "sha256": "0"} for name in ("two.gguf", "LICENSE")}
    placed = {n: {"files": [f"{n}.gguf", "LICENSE"], "branch": None} for n in ("one", "two")}
    document = {"schema": "quantkit/repo/1", "targets": {}, "placed": placed, "checks": {}, "files": sums}
    (folder / "quantkit.json").write_text(json.dumps(document))
    return folder


def test_a_file_of_a_repository_of_several(repository: Path) -> None:
    found = verify(repository / "one.gguf")
    assert found.sound and found.checks["sums"] == "1 files of quantkit.json"
    assert "1 of 2 files of quantkit.json are not here" in found.notes
    (repository / "two.gguf").write_bytes(b"not whole")
    assert verify(repository / "one.gguf").sound, "another target"
    (repository / "LICENSE").write_text("another text")
    assert verify(repository / "one.gguf").problems == ["`LICENSE` has 12 bytes; 9 were written"]


def test_paths_that_leave_the_folder_are_not_followed(repository: Path) -> None:
    document = json.loads((repository / "quantkit.json").read_text())
    document["files"]["../made/quantkit.json"] = {"bytes": 1, "sha256": "0"}
    document["placed"]["one"]["files"].append("../made/quantkit.json")
    (repository / "quantkit.json").write_text(json.dumps(document))
    assert "2 of 3 files of quantkit.json are not here" in verify(repository / "one.gguf").notes


# ------------------------------------------------------------------------------------------------- tokenizers
@pytest.fixture
def worded(made: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The result and its source with a tokenizer each, the same, which quantkit.json does not list."""
    monkeypatch.setattr(whole, "check_sums", lambda report, file: None)
    like = shutil.copytree(source, tmp_path / "source")
    shutil.copytree(
        byte_tokenizer(like), made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "model*")
    )
    return made, like


def test_the_tokenizer_of_the_source(worded: tuple[Path, Path]) -> None:
    made, source = worded
    found = verify(made, against=str(source))
    assert found.sound and (found.checks["tokens"], found.checks["chat template"]) == (
        "those of the source",
        "renders",
    )


def test_other_tokens(worded: tuple[Path, Path]) -> None:
    made, source = worded
    file = made / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(tokenizer))
    found = verify(made, against=str(source))
    assert found.problems and all("its tokenizer makes other tokens: " in p for p in found.problems)


def test_special_tokens_and_template(worded: tuple[Path, Path]) -> None:
    made, source = worded
    file = made / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<s>"}))
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    expected = [
        "its eos_token is '<s>', that of the source '</s>'",
        "its chat template is not that of the source",
    ]
    assert verify(made, against=str(source)).problems == expected
    (made / "quantkit.json").unlink()
    found = verify(made, against=str(source))
    assert found.sound and set(expected) <= set(found.notes), "others may have meant to"


def test_a_template_that_does_not_render(worded: tuple[Path, Path]) -> None:
    made, _ = worded
    (made / "chat_template.jinja").write_text("{{ messages[7]['content'] }}")
    (problem,) = verify(made).problems
    assert problem.startswith("its chat template does not render: UndefinedError: ")


# ---------------------------------------------------------------------------------------------------- engines
@pytest.mark.parametrize("wrong", [None, "it crashed (SIGABRT)"])
def test_engines_are_shown(wrong: str | None, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("some engine", "1.2", "cpu", wrong, 128, 3e-7, 1.0, 10**9)
    monkeypatch.setattr(whole, "check_engine", lambda path, **_: Looked((check,), ("a note",)))
    found = whole.verify(made)
    assert found.engines == [check] and "a note" in found.notes
    assert found.problems == ([] if wrong is None else ["some engine 1.2: it crashed (SIGABRT)"])
    assert json.loads(json.dumps(found.to_json()))["engines"][0]["kl_mean"] == 3e-7
    shown = dict(found.tables()[0].rows)["some engine"]
    text = "1.2; 128 tokens beside quantkit's own reading: KL 3e-07; same top-1 100.0%; 1.00 GB of memory"
    assert shown == (text if wrong is None else f"{text}; wrong")


def test_damaged_files_are_given_to_no_engine(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "check_engine", lambda path, **_: pytest.fail("it was run"))
    (made / "model.safetensors").write_bytes(b"x" * 100)
    assert "no engine was run: it is not for damaged files" in whole.verify(made).notes


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError: "),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes more than 0.2 s",
        ),
    ],
)
def test_a_template_that_fails_as_programs_do(
    worded: tuple[Path, Path], template: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2 if why.endswith("s") else 20.0)
    made, _ = worded
    (made / "chat_template.jinja").write_text(template)
    (problem,) = verify(made).problems
    assert problem.startswith(f"its chat template does not render: {why}")


def test_a_template_that_cannot_be_tried(worded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_command", lambda: ["/no/such/program"])
    found = verify(worded[0])
    assert found.sound and "chat template" not in found.checks
    assert any(note.startswith("its chat template was not looked at: no process") for note in found.notes)


@pytest.mark.parametrize("text", ["{", "[" * 200_000])
def test_a_tokenizer_that_does_not_load_is_told(worded: tuple[Path, Path], text: str) -> None:
    made, _ = worded
    (made / "tokenizer.json").write_text(text)
    assert any(note.startswith("tokens were not looked at: cannot load") for note in verify(made).notes)


def test_a_manifest_that_is_nested_too_deeply(made: Path) -> None:
    (made / "quantkit.json").write_text("[" * 200_000)
    assert any("is not what quantkit writes: RecursionError" in p for p in verify(made).problems)
