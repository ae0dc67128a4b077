"""How far an upload is, as the real client sends it. Fails where a client is not heard any more."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.utils import _xet, disable_progress_bars
from safetensors.torch import save

from quantkit.hub.client import connect
from quantkit.hub.push import sent
from quantkit.hub.push.sent import Sending
from quantkit.recipe.sizes import format_size
from quantkit.recipe.spec import Publish
from tests.hubplace import Workplace
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import ALICE, SENDS_FILES, tame
from tests.pushing import Pusher, Said, sound
from tests.targets import gguf, target

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
CHUNK = 65_536  # bytes that the client's transport asks for at once
SIZE = 3 * CHUNK + 1000
CONTENT = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(SIZE // 32 + 1))[:SIZE]


@dataclass
class Heard(Said):
    """All that was said, and (done, total) of each amount."""

    amounts: list[tuple[int, int]] = field(default_factory=list)

    def amount(self, done: int, total: int) -> None:
        self.amounts.append((done, total))

    @property
    def done(self) -> list[int]:
        return [done for done, _ in self.amounts]


@pytest.fixture
def lfs(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    tame(monkeypatch)
    with HubServer() as server:
        yield server


@pytest.fixture
def xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    tame(monkeypatch, xet=True)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    with HubServer(xet=tmp_path / "xet") as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return path


def send(hub: HubServer, sending: Sending, *files: Path, **again: Any) -> None:
    """One try, as a push makes it."""
    hub.add(REPO, {"x": b"x"}, private=True)
    operations = [sending.operation(path.name, path) for path in files]
    with disable_progress_bars(), sending.trying():
        connect(hub.url, ALICE).preupload_lfs_files(REPO, additions=operations, **again)


def test_lfs_tells_each_part_that_was_read(lfs: HubServer, file: Path) -> None:
    heard = Heard()
    send(lfs, Sending(heard, SIZE), file)
    assert heard.amounts == [(n, SIZE) for n in (0, CHUNK, 2 * CHUNK, 3 * CHUNK, SIZE)]
    assert lfs.repo(REPO).files().keys() == {".gitattributes", "x"}  # in no commit yet


def test_parts_of_a_large_file_follow_one_another(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    tame(monkeypatch)
    with HubServer(multipart=100_000) as hub:
        heard = Heard()
        send(hub, Sending(heard, SIZE), file)
    assert heard.done == [0, CHUNK, 100_000, 100_000 + CHUNK]  # the end of the last part is not asked for
    assert SIZE > 100_000 + CHUNK > SIZE // 2


def test_what_is_sent_again_is_counted_once(lfs: HubServer, file: Path) -> None:
    lfs.faults.append(Fault("PUT /lfs/", "status", times=2))
    heard = Heard()
    send(lfs, Sending(heard, SIZE), file)
    once = [0, CHUNK, 2 * CHUNK, 3 * CHUNK, SIZE]
    assert heard.done == once * 3
    assert max(heard.done) <= SIZE


def test_a_new_try_begins_anew(file: Path) -> None:
    """By another way, maybe: what was told of the first counts no more."""
    heard = Heard()
    sending = Sending(heard, 3 * SIZE)
    sending.arrived(SIZE)
    for name in ("b.gguf", "c.gguf"):
        with sending.trying(), sending.operation(name, file).as_file(with_tqdm=True) as opened:
            opened.read(CHUNK)
            opened.read(CHUNK)
    assert heard.done == [SIZE, SIZE, SIZE + CHUNK, SIZE, SIZE + CHUNK]


def test_several_files_at_once_are_one_count(lfs: HubServer, tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(CONTENT[::-1])
    heard = Heard()
    send(lfs, Sending(heard, 2 * SIZE), file, other, num_threads=1)
    assert heard.done[-1] == 2 * SIZE and heard.done == sorted(heard.done)


def test_looking_at_a_file_is_not_sending_it(file: Path) -> None:
    heard = Heard()
    operation = Sending(heard, SIZE).operation("model.gguf", file)
    assert operation.b64content() and operation.upload_info.sha256 == hashlib.sha256(CONTENT).digest()
    small = Sending(heard, 1).operation("x", b"x")
    with small.as_file(with_tqdm=True) as opened:
        assert opened.read() == b"x"
    assert heard.amounts == []


def test_xet_tells_how_far_it_is(xet: HubServer, file: Path) -> None:
    """From the storage's own code: `arrived` is not called here."""
    heard = Heard()
    send(xet, Sending(heard, SIZE), file)
    assert heard.amounts and heard.amounts[-1] == (SIZE, SIZE)
    assert heard.done == sorted(heard.done)


def test_what_xet_finds_there_counts_as_sent(xet: HubServer, tmp_path: Path, file: Path) -> None:
    send(xet, Sending(Heard(), SIZE), file)
    same = tmp_path / "same.gguf"
    same.write_bytes(CONTENT)
    heard = Heard()
    send(xet, Sending(heard, SIZE), same)
    assert heard.amounts[-1] == (SIZE, SIZE)


def test_the_client_is_left_as_it_was(xet: HubServer, file: Path) -> None:
    session = _xet.get_xet_session
    xet.faults.append(Fault("xet-write-token", "status", status=403, times=100))
    with pytest.raises(Exception, match="403"):
        send(xet, Sending(Heard(), SIZE), file)
    assert _xet.get_xet_session is session


class Other:
    """A session of another client, which notes how uploads begin."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []

    def new_upload_commit(self, **named: Any) -> None:
        self.begun.append(named)


def test_another_client_is_not_disturbed(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    heard, other = Heard(), Other()
    monkeypatch.setattr(_xet, "get_xet_session", lambda: other)
    with Sending(heard, SIZE).trying():
        _xet.get_xet_session().new_upload_commit(other_callback=None)
        _xet.get_xet_session().new_upload_commit(progress_callback=print)
        _xet.get_xet_session().new_upload_commit(progress_callback=None)
        assert _xet.get_xet_session().begun is other.begun
    assert other.begun[:2] == [{"other_callback": None}, {"progress_callback": print}]
    other.begun[2]["progress_callback"](object(), {})  # a report without what is read of it
    assert heard.amounts == []
    monkeypatch.delattr(_xet, "get_xet_session")
    with Sending(heard, SIZE).trying():
        assert not hasattr(_xet, "get_xet_session")
    monkeypatch.delattr("huggingface_hub.utils._xet")
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils._xet", None)
    with Sending(heard, SIZE).trying():
        pass


@pytest.mark.parametrize("kind", ["lfs", "xet"])
def test_a_push_without_any_hook_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What a client would be that reads files otherwise: nothing is told but that each file is there."""
    hub: HubServer = request.getfixturevalue(kind)
    monkeypatch.setattr(sent._Told, "as_file", CommitOperationAdd.as_file)
    monkeypatch.setattr(sent._XetSession, "_report", None)
    push = pusher(hub, tmp_path)
    push()
    sound(hub, REPO, push.targets)
    assert heard_by(push).done == [6, SIZE + 6, 2 * SIZE + 6]


def pusher(hub: HubServer, root: Path) -> Pusher:
    """Two GGUF files of `SIZE` bytes, of one content in part, and a licence of 6 bytes."""
    targets = [gguf(root / "out", "q4_k_m", CONTENT), gguf(root / "out", "q5_k_m", CONTENT[::-1])]
    return Pusher(hub, targets, Publish(REPO), root / "publish.json", Heard())


def heard_by(push: Pusher) -> Heard:
    assert isinstance(push.said, Heard)
    return push.said


@pytest.mark.parametrize("kind", ["lfs", "xet"])
def test_a_push_counts_all_weights_of_a_commit(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    hub: HubServer = request.getfixturevalue(kind)
    push = pusher(hub, tmp_path)
    push()
    sound(hub, REPO, push.targets)
    of_weights = [done for done, total in heard_by(push).amounts if total == 2 * SIZE + 6]
    assert of_weights[0] == 6 and of_weights[-1] == 2 * SIZE + 6
    assert of_weights == sorted(of_weights)
    # more than that files arrived: the client itself was heard
    assert len(of_weights) > 3
    push.said = Heard()
    push()
    assert heard_by(push).amounts == []


def test_what_the_hub_has_already_is_through_at_once(lfs: HubServer, tmp_path: Path) -> None:
    lfs.add("alice/other", {"same.gguf": CONTENT})
    push = pusher(lfs, tmp_path)
    push()
    assert heard_by(push).done[:2] == [6, SIZE + 6]


def test_an_upload_that_is_tried_again_ends_at_the_same_total(lfs: HubServer, tmp_path: Path) -> None:
    lfs.faults += [Fault("PUT /lfs/", "status", times=7), Fault("PUT /lfs/", "drop_mid_request", after=CHUNK)]
    push = pusher(lfs, tmp_path)
    push()
    sound(lfs, REPO, push.targets)
    assert any("trying again" in line for line in push.said.lines)
    done = heard_by(push).done
    assert max(done) == 2 * SIZE + 6 and done.count(6) > 2  # it began anew each time


def test_without_xet_after_all_nothing_is_counted_twice(
    xet: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xet.faults.append(Fault("xet-write-token", "status", status=404, times=100))
    push = pusher(xet, tmp_path)
    push()
    sound(xet, REPO, push.targets)
    done = heard_by(push).done
    assert max(done) == 2 * SIZE + 6 and done == sorted(done)
    assert not constants.HF_HUB_DISABLE_XET


def test_the_command_tells(lfs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.cli.progress.EVERY", 0.0)
    place = Workplace(lfs, tmp_path / "place")
    weights = save({"x": torch.arange(SIZE // 4, dtype=torch.int32)})
    target(place.folder / "out", "gptq-w4g128", "gptq", "w4g128", {"model.safetensors": weights})
    done = place.call("push", "out", "--repo", REPO, "--no-engine", "--progress", "json")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.err.splitlines()]
    amounts = [e["done"] for e in events if e["event"] == "amount" and e["total"] == len(weights)]
    assert len(amounts) > 3 and amounts[-1] == len(weights)
    lines = place.call("push", "out", "--repo", "alice/again", "--no-engine", "--progress", "lines")
    assert lines.code == 0, lines.err
    assert f"upload  {format_size(len(weights))} of {format_size(len(weights))}" in lines.err, lines.err


def test_the_sum_of_a_large_file_is_told_of(
    lfs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.hub.push.difference._LARGE", SIZE)
    monkeypatch.setattr("quantkit.hub.push.difference._CHUNK", CHUNK)
    push = pusher(lfs, tmp_path)
    push(dry_run=True)
    steps = [line for line in push.said.lines if line.startswith("checksum")]
    size = format_size(SIZE)
    assert steps == [f"checksum Tiny-Q4_K_M.gguf ({size})", f"checksum Tiny-Q5_K_M.gguf ({size})"]
    assert heard_by(push).amounts == [(n, SIZE) for n in (CHUNK, 2 * CHUNK, 3 * CHUNK, SIZE)] * 2
