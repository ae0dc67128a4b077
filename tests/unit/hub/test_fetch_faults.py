"""`resolve` through the real client, with every fault it must get over or explain."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as client_errors

from quantkit.errors import HubError
from quantkit.hub import client as client_module
from quantkit.hub import problems, xet
from tests.downloads import (
    ALICE,
    BODY,
    EVERYWHERE,
    HEAD,
    INFO,
    SHARD,
    SMALL,
    TREE,
    fetched,
    head,
    refused,
)
from tests.hubserver import Fault, HubServer

pytestmark = pytest.mark.usefixtures("sleeps")


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
        (OSError("Consistency check failed: 7"), False),
        (httpx2.ReadTimeout("slow"), False),
        (None, False),
    ],
)
def test_what_is_a_failure_of_xet(error: BaseException | None, expected: bool) -> None:
    pytest.importorskip("hf_xet")
    assert xet.is_to_blame(error) is expected


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
