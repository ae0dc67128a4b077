"""`convert --push` to where something lies already: what would stop the push is said before the work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.gguf_files import byte_tokenizer
from tests.hubplace import CARD, Ran, Workplace
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES
from tests.models import save_tiny

pytestmark = SENDS_FILES
# one block, as wide as a superblock of GGUF
TINY = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 448, "num_hidden_layers": 1}
REPO = "alice/tiny-{target}"
GGUF, GPTQ = "alice/tiny-GGUF", "alice/tiny-w4"
TARGETS = ("gguf:q8_0", "gptq:w4g32@method=rtn,name=w4")
# of the same size, made otherwise
OTHERS = ("gguf:q8_0", "gptq:w4g32@method=rtn,scales=mse,name=w4")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **TINY))
    (folder / "README.md").write_bytes(CARD)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `TARGETS` give."""
    with HubServer() as hub:
        hub.add("org/tiny", source)
        place = Workplace(hub, tmp_path_factory.mktemp("made") / "place")
        done = convert(place, out="out", push=False)
        assert done.code == 0, done.err
        return place.folder / "out"


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Iterator[Workplace]:
    with HubServer() as hub:
        hub.add("org/tiny", source)
        yield Workplace(hub, tmp_path / "place")


@pytest.fixture
def published(place: Workplace, made: Path) -> Workplace:
    """Where `made` lies in the output, and was pushed."""
    shutil.copytree(made, place.folder / "out")
    done = place.call("push", "out", "--repo", REPO, "--no-engine", "--tag", "v1")
    assert done.code == 0, done.err
    return place


def convert(
    place: Workplace, *flags: str, out: str, targets: Sequence[str] = TARGETS, push: bool = True
) -> Ran:
    """One command from the source to what is published."""
    to = [word for target in targets for word in ("--to", target)]
    where = ["--push", "--repo", REPO] if push else []
    done = place.call(
        "convert", "org/tiny", *to, "-o", out, "--no-eval", "--no-engine", *where, *flags,
    )  # fmt: skip
    assert "Traceback" not in done.err
    return done


def stops(place: Workplace, *flags: str, out: str = "other", targets: Sequence[str] = TARGETS) -> str:
    """What it says before anything is made or changed."""
    log = len(place.hub.log)
    done = convert(place, *flags, out=out, targets=targets)
    assert done.code == 2, done.err
    assert not (place.folder / "other").exists() and "sweep" not in done.err
    assert not [line for line in place.hub.log[log:] if line.startswith(("POST", "PUT", "DELETE"))]
    return done.err


def test_the_same_again_has_nothing_to_do(published: Workplace) -> None:
    """From the same folder by what lies in it; from another by how it is made."""
    for out in ("out", "new"):
        again = convert(published, out=out)
        assert again.code == 0, again.err
        assert again.out.count("nothing to do") == 2
        assert "--replace" not in again.err


def test_other_settings_need_leave_before_the_work(published: Workplace) -> None:
    said = stops(published, targets=OTHERS)
    assert f"{GPTQ}: 'model.safetensors' is there with another content than this run will give" in said
    assert "give --replace to put the new one in its place" in said
    assert f"{GGUF}:" not in said


def test_what_lies_here_is_compared_byte_for_byte(published: Workplace) -> None:
    """The run will keep it, so the sum of the very file is known."""
    file = published.hub.repo(GPTQ).read("model.safetensors")
    published.hub.add(GPTQ, {"model.safetensors": file[:-1] + bytes([file[-1] ^ 1])})
    assert f"{GPTQ}: 'model.safetensors' is there with another content" in stops(published, out="out")


def test_a_file_of_another_size_cannot_be_the_same(place: Workplace) -> None:
    place.hub.add(GGUF, {"tiny-Q8_0.gguf": b"GGUF of another kind"}, private=True)
    assert f"{GGUF}: 'tiny-Q8_0.gguf' is there with another content" in stops(place)


def test_a_file_that_may_be_the_same_is_told_of(place: Workplace, made: Path) -> None:
    size = (made / "gguf-q8_0" / "tiny-Q8_0.gguf").stat().st_size
    place.hub.add(GGUF, {"tiny-Q8_0.gguf": b"GGUF" + bytes(size - 4)})
    done = convert(place, out="other", targets=["gguf:q8_0"])
    said = f"warning: {GGUF}: 'tiny-Q8_0.gguf' is there; unless this run gives the very same, the push will"
    assert said in done.err
    assert done.code == 2 and (place.folder / "other" / "gguf-q8_0").is_dir()
    assert "differs from the file here" in done.err


def test_a_card_that_a_person_changed(published: Workplace) -> None:
    edit(published)
    said = stops(published)
    assert f"{GPTQ}: README.md: the part that quantkit wrote was edited since" in said
    assert "--replace-card" in said


def edit(place: Workplace) -> None:
    """Somebody writes into quantkit's part of a card."""
    card = place.hub.repo(GPTQ).read("README.md")
    place.hub.add(
        GPTQ, {"README.md": card.replace(b"\n<!-- quantkit:end -->", b"\nMine.\n<!-- quantkit:end -->")}
    )


def test_who_may_see_it(published: Workplace) -> None:
    said = stops(published, "--set", "publish.visibility=public")
    assert f"{GGUF} is private, public was asked for" in said and f"{GPTQ} is private" in said


def test_a_tag_that_names_something_else(published: Workplace) -> None:
    said = stops(published, "--replace", "--set", "publish.tag=v1", targets=OTHERS)
    assert f"{GPTQ} has a tag 'v1'" in said and f"{GGUF} has" not in said


def test_every_leave_is_given_in_one_command(published: Workplace) -> None:
    edit(published)
    old = published.hub.repo(GPTQ).read("model.safetensors")
    done = convert(
        published, "--replace", "--replace-card", "--prune", "--yes", "--set", "publish.visibility=public",
        out="other", targets=["gguf:q6_k@method=rtn", OTHERS[1]],
    )  # fmt: skip
    assert done.code == 0, done.err
    found = published.hub.repo(GPTQ)
    assert found.read("model.safetensors") != old and b"Mine." not in found.read("README.md")
    assert {p for p in published.hub.repo(GGUF).files() if p.endswith(".gguf")} == {"tiny-Q6_K.gguf"}
    assert found.private  # `--yes` leaves it as it is


def test_nothing_is_asked_of_a_push_that_is_not_to_be(published: Workplace) -> None:
    log = len(published.hub.log)
    done = convert(published, "--set", "publish.when=manual", "--on-exists", "resume", out="out")
    assert done.code == 0 and "nothing was pushed: `publish.when` is manual" in done.err
    assert not [line for line in published.hub.log[log:] if "alice" in line]


def test_names_that_are_not_possible(place: Workplace) -> None:
    said = stops(place, "--set", "publish.layout=files", "--repo", "alice/x", targets=(*TARGETS, "ct:w8"))
    assert "both have a file 'model.safetensors'" in said


def test_a_pull_request_is_looked_at_where_it_is(place: Workplace, made: Path) -> None:
    shutil.copytree(made, place.folder / "out")
    for name in (GGUF, GPTQ):
        place.hub.add(name, {"x": b"x"}, private=True)
    done = place.call("push", "out", "--repo", REPO, "--no-engine", "--create-pr")
    assert done.code == 0, done.err
    said = stops(place, "--set", "publish.create_pr=true", targets=OTHERS)
    assert f"{GPTQ}: 'model.safetensors' is there with another content" in said
    assert "model.safetensors" not in place.hub.repo(GPTQ).files()
