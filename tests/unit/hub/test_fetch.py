"""`resolve` through the real client against a server on 127.0.0.1: what is fetched, for whom, and when."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import BudgetError, SourceError
from quantkit.hub import listing as listing_module
from quantkit.hub.fetch import Source, resolve
from tests.downloads import (
    ALICE,
    BOB,
    BODY,
    INFO,
    SHARD,
    TREE,
    downloads,
    fetched,
    head,
    refused,
)
from tests.hubserver import Fault, HubServer

pytestmark = pytest.mark.usefixtures("sleeps")


# ---- what is fetched


def test_an_existing_folder_is_taken_as_it_is(repo: Path) -> None:
    assert resolve(str(repo)) == Source(repo, None, None, str(repo))


def test_an_existing_gguf_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "m.gguf")).path == tmp_path / "m.gguf"


def test_an_existing_folder_wins_over_a_repository(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    shutil.copytree(repo, tmp_path / "org" / "tiny")
    assert resolve("org/tiny").id is None


def test_download(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = fetched("org/tiny", hub, cache)
    assert (source.id, source.revision, source.requested) == ("org/tiny", head(hub), "org/tiny")
    assert sorted(p.name for p in source.path.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "quantize_config.json",
        "tokenizer.json",
    ]
    assert torch.equal(Checkpoint.open(source.path).read("b"), torch.full((9,), 2.0))
    skipped = 400 + len(hub.repo("org/tiny").read(".gitattributes"))
    assert f"2 weight files, skipped 5 others of {skipped} bytes" in caplog.text


def test_a_second_download_asks_for_the_revision_only(hub: HubServer, cache: Path) -> None:
    first = fetched("org/tiny", hub, cache)
    before = len(hub.log)
    assert fetched("org/tiny", hub, cache) == first
    assert hub.log[before:] == ["GET /api/models/org/tiny"]
    assert fetched(f"org/tiny@{first.revision}", hub, cache).path == first.path
    assert len(hub.log) == before + 1


def test_a_revision_that_moves_while_it_is_fetched(hub: HubServer, cache: Path, repo: Path) -> None:
    """All files are of the commit that the revision was when it was asked for."""
    before = head(hub)
    resolved = HfApi.resolve_revision

    def moving(self: HfApi, *arguments: Any, **more: Any) -> Any:
        found = resolved(self, *arguments, **more)
        hub.add("org/tiny", {"config.json": b'{"moved": true}'})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "resolve_revision", moving)
        source = fetched("org/tiny", hub, cache)
    assert (source.revision, (source.path / "config.json").read_text()) == (before, '{"file": "config.json"}')
    moved = fetched("org/tiny", hub, cache)
    assert (moved.revision, (moved.path / "config.json").read_text()) == (head(hub), '{"moved": true}')


def test_a_branch(hub: HubServer, cache: Path) -> None:
    other = hub.add("org/tiny", {"config.json": b'{"v": 2}', "model.safetensors": b"x" * 9000}, revision="v2")
    source = fetched("org/tiny@v2", hub, cache)
    assert (source.revision, (source.path / "config.json").read_text()) == (other, '{"v": 2}')


def test_gguf_by_tag_by_name_and_alone(hub: HubServer, cache: Path) -> None:
    files = {f"Tiny-{tag}.gguf": tag.encode() * 9 for tag in ("Q4_K_M", "Q8_0", "IQ4_XS")}
    hub.add("org/many-GGUF", {**files, "mmproj-Tiny-F16.gguf": b"no model", "README.md": b"hello"})
    source = fetched("org/many-GGUF:q4_k_m", hub, cache)
    assert (source.path.name, source.path.read_bytes()) == ("Tiny-Q4_K_M.gguf", b"Q4_K_M" * 9)
    assert sorted(p.name for p in source.path.parent.iterdir()) == ["README.md", "Tiny-Q4_K_M.gguf"]
    assert fetched("org/many-GGUF:Tiny-Q8_0.gguf", hub, cache).path.name == "Tiny-Q8_0.gguf"
    error = refused("org/many-GGUF", hub, cache)
    assert error.message == "org/many-GGUF has 3 GGUF models: IQ4_XS, Q4_K_M, Q8_0"
    assert error.remedy == "give one, as org/many-GGUF:IQ4_XS"
    hub.add("org/one-GGUF", {"Tiny-Q8_0.gguf": b"8" * 9, "Tiny.imatrix.gguf": b"i", "config.json": b"{}"})
    assert fetched("org/one-GGUF", hub, cache).path.name == "Tiny-Q8_0.gguf"
    assert fetched("org/one-GGUF", hub, cache, offline=True).path.name == "Tiny-Q8_0.gguf"


def test_all_shards_of_a_gguf_model(hub: HubServer, cache: Path) -> None:
    names = [f"Q6_K/big-Q6_K-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.add("org/big-GGUF", {name: name.encode() for name in names})
    for which in (":Q6_K", "", ":Q6_K/big-Q6_K-00002-of-00002.gguf"):
        path = fetched(f"org/big-GGUF{which}", hub, cache).path
        assert path.name == "big-Q6_K-00001-of-00002.gguf"
        assert len(list(path.parent.iterdir())) == 2


def test_sub_folder(hub: HubServer, cache: Path, repo: Path) -> None:
    inside = {f"fp16/{name}": (repo / name).read_bytes() for name in ("config.json", SHARD)}
    second = "model-00002-of-00002.safetensors"
    above = {"README.md": b"top", "LICENSE": b"terms", "tokenizer.json": b"{}"}
    hub.add("org/nested", {**inside, f"fp16/{second}": (repo / second).read_bytes(), **above})
    source = fetched("org/nested:fp16", hub, cache)
    assert source.path.name == "fp16"
    assert {path.name for path in source.path.parent.iterdir()} == {"fp16", "README.md", "LICENSE"}
    assert list(Checkpoint.open(source.path).tensors) == ["a", "b"]
    assert fetched("org/nested:fp16", hub, cache, offline=True) == source
    assert "it has fp16; give one, as org/nested:fp16" in str(refused("org/nested", hub, cache).remedy)
    assert "has no model 'fp8'" in refused("org/nested:fp8", hub, cache).message


def test_pickles_only(cache: Path) -> None:
    with HubServer() as hub:
        hub.add("org/tiny", {"config.json": b"{}", "pytorch_model.bin": b"x" * 100})
        error = refused("org/tiny", hub, cache)
        assert isinstance(error, SourceError)
        assert "pickle checkpoints are refused" in error.message
        assert not [line for line in hub.log if "pytorch_model" in line]


def test_no_config(hub: HubServer, cache: Path) -> None:
    hub.add("org/bare", {"model.safetensors": b"x" * 100})
    assert "has no config.json" in refused("org/bare", hub, cache).message


def test_hostile_index_fetches_nothing(hub: HubServer, cache: Path) -> None:
    hub.add("org/tiny", {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'})
    assert "not to a safetensors file next to it" in refused("org/tiny", hub, cache).message
    assert not [line for line in downloads(hub) if re.search(r"\.safetensors$", line)]


def test_a_hostile_commit_names_no_folder(hub: HubServer, cache: Path) -> None:
    body = json.dumps({"id": "org/tiny", "sha": "../../../escaped", "siblings": [], "tags": []})
    hub.faults.append(Fault(INFO, "status", status=200, body=body, times=9))
    assert refused("org/tiny", hub, cache).message == f"{hub.url} does not speak the Hub protocol."


# ---- the cache


def test_offline_uses_the_cache_and_no_network(hub: HubServer, cache: Path) -> None:
    online = fetched("org/tiny", hub, cache)
    before = len(hub.log)
    assert fetched("org/tiny", hub, cache, offline=True) == online
    assert fetched(f"org/tiny@{head(hub)}", hub, cache, offline=True).path == online.path
    assert len(hub.log) == before


def test_offline_without_the_files(hub: HubServer, cache: Path) -> None:
    for source in ("org/tiny", f"org/tiny@{head(hub)}"):
        error = refused(source, hub, cache, offline=True)
        assert error.message == "Offline and 'org/tiny' is not in the cache"
    path = fetched("org/tiny", hub, cache).path
    for name in (SHARD, "model-00002-of-00002.safetensors"):
        (path / name).unlink()
    error = refused("org/tiny", hub, cache, offline=True)
    assert error.message == f"The cached copy of org/tiny@{head(hub)[:7]} lacks 2 files (first: {SHARD})."


def test_the_clients_own_offline_switch(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert refused("org/tiny", hub, cache).message == "Offline and 'org/tiny' is not in the cache"
    assert not hub.log


def test_cache_filled_by_another_tool_has_no_listing(hub: HubServer, cache: Path) -> None:
    online = fetched("org/tiny", hub, cache)
    shutil.rmtree(cache / "models--org--tiny" / "trees")
    shutil.rmtree(cache / "models--org--tiny" / "quantkit")
    assert fetched("org/tiny", hub, cache, offline=True) == online


def test_server_gone_but_cached(hub: HubServer, cache: Path) -> None:
    online = fetched("org/tiny", hub, cache)
    hub.faults.append(Fault("", "drop", times=10_000))
    assert fetched("org/tiny", hub, cache) == online


def test_the_listing_fails_but_everything_is_cached(hub: HubServer, cache: Path) -> None:
    online = fetched("org/tiny", hub, cache)
    shutil.rmtree(cache / "models--org--tiny" / "quantkit")
    hub.faults.append(Fault(TREE, "status", times=1000))
    assert fetched("org/tiny", hub, cache) == online


def test_a_damaged_file_in_the_cache_is_noticed(hub: HubServer, cache: Path, repo: Path) -> None:
    path = fetched("org/tiny", hub, cache).path
    for name in (SHARD, "config.json"):
        blob = (path / name).resolve()
        blob.write_bytes(b"y" * blob.stat().st_size)
    fetched("org/tiny", hub, cache)
    for name in (SHARD, "config.json"):
        assert (path / name).read_bytes() == (repo / name).read_bytes()


def test_large_files_are_hashed_once(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(2**20 + 8)
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": content})
    hashed: list[str] = []
    real = listing_module._hash

    def counting(path: Path, listed: listing_module.Listed) -> str:
        hashed.append(listed.path)
        return real(path, listed)

    monkeypatch.setattr(listing_module, "_hash", counting)
    file = fetched("org/large", hub, cache).path / "model.safetensors"
    assert hashed.count(file.name) == 1
    fetched("org/large", hub, cache)
    assert hashed.count(file.name) == 1
    file.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fetched("org/large", hub, cache)
    assert hashed.count(file.name) == 3, "changed: hashed, fetched again, hashed"
    assert file.read_bytes() == content
    (cache / "models--org--large" / "quantkit" / "verified.json").write_text("garbage")
    assert fetched("org/large", hub, cache).path == file.parent


def test_too_little_disk(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    error = refused("org/tiny", hub, cache)
    assert isinstance(error, BudgetError)
    assert error.available == 10


def test_the_disk_fills_up_on_the_way(
    hub: HubServer, cache: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        error = refused("org/tiny", hub, cache)
    assert isinstance(error, BudgetError)
    assert error.message.startswith(f"disk full while downloading org/tiny into `{cache}`")
    assert (fetched("org/tiny", hub, cache).path / SHARD).read_bytes() == (repo / SHARD).read_bytes()


# ---- who may


def test_gated(hub: HubServer, cache: Path) -> None:
    hub.add("org/tiny", {}, gated=True)
    error = refused("org/tiny", hub, cache)
    assert error.message == "org/tiny is gated and you are not logged in."
    assert error.remedy == f"Accept the terms at {hub.url}/org/tiny, then run: hf auth login"
    error = refused("org/tiny", hub, cache, token=ALICE)
    assert error.message == "Your account (alice) has not been granted access to org/tiny."
    assert error.remedy == f"Request access at {hub.url}/org/tiny; approval can take a while."
    hub.repo("org/tiny").admitted.add("alice")
    assert fetched("org/tiny", hub, cache, token=ALICE).revision == head(hub)


def test_private(hub: HubServer, cache: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("acme/secret", repo, private=True)
    assert refused("acme/secret", hub, cache).message == "No public model 'acme/secret'."
    error = refused("acme/secret", hub, cache, token=BOB)
    assert error.message == "'acme/secret' does not exist or this token (bob) cannot see it."
    monkeypatch.setenv("HF_TOKEN", ALICE)
    source = fetched("acme/secret", hub, cache)
    assert (source.path / SHARD).read_bytes() == (repo / SHARD).read_bytes()


def test_unknown_repository(hub: HubServer, cache: Path) -> None:
    fetched("org/tiny", hub, cache)
    error = refused("org/tinny", hub, cache)
    assert error.message == "No public model 'org/tinny'."
    assert "Did you mean org/tiny?" in str(error.remedy)
    error = refused("org/x", hub, cache, token=ALICE)
    assert error.message == "'org/x' does not exist or this token (alice) cannot see it."


def test_unknown_revision(hub: HubServer, cache: Path) -> None:
    hub.add("org/tiny", {}, revision="v1")
    error = refused("org/tiny@mian", hub, cache)
    assert error.message == "'org/tiny' has no revision 'mian'."
    assert error.remedy == "it has main, v1. Did you mean main?"


@pytest.mark.parametrize("on", ["", BODY])
def test_a_token_that_expired(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    if on:  # while files are fetched
        hub.faults.append(Fault(on, "status", status=401, times=99))
    else:
        del hub.tokens[ALICE]
    at = f"is not valid at {hub.url}: it expired, was revoked, or is of another Hub."
    assert refused("org/tiny", hub, cache, token=ALICE).message == f"The token that was given {at}"
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert refused("org/tiny", hub, cache).message == f"The token in HF_TOKEN {at}"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text(ALICE)
    error = refused("org/tiny", hub, cache)
    assert error.message == f"The token in `{tmp_path / 'no-token'}` {at}"
    assert ALICE not in str(error)


def test_a_bad_token_that_hides_as_a_missing_repository(hub: HubServer, cache: Path) -> None:
    """Some servers answer 401 with the code of a repository that is not there, whatever is asked for."""
    del hub.tokens[ALICE]
    for code in ("RepoNotFound", "GatedRepo"):
        hub.faults[:] = [Fault(INFO, "status", status=401, headers={"X-Error-Code": code}, times=9)]
        assert "is not valid at" in refused("org/tiny", hub, cache, token=ALICE).message


def test_a_disabled_repository(hub: HubServer, cache: Path) -> None:
    headers = {"X-Error-Message": "Access to this resource is disabled."}
    hub.faults.append(Fault(INFO, "status", status=403, headers=headers))
    assert refused("org/tiny", hub, cache).message.startswith("org/tiny is disabled")


def test_no_token_in_any_log_or_at_the_storage(
    hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    hub.faults.append(Fault(BODY, "status", times=1))
    fetched("org/tiny", hub, cache, token=ALICE)
    assert ALICE not in caplog.text
    assert [r for r in hub.requests if ALICE in r.headers.get("authorization", "")]
    assert not [r for r in hub.requests if "/cdn/" in r.path and "authorization" in r.headers]


# ---- names that are none


@pytest.mark.parametrize(
    "source",
    [
        "C:\\models\\x",
        "./absent",
        "",
        "~nobody-here/x",
        "x" * 300,
        "org/name/more",
        "name",
        "org/na me",
        "a/b@",
        "a/b:",
        "a/b@v:",
        "a/b:c:d",
        "a/b--c",
        "a/" + "b" * 99,
    ],
)
def test_neither_folder_nor_repository(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=re.escape(f"'{source}' is neither a folder nor a repo id")):
        resolve(source)


def test_a_mistyped_folder_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "qwen-7b").mkdir()
    with pytest.raises(SourceError, match=r"did you mean `.*qwen-7b`"):
        resolve(str(tmp_path / "qwen-7B-"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is a file"):
        resolve(str(tmp_path / "file"))
