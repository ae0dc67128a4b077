"""`push` through the real client against a server on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import HubError, UsageError, VerifyError
from quantkit.recipe.spec import Publish
from tests.hubserver import HubServer, User
from tests.hubserver.client import BOB, READER, SENDS_FILES, tame
from tests.pushing import Pusher, no_token, sound
from tests.targets import changed, gguf, gptq, target

pytestmark = SENDS_FILES
REPO = "alice/Tiny-GGUF"
WRITES = ("POST", "PUT", "DELETE")


@pytest.fixture(params=["lfs", "xet"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    xet = request.param == "xet"
    tame(monkeypatch, xet=xet)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    with HubServer(xet=tmp_path / "xet" if xet else None) as server:
        yield server


@pytest.fixture
def lfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    tame(monkeypatch)
    with HubServer() as server:
        yield server


def pusher(hub: HubServer, root: Path, how: Publish | None = None) -> Pusher:
    targets = [gguf(root / "out", "q4_k_m"), gguf(root / "out", "q5_k_m")]
    return Pusher(hub, targets, how or Publish(REPO), root / "publish.json")


def writes(hub: HubServer, since: int = 0) -> list[str]:
    return [line for line in hub.log[since:] if line.startswith(WRITES)]


def test_two_files_into_a_new_private_repository(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    pushed = push()
    repo = hub.repo(REPO)
    sound(hub, REPO, push.targets)
    assert repo.private and not repo.gated
    card, weights, first = repo.history()
    assert first.title == "initial commit" and card.title.startswith("Describe Q4_K_M, Q5_K_M (quantkit ")
    assert set(weights.files) == {".gitattributes", "LICENSE", "Tiny-Q4_K_M.gguf", "Tiny-Q5_K_M.gguf"}
    assert weights.title.startswith("Add Q4_K_M, Q5_K_M (quantkit ")
    for told in (
        "org/tiny@0123456789",
        "recipe sha256",
        "torch 2.0",
        "32 tokens",
        repo.files()["LICENSE"].path,
    ):
        assert told in weights.description
    assert repo.files()["Tiny-Q4_K_M.gguf"].sha256 in weights.description
    document = json.loads(repo.read("quantkit.json"))
    assert document["schema"] == "quantkit/repo/1"
    assert sorted(document["targets"]) == ["gguf-q4_k_m", "gguf-q5_k_m"]
    assert set(document["files"]) == {"LICENSE", "Tiny-Q4_K_M.gguf", "Tiny-Q5_K_M.gguf"}
    assert repo.read("recipes/gguf-q4_k_m.yaml").startswith(b"source: org/tiny")
    (done,) = pushed.done
    assert (done.commit, done.branch, done.pull_request) == (repo.history()[0].sha, "main", None)
    assert done.url == f"{hub.url}/{REPO}/tree/main"
    no_token(hub, push)


def test_a_second_push_commits_nothing(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    first = push()
    before = len(hub.log)
    second = push()
    assert second.done[0].unchanged and second.done[0].commit == first.done[0].commit
    assert writes(hub, before) == []
    assert "nothing to do" in str(second.tables())


def test_another_target_joins_those_that_are_there(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    push()
    first = push.targets
    push.targets = [gguf(tmp_path / "out", "q8_0")]
    push()
    sound(lfs, REPO, [*first, *push.targets])
    document = json.loads(lfs.repo(REPO).read("quantkit.json"))
    assert sorted(document["targets"]) == ["gguf-q4_k_m", "gguf-q5_k_m", "gguf-q8_0"]
    assert b"- gguf-q4_k_m\n- gguf-q5_k_m\n- gguf-q8_0" in lfs.repo(REPO).read("README.md")
    assert len(lfs.repo(REPO).read("SHA256SUMS").splitlines()) == 4


def test_what_somebody_changed_is_not_described_any_more(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    push()
    lfs.add(REPO, {"Tiny-Q4_K_M.gguf": b"GGUF of somebody else"})
    push.targets = [gguf(tmp_path / "out", "q8_0")]
    push()
    document = json.loads(lfs.repo(REPO).read("quantkit.json"))
    assert sorted(document["targets"]) == ["gguf-q5_k_m", "gguf-q8_0"]
    assert "Tiny-Q4_K_M.gguf" in lfs.repo(REPO).files()


def test_one_target_in_a_repository_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    push = Pusher(hub, [gptq(tmp_path)], Publish("acme/Tiny-{target}"), tmp_path / "publish.json")
    push()
    repo = hub.repo("acme/Tiny-gptq-w4g128")
    sound(hub, repo.id, push.targets)
    assert repo.read("quantkit.json") == (push.targets[0][0] / "quantkit.json").read_bytes()
    assert repo.read("recipe.yaml").decode() == push.targets[0][1].recipe
    assert "checks.json" not in repo.files()
    assert b"A card for this folder" not in repo.read("README.md")


def test_a_dry_run_only_reads(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    table = push(dry_run=True).tables()[0]
    assert not hub.has(REPO) and not push.record.exists()
    assert ("new", "Tiny-Q4_K_M.gguf", "125 B") in table.rows
    assert table.blockers == () and f"{REPO} will be made, private" in table.notes
    push()
    before = len(hub.log)
    rows = push(dry_run=True).tables()[0].rows
    assert {row[0] for row in rows} == {"same"}
    assert ".gitattributes" not in {row[1] for row in rows}
    assert writes(hub, before) == []


def test_a_dry_run_without_the_right_to_write(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path, Publish(REPO, visibility="public"))
    push()
    for token, said in (
        (BOB, "The token of bob may not write to alice/Tiny-GGUF: it may write to bob"),
        (READER, "it may only read"),
        (None, "There is no token"),
    ):
        table = push(dry_run=True, token=token).tables()[0]
        assert said in table.blockers[0]
        assert ("same", "Tiny-Q4_K_M.gguf") in {row[:2] for row in table.rows}
        with pytest.raises(HubError, match=said):
            push(token=token)


def test_what_is_worth_knowing_is_told_before_anything_is_sent(lfs: HubServer, tmp_path: Path) -> None:
    class Licence:
        gated, reminders, warnings = True, ("Built with X",), ("no name",)
        blockers, blockers_if_public = (), ("say where it is from",)

    push = pusher(lfs, tmp_path, Publish(REPO, tag="v1"))
    planned = push(dry_run=True, licence=lambda publication: Licence).tables()[0].notes
    push.said.lines.clear()
    pushed = push(licence=lambda publication: Licence)
    said = push.said.lines
    first = next(i for i, line in enumerate(said) if line.startswith(("push ", "upload ")))
    assert said[1:first] == [
        "warning: no name",
        "warning: Built with X",
        f"{REPO} will be made, private",
        "tag v1 will be set",
        f"access to {REPO} will be gated (auto), as that to org/tiny is",
        f"{REPO}: {planned[-1]}",
    ]
    assert planned[-1].startswith("9 files, ") and planned[-1].endswith(" to send")
    document: Any = pushed.to_json()
    told = document["plans"][0]
    assert told["warnings"] == ["no name", "Built with X"] and told["notes"][1] == "tag v1 will be set"
    assert [line for line in said if "making" in line or "setting" in line] == [
        f"push making {REPO}, private", f"push setting tag v1 of {REPO}"
    ]  # fmt: skip
    table = pushed.tables()[0]
    assert dict(zip(table.columns, table.rows[0], strict=True))["tag"] == "v1"
    push.said.lines.clear()
    assert push(licence=lambda publication: Licence).to_json()["plans"][0]["total"] == "nothing to do"  # type: ignore[index]
    assert not any("v1" in line or "gated" in line for line in push.said.lines)
    lfs.repo(REPO).private = False
    assert (
        push(dry_run=True, licence=lambda publication: Licence).problems[0].message == "say where it is from"
    )


def test_without_a_visibility_a_repository_stays_as_it_is(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    push()
    assert push.how.visibility is None and lfs.repo(REPO).private
    lfs.repo(REPO).private = False
    push.targets = push.targets[:1]
    found = push(dry_run=True)
    assert found.problems == () and f"{REPO} is public" in found.tables()[0].notes
    push()
    assert not lfs.repo(REPO).private


def test_a_card_that_a_person_changed_is_one_of_the_problems(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path, Publish(REPO, visibility="public"))
    push()
    push.targets = push.targets[:1]

    def edited(*_: object) -> dict[str, bytes]:
        raise UsageError("somebody wrote into it.", remedy="give --replace-card")

    found = push(dry_run=True, token=BOB, card=edited, prune=True)
    assert found.problems[0].message == "somebody wrote into it."
    assert found.to_json()["status"] == "blocked" and len(found.problems) == 2
    table = found.tables()[0]
    assert table.blockers[0] == "somebody wrote into it; give --replace-card"
    assert ("untouched", "README.md") in {row[:2] for row in table.rows}
    assert ("delete", "Tiny-Q5_K_M.gguf") in {row[:2] for row in table.rows}
    assert {row[0] for row in table.rows if "quality.png" in row[1]} == {"untouched"}
    with pytest.raises(UsageError) as caught:
        push(token=BOB, card=edited)
    first, second = str(caught.value).splitlines()
    assert first == "somebody wrote into it; give --replace-card" and "name a repository of yours" in second
    assert push(dry_run=True).to_json()["status"] == "ok"


def test_a_card_that_the_hub_refuses_is_one_of_the_problems(lfs: HubServer, tmp_path: Path) -> None:
    text = b"---\nlicense: {a: 1}\n---\n"
    found = pusher(lfs, tmp_path)(dry_run=True, card=lambda publication, remote: {"README.md": text})
    assert "refuses the card" in found.tables()[0].blockers[0]


def test_what_is_wrong_everywhere_is_said_once(lfs: HubServer, tmp_path: Path) -> None:
    targets = [gptq(tmp_path), gguf(tmp_path, "q4_k_m")]
    push = Pusher(lfs, targets, Publish("alice/Tiny-{target}"), tmp_path / "publish.json")
    found = push(dry_run=True, token=None)
    assert [len(table.blockers) for table in found.tables()] == [1, 0] and len(found.problems) == 1
    assert all(table.notes[-1].endswith("to send") for table in found.tables())
    with pytest.raises(HubError) as caught:
        push(token=None)
    assert str(caught.value).count("There is no token") == 1
    for repo in ("alice/Tiny-gptq-w4g128", "alice/Tiny-GGUF"):
        lfs.add(repo, {"LICENSE": b"other"}, private=True)
    with pytest.raises(UsageError) as both:
        push()
    assert [line[:2] for line in str(both.value).splitlines()] == ["al", "  ", "  "]
    assert str(both.value).count("--replace") == 1


def test_a_pull_request_to_a_gated_repository(lfs: HubServer, tmp_path: Path) -> None:
    lfs.add("org/gated", {"README.md": b"---\nlicense: mit\n---\n"}, gated="auto")
    push = pusher(lfs, tmp_path, Publish("org/gated", create_pr=True))
    with pytest.raises(HubError, match="org/gated is gated, and alice has not been granted access") as caught:
        push()
    assert f"request access at {lfs.url}/org/gated" in str(caught.value)


def test_a_token_that_nobody_has(lfs: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = pusher(lfs, tmp_path)
    with pytest.raises(HubError, match="The token that was given is not valid at http") as caught:
        push(token="hf_nobodynobodynobody")
    assert "hf_nobody" not in str(caught.value) and caught.value.exit_code == 3
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobodynobody")
    with pytest.raises(HubError, match="The token in HF_TOKEN is not valid at http") as caught:
        push(token=None)
    assert "set HF_TOKEN to another one" in str(caught.value) and "then: the same command" in str(
        caught.value
    )


def test_a_namespace_that_is_not_ours(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path, Publish("bob/Tiny"))
    with pytest.raises(HubError, match="may not write to bob/Tiny: it may write to alice, acme"):
        push()
    assert not lfs.has("bob/Tiny")


def test_weights_are_replaced_only_when_asked(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    push()
    folder, made = push.targets[0]
    again = changed(folder, made, "Tiny-Q4_K_M.gguf", b"GGUF\0 better")
    push.targets = [(folder, again), push.targets[1]]
    before = hub.repo(REPO).history()[0].sha
    with pytest.raises(UsageError, match=r"'Tiny-Q4_K_M.gguf' is there and differs") as caught:
        push()
    assert "--replace" in str(caught.value)
    assert hub.repo(REPO).history()[0].sha == before
    assert ("replace", "Tiny-Q4_K_M.gguf", "12 B") in push(dry_run=True).tables()[0].rows
    push(replace=True)
    sound(hub, REPO, push.targets)
    assert b"2026-01-02: replaced `Tiny-Q4_K_M.gguf`" in hub.repo(REPO).read("README.md")
    head = hub.repo(REPO).history()[0].sha
    assert push().done[0].commit == head


def test_what_a_person_wrote_stays(hub: HubServer, tmp_path: Path) -> None:
    own = b"mine\n<!-- own -->\nMy words.\n"
    hub.add(REPO, {"README.md": own, "notes.txt": b"n", "photo.png": b"\x89PNG"}, private=True)
    push = pusher(hub, tmp_path)
    assert ("untouched", "notes.txt", "1 B") in push(dry_run=True).tables()[0].rows
    push(prune=True)
    assert hub.repo(REPO).read("README.md").endswith(b"<!-- own -->\nMy words.\n")
    assert hub.repo(REPO).read("notes.txt") == b"n" and "photo.png" in hub.repo(REPO).files()


def test_files_of_others_with_names_of_ours(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"quantkit.json": b"[]", "SHA256SUMS": b"sums"}, private=True)
    push = pusher(hub, tmp_path)
    with pytest.raises(UsageError, match=r"'SHA256SUMS' is there and was not written by quantkit"):
        push()
    assert hub.repo(REPO).read("SHA256SUMS") == b"sums"
    push(replace=True)
    sound(hub, REPO, push.targets)


def test_prune_deletes_what_an_earlier_push_put_there(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    push()
    hub.add(REPO, {"mine.gguf": b"GGUF"})
    push.targets = [push.targets[0]]
    rows = {row[1]: row[0] for row in push(dry_run=True, prune=True).tables()[0].rows}
    assert rows["Tiny-Q5_K_M.gguf"] == "delete" and rows["mine.gguf"] == "untouched"
    done = push(prune=True).done[0]
    assert done.deleted == ("Tiny-Q5_K_M.gguf", "recipes/gguf-q5_k_m.yaml")
    found = hub.repo(REPO).files()
    assert "Tiny-Q5_K_M.gguf" not in found and {"mine.gguf", ".gitattributes"} <= set(found)
    document = json.loads(hub.repo(REPO).read("quantkit.json"))
    assert list(document["targets"]) == ["gguf-q4_k_m"]
    sound(hub, REPO, push.targets)


def test_prune_knows_what_went_with_earlier_cards(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    push()
    mine = {"report/mine.png": b"\x89PNG", "recipes/mine.yaml": b"x: 1", "recipe.yaml": b"x: 1"}
    lfs.add(REPO, mine)
    alone: dict[str, Any] = {"card": lambda publication, remote: {"README.md": b"---\nlicense: mit\n---\n"}}
    push.targets = [gguf(tmp_path / "other", "q6_k")]
    told = "1 file of an earlier push stays (it is 'report/quality.png'); --prune deletes it"
    assert told in push(dry_run=True, **alone).tables()[0].notes
    push(**alone)
    assert json.loads(lfs.repo(REPO).read("quantkit.json"))["left"] == ["report/quality.png"]
    assert push(**alone).done[0].unchanged
    gone = {"Tiny-Q4_K_M.gguf", "Tiny-Q5_K_M.gguf", "recipes/gguf-q4_k_m.yaml", "recipes/gguf-q5_k_m.yaml"}
    rows = push(dry_run=True, prune=True, **alone)
    assert rows.tables()[0].notes[-1].endswith(" to send; 5 files to delete")
    changes = {file["path"]: file["change"] for file in rows.to_json()["plans"][0]["files"]}  # type: ignore[index]
    assert {path for path, change in changes.items() if change == "delete"} == {*gone, "report/quality.png"}
    assert set(push(prune=True, **alone).done[0].deleted) == {*gone, "report/quality.png"}
    assert set(mine) <= set(lfs.repo(REPO).files())
    assert "left" not in json.loads(lfs.repo(REPO).read("quantkit.json"))
    assert push(prune=True, **alone).done[0].unchanged


def test_prune_leaves_the_recipes_of_other_branches(lfs: HubServer, tmp_path: Path) -> None:
    both = [gptq(tmp_path, name) for name in ("a", "b")]
    push = Pusher(lfs, both[:1], Publish("alice/T", layout="branches"), tmp_path / "publish.json")
    push()
    push.targets = both[1:]
    push(prune=True)
    assert {"recipes/a.yaml", "recipes/b.yaml"} <= set(lfs.repo("alice/T").files())
    assert push.said.lines.count("push making alice/T, private") == 1
    assert "push making branch b of alice/T" in push.said.lines


def test_public_once_everything_is_verified(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path, Publish(REPO, visibility="private-then-public"))
    push()
    assert not hub.repo(REPO).private
    shown = next(i for i, line in enumerate(hub.log) if "PUT" in line and "settings" in line)
    assert not any("commit/" in line for line in hub.log[shown:])
    before = len(hub.log)
    push()
    assert writes(hub, before) == []


def test_visibility_is_never_changed_silently(lfs: HubServer, tmp_path: Path) -> None:
    lfs.add(REPO, {"x": b"x"}, private=False)
    push = pusher(lfs, tmp_path, Publish(REPO, visibility="private"))
    with pytest.raises(UsageError, match="is public, private was asked for") as caught:
        push()
    assert "give --visibility public" in str(caught.value)
    push(confirmed=True)
    assert not lfs.repo(REPO).private
    lfs.add("alice/other", {"secret": b"x"}, private=True)
    then = Publish("alice/other", visibility="private-then-public")
    with pytest.raises(
        UsageError, match=r"would become public with .*: 1 file on main \(1 B, first: 'secret'\)"
    ):
        push(how=then)
    assert lfs.repo("alice/other").private and "README.md" not in lfs.repo("alice/other").files()
    push(how=then, confirmed=True)
    assert not lfs.repo("alice/other").private


def test_branches_start_with_the_first_commit(hub: HubServer, tmp_path: Path) -> None:
    files = {"model.safetensors": b"\0x", "config.json": b"{}"}
    targets = [
        target(tmp_path, f"exl3-{b}", "exl3", "w4", files | {"b": b"%d" % b}, bits=b) for b in (4.0, 5.0)
    ]
    hub.add("alice/Tiny-EXL3", {"on-main.txt": b"x"}, private=True)
    push = Pusher(hub, targets, Publish("alice/Tiny-{target}", tag="v1"), tmp_path / "publish.json")
    pushed = push()
    repo = hub.repo("alice/Tiny-EXL3")
    assert {ref for ref in repo.refs if "heads" in ref} == {
        f"refs/heads/{b}" for b in ("main", "4.0bpw", "5.0bpw")
    }
    for bits, made in (("4.0bpw", targets[0]), ("5.0bpw", targets[1])):
        sound(hub, repo.id, [made], bits)
        assert "on-main.txt" not in repo.files(bits)
        assert repo.history(bits)[-1].title == "initial commit" and len(repo.history(bits)) == 3
    main = repo.files()
    assert "model.safetensors" not in main and "SHA256SUMS" not in main and "on-main.txt" in main
    document = json.loads(repo.read("quantkit.json"))
    assert document["placed"]["exl3-5.0"] == {
        "files": ["b", "config.json", "model.safetensors"],
        "branch": "5.0bpw",
    }
    assert repo.resolve("v1") == repo.resolve("main") == pushed.done[-1].commit
    before = len(hub.log)
    assert all(done.unchanged for done in push().done)
    assert writes(hub, before) == []
    push.targets = [target(tmp_path, "exl3-6", "exl3", "w4", files, bits=6.0)]
    push(how=Publish("alice/Tiny-{target}"))
    assert repo.read("README.md").count(b"- exl3-") == 3


def test_a_branch_to_commit_to(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"on-main.txt": b"x"}, private=True)
    push = pusher(hub, tmp_path, Publish(REPO, branch="next"))
    assert "branch next will be made from main" in push(dry_run=True).tables()[0].notes
    push()
    sound(hub, REPO, push.targets, "next")
    assert "on-main.txt" in hub.repo(REPO).files("next")
    assert "README.md" not in hub.repo(REPO).files("main")


def test_a_pull_request(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"x.txt": b"x"}, private=False)
    push = pusher(hub, tmp_path, Publish(REPO, create_pr=True, tag="v1"))
    (done,) = push().done
    (made,) = hub.repo(REPO).pull_requests
    assert (made.num, made.status, done.pull_request) == (1, "open", 1)
    assert made.title.startswith("Add Q4_K_M, Q5_K_M (quantkit ")
    sound(hub, REPO, push.targets, "refs/pr/1")
    assert set(hub.repo(REPO).files()) == {".gitattributes", "x.txt"}
    assert hub.repo(REPO).resolve("v1") is None and not hub.repo(REPO).private
    before = len(hub.log)
    assert push().done[0].unchanged
    assert writes(hub, before) == []
    push.record.unlink()
    push()
    assert len(hub.repo(REPO).pull_requests) == 1


def test_a_pull_request_that_was_closed_is_not_gone_on_with(lfs: HubServer, tmp_path: Path) -> None:
    lfs.add(REPO, {"x.txt": b"x"}, private=False)
    push = pusher(lfs, tmp_path, Publish(REPO, create_pr=True))
    push()
    lfs.repo(REPO).pull_requests[0].status = "closed"
    assert push().done[0].pull_request == 2
    lfs.repo(REPO).pull_requests[1].status = "merged"
    lfs.repo(REPO).refs["refs/heads/main"] = lfs.repo(REPO).refs["refs/pr/2"]
    (done,) = push().done
    assert done.pull_request is None and done.unchanged and len(lfs.repo(REPO).pull_requests) == 2


def test_a_pull_request_needs_a_repository(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path, Publish(REPO, create_pr=True))
    with pytest.raises(UsageError, match="no pull request can be opened"):
        push()
    assert not lfs.has(REPO)


def test_tags(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path, Publish(REPO, tag="v1"))
    push()
    assert lfs.repo(REPO).resolve("v1") == lfs.repo(REPO).resolve("main")
    push()
    folder, made = push.targets[0]
    push.targets = [(folder, changed(folder, made, "Tiny-Q4_K_M.gguf", b"GGUF 2")), push.targets[1]]
    before = lfs.repo(REPO).resolve("main")
    with pytest.raises(UsageError, match="has a tag 'v1' at"):
        push(replace=True)
    assert lfs.repo(REPO).resolve("main") == before == lfs.repo(REPO).resolve("v1")


def test_files_that_are_not_what_was_made(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    (push.targets[0][0] / "Tiny-Q4_K_M.gguf").write_bytes(b"GGUF damaged")
    with pytest.raises(VerifyError, match=r"Tiny-Q4_K_M.gguf` is not the file that was made") as caught:
        push()
    assert "run quantkit convert again with --on-exists replace" in str(caught.value)
    (push.targets[0][0] / "Tiny-Q4_K_M.gguf").unlink()
    with pytest.raises(VerifyError, match="No such file"):
        push()
    assert push(dry_run=True).tables()[0].blockers and not lfs.has(REPO)


def test_a_target_that_an_engine_found_unsound(lfs: HubServer, tmp_path: Path) -> None:
    bad = target(tmp_path, "bad", "gguf", "q4_k_m", {"T-Q4_K_M.gguf": b"GGUF"}, problem="it says nothing")
    push = Pusher(lfs, [bad], Publish(REPO), tmp_path / "publish.json")
    with pytest.raises(VerifyError, match=r"`bad` is not sound in llama.cpp: it says nothing"):
        push()
    assert not lfs.has(REPO)


def test_scrubbing_and_licences_come_first(lfs: HubServer, tmp_path: Path) -> None:
    push = pusher(lfs, tmp_path)
    seen: list[str] = []

    def scrub(files: object) -> list[str]:
        seen.extend(files)  # type: ignore[call-overload]
        return ["config.json:3 a path"]

    with pytest.raises(UsageError, match=r"must not be published: config.json:3 a path"):
        push(scrub=scrub)
    assert {"Tiny-Q4_K_M.gguf", "README.md", "quantkit.json", "recipes/gguf-q4_k_m.yaml"} <= set(seen)

    class Licence:
        gated, reminders, warnings, blockers = True, ("Built with X",), (), ("no derivatives",)
        blockers_if_public = ()

    with pytest.raises(UsageError, match="no derivatives"):
        push(licence=lambda publication: Licence)
    assert not lfs.has(REPO)
    Licence.blockers = ()
    assert "Built with X" in push(dry_run=True, licence=lambda publication: Licence).tables()[0].notes
    push(licence=lambda publication: Licence)
    assert lfs.repo(REPO).gated == "auto"
    gate = next(i for i, line in enumerate(lfs.log) if line.startswith("PUT") and "settings" in line)
    assert not any("commit/" in line or "preupload" in line for line in lfs.log[:gate])


def test_names_that_llama_cpp_passes_over(lfs: HubServer, tmp_path: Path) -> None:
    odd = target(tmp_path, "odd", "gguf", "q6_k", {"tiny-mtp-1B-Q6_K.gguf": b"GGUF"})
    notes = Pusher(lfs, [odd], Publish(REPO), tmp_path / "p.json")(dry_run=True).tables()[0].notes
    assert any("holds 'mtp-'" in note for note in notes)
    assert any("without Q4_K_M or Q8_0" in note for note in notes)


def test_names_that_the_hub_does_not_take(lfs: HubServer, tmp_path: Path) -> None:
    odd = target(tmp_path, "odd", "gguf", "q4_k_m", {"a#b-Q4_K_M.gguf": b"GGUF"})
    with pytest.raises(UsageError, match=r"'a#b-Q4_K_M.gguf' is no name"):
        Pusher(lfs, [odd], Publish(REPO), tmp_path / "p.json")()


def test_a_server_without_xet_gets_lfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    tame(monkeypatch, xet=True)
    with HubServer() as hub:
        push = pusher(hub, tmp_path)
        push()
        sound(hub, REPO, push.targets)
        assert len([line for line in hub.log if "xet-write-token" in line]) == 1
        assert any("has no Xet storage" in line for line in push.said.lines) and push.slept == []
    assert constants.HF_HUB_DISABLE_XET is False


def test_large_files_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tame(monkeypatch)
    with HubServer(multipart=50) as hub:
        push = pusher(hub, tmp_path)
        push()
        sound(hub, REPO, push.targets)
        assert any("/part/3" in line for line in hub.log)


def test_the_record_says_what_is_where(hub: HubServer, tmp_path: Path) -> None:
    push = pusher(hub, tmp_path)
    push()
    document = json.loads(push.record.read_text())
    (entry,) = document["publications"]
    assert (entry["repo"], entry["branch"], entry["step"]) == (REPO, "main", "done")
    assert entry["commit"] == hub.repo(REPO).resolve("main")
    assert entry["files"]["Tiny-Q4_K_M.gguf"]["bytes"] == 125
    assert {"quantkit", "huggingface_hub", "hf_xet"} <= set(document["versions"])


def test_only_members_with_the_right_role_make_repositories(lfs: HubServer, tmp_path: Path) -> None:
    lfs.tokens["hf_carolcarolcarol"] = User("carol", {"acme": "read"})
    push = pusher(lfs, tmp_path, Publish("acme/Tiny"))
    with pytest.raises(HubError, match="it may write to carol"):
        push(token="hf_carolcarolcarol")
