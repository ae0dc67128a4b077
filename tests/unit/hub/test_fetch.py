"""`resolve` through the real client against a server on 127.0.0.1, with every fault it must explain."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as client_errors
from safetensors.torch import save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import BudgetError, HubError, QuantkitError, SourceError
from quantkit.hub import client as client_module
from quantkit.hub import listing as listing_module
from quantkit.hub import problems, xet
from quantkit.hub.fetch import Source, resolve
from tests.hubserver import Fault, HubServer

ALICE, BOB = "hf_alicealicealice", "hf_bobbobbobbob"
pytestmark = pytest.mark.usefixtures("sleeps")
SHARD = "model-00001-of-00002.safetensors"
INFO, TREE, HEAD = "GET /api/models/org/tiny", "GET .*/tree/", "HEAD .*/config.json"
SMALL, BODY = "GET /org/tiny/resolve/.*/config.json", rf"GET /cdn/.*{SHARD}"
EVERYWHERE = (INFO, TREE, HEAD, SMALL, "HEAD .*/model-00001", BODY)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with two indexed shards and much that must stay where it is."""
    path = tmp_path / "repo"
    (path / "original").mkdir(parents=True)
    for i, name in enumerate("ab", start=1):
        save_file({name: torch.full((9,), float(i))}, path / f"model-0000{i}-of-00002.safetensors")
    weight_map = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", start=1)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "quantize_config.json", "tokenizer.json", "LICENSE", "README.md"):
        (path / name).write_text(json.dumps({"file": name}))  # equal files are fetched once
    for name in (
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/model.safetensors",
    ):
        (path / name).write_bytes(b"x" * 100)
    return path


@pytest.fixture
def hub(repo: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", repo)
        yield server


def fetched(source: str, hub: HubServer, cache: Path, **more: Any) -> Source:
    return resolve(source, cache_dir=cache, endpoint=hub.url, **more)


def refused(source: str, hub: HubServer, cache: Path, **more: Any) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        fetched(source, hub, cache, **more)
    assert caught.value.remedy
    return caught.value


def head(hub: HubServer) -> str:
    return hub.repo("org/tiny").refs["refs/heads/main"]


def downloads(hub: HubServer) -> list[str]:
    """Requests for the content of files."""
    return [line for line in hub.log if line.startswith("GET") and ("/resolve/" in line or "/cdn/" in line)]


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
    hub.add("org/nested", {**inside, f"fp16/{second}": (repo / second).read_bytes(), "README.md": b"top"})
    source = fetched("org/nested:fp16", hub, cache)
    assert source.path.name == "fp16"
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


# ---- faults


def test_server_gone(hub: HubServer, cache: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("", "drop", times=10_000))
    assert refused("org/tiny", hub, cache).message == f"Cannot reach {hub.url}"
    assert sleeps == list(problems.WAITS)


@pytest.mark.parametrize("on", EVERYWHERE)
@pytest.mark.parametrize("action", ["status", "drop"])
def test_one_fault_anywhere_is_tried_again(
    hub: HubServer, cache: Path, repo: Path, on: str, action: Any
) -> None:
    fault = Fault(on, action)
    hub.faults.append(fault)
    path = fetched("org/tiny", hub, cache).path
    assert fault.times == 0
    for name in (SHARD, "config.json"):
        assert (path / name).read_bytes() == (repo / name).read_bytes()


@pytest.mark.parametrize("on", [BODY, SMALL])
@pytest.mark.parametrize("action", ["drop_mid", "close_mid", "truncate", "corrupt"])
def test_a_bad_body_once_is_fetched_again(
    hub: HubServer, cache: Path, repo: Path, on: str, action: Any
) -> None:
    fault = Fault(on, action, after=1)
    hub.faults.append(fault)
    path = fetched("org/tiny", hub, cache).path
    for name in (SHARD, "config.json"):
        assert (path / name).read_bytes() == (repo / name).read_bytes()
    assert fault.times == 0


@pytest.mark.parametrize("ignored", [False, True])
def test_a_polite_close_is_continued_where_it_was(
    cache: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    content = os.urandom(5000)
    with HubServer() as hub:
        hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": content})
        hub.faults.append(Fault("GET /cdn/", "close_mid", after=3000))
        if ignored:
            hub.faults.append(Fault("GET /cdn/", "ignore_range"))
        assert (fetched("org/tiny", hub, cache).path / "model.safetensors").read_bytes() == content
        assert [r.headers.get("range") for r in hub.requests if "/cdn/" in r.path][1] == "bytes=3000-"


@pytest.mark.parametrize("on", [INFO, TREE, "HEAD .*/config.json", BODY])
def test_a_server_that_stalls(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, on: str, sleeps: list[float]
) -> None:
    monkeypatch.setitem(client_module._TIMEOUTS, "read", 0.1)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.1)
    fault = Fault(on, "stall", seconds=0.4, after=20 if on == BODY else 0)
    hub.faults.append(fault)
    assert fetched("org/tiny", hub, cache).revision == head(hub)
    assert fault.times == 0


def test_a_server_that_stalls_for_ever(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    monkeypatch.setitem(client_module._TIMEOUTS, "read", 0.1)
    hub.faults.append(Fault(INFO, "stall", seconds=0.3, times=99))
    assert refused("org/tiny", hub, cache).message == f"{hub.url} did not answer in time"
    assert sleeps == list(problems.WAITS)


def test_503_for_ever(hub: HubServer, cache: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault(INFO, "status", times=100))
    error = refused("org/tiny", hub, cache)
    assert error.message == "The Hub answered 503"
    assert isinstance(error, HubError)
    assert error.exit_code == 3
    assert sleeps == list(problems.WAITS)


@pytest.mark.parametrize("on", [TREE, "HEAD", BODY, SMALL])
def test_503_for_ever_elsewhere(hub: HubServer, cache: Path, on: str) -> None:
    hub.faults.append(Fault(on, "status", times=10_000))
    assert refused("org/tiny", hub, cache).message == "The Hub answered 503"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "55"}, 55),
        ({"RateLimit": '"api";r=0;t=54'}, 55),
        ({}, 1),
        ({"Retry-After": "99999"}, 300),
    ],
)
def test_rate_limit_waits_as_asked(
    hub: HubServer,
    cache: Path,
    sleeps: list[float],
    headers: dict[str, str],
    seconds: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.faults.append(Fault(INFO, "status", status=429, headers=headers))
    assert fetched("org/tiny", hub, cache).revision == head(hub)
    assert sleeps == [seconds]
    assert f"Rate limited; waiting {seconds} s." in caplog.text


@pytest.mark.parametrize("on", [TREE, HEAD, SMALL, BODY])
def test_rate_limit_elsewhere(hub: HubServer, cache: Path, on: str, sleeps: list[float]) -> None:
    hub.faults.append(Fault(on, "status", status=429, headers={"Retry-After": "7"}, times=2))
    assert fetched("org/tiny", hub, cache).revision == head(hub)
    assert 8.0 in sleeps, "the client waits a second longer"


def test_rate_limit_for_ever(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(INFO, "status", times=100, status=429))
    assert refused("org/tiny", hub, cache).message == "Rate limited."


def test_bad_bodies_for_ever(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(BODY, "truncate", after=50, times=100))
    assert refused("org/tiny", hub, cache).message == "Download of org/tiny was cut short."
    hub.faults[:] = [Fault(BODY, "corrupt", after=50, times=100)]
    error = refused("org/tiny", hub, cache)
    assert f"'{SHARD}' of org/tiny@{head(hub)[:7]} arrived damaged twice: hash" in error.message


def test_a_file_that_is_damaged_in_the_store(hub: HubServer, cache: Path) -> None:
    hub.corrupt("org/tiny", SHARD)
    assert "arrived damaged twice" in refused("org/tiny", hub, cache).message


@pytest.mark.parametrize("on", [INFO, TREE, "/resolve/"])
def test_something_else_answers(hub: HubServer, cache: Path, on: str) -> None:
    hub.faults.append(Fault(on, "html", times=1000))
    assert refused("org/tiny", hub, cache).message == f"{hub.url} does not speak the Hub protocol."


@pytest.mark.parametrize("on", [INFO, TREE])
@pytest.mark.parametrize("body", ["{}", "[]", '[{"type": "file"}]', '{"id": 1}', "7"])
def test_another_interface_answers(hub: HubServer, cache: Path, on: str, body: str) -> None:
    hub.faults.append(Fault(on, "status", status=200, body=body, times=1000))
    error = refused("org/tiny", hub, cache)
    if on == INFO or body not in ("{}", "[]"):  # an empty listing is one
        assert error.message == f"{hub.url} does not speak the Hub protocol."


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


# ---- Xet


@pytest.fixture
def xet_hub(repo: Path, tmp_path: Path) -> Iterator[HubServer]:
    """The same repository in Xet storage, put there by the client's own upload code."""
    pytest.importorskip("hf_xet")
    with HubServer(xet=tmp_path / "cas") as server:
        api = HfApi(endpoint=server.url, token=ALICE)
        api.create_repo("acme/tiny")
        api.upload_folder(repo_id="acme/tiny", folder_path=repo, ignore_patterns=["README.md"])
        if server.repo("acme/tiny").files()[SHARD].xet is None:
            pytest.skip("this hf_xet has no local:// storage")
        server.log.clear()
        yield server


def test_xet(xet_hub: HubServer, cache: Path, repo: Path) -> None:
    path = fetched("acme/tiny", xet_hub, cache).path
    assert (path / SHARD).read_bytes() == (repo / SHARD).read_bytes()
    assert any("/xet-read-token/" in line for line in xet_hub.log)
    assert not [line for line in xet_hub.log if "/cdn/" in line]


@pytest.mark.parametrize("status", [404, 403, 500])
def test_plain_http_where_xet_is_refused(xet_hub: HubServer, cache: Path, repo: Path, status: int) -> None:
    xet_hub.faults.append(Fault("/xet-read-token/", "status", status=status, times=1000))
    path = fetched("acme/tiny", xet_hub, cache).path
    assert (path / SHARD).read_bytes() == (repo / SHARD).read_bytes()
    assert [line for line in xet_hub.log if "/cdn/" in line]
    assert constants.HF_HUB_DISABLE_XET is False


def test_plain_http_where_the_xet_storage_is_gone(
    xet_hub: HubServer, cache: Path, repo: Path, tmp_path: Path
) -> None:
    for entry in xet_hub.repo("acme/tiny").files().values():
        if entry.sha256 is not None:
            xet_hub.repo("acme/tiny").store.blobs[entry.sha256] = (repo / entry.path).read_bytes()
    for folder in (tmp_path / "cas").rglob("xorbs"):
        shutil.rmtree(folder)
    path = fetched("acme/tiny", xet_hub, cache).path
    assert (path / SHARD).read_bytes() == (repo / SHARD).read_bytes()


def test_a_byte_flipped_in_xet_storage_is_noticed(xet_hub: HubServer, cache: Path) -> None:
    xet_hub.corrupt("acme/tiny", SHARD)
    assert "arrived damaged twice: hash" in refused("acme/tiny", xet_hub, cache).message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("Network error: HTTP status client error (404 Not Found)"), True),
        (ConnectionResetError("reset"), False),
        (RuntimeError("Data processing error: CAS service error"), True),
        (ValueError("Xet headers have not been correctly set by the server."), True),
        (OSError(errno.ENOSPC, "full"), False),
        (httpx2.ReadTimeout("slow"), False),
        (None, False),
    ],
)
def test_what_is_a_failure_of_xet(error: BaseException | None, expected: bool) -> None:
    pytest.importorskip("hf_xet")
    assert xet.is_to_blame(error) is expected


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


# ---- errors of the client alone


def test_every_request_has_a_time_limit() -> None:
    with client_module._client() as client:
        for given in (None, 7.0):
            request = client.build_request("GET", "http://127.0.0.1/", timeout=given)
            client_module._limit_time(request)
            assert request.extensions["timeout"]["read"] == (given or 120.0)
            assert request.extensions["timeout"]["connect"] == (given or 10.0)


@pytest.mark.parametrize(
    ("error", "says", "passes"),
    [
        (
            ConnectionError("Network error: HTTP status client error (403 Forbidden)"),
            "The Hub answered 403",
            False,
        ),
        (ConnectionError("Network error: HTTP status server error (502 Bad)"), "The Hub answered 502", True),
        (ConnectionResetError("reset"), "Cannot reach", True),
        (TimeoutError("slow"), "did not answer in time", True),
        (client_errors.OfflineModeIsEnabled("offline"), "Offline and", False),
        (client_errors.LocalEntryNotFoundError("offline"), "Offline and", False),
        (client_errors.IncompleteSnapshotError("x", snapshot_path="y"), "lacks files", False),
        (client_errors.FileMetadataError("no commit"), "does not speak the Hub protocol", False),
        (client_errors.OIDCError("no"), "HF_OIDC_RESOURCE", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk full", False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk full", False),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "cannot write `/x/y`", False),
        (OSError("Consistency check failed: 7"), "was cut short", True),
        (OSError("odd"), "Download of org/tiny failed: odd", False),
    ],
)
def test_failures_without_an_answer(cache: Path, error: Exception, says: str, passes: bool) -> None:
    cache.mkdir()
    repo = client_module.repository("org/tiny", None, client_module.connect("http://127.0.0.1:1"), cache)
    assert says in problems.explain(error, repo).message
    assert problems.may_pass(error) is passes
    wrapped = RuntimeError("Error while uploading 'x' to the Hub.")
    wrapped.__cause__ = error
    assert says in problems.explain(wrapped, repo).message
    assert problems.status_of(wrapped) == problems.status_of(error)


def test_a_missing_file(hub: HubServer, cache: Path) -> None:
    repo = client_module.repository("org/tiny", None, client_module.connect(hub.url), cache)
    with pytest.raises(HubError) as caught:
        problems.attempt(lambda: repo.api.hf_hub_download("org/tiny", "x/vocab.json", cache_dir=cache), repo)
    assert caught.value.message == "org/tiny@main has no 'x/vocab.json'."
    assert "tokenizer.json" in str(caught.value.remedy)


def test_a_local_folder_needs_neither_torch_nor_the_hub_client(repo: Path) -> None:
    program = "import sys; from quantkit.hub.fetch import resolve; resolve(sys.argv[1]); "
    program += "assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(repo)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
