"""`push` where everything goes wrong that can: it completes, or says what is wrong and goes on next time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _xet

from quantkit.errors import BudgetError, HubError, QuantkitError, UsageError, VerifyError
from quantkit.hub import client as client_module
from quantkit.recipe.spec import Publish
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import ALICE, SENDS_FILES, tame
from tests.pushing import Pusher, no_token, nothing_false, sound
from tests.targets import gguf

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
MODEL = r"/api/models/alice/Tiny-GGUF"
COMMIT = f"POST {MODEL}/commit/"
ONCE_EACH = {
    "whoami": "GET /api/whoami-v2",
    "info": f"GET {MODEL}\\?expand=",
    "refs": f"GET {MODEL}/refs",
    "history": f"GET {MODEL}/commits/",
    "tree": f"GET {MODEL}/tree/",
    "preupload": f"POST {MODEL}/preupload/",
    "batch": "POST /alice/Tiny-GGUF.git/info/lfs/objects/batch",
    "put": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "card": "POST /api/validate-yaml",
    "commit": COMMIT,
    "create": "POST /api/repos/create",
    "branch": f"POST {MODEL}/branch/",
    "settings": f"PUT {MODEL}/settings",
    "tag": f"POST {MODEL}/tag/",
    "open": f"POST {MODEL}/discussions$",
    "details": rf"GET {MODEL}/discussions/\d",
    "list": rf"GET {MODEL}/discussions\?",
    "status": rf"POST {MODEL}/discussions/\d+/status",
    "head": f"GET {MODEL}/revision/refs",
}
OF_REQUESTS = ("open", "details", "list", "status", "head")
OF_BRANCHES = ("create", "branch", "settings", "tag", "history")
BRANCH = Publish(REPO, visibility="private-then-public", layout="branches", tag="v1")
REQUEST = Publish(REPO, create_pr=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    tame(monkeypatch)
    monkeypatch.setattr(client_module, "_TIMEOUTS", {"connect": 5.0, "read": 5.0, "write": 5.0})


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def pusher(hub: HubServer, root: Path, how: Publish = BRANCH) -> Pusher:
    if how.create_pr:
        hub.add(REPO, {"x": b"x"}, private=True)
    return Pusher(hub, [gguf(root / "out", "q4_k_m")], how, root / "publish.json")


def complete(hub: HubServer, push: Pusher) -> None:
    """Everything is there, once."""
    repo = hub.repo(REPO)
    if push.how.create_pr:
        (request,) = repo.pull_requests
        assert request.status == "open"
        sound(hub, REPO, push.targets, request.ref)
    else:
        sound(hub, REPO, push.targets, "gguf-q4_k_m")
        assert "README.md" in repo.files() and not repo.private
        assert repo.resolve("v1") == repo.resolve("main")
        assert len(repo.history("gguf-q4_k_m")) == 3 and len(repo.history()) == 2


def fails(push: Pusher, hub: HubServer, expected: type[QuantkitError] = HubError) -> str:
    """What it says; nothing false is left behind."""
    with pytest.raises(expected) as caught:
        push()
    for revision in ("main", "gguf-q4_k_m", "refs/pr/1"):
        nothing_false(hub, REPO, revision)
    no_token(hub, push, str(caught.value), repr(caught.value.__cause__))
    return str(caught.value)


ACTIONS: dict[str, dict[str, Any]] = {
    "503": {"action": "status"},
    "429": {"action": "status", "status": 429, "headers": {"Retry-After": "3"}},
    "reset": {"action": "drop"},
    "reset while sending": {"action": "drop_mid_request", "after": 5},
    "answer lost": {"action": "drop_after"},
    "answer cut": {"action": "close_mid", "after": 4},
    "page of a proxy": {"action": "html"},
    "stalled": {"action": "stall", "seconds": 0.2},
}


@pytest.mark.parametrize("how", [BRANCH, REQUEST], ids=["branch", "request"])
@pytest.mark.parametrize("action", list(ACTIONS))
def test_every_request_fails_once(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Publish, action: str
) -> None:
    if action == "stalled":
        monkeypatch.setattr(client_module, "_TIMEOUTS", {"connect": 5.0, "read": 0.15, "write": 5.0})
    push = pusher(hub, tmp_path, how)
    unused = OF_BRANCHES if how.create_pr else OF_REQUESTS
    hub.faults = [Fault(on, **ACTIONS[action]) for name, on in ONCE_EACH.items() if name not in unused]
    done = action in ("answer lost", "answer cut", "stalled")  # and not done again
    hub.faults.append(Fault(COMMIT, skip=0 if done else 1, **ACTIONS[action]))
    push()
    # a reset in the middle of a body needs a body, an answer that is cut needs one too
    left = {fault.on for fault in hub.faults if fault.times}
    assert all(on.startswith("GET") or action in ("answer cut", "reset while sending") for on in left), left
    complete(hub, push)
    no_token(hub, push)


@pytest.mark.parametrize("name", [name for name in ONCE_EACH if name not in OF_REQUESTS])
def test_an_endpoint_that_is_down(hub: HubServer, tmp_path: Path, name: str) -> None:
    push = pusher(hub, tmp_path)
    hub.faults = [Fault(ONCE_EACH[name], "status", times=10_000)]
    if name != "verify":  # the object is there: the batch says so
        said = fails(push, hub)
        assert "503" in said or name == "card"
        assert "quantkit push" in said or "the same command" in said
        assert not hub.has(REPO) or hub.repo(REPO).private
        assert sum(push.slept) == 7
    hub.faults = []
    push()
    complete(hub, push)


@pytest.mark.parametrize("name", OF_REQUESTS)
def test_pull_requests_are_down(hub: HubServer, tmp_path: Path, name: str) -> None:
    push = pusher(hub, tmp_path, REQUEST)
    hub.faults = [Fault(ONCE_EACH[name], "status", times=10_000)]
    assert "503" in fails(push, hub)
    hub.faults = []
    push.record.unlink(missing_ok=True)
    push()
    complete(hub, push)


@pytest.mark.parametrize("on", ["preupload/", "objects/batch", "commit/gguf", "commit/main", "settings"])
def test_a_token_that_expires_in_the_middle(hub: HubServer, tmp_path: Path, on: str) -> None:
    push = pusher(hub, tmp_path)
    alice = hub.tokens[ALICE]
    hub.when(f"(POST|PUT) .*{on}", lambda: hub.tokens.pop(ALICE))
    said = fails(push, hub)
    assert f"The token that was given is not valid at {hub.url}, while " in said
    assert "put another in its place, then: quantkit push " in said
    assert push.slept == []
    hub.tokens[ALICE] = alice
    push()
    complete(hub, push)


@pytest.mark.parametrize(
    ("on", "status", "said"),
    [
        ("objects/batch", 402, "wants payment before uploading 'Tiny-Q4_K_M.gguf'"),
        ("commit/", 413, "too large, while committing"),
        ("preupload", 403, "may not write to alice/Tiny-GGUF: it may write to alice, acme"),
        ("repos/create", 403, "may not write to alice/Tiny-GGUF"),
        ("GET .*/refs", 403, "has no right to see"),
        ("PUT /lfs", 403, "the storage answered 403"),
        ("commit/", 404, "is gone, or cannot be seen any more"),
    ],
)
def test_refusals(hub: HubServer, tmp_path: Path, on: str, status: int, said: str) -> None:
    push = pusher(hub, tmp_path)
    hub.faults = [Fault(on, "status", status=status, times=10_000, body="storage: no")]
    found = fails(push, hub)
    assert said in found
    hub.faults = []
    push()
    complete(hub, push)


def test_what_became_of_each_file_is_told(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    hub.faults = [Fault("PUT /lfs/", "drop", times=10_000)]
    lines = fails(push, hub).splitlines()
    assert lines[0].startswith(f"Cannot reach {hub.url} while uploading 'Tiny-Q4_K_M.gguf'")
    assert "  LICENSE: uploaded" in lines and "  Tiny-Q4_K_M.gguf: not uploaded" in lines
    again = f"quantkit push {tmp_path}/out/gguf-q4_k_m --repo {REPO} --visibility private-then-public"
    again += " --layout branches --branch gguf-q4_k_m"
    assert lines[-1].endswith(again)
    with pytest.raises(HubError) as caught:
        push(replace=True, prune=True, confirmed=True)
    assert str(caught.value).endswith(f"{again} --replace --prune --yes")


def test_bytes_that_arrive_damaged_are_sent_again(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    hub.faults = [Fault("PUT /lfs/", "corrupt", after=3), Fault("PUT /lfs/", "truncate", after=3, skip=1)]
    push()
    assert not any(fault.times for fault in hub.faults)
    complete(hub, push)


def test_bytes_that_always_arrive_damaged(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    hub.faults = [Fault("PUT /lfs/", "corrupt", times=10_000)]
    assert "the storage answered 422 while uploading 'Tiny-Q4_K_M.gguf'" in fails(push, hub)
    assert hub.repo(REPO).private and len(hub.repo(REPO).history("gguf-q4_k_m")) == 1


def lists_another(hub: HubServer, revision: str) -> Callable[[], None]:
    """The server forgets what it was sent."""

    def do() -> None:
        repo = hub.repo(REPO)
        files = repo.made[repo.refs[f"refs/heads/{revision}"]].files
        files["Tiny-Q4_K_M.gguf"] = repo.store.large("Tiny-Q4_K_M.gguf", b"other")  # type: ignore[index]

    return do


def test_a_commit_that_lists_something_else(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    branch = "gguf-q4_k_m"
    listing = f"GET {MODEL}/tree/"
    hub.when(COMMIT, lambda: hub.when(listing, lists_another(hub, branch)))
    push()
    assert any("is listed with another content; sending it again" in line for line in push.said.lines)
    sound(hub, REPO, push.targets, branch)


def test_a_commit_that_lists_something_else_twice(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    other = lists_another(hub, "gguf-q4_k_m")
    listing = f"GET {MODEL}/tree/"

    def again() -> None:
        other()
        hub.when(COMMIT, lambda: hub.when(listing, other))

    hub.when(COMMIT, lambda: hub.when(listing, again))
    said = fails(push, hub)
    made = push.targets[0][1].files["Tiny-Q4_K_M.gguf"]
    assert "'Tiny-Q4_K_M.gguf' is not what was sent, twice" in said
    assert (
        made.sha256 in said
        and "5 bytes, d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa" in said
    )
    assert "README.md" not in hub.repo(REPO).files("gguf-q4_k_m")
    push(replace=True)
    sound(hub, REPO, push.targets, "gguf-q4_k_m")


def test_somebody_else_commits_in_between(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))
    own = {"README.md": b"<!-- own -->\nFrom the web.\n"}
    hub.when(COMMIT, lambda: hub.when(COMMIT, lambda: hub.add(REPO, own, message="Edit")))
    said = fails(push, hub)
    assert f"{REPO} was changed since" in said and "by alice at 20" in said and "UTC: Edit" in said
    assert hub.repo(REPO).read("README.md") == own["README.md"]
    push()
    sound(hub, REPO, push.targets)
    assert hub.repo(REPO).read("README.md").endswith(b"From the web.\n")


def test_a_commit_of_ours_in_between_is_gone_on_from(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))

    def twice() -> None:
        repo = hub.repo(REPO)
        head = repo.history()[0]
        repo.commit("refs/heads/main", head.title, head.files, author="alice")

    hub.when(COMMIT, lambda: hub.when(COMMIT, twice))
    push()
    sound(hub, REPO, push.targets)
    assert len(hub.repo(REPO).history()) == 4


def test_a_lost_answer(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))
    hub.faults = [Fault(COMMIT, "drop_after", times=2)]
    push()
    sound(hub, REPO, push.targets)
    assert len(hub.repo(REPO).history()) == 3 and push.slept == []
    assert sum("the commit is there, its answer was lost" in line for line in push.said.lines) == 2


def test_a_lost_answer_and_nobody_to_ask(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))
    hub.faults = [
        Fault(COMMIT, "drop_after", skip=1),
        Fault(f"GET {MODEL}/revision/main", "status"),
    ]
    push()
    sound(hub, REPO, push.targets)
    assert len(hub.repo(REPO).history()) == 3
    assert push.slept == [1.0]


def test_somebody_else_makes_the_repository_public_meanwhile(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))
    hub.when("POST /api/repos/create", lambda: hub.add(REPO, {"x": b"x"}, private=False))
    with pytest.raises(UsageError, match="is public, private was asked for"):
        push()
    assert "Tiny-Q4_K_M.gguf" not in hub.repo(REPO).files()


def test_what_appears_meanwhile_is_not_made_public(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    branch = "gguf-q4_k_m"
    # that branch is done by then, main is not
    hub.when(f"{COMMIT}main", lambda: hub.add(REPO, {"secret.txt": b"x"}, revision=branch))
    said = fails(push, hub)
    assert f"{REPO}, branch {branch} is complete and stays private: 1 file appeared" in said
    assert "first: 'secret.txt'" in said and said.endswith(", with --yes")
    assert hub.repo(REPO).private
    with pytest.raises(UsageError, match="give --yes if all may see that"):
        push()
    push(confirmed=True)
    assert not hub.repo(REPO).private


def test_what_appears_after_the_last_commit_is_not_made_public(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    hub.when(f"POST {MODEL}/tag/", lambda: hub.add(REPO, {"z.txt": b"x", "a.txt": b"x"}))
    said = fails(push, hub)
    assert f"{REPO} is complete and stays private: 2 files appeared" in said and "'a.txt'" in said
    assert hub.repo(REPO).private


def test_a_record_that_cannot_be_written_stops_nothing(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    push.record = tmp_path / "gone" / "publish.json"
    push()
    complete(hub, push)
    assert sum("where this push gets is not noted" in line for line in push.said.lines) == 1


def test_a_card_that_the_hub_refuses(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO))
    text = b"---\nlicense: {a: 1}\n---\n"
    with pytest.raises(UsageError, match=r"refuses the card of alice/Tiny-GGUF: .*license") as caught:
        push(card=lambda publication, remote: {"README.md": text})
    assert "front matter" in str(caught.value) and push.slept == []
    assert not hub.has(REPO)
    push()
    sound(hub, REPO, push.targets)


def test_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = pusher(hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="Offline: "):
        push()
    assert hub.log == [] and push.slept == []


def test_a_disk_that_is_full(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = pusher(hub, tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "xet"))

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "preupload_lfs_files", full)
        assert "disk full" in fails(push, hub, BudgetError)
    push()
    complete(hub, push)


def test_a_file_that_changes_while_it_is_sent(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    path = push.targets[0][0] / "Tiny-Q4_K_M.gguf"
    content = path.read_bytes()
    hub.when("POST /lfs/.*/verify", lambda: path.write_bytes(content + b"more"))
    assert "was written to while it was uploaded" in fails(push, hub, VerifyError)
    path.write_bytes(content)
    push()
    complete(hub, push)


def test_interrupted(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = pusher(hub, tmp_path)
    real = HfApi.create_commit

    def stop(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HfApi, "create_commit", stop)
        push()
    assert '"step": "made"' in push.record.read_text()
    push()
    complete(hub, push)


def test_the_hub_is_down(tmp_path: Path) -> None:
    with HubServer() as hub:
        push = pusher(hub, tmp_path)
    with pytest.raises(HubError, match="Cannot reach") as caught:
        push()
    assert "try again later" in str(caught.value) and caught.value.exit_code == 3


def test_xet_tokens_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tame(monkeypatch, xet=True)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    _xet.abort_xet_session()  # the one of an earlier test knows nothing of these
    with HubServer(xet=tmp_path / "xet") as hub:
        push = pusher(hub, tmp_path)
        token = "GET .*xet-write-token"
        for status, said in (
            (401, "is not valid at"), (403, "may not write"), (503, "answered 503")
        ):  # fmt: skip
            hub.faults = [Fault(token, "status", status=status, times=10_000)]
            assert said in fails(push, hub)
        hub.faults = [Fault(token, "status"), Fault(token, "html", skip=1), Fault(token, "drop", skip=2)]
        push()
        complete(hub, push)
        assert not any("/lfs/" in line for line in hub.log)
    _xet.abort_xet_session()
