"""`convert --push` that is killed between making and publishing: the same command goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quantkit.checkpoint.atomic import write_text
from quantkit.hub.push import record
from quantkit.run import publish as publishing
from tests.elsewhere import picture
from tests.gguf_files import byte_tokenizer
from tests.hubplace import CARD, LICENSE, Ran, Workplace
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES
from tests.models import save_tiny

pytestmark = SENDS_FILES
RECIPE = """
quantkit: 1
source: org/tiny
output: {dir: out}
targets: [gguf:q8_0]
eval: {perplexity: []}
engine_check: false
publish: {repo: alice/tiny, visibility: private-then-public}
"""


class Killed(BaseException):
    """What nothing here catches."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("killed")
    source = byte_tokenizer(
        save_tiny("llama", folder / "tiny", hidden_size=256, vocab_size=448, num_hidden_layers=1)
    )
    (source / "README.md").write_bytes(CARD)
    (source / "LICENSE").write_bytes(LICENSE)
    with HubServer() as hub:
        hub.add("org/tiny", source)
        made = Workplace(hub, folder / "place")
        (made.folder / "recipe.yaml").write_text(RECIPE)
        yield made


def convert(place: Workplace, repo: str) -> Ran:
    return place.call("convert", "-r", "recipe.yaml", "--push", "--repo", repo)


def shown(hub: HubServer, repo: str) -> Any:
    """The repository, but for its name, and for the hash in the card of what names it."""
    text = json.dumps(picture(hub, repo), default=repr).replace(repo.partition("/")[2], "NAME")
    return json.loads(re.sub("quantkit:begin sha256=[0-9a-f]{64}", "quantkit:begin", text))


def recorded(place: Workplace) -> dict[str, str]:
    """The last step by repository."""
    found = json.loads((place.folder / "out" / record.RECORD).read_text())
    return {told["repo"]: told["step"] for told in found["publications"]}


def dying(step: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`step` as it is until the given call, before which everything ends."""
    left = number

    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return step(*given, **named)

    return wrapped


def test_killed_at_each_seam(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = place.hub
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(publishing, "publish", dying(publishing.publish, 1))
        convert(place, "alice/tiny-0")
    out = place.folder / "out"
    assert not hub.has("alice/tiny-0") and not (out / record.RECORD).exists()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.gguf")}
    assert made
    done = convert(place, "alice/tiny-0")
    assert done.code == 0, done.err
    assert not hub.repo("alice/tiny-0").private
    end = shown(hub, "alice/tiny-0")
    # once the card is there, and not noted yet
    repo = "alice/tiny-1"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(record, "write_text", dying(write_text, 3))
        convert(place, repo)
    (out / f"{record.RECORD}.partial").write_text('{"schema": "quant')
    assert "README.md" in hub.repo(repo).files() and hub.repo(repo).private
    assert recorded(place) == {"alice/tiny-0": "done", repo: "weights"}
    done = convert(place, repo)
    assert done.code == 0, done.err
    assert shown(hub, repo) == end
    assert recorded(place) == {"alice/tiny-0": "done", repo: "done"}
    assert not list(out.glob("*.partial"))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.gguf")} == made
