"""`resolve` through the real client against a server on 127.0.0.1, with every fault it must explain."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as client_errors
from safetensors.torch import save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import BudgetError, HubError, QuantkitError, SourceError
from quantkit.hub import problems, snapshot
from quantkit.hub.fetch import Source, resolve
from tests.hubserver import COMMIT, Fault, HubServer

BODY = r"GET /org/tiny/resolve/.*/model-00001"


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
        (path / name).write_text("{}")
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
    with HubServer(repo) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Nobody is logged in, nobody waits; the waits that were asked for are recorded."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    recorded: list[float] = []
    sleep = time.sleep

    def recording_sleep(seconds: float) -> None:
        if seconds >= 0.5:  # shorter ones poll a lock
            recorded.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", recording_sleep)
    return recorded


def refused(source: str, hub: HubServer, cache: Path, *, offline: bool = False) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        resolve(source, cache_dir=cache, endpoint=hub.url, offline=offline)
    assert caught.value.remedy
    return caught.value


def test_an_existing_folder_is_taken_as_it_is(repo: Path) -> None:
    assert resolve(str(repo)) == Source(repo, None, None, str(repo))


def test_download(hub: HubServer, cache: Path) -> None:
    source = resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    assert (source.id, source.revision, source.requested) == ("org/tiny", COMMIT, "org/tiny")
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
    before = len(hub.log)
    assert resolve("org/tiny@v1", cache_dir=cache, endpoint=hub.url).path == source.path
    assert not [line for line in hub.log[before:] if "/resolve/" in line], (
        "cached files are not asked for again"
    )


def test_offline_uses_the_cache_and_no_network(hub: HubServer, cache: Path) -> None:
    online = resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    before = len(hub.log)
    assert resolve("org/tiny", cache_dir=cache, endpoint=hub.url, offline=True) == online
    assert resolve(f"org/tiny@{COMMIT}", cache_dir=cache, endpoint=hub.url, offline=True).path == online.path
    assert len(hub.log) == before


def test_offline_without_the_files(hub: HubServer, cache: Path) -> None:
    for source in ("org/tiny", f"org/tiny@{COMMIT}"):
        assert (
            refused(source, hub, cache, offline=True).message == "Offline and 'org/tiny' is not in the cache"
        )
    path = resolve("org/tiny", cache_dir=cache, endpoint=hub.url).path
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (path / name).unlink()
    error = refused("org/tiny", hub, cache, offline=True)
    first = "first: model-00001-of-00002.safetensors"
    assert error.message == f"The cached copy of org/tiny@{COMMIT[:7]} lacks 2 files ({first})."


def test_the_clients_own_offline_switch(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert refused("org/tiny", hub, cache).message == "Offline and 'org/tiny' is not in the cache"
    assert not hub.log


def test_cache_filled_by_another_tool_has_no_listing(hub: HubServer, cache: Path) -> None:
    online = resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    shutil.rmtree(cache / "models--org--tiny" / "trees")
    assert resolve("org/tiny", cache_dir=cache, endpoint=hub.url, offline=True) == online


def test_server_gone_but_cached(hub: HubServer, cache: Path) -> None:
    online = resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    hub.faults.append(Fault("", "close", times=10_000))
    assert resolve("org/tiny", cache_dir=cache, endpoint=hub.url) == online


def test_server_gone(hub: HubServer, cache: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("", "close", times=10_000))
    assert refused("org/tiny", hub, cache).message == f"Cannot reach {hub.url}"
    assert sleeps == list(problems.WAITS)


@pytest.mark.parametrize("on", ["GET /api/models/org/tiny", "/tree/", "HEAD .*/config.json", BODY])
def test_503_once_is_tried_again(hub: HubServer, cache: Path, on: str) -> None:
    fault = Fault(on, "status")
    hub.faults.append(fault)
    assert resolve("org/tiny", cache_dir=cache, endpoint=hub.url).revision == COMMIT
    assert fault.times == 0


def test_503_for_ever(hub: HubServer, cache: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("GET /api/models/org/tiny", "status", times=100))
    error = refused("org/tiny", hub, cache)
    assert error.message == "The Hub answered 503"
    assert isinstance(error, HubError)
    assert error.exit_code == 3
    assert sleeps == list(problems.WAITS)


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
    hub: HubServer, cache: Path, sleeps: list[float], headers: dict[str, str], seconds: float
) -> None:
    hub.faults.append(Fault("GET /api/models/org/tiny", "status", status=429, headers=headers))
    assert resolve("org/tiny", cache_dir=cache, endpoint=hub.url).revision == COMMIT
    assert sleeps == [seconds]


def test_rate_limit_for_ever(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault("GET /api/models/org/tiny", "status", times=100, status=429))
    assert refused("org/tiny", hub, cache).message == "Rate limited."


@pytest.mark.parametrize("action", ["short", "flip", "close"])
def test_a_bad_body_once_is_fetched_again(hub: HubServer, cache: Path, repo: Path, action: str) -> None:
    fault = Fault(BODY, action)  # type: ignore[arg-type]
    hub.faults.append(fault)
    path = resolve("org/tiny", cache_dir=cache, endpoint=hub.url).path
    name = "model-00001-of-00002.safetensors"
    assert (path / name).read_bytes() == (repo / name).read_bytes()
    assert fault.times == 0


def test_bad_bodies_for_ever(hub: HubServer, cache: Path) -> None:
    hub.faults = [Fault(BODY, "short", times=100)]
    assert refused("org/tiny", hub, cache).message == "Download of org/tiny was cut short."
    hub.faults = [Fault(BODY, "flip", times=100)]
    error = refused("org/tiny", hub, cache)
    assert (
        "model-00001-of-00002.safetensors' of org/tiny@0123456 arrived damaged twice: hash" in error.message
    )


def test_a_damaged_file_in_the_cache_is_noticed(hub: HubServer, cache: Path, repo: Path) -> None:
    path = resolve("org/tiny", cache_dir=cache, endpoint=hub.url).path
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        blob = (path / name).resolve()
        blob.write_bytes(b"y" * blob.stat().st_size)
    resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        assert (path / name).read_bytes() == (repo / name).read_bytes()


def test_gated(repo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(repo, gated=True) as hub:
        error = refused("org/tiny", hub, cache)
        assert error.message == "org/tiny is gated and you are not logged in."
        assert error.remedy == f"Accept the terms at {hub.url}/org/tiny, then run: hf auth login"
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        error = refused("org/tiny", hub, cache)
        assert error.message == "Your account (alice) has not been granted access to org/tiny."
        assert error.remedy == f"Request access at {hub.url}/org/tiny; approval can take a while."


def test_unknown_repository(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/tiny", cache_dir=cache, endpoint=hub.url)
    error = refused("org/tinny", hub, cache)
    assert error.message == "No public model 'org/tinny'."
    assert "Did you mean org/tiny?" in str(error.remedy)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert (
        refused("org/x", hub, cache).message == "'org/x' does not exist or this token (alice) cannot see it."
    )


def test_unknown_revision(hub: HubServer, cache: Path) -> None:
    error = refused("org/tiny@v2", hub, cache)
    assert error.message == "'org/tiny' has no revision 'v2'."
    assert error.remedy == "it has main, v1"


@pytest.mark.parametrize("on", ["/api/models/org/tiny", "/tree/", "/resolve/"])
def test_something_else_answers(hub: HubServer, cache: Path, on: str) -> None:
    hub.faults.append(Fault(on, "html", times=1000))
    assert refused("org/tiny", hub, cache).message == f"{hub.url} does not speak the Hub protocol."


def test_pickles_only(hub: HubServer, cache: Path, repo: Path) -> None:
    for path in repo.glob("*.safetensors*"):
        path.unlink()
    error = refused("org/tiny", hub, cache)
    assert isinstance(error, SourceError)
    assert "pickle checkpoints are refused" in error.message
    assert not [line for line in hub.log if "pytorch_model" in line]


def test_no_config(hub: HubServer, cache: Path, repo: Path) -> None:
    (repo / "config.json").unlink()
    assert "has no config.json" in refused("org/tiny", hub, cache).message


def test_hostile_index_fetches_nothing(hub: HubServer, cache: Path, repo: Path) -> None:
    (repo / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    assert "not to a safetensors file next to it" in refused("org/tiny", hub, cache).message
    assert not [
        line for line in hub.log if "/resolve/" in line and ".safetensors" in line and "index" not in line
    ]


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


def test_too_little_disk(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: usage._replace(free=10))
    error = refused("org/tiny", hub, cache)
    assert isinstance(error, BudgetError)
    assert error.available == 10


def test_every_request_has_a_time_limit() -> None:
    with snapshot._client() as client:
        for given in (None, 7.0):
            request = client.build_request("GET", "http://127.0.0.1/", timeout=given)
            snapshot._limit_time(request)
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
        (client_errors.OfflineModeIsEnabled("offline"), "Offline and", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk full", False),
        (OSError("odd"), "Download of org/tiny failed: odd", False),
    ],
)
def test_failures_without_an_answer(cache: Path, error: Exception, says: str, passes: bool) -> None:
    cache.mkdir()
    repo = snapshot.repository("org/tiny", None, cache, "http://127.0.0.1:1")
    assert says in problems.explain(error, repo).message
    assert problems.may_pass(error) is passes


def test_a_local_folder_needs_neither_torch_nor_the_hub_client(repo: Path) -> None:
    program = "import sys; from quantkit.hub.fetch import resolve; resolve(sys.argv[1]); "
    program += "assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(repo)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
