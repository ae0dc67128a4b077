"""Every fault of the test server, and what the real client makes of it."""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from tests.hubserver import Fault, HubServer
from tests.hubserver.client import ALICE, SENDS_FILES, Clock, download, tame, upload

pytestmark = SENDS_FILES

REPO = "alice/tiny"
WEIGHTS = random.Random(1).randbytes(9000)
FILES = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "sub/a.gguf": WEIGHTS}


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


BODY = "GET /cdn/.*a.gguf"


def test_fault_status(hub: HubServer, api: HfApi, clock: Clock) -> None:
    hub.faults.append(Fault(f"GET /api/models/{REPO}$", "status", body="busy", headers={"X-Note": "1"}))
    with pytest.raises(HfHubHTTPError, match="busy") as caught:
        api.model_info(REPO)
    assert (caught.value.response.status_code, caught.value.response.headers["x-note"]) == (503, "1")
    assert api.model_info(REPO).id == REPO
    limit = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.faults.append(Fault("GET .*/tree/", "status", status=429, headers=limit, times=2))
    assert len(list(api.list_repo_tree(REPO))) == 4
    assert clock.slept == [56, 56]


def test_faults_are_taken_in_turn(hub: HubServer, api: HfApi) -> None:
    hub.faults += [
        Fault("/refs", "status", status=500, skip=1),
        Fault("/refs", "status", status=502, times=2),
    ]
    seen = []
    for _ in range(4):
        try:
            api.list_repo_refs(REPO)
            seen.append(200)
        except HfHubHTTPError as error:
            seen.append(error.response.status_code)
    assert seen == [502, 500, 502, 200]


def test_fault_html(hub: HubServer, api: HfApi) -> None:
    hub.faults.append(Fault("/api/", "html"))
    with pytest.raises(ValueError):
        api.model_info(REPO)


def test_fault_drop(hub: HubServer, api: HfApi, clock: Clock) -> None:
    hub.faults.append(Fault("/api/", "drop", times=2))
    with pytest.raises(httpx2.ReadError):
        api.model_info(REPO)
    assert len(list(api.list_repo_tree(REPO))) == 4
    assert clock.slept == [1]


def test_fault_drop_mid_request(hub: HubServer, api: HfApi, clock: Clock) -> None:
    content = bytes(5_000_000)
    hub.faults.append(Fault("PUT /lfs/", "drop_mid_request", after=1000))
    upload(api, REPO, {"b.gguf": content})
    assert hub.repo(REPO).read("b.gguf") == content
    assert (len(calls(hub, "PUT /lfs/")), clock.slept) == (2, [1])


def test_fault_drop_after(hub: HubServer, api: HfApi) -> None:
    parent = hub.repo(REPO).commits[0].sha
    hub.faults.append(Fault("POST .*/commit/", "drop_after"))
    with pytest.raises(httpx2.ReadError):
        upload(api, REPO, {"a.txt": b"a"}, parent_commit=parent)
    assert hub.repo(REPO).read("a.txt") == b"a"


def test_fault_drop_mid(hub: HubServer, tmp_path: Path) -> None:
    """A reset is not retried; what was finished is not asked for again."""
    hub.faults.append(Fault(BODY, "drop_mid", after=4000))
    with pytest.raises(httpx2.ReadError):
        download(hub.url, REPO, tmp_path)
    hub.log.clear()
    assert download(hub.url, REPO, tmp_path) == FILES
    assert len(calls(hub, "GET /cdn/")) == 1


def test_fault_drop_mid_sends_so_much(hub: HubServer) -> None:
    hub.faults.append(Fault(BODY, "drop_mid", after=4000))
    connection, answer = get(hub, "sub/a.gguf")
    assert answer.read(4000) == WEIGHTS[:4000]
    with pytest.raises(ConnectionResetError):
        answer.read(1)
    connection.close()


@pytest.mark.parametrize("ignored", [False, True])
def test_fault_close_mid(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    """A polite end is continued where it was, in steps of whole chunks, or from the start."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(Fault(BODY, "close_mid", after=4500))
    if ignored:
        hub.faults.append(Fault(BODY, "ignore_range"))
    assert download(hub.url, REPO, tmp_path) == FILES
    ranges = [r.headers.get("range") for r in hub.requests if r.path.startswith("/cdn/")]
    assert ranges == [None, "bytes=4000-"]
    assert not ignored or hub.faults[1].times == 0


def test_fault_truncate(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault(BODY, "truncate", after=100))
    with pytest.raises(OSError, match="Consistency check failed"):
        download(hub.url, REPO, tmp_path)


def test_fault_corrupt_on_the_way_out(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault(BODY, "corrupt", after=5))
    found = download(hub.url, REPO, tmp_path)["sub/a.gguf"]
    assert [i for i in range(9000) if found[i] != WEIGHTS[i]] == [5], "the client does not notice"
    assert hub.repo(REPO).read("sub/a.gguf") == WEIGHTS


@pytest.mark.parametrize("action", ["corrupt", "truncate"])
def test_fault_on_the_way_in(hub: HubServer, api: HfApi, action: Any) -> None:
    hub.faults.append(Fault("PUT /lfs/", action, after=5))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'b\.gguf'"):
        upload(api, REPO, {"b.gguf": WEIGHTS[::-1]})
    assert "b.gguf" not in hub.repo(REPO).files()
    upload(api, REPO, {"b.gguf": WEIGHTS[::-1]})
    assert hub.repo(REPO).read("b.gguf") == WEIGHTS[::-1]


def test_fault_on_the_way_in_that_nobody_checks() -> None:
    with HubServer(verify=False) as hub:
        api = HfApi(endpoint=hub.url, token=ALICE)
        api.create_repo(REPO)
        hub.faults.append(Fault("PUT /lfs/", "corrupt"))
        upload(api, REPO, {"b.gguf": WEIGHTS})
        assert hub.repo(REPO).read("b.gguf") == bytes([WEIGHTS[0] ^ 0xFF]) + WEIGHTS[1:]


def test_fault_delay(hub: HubServer, api: HfApi) -> None:
    hub.faults.append(Fault("/api/models", "delay", seconds=60))
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info(REPO, timeout=0.05)
    hub.faults.append(Fault("/api/models", "delay", seconds=0.001))
    assert api.model_info(REPO).id == REPO


def test_fault_stall(hub: HubServer, api: HfApi) -> None:
    hub.faults.append(Fault("/api/models", "stall", seconds=60))
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info(REPO, timeout=0.05)
    hub.faults.append(Fault(BODY, "stall", after=4000, seconds=60))
    connection, answer = get(hub, "sub/a.gguf", timeout=0.05)
    assert answer.read(4000) == WEIGHTS[:4000]
    with pytest.raises(TimeoutError):
        answer.read(1)
    connection.close()


def get(hub: HubServer, path: str, timeout: float = 10) -> Any:
    """The answer of the CDN, not yet read, and its connection."""
    address = hub.cdn.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=timeout)
    connection.request("GET", f"/cdn/models/{REPO}/{hub.repo(REPO).commits[0].sha}/{path}")
    return connection, connection.getresponse()
