"""`quantkit.json` of a repository: read whoever wrote it, and true of what lies in every branch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.hub.manifest import MANIFEST
from quantkit.hub.push import published
from quantkit.hub.push.publication import publications
from quantkit.recipe.spec import Publish
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES, tame
from tests.pushing import Pusher
from tests.targets import gguf, gptq

pytestmark = SENDS_FILES
Document = dict[str, Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    tame(monkeypatch)
    with HubServer() as server:
        yield server


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"schema": "x"}', b"[" * 100_000, b"\xff"])
def test_a_quantkit_json_of_somebody_else(text: bytes) -> None:
    assert published.parse(text) == published.Published()


@pytest.mark.parametrize("text", [b'{"schema": "quantkit/repo/1"}', b'{"schema": "quantkit/target/9"}'])
def test_a_quantkit_json_of_another_version(text: bytes) -> None:
    assert published.parse(text) == published.Published(ours=True)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (made,) = publications([gguf(tmp_path, "q4_k_m"), gguf(tmp_path, "q8_0")], Publish("alice/Tiny"))
    known = published.parse(published.compose(made, (), published.Published(), ("a change",)))
    assert known.ours and known.targets == made.placed and known.changes == ("a change",)
    assert known.files == {item.path_in_repo: item.expected for item in made.weights}
    other = replace(made, placed=made.placed[:1], weights=())
    assert published.still_there(known, other, {}, lambda _: {}) == ()


def check(document: Document) -> Document:
    found: Document = document["checks"]["gguf-q4_k_m"][0]
    return found


WRONG: dict[str, Callable[[Document], object]] = {
    "a branch": lambda d: d["placed"]["gguf-q4_k_m"].update(branch=["main"]),
    "a file": lambda d: d["placed"]["gguf-q4_k_m"].update(files=[1]),
    "files": lambda d: d["placed"]["gguf-q4_k_m"].update(files="LICENSE"),
    "an engine": lambda d: check(d).update(engine=3),
    "a problem": lambda d: check(d).update(problem=[0]),
    "a share": lambda d: check(d).update(top1_agreement="all"),
    "a size": lambda d: d["files"]["LICENSE"].update(bytes="6"),
    "a hash": lambda d: d["files"]["LICENSE"].update(sha256=6),
    "a line": lambda d: d.update(changes=[["x"]]),
    "lines": lambda d: d.update(left={"x": 1}),
    "a number": lambda d: d["targets"]["gguf-q4_k_m"].update(bits_per_weight=10**400),
    "a target": lambda d: d["targets"].update({"gguf-q4_k_m": []}),
    "checks": lambda d: d.update(checks=[]),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_quantkit_json_with_values_of_another_type(hub: HubServer, tmp_path: Path, what: str) -> None:
    push = Pusher(hub, [gguf(tmp_path, "q4_k_m")], Publish("alice/T"), tmp_path / "publish.json")
    (made,) = publications(push.targets, push.how)
    document = json.loads(published.compose(made, (), published.Published(), ()))
    WRONG[what](document)
    text = json.dumps(document).encode()
    assert published.parse(text) == published.Published(ours=True)
    hub.add("alice/T", {MANIFEST: text}, private=True)
    push.targets = [gguf(tmp_path, "q8_0")]
    push()
    assert list(json.loads(hub.repo("alice/T").read(MANIFEST))["targets"]) == ["gguf-q8_0"]


def test_a_target_alone_with_values_of_another_type(tmp_path: Path) -> None:
    found = gptq(tmp_path)[1].to_json()
    assert published.parse(json.dumps(found).encode()).targets
    for wrong in ({"changes": [1]}, {"left": "x"}, {"size_bytes": "1"}):
        assert published.parse(json.dumps(found | wrong).encode()) == published.Published(ours=True)


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"config.json": b"{}"}, True),
        ({"model-00001-of-00002.safetensors": b"of somebody else"}, False),
    ],
)
def test_what_somebody_changed_in_a_branch_is_not_described_any_more(
    hub: HubServer, tmp_path: Path, change: dict[str, bytes], stays: bool
) -> None:
    both = [gptq(tmp_path, name) for name in ("a", "b")]
    push = Pusher(hub, both[:1], Publish("alice/T", layout="branches"), tmp_path / "publish.json")
    push()
    hub.add("alice/T", change, revision="a")
    push.targets = both[1:]
    before = len(hub.log)
    push(dry_run=True)
    head = hub.repo("alice/T").resolve("a")
    assert sum(f"/tree/{head}" in line for line in hub.log[before:]) == 1
    push()
    targets = json.loads(hub.repo("alice/T").read(MANIFEST))["targets"]
    assert list(targets) == (["a", "b"] if stays else ["b"])
    assert (b"- a\n" in hub.repo("alice/T").read("README.md")) is stays


def test_a_branch_that_is_gone_is_not_described(hub: HubServer, tmp_path: Path) -> None:
    both = [gptq(tmp_path, name) for name in ("a", "b")]
    push = Pusher(hub, both[:1], Publish("alice/T", layout="branches"), tmp_path / "publish.json")
    push()
    del hub.repo("alice/T").refs["refs/heads/a"]
    push.targets = both[1:]
    push()
    assert list(json.loads(hub.repo("alice/T").read(MANIFEST))["targets"]) == ["b"]


@pytest.mark.parametrize(("layout", "path"), [("files", "recipes/gguf-q4_k_m.yaml"), ("auto", "recipe.yaml")])
def test_no_recipe_is_published_where_none_is_known(
    hub: HubServer, tmp_path: Path, layout: Any, path: str
) -> None:
    folder, made = gguf(tmp_path, "q4_k_m") if layout == "files" else gptq(tmp_path)
    made = replace(made, recipe="")
    (folder / MANIFEST).write_text(json.dumps(made.to_json()))
    how = Publish("alice/T", layout=layout)
    Pusher(hub, [(folder, made)], how, tmp_path / "publish.json")()
    repo = hub.repo("alice/T")
    assert path not in repo.files() and "README.md" in repo.files()
    assert not any("recipe sha256" in commit.description for commit in repo.history())
