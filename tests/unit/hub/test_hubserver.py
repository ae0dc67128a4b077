"""The test server speaks the Hub's protocol: everything here goes through the real client.

What these tests say of the client (what it retries, what it overlooks) is what the package is built on:
one that fails after an update of the client says which assumption no longer holds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tests.hubserver import Entry, Fault, HubServer
from tests.hubserver.client import ALICE, BOB, READER, SENDS_FILES, Clock, download, tame, upload

pytestmark = SENDS_FILES

REPO = "alice/tiny"
CARD = b"---\nlicense: mit\nbase_model: org/base\ntags: [gguf]\n---\n# Tiny\n"
WEIGHTS = random.Random(1).randbytes(9000)
FILES = {"README.md": CARD, "config.json": b"{}", "sub/a.gguf": WEIGHTS, "sub/deep/empty.txt": b""}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return tame(monkeypatch)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=ALICE)


def calls(hub: HubServer, start: str) -> list[str]:
    return [line for line in hub.log if line.startswith(start)]


# Accounts and repositories


def test_who_asks(hub: HubServer, api: HfApi) -> None:
    known = api.whoami()
    assert (known["name"], [org["name"] for org in known["orgs"]]) == ("alice", ["acme"])
    assert api.whoami(token=READER)["auth"]["accessToken"]["role"] == "read"
    del hub.tokens[ALICE]
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api.model_info(REPO)
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        api.whoami()


def test_create_and_delete(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo("acme/new", visibility="private").repo_id == "acme/new"
    assert hub.repo("acme/new").private
    assert list(hub.repo("acme/new").files()) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("acme/new")
    assert caught.value.response.status_code == 409
    assert api.create_repo("acme/new", visibility="public", exist_ok=True).repo_id == "acme/new"
    assert hub.repo("acme/new").private, "what is there keeps its visibility"
    api.delete_repo("acme/new")
    assert not hub.has("acme/new")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("acme/new")
    api.create_repo("acme/texts", repo_type="dataset")
    assert hub.has("acme/texts", "dataset") and not hub.has("acme/texts")


@pytest.mark.parametrize("token", [BOB, READER])
def test_create_where_one_may_not(api: HfApi, token: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("acme/new", token=token)
    assert caught.value.response.status_code == 403


@pytest.mark.parametrize("token", [BOB, READER])
def test_rights_to_write(hub: HubServer, api: HfApi, token: str) -> None:
    api.auth_check(REPO, write=True)
    api.auth_check(REPO, token=token)
    with pytest.raises(HfHubHTTPError) as caught:
        api.auth_check(REPO, write=True, token=token)
    assert caught.value.response.status_code == 403
    for path in ("a.txt", "a.gguf"):
        with pytest.raises(HfHubHTTPError) as caught:
            upload(api, REPO, {path: b"x"}, token=token)
        assert caught.value.response.status_code == 403
    assert len(hub.repo(REPO).commits) == 2


def test_private(hub: HubServer, api: HfApi) -> None:
    hub.repo(REPO).private = True
    assert api.model_info(REPO).private
    assert api.model_info(REPO, token=READER).private
    for repo in (REPO, "alice/none"):
        for token, status in ((BOB, 404), (False, 401)):
            with pytest.raises(RepositoryNotFoundError) as caught:
                api.model_info(repo, token=token)
            assert caught.value.response.status_code == status
    api.update_repo_settings(REPO, visibility="public")
    assert not api.model_info(REPO, token=False).private


def test_gated(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.update_repo_settings(REPO, gated="manual")
    assert api.model_info(REPO, token=False).gated == "manual"
    for token, status in ((BOB, 403), (False, 401)):
        with pytest.raises(GatedRepoError) as caught:
            api.hf_hub_download(REPO, "config.json", token=token, cache_dir=tmp_path)
        assert caught.value.response.status_code == status
        with pytest.raises(GatedRepoError) as caught:
            api.auth_check(REPO, token=token)
        assert caught.value.response.status_code == status
    hub.repo(REPO).admitted.add("bob")
    api.auth_check(REPO, token=BOB)


def test_card_is_checked(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(ValueError, match='"tags" must be an array'):
        upload(api, REPO, {"README.md": b"---\ntags: gguf\n---\n"})
    with pytest.raises(ValueError, match="YAML Metadata Error"):
        upload(api, REPO, {"README.md": b"---\ntags: [\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload(api, REPO, {"README.md": b"# Tiny"})
    assert hub.repo(REPO).read("README.md") == b"# Tiny"


# What a repository tells


def test_info(hub: HubServer, api: HfApi) -> None:
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == hub.repo(REPO).commits[0].sha
    assert info.tags == ["gguf", "license:mit", "base_model:org/base"]
    assert info.card_data is not None and info.card_data.base_model == "org/base"
    assert {s.rfilename: (s.size, s.lfs is not None) for s in info.siblings or ()} == {
        ".gitattributes": (306, False),
        "README.md": (len(CARD), False),
        "config.json": (2, False),
        "sub/a.gguf": (9000, True),
        "sub/deep/empty.txt": (0, False),
    }
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v2")


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ("license: [1, {a: b}]", {"license": [1, {"a": "b"}]}),
        ("datasets: {a: [b]}", {"datasets": {"a": ["b"]}}),
        ("tags: &t [x]\ndatasets: *t", {"tags": ["x"], "datasets": ["x"]}),
        ("x: 2024-01-01\n3: !!binary bWl0\ny: !!set {a}", {"x": "2024-01-01", "3": "6d6974", "y": ["a"]}),
        ("x: .nan\ny: .5", {"y": 0.5}),
        ('x: "c\\0d"', {"x": "c\0d"}),
        ("[a, b]: 3", None),
        ("x: 2024-99-99", None),
        ("x: &x [*x]", None),
        ("x: [\t", None),
        ("x: \x1b", None),
        (BOMB, None),
        ("x: 1\n" + "# more\n" * 300_000, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_info_of_a_card_of_odd_types(
    front: str, told: dict[str, object] | None, hub: HubServer, api: HfApi
) -> None:
    """It is answered, as JSON, or as if there were no card."""
    hub.add(REPO, {"README.md": f"---\n{front}\n---\n".encode()})
    found = api.model_info(REPO).card_data
    assert (None if found is None else found.to_dict()) == told


@pytest.mark.parametrize("front", ["self: 1", "tags: 3", "ignore_metadata_errors: true"])
def test_cards_that_the_client_cannot_take(front: str, hub: HubServer, api: HfApi) -> None:
    hub.add(REPO, {"README.md": f"---\n{front}\n---\n".encode()})
    with pytest.raises(TypeError):
        api.model_info(REPO)
    info = api.model_info(REPO, expand=["sha", "private", "gated"])
    assert (info.sha, info.private, info.gated) == (hub.repo(REPO).commits[0].sha, False, False)
    assert info.card_data is None and info.siblings is None


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_tree_and_its_pages(page: int) -> None:
    with HubServer(page=page) as hub:
        hub.add(REPO, FILES)
        api = HfApi(endpoint=hub.url, token=False)
        found = {item.path: item for item in api.list_repo_tree(REPO, recursive=True)}
        assert set(found) == {".gitattributes", "sub", "sub/deep", *FILES}
        stored = hub.repo(REPO).files()
        for path, item in found.items():
            if isinstance(item, RepoFile):
                assert (item.size, item.blob_id) == (stored[path].size, stored[path].oid)
                assert (item.lfs.sha256 if item.lfs else None) == stored[path].sha256
        assert {item.path for item in api.list_repo_tree(REPO)} == {
            ".gitattributes",
            "README.md",
            "config.json",
            "sub",
        }
        assert {i.path for i in api.list_repo_tree(REPO, "sub")} == {"sub/a.gguf", "sub/deep"}
        with pytest.raises(RemoteEntryNotFoundError):
            list(api.list_repo_tree(REPO, "none"))
        assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Add files", "initial commit"]


def test_paths(api: HfApi) -> None:
    found = api.get_paths_info(REPO, ["config.json", "sub", "none", "sub/a.gguf"])
    assert sorted(item.path for item in found) == ["config.json", "sub", "sub/a.gguf"]
    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "none")
    (file,) = api.get_paths_info(REPO, "config.json")
    assert isinstance(file, RepoFile) and file.blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


# Writing


def test_commit(hub: HubServer, api: HfApi) -> None:
    made = upload(api, REPO, {"new.gguf": WEIGHTS[::-1], "new.txt": b"new"}, commit_description="why")
    repo = hub.repo(REPO)
    assert (repo.commits[0].sha, repo.commits[0].title) == (made.oid, "Add")
    assert (repo.commits[0].description, repo.commits[0].author) == ("why", "alice")
    assert repo.read("new.gguf") == WEIGHTS[::-1] and repo.read("new.txt") == b"new"
    assert repo.files()["new.gguf"].sha256 and not repo.files()["new.txt"].sha256
    assert repo.read("sub/a.gguf") == WEIGHTS, "what was there stays"
    assert len(calls(hub, "PUT /lfs/")) == len(calls(hub, "POST /lfs/")) == 1
    (put,) = (request for request in hub.requests if request.method == "PUT")
    assert "authorization" not in put.headers and put.size == len(WEIGHTS)
    upload(api, REPO, {"again.gguf": WEIGHTS[::-1]})
    assert len(calls(hub, "PUT /lfs/")) == 1, "what is stored is not sent again"


def test_unchanged_files_make_no_commit(hub: HubServer, api: HfApi) -> None:
    head = hub.repo(REPO).commits[0].sha
    assert upload(api, REPO, dict(FILES)).oid == head
    assert not calls(hub, f"POST /api/models/{REPO}/commit/")


def test_delete_and_copy(hub: HubServer, api: HfApi) -> None:
    api.create_branch(REPO, branch="b", revision=api.list_repo_commits(REPO)[-1].commit_id)
    operations = [
        CommitOperationCopy("sub/a.gguf", "b.gguf", src_revision="main"),
        CommitOperationCopy("README.md", "c.md", src_revision="main"),
    ]
    api.create_commit(REPO, operations, commit_message="Copy", revision="b")
    repo = hub.repo(REPO)
    assert set(repo.files("b")) == {".gitattributes", "b.gguf", "c.md"}
    assert (repo.read("b.gguf", "b"), repo.files("b")["b.gguf"].size) == (WEIGHTS, 9000)
    gone = [CommitOperationDelete("README.md"), CommitOperationDelete("sub/", is_folder=True)]
    api.create_commit(REPO, gone, commit_message="Delete")
    assert set(repo.files()) == {".gitattributes", "config.json"}
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPO, gone[:1], commit_message="Delete")


def test_branches_and_tags(hub: HubServer, api: HfApi) -> None:
    first = api.list_repo_commits(REPO)[-1].commit_id
    with pytest.raises(RevisionNotFoundError):
        upload(api, REPO, {"a.txt": b"a"}, revision="4.0bpw")
    api.create_branch(REPO, branch="4.0bpw", revision=first)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(REPO, branch="4.0bpw")
    assert caught.value.response.status_code == 409
    api.create_branch(REPO, branch="4.0bpw", exist_ok=True)
    made = upload(api, REPO, {"a.txt": b"a"}, revision="4.0bpw")
    assert set(hub.repo(REPO).files("4.0bpw")) == {".gitattributes", "a.txt"}
    api.create_tag(REPO, tag="v1", revision="4.0bpw")
    refs = api.list_repo_refs(REPO)
    assert {branch.name: branch.target_commit for branch in refs.branches}["4.0bpw"] == made.oid
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", made.oid)]
    assert api.model_info(REPO, revision=made.oid[:7]).sha == made.oid
    api.delete_branch(REPO, branch="4.0bpw")
    api.delete_tag(REPO, tag="v1")
    assert list(hub.repo(REPO).refs) == ["refs/heads/main"]
    hub.add(REPO, {"b.txt": b"b"}, revision="new")
    assert set(hub.repo(REPO).files("new")) == {".gitattributes", "b.txt"}


def test_stale_parent(hub: HubServer, api: HfApi) -> None:
    stale = hub.repo(REPO).commits[0].sha
    hub.add(REPO, {"other.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError) as caught:
        upload(api, REPO, {"a.txt": b"ours"}, parent_commit=stale)
    assert caught.value.response.status_code == 412
    assert "a.txt" not in hub.repo(REPO).files()
    upload(api, REPO, {"a.txt": b"ours"}, parent_commit=hub.repo(REPO).commits[0].sha)
    assert hub.repo(REPO).read("a.txt") == b"ours"


def test_somebody_else_is_faster(hub: HubServer, api: HfApi) -> None:
    hub.when("POST .*/commit/", lambda: hub.add(REPO, {"other.txt": b"theirs"}))
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(api, REPO, {"a.txt": b"ours"}, parent_commit=hub.repo(REPO).commits[0].sha)
    upload(api, REPO, {"a.txt": b"ours"})
    assert [c.title for c in hub.repo(REPO).history()] == ["Add", "Add files", "Add files", "initial commit"]


def test_pull_requests(hub: HubServer, api: HfApi) -> None:
    made = upload(api, REPO, {"a.txt": b"a", "a.gguf": b"\0"}, create_pr=True, token=BOB, message="Mine")
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    upload(api, REPO, {"b.txt": b"b"}, revision="refs/pr/1")
    repo = hub.repo(REPO)
    assert {"a.txt", "a.gguf", "b.txt"} <= set(repo.files("refs/pr/1"))
    assert "a.txt" not in repo.files() and repo.pull_requests[0].author == "bob"
    second = api.create_pull_request(REPO, title="Second", description="text")
    api.create_discussion(REPO, title="Question", description="text")
    assert (second.num, second.status, second.target_branch) == (2, "draft", "refs/heads/main")
    opened = list(api.get_repo_discussions(REPO, discussion_type="pull_request", discussion_status="open"))
    assert [(item.num, item.title, item.author) for item in opened] == [
        (2, "Second", "alice"),
        (1, "Mine", "bob"),
    ]
    assert [item.num for item in api.get_repo_discussions(REPO, author="bob")] == [1]
    assert len(api.list_repo_refs(REPO, include_pull_requests=True).pull_requests or ()) == 2
    api.change_discussion_status(REPO, 2, new_status="closed")
    api.merge_pull_request(REPO, 1)
    assert repo.read("a.txt") == b"a"
    assert [api.get_discussion_details(REPO, i).status for i in (1, 2, 3)] == ["merged", "closed", "open"]


def test_many_discussions(hub: HubServer, api: HfApi) -> None:
    for i in range(23):
        api.create_discussion(REPO, title=f"Discussion {i}", description="text")
    assert [item.num for item in api.get_repo_discussions(REPO)] == list(range(23, 0, -1))


@pytest.mark.parametrize("size", [10_000, 12_000])
def test_multipart(size: int) -> None:
    content = random.Random(2).randbytes(size)
    with HubServer(multipart=4000) as hub:
        api = HfApi(endpoint=hub.url, token=ALICE)
        api.create_repo(REPO)
        upload(api, REPO, {"a.gguf": content, "small.gguf": b"\0"})
        assert hub.repo(REPO).read("a.gguf") == content
        assert sorted(line.partition("/part/")[2] for line in calls(hub, "PUT")) == ["", "1", "2", "3"]
        assert len([line for line in calls(hub, "POST /lfs/") if line.endswith("/complete")]) == 1


def test_upload_folder_and_back(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    api.create_repo("acme/new", private=True)
    made = api.upload_folder(repo_id="acme/new", folder_path=tmp_path / "out")
    assert made.oid == hub.repo("acme/new").commits[0].sha
    assert hub.repo("acme/new").files("main").keys() - {".gitattributes"} == set(FILES)
    assert download(hub.url, "acme/new", tmp_path / "cache", token=ALICE) == FILES


# Reading


def test_download(hub: HubServer, tmp_path: Path) -> None:
    assert download(hub.url, REPO, tmp_path) == FILES
    assert calls(hub, "GET /cdn/models/alice/tiny/") == [
        f"GET /cdn/models/alice/tiny/{hub.repo(REPO).commits[0].sha}/sub/a.gguf"
    ]
    assert not calls(hub, "GET /alice/tiny/resolve/main/sub/a.gguf"), "large files come from the other origin"


def test_files_that_are_not_there(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="v2", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("asked", "status", "wanted"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        ("bytes=8990-", 206, WEIGHTS[8990:]),
        ("bytes=-10", 206, WEIGHTS[-10:]),
        ("bytes=8990-20000", 206, WEIGHTS[8990:]),
        ("bytes=9000-", 416, b""),
    ],
)
def test_ranges(hub: HubServer, asked: str, status: int, wanted: bytes) -> None:
    url = f"{hub.url}/{REPO}/resolve/main/sub/a.gguf"
    with httpx2.Client(follow_redirects=True) as client:
        answer = client.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, wanted)


def test_range_of_a_header(hub: HubServer, api: HfApi) -> None:
    """The client reads the headers of safetensors by ranges."""
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    hub.add(REPO, {"model.safetensors": len(header).to_bytes(8, "little") + header + b"1234"})
    found = api.get_safetensors_metadata(REPO)
    assert found.files_metadata["model.safetensors"].tensors["w"].shape == [4]


def test_stored_bytes_that_are_not_what_they_were(hub: HubServer, tmp_path: Path) -> None:
    before = hub.repo(REPO).files()
    hub.corrupt(REPO, "sub/a.gguf")
    hub.corrupt(REPO, "config.json")
    assert hub.repo(REPO).files() == before
    found = download(hub.url, REPO, tmp_path)
    assert [a != b for a, b in zip(found["sub/a.gguf"], WEIGHTS, strict=True)].count(True) == 1
    assert found["config.json"] != b"{}", "the client notices neither"


# Xet


@pytest.fixture
def xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server with Xet, if the installed `hf_xet` can keep its chunks in a folder."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    try:
        with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{tmp_path / 'probe'}") as commit:
            commit.start_upload_bytes(b"probe", sha256=hf_xet.COMPUTE_SHA256)
    except (AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        pytest.skip(f"this hf_xet has no local:// store any more: {error}")
    with HubServer(xet=tmp_path / "xet") as server:
        yield server


@pytest.mark.parametrize("whole_folder", [True, False])
def test_xet(xet: HubServer, tmp_path: Path, whole_folder: bool) -> None:
    api = HfApi(endpoint=xet.url, token=ALICE)
    api.create_repo(REPO)
    (tmp_path / "a.gguf").write_bytes(WEIGHTS)
    if whole_folder:
        api.upload_folder(repo_id=REPO, folder_path=tmp_path, allow_patterns="a.gguf")
    else:
        api.upload_file(path_or_fileobj=tmp_path / "a.gguf", path_in_repo="a.gguf", repo_id=REPO)
    entry = xet.repo(REPO).files()["a.gguf"]
    assert entry.sha256 and entry.xet and entry.size == 9000
    assert not calls(xet, "PUT") and calls(xet, f"GET /api/models/{REPO}/xet-write-token")
    assert xet.repo(REPO).read("a.gguf") == WEIGHTS
    assert download(xet.url, REPO, tmp_path / "cache") == {"a.gguf": WEIGHTS}
    assert not calls(xet, "GET /cdn/") and calls(xet, f"GET /api/models/{REPO}/xet-read-token")
    api.create_branch(REPO, branch="b")
    copy = CommitOperationCopy("a.gguf", "b.gguf", src_revision="main")
    api.create_commit(REPO, [copy], commit_message="Copy", revision="b")
    assert xet.repo(REPO).files("b")["b.gguf"].size == 9000


def test_xet_file_for_a_client_without(
    xet: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = HfApi(endpoint=xet.url, token=ALICE)
    api.create_repo(REPO)
    upload(api, REPO, {"a.gguf": WEIGHTS})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert download(xet.url, REPO, tmp_path / "cache") == {"a.gguf": WEIGHTS}
    assert calls(xet, "GET /cdn/")


def test_xet_does_not_notice_a_flipped_byte(xet: HubServer, tmp_path: Path) -> None:
    api = HfApi(endpoint=xet.url, token=ALICE)
    api.create_repo(REPO)
    upload(api, REPO, {"a.gguf": WEIGHTS, "b.gguf": WEIGHTS[::-1]})
    xet.corrupt(REPO, "a.gguf")
    found = download(xet.url, REPO, tmp_path / "cache")
    assert len(found["a.gguf"]) == 9000 and found["a.gguf"] != WEIGHTS
    assert found["b.gguf"] == WEIGHTS[::-1]


def test_server_without_xet(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not fall back by itself; it can be told to in the same process."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match="404"):
        upload(api, REPO, {"a.gguf": b"\0"})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    upload(api, REPO, {"a.gguf": b"\0"})
    assert hub.repo(REPO).read("a.gguf") == b"\0"


# The server itself


def test_the_end_is_immediate_whatever_waits() -> None:
    with HubServer() as hub:
        hub.add(REPO, FILES)
        hub.faults.append(Fault("/api/models", "stall", seconds=60))
        with pytest.raises(httpx2.ReadTimeout):
            HfApi(endpoint=hub.url).model_info(REPO, timeout=0.05)
        begun = time.perf_counter()
    assert time.perf_counter() - begun < 1


def test_a_flaw_of_the_server_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="KeyError"), HubServer() as hub:
        answer = httpx2.post(
            f"{hub.url}/api/repos/create", json={}, headers={"Authorization": f"Bearer {BOB}"}
        )
        assert answer.status_code == 500


def test_commits_have_the_same_names_in_every_run() -> None:
    made = []
    for _ in range(2):
        with HubServer() as hub:
            made.append(hub.add(REPO, FILES))
    assert made[0] == made[1]


def test_entry() -> None:
    """Git's own answer for a file of two bytes."""
    with HubServer() as hub:
        hub.add(REPO, {"config.json": b"{}"})
        expected = Entry("config.json", 2, "9e26dfeeb6e641a33dae4961196235bdb965b21b")
        assert hub.repo(REPO).files()["config.json"] == expected
