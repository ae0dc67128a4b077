"""Large files over plain HTTP: whatever cuts a download, the next attempt or run asks for the rest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, file_download

from quantkit.errors import BudgetError
from quantkit.hub import problems, resume
from quantkit.progress import Silent
from tests.downloads import ALICE, fetched, head, refused
from tests.hubserver import Fault, HubServer

NAME, SIZE = "model.safetensors", 300_000
BODY = f"GET /cdn/.*/{NAME}"
CONTENT = os.urandom(SIZE)
WHOLE = f"bytes=0-{SIZE - 1}"
# A process of its own that fetches org/tiny: a limit in this one does not hold there.
CHILD = """
import sys
from pathlib import Path
from quantkit.hub import resume
from quantkit.hub.fetch import resolve
resume._LEAST = 1000
resolve("org/tiny", cache_dir=Path(sys.argv[1]), endpoint=sys.argv[2])
"""


@pytest.fixture(autouse=True)
def small(sleeps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_LEAST", 1000)
    monkeypatch.setattr(resume, "_LOCK_WAIT", 0.05)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", {"config.json": b"{}", NAME: CONTENT})
        yield server


def ranges(hub: HubServer, name: str = NAME) -> list[str]:
    """What was asked for of the body of a file, request by request."""
    return [r.headers.get("range", "all") for r in hub.requests if f"/{name}" in r.path and "/cdn/" in r.path]


def unfinished(cache: Path) -> list[Path]:
    return sorted(cache.glob("models--*/blobs/*.incomplete"))


def content(hub: HubServer, cache: Path) -> bytes:
    return (fetched("org/tiny", hub, cache).path / NAME).read_bytes()


def cut_at(hub: HubServer, cache: Path, at: int) -> None:
    """A run that ends with `at` bytes of the file in the cache."""
    hub.faults[:] = [Fault(BODY, "close_mid", after=at), Fault(BODY, "drop", times=1000)]
    assert refused("org/tiny", hub, cache).message == f"Cannot reach {hub.url}"
    assert [path.stat().st_size for path in unfinished(cache)] == [at]
    hub.faults.clear()
    hub.requests.clear()


def until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


# ---- one run


def test_the_client_only_links_to_what_was_fetched(hub: HubServer, cache: Path) -> None:
    path = fetched("org/tiny", hub, cache).path / NAME
    assert path.read_bytes() == CONTENT
    assert path.resolve() == (path.parents[2] / "blobs" / hashlib.sha256(CONTENT).hexdigest()).resolve()
    assert ranges(hub) == [WHOLE]
    assert not unfinished(cache)
    assert (path.resolve().stat().st_mode & 0o777) == ((path.parent / "config.json").stat().st_mode & 0o777)


@pytest.mark.parametrize("action", ["drop_mid", "close_mid", "truncate", "stall"])
def test_the_next_attempt_asks_for_the_rest(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, sleeps: list[float], action: Any
) -> None:
    if action == "stall":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault(BODY, action, after=100_000, seconds=0.5))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE, f"bytes=100000-{SIZE - 1}"]
    assert sleeps == ([] if action == "truncate" else [1.0])
    assert not unfinished(cache)


def test_a_link_that_breaks_again_and_again_ends(hub: HubServer, cache: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault(BODY, "close_mid", after=20_000, times=1000))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [f"bytes={begin}-{SIZE - 1}" for begin in range(0, SIZE, 20_000)]
    assert sleeps == [1.0] * 14, "after each new byte the waits begin anew"


def test_without_a_new_byte_it_ends_and_what_came_stays(
    hub: HubServer, cache: Path, sleeps: list[float]
) -> None:
    cut_at(hub, cache, 100_000)
    assert sleeps == list(problems.WAITS)


@pytest.mark.parametrize("status", [503, 429, 408])
def test_a_status_that_passes(hub: HubServer, cache: Path, sleeps: list[float], status: int) -> None:
    hub.faults.append(Fault(BODY, "close_mid", after=100_000))
    hub.faults.append(Fault(BODY, "status", status=status, headers={"Retry-After": "9"}, times=2))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE, *[f"bytes=100000-{SIZE - 1}"] * 3]
    assert sleeps == [1.0, 9.0, 9.0]


def test_a_server_that_does_not_know_ranges(hub: HubServer, cache: Path) -> None:
    """What is there is passed over, and stays where such an answer is cut before that."""
    hub.faults.append(Fault(BODY, "close_mid", after=100_000))
    whole = {"Content-Length": str(SIZE), "Connection": "close"}
    hub.faults.append(Fault(BODY, "status", status=200, headers=whole, body="x" * 50_000))
    hub.faults.append(Fault(BODY, "ignore_range"))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE, *[f"bytes=100000-{SIZE - 1}"] * 2]


def test_the_page_of_a_network_is_not_taken_for_the_file(hub: HubServer, cache: Path) -> None:
    hub.faults += [Fault(BODY, "html"), Fault(BODY, "close_mid", after=100_000), Fault(BODY, "html")]
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE, WHOLE, *[f"bytes=100000-{SIZE - 1}"] * 2]


def test_a_part_of_something_else(hub: HubServer, cache: Path) -> None:
    other = {"Content-Range": "bytes 0-9/10"}
    hub.faults.append(Fault(BODY, "status", status=206, headers=other, body="0123456789"))
    assert refused("org/tiny", hub, cache).message == f"{hub.url} does not speak the Hub protocol."


def test_large_pieces(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage gives out so much at once."""
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 200_000)
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == ["bytes=0-199999", f"bytes=200000-{SIZE - 1}"]


def test_damage_is_fetched_anew_once(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(BODY, "corrupt", after=1000))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE] * 2
    (path,) = cache.glob(f"models--*/snapshots/*/{NAME}")
    path.resolve().write_bytes(bytes(SIZE))
    hub.faults.append(Fault(BODY, "close_mid", after=100_000))
    hub.requests.clear()
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [WHOLE, f"bytes=100000-{SIZE - 1}"]
    assert not unfinished(cache)
    path.unlink()
    path.write_bytes(bytes(SIZE))  # a cache that was copied without its links
    assert content(hub, cache) == CONTENT


def test_damage_that_stays(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(BODY, "corrupt", after=1000, times=1000))
    assert "arrived damaged twice: hash" in refused("org/tiny", hub, cache).message
    assert ranges(hub) == [WHOLE] * 2
    assert not unfinished(cache)


def test_equal_files_and_several_at_once(hub: HubServer, cache: Path) -> None:
    names = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    other = os.urandom(SIZE)
    files = dict(zip(names, (CONTENT, other, CONTENT), strict=True))
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    hub.add("org/three", {"config.json": b"{}", "model.safetensors.index.json": index, **files})
    hub.faults.append(Fault("GET /cdn/.*/model-", "close_mid", after=100_000, times=2))
    path = fetched("org/three", hub, cache).path
    for name, expected in files.items():
        assert (path / name).read_bytes() == expected
    asked = sorted(len(ranges(hub, name)) for name in names)
    assert (asked[0], sum(asked)) == (0, 4), "equal files are fetched once"


def test_one_that_fails_stops_the_others(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    files = {name: os.urandom(SIZE) for name in names}
    hub.add("org/two", {"config.json": b"{}", "model.safetensors.index.json": index, **files})
    stalled = Fault(f"GET /cdn/.*/{names[0]}", "stall", after=100_000, seconds=0.5, times=1000)
    hub.faults += [stalled, Fault(f"GET /cdn/.*/{names[1]}", "status", status=403)]
    assert refused("org/two", hub, cache).message == "The Hub answered 403 for org/two."
    assert len(ranges(hub, names[0])) <= 1
    assert max(path.stat().st_size for path in unfinished(cache)) in (0, 100_000)


def test_no_token_at_the_storage(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    hub.faults.append(Fault(BODY, "close_mid", after=100_000))
    fetched("org/tiny", hub, cache, token=ALICE)
    asked = [r for r in hub.requests if f"/{NAME}" in r.path]
    assert all(ALICE in r.headers["authorization"] for r in asked if "/resolve/" in r.path)
    assert not [r for r in asked if "/cdn/" in r.path and "authorization" in r.headers]
    assert ALICE not in caplog.text


def test_the_disk_is_full(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = resume._Body._pieces

    def full(body: Any, begin: int, end: int) -> Iterator[bytes]:
        yield from pieces(body, begin, 100_000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(resume._Body, "_pieces", full)
        error = refused("org/tiny", hub, cache)
    assert isinstance(error, BudgetError)
    assert error.message.startswith(f"disk full while downloading org/tiny into `{cache}`")
    hub.requests.clear()
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [f"bytes=100000-{SIZE - 1}"]


# ---- the next run


def test_the_next_run_asks_for_the_rest(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_at(hub, cache, 100_000)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE - 100_000))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [f"bytes=100000-{SIZE - 1}"]
    assert not unfinished(cache)


def test_all_of_it_was_there(hub: HubServer, cache: Path) -> None:
    cut_at(hub, cache, 100_000)
    (path,) = unfinished(cache)
    path.write_bytes(CONTENT)
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == []


@pytest.mark.parametrize("left", [bytes(100_000), bytes(SIZE), bytes(SIZE + 1)])
def test_what_was_there_is_not_the_file(hub: HubServer, cache: Path, left: bytes) -> None:
    cut_at(hub, cache, 100_000)
    (path,) = unfinished(cache)
    path.write_bytes(left)
    assert content(hub, cache) == CONTENT
    assert ranges(hub)[-1] == WHOLE
    assert not unfinished(cache)


def test_the_file_changed_in_between(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_at(hub, cache, 100_000)
    usage = shutil.disk_usage(cache)

    def free(_: Path) -> Any:  # room for the new one, once the old one is gone
        return usage._replace(free=SIZE - sum(path.stat().st_size for path in unfinished(cache)))

    monkeypatch.setattr(shutil, "disk_usage", free)
    before, changed = head(hub), os.urandom(SIZE)
    hub.add("org/tiny", {NAME: changed})
    assert head(hub) != before
    assert content(hub, cache) == changed
    assert ranges(hub) == [WHOLE]
    assert not unfinished(cache), "nobody needs the rest of the old one"


def test_the_client_fetched_it_in_between(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(hub, cache, 100_000)
    monkeypatch.setattr(resume, "_LEAST", SIZE + 1)  # as it does where Xet is installed since
    assert content(hub, cache) == CONTENT
    assert not unfinished(cache)


def test_another_file_of_the_commit_is_kept(hub: HubServer, cache: Path) -> None:
    files = {"a-Q8_0.gguf": os.urandom(SIZE), "a-Q4_K_M.gguf": os.urandom(SIZE)}
    hub.add("org/ggufs", files)
    hub.faults += [Fault("/cdn/.*Q8_0", "close_mid", after=100_000), Fault("/cdn/.*Q8_0", "drop", times=1000)]
    refused("org/ggufs:Q8_0", hub, cache)
    hub.faults.clear()
    fetched("org/ggufs:Q4_K_M", hub, cache)
    hub.requests.clear()
    assert fetched("org/ggufs:Q8_0", hub, cache).path.read_bytes() == files["a-Q8_0.gguf"]
    assert ranges(hub, "a-Q8_0.gguf") == [f"bytes=100000-{SIZE - 1}"]


def test_killed_in_the_middle(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(BODY, "stall", after=100_000, seconds=60))
    with subprocess.Popen([sys.executable, "-c", CHILD, str(cache), hub.url]) as child:
        until(lambda: [path.stat().st_size for path in unfinished(cache)] == [100_000])
        child.kill()
    hub.requests.clear()
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == [f"bytes=100000-{SIZE - 1}"]
    assert not unfinished(cache)


def test_two_processes_at_once(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hub.faults.append(Fault(BODY, "stall", after=100_000, seconds=0.5))
    with subprocess.Popen([sys.executable, "-c", CHILD, str(cache), hub.url]) as child:
        until(lambda: [path.stat().st_size for path in unfinished(cache)] == [100_000])
        assert content(hub, cache) == CONTENT
    assert child.returncode == 0
    assert ranges(hub) == [WHOLE, f"bytes=100000-{SIZE - 1}"], "no byte was asked for twice"
    assert "is being fetched elsewhere" in caplog.text
    assert not unfinished(cache)


# ---- what is the client's


def test_small_files(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_LEAST", SIZE + 1)
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == ["all"]


def test_each_file_that_is_whole_is_progress(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    monkeypatch.setattr(resume, "_LEAST", SIZE + 1)
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    files = {name: os.urandom(1000) for name in names}
    hub.add("org/five", {"config.json": b"{}", "model.safetensors.index.json": index, **files})
    hub.faults += [Fault(f"GET /cdn/.*/{name}", "drop", times=i) for i, name in enumerate(names, start=1)]
    path = fetched("org/five", hub, cache).path
    assert [(path / name).read_bytes() for name in names] == list(files.values())
    assert len(sleeps) >= 5 and sleeps.count(1.0) > 1, "waits begin anew; files race, so how often varies"


def test_where_there_are_no_links(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (resume, file_download):
        monkeypatch.setattr(module, "are_symlinks_supported", lambda _: False)
    path = fetched("org/tiny", hub, cache).path / NAME
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert ranges(hub) == ["all"]


def test_a_hub_that_names_files_otherwise(hub: HubServer, cache: Path) -> None:
    headers = {"X-Repo-Commit": head(hub), "X-Linked-Etag": '"7"', "X-Linked-Size": str(SIZE)}
    hub.faults.append(Fault(f"HEAD .*/{NAME}", "status", status=200, headers=headers, times=2))
    assert content(hub, cache) == CONTENT
    assert ranges(hub) == ["all"]


def test_xet_and_plain_http_where_xet_is_refused(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with HubServer(xet=tmp_path / "cas") as hub:
        api = HfApi(endpoint=hub.url, token=ALICE)
        for name in ("acme/one", "acme/two"):
            api.create_repo(name)
            for path, body in {"config.json": b"{}", NAME: CONTENT}.items():
                api.upload_file(path_or_fileobj=body, path_in_repo=path, repo_id=name)
        if hub.repo("acme/one").files()[NAME].xet is None:
            pytest.skip("this hf_xet has no local:// storage")
        assert (fetched("acme/one", hub, cache).path / NAME).read_bytes() == CONTENT
        assert ranges(hub) == []
        hub.faults += [Fault("/xet-read-token/", "status", status=404, times=1000)]
        hub.faults += [Fault(BODY, "close_mid", after=100_000)]
        second = tmp_path / "second"
        assert (fetched("acme/two", hub, second).path / NAME).read_bytes() == CONTENT
        assert ranges(hub) == [WHOLE, f"bytes=100000-{SIZE - 1}"]


# ---- what is told


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.amounts: list[tuple[int, int]] = []

    def step(self, name: str, detail: str = "") -> None:
        self.lines.append(detail)

    def amount(self, done: int, total: int) -> None:
        self.amounts.append((done, total))


def test_progress(hub: HubServer, cache: Path) -> None:
    cut_at(hub, cache, 100_000)
    hub.faults.append(Fault(BODY, "close_mid", after=100_000))
    told = Told()
    fetched("org/tiny", hub, cache, progress=told)
    assert told.lines[-1].endswith("1 file, 300 kB, 100 kB of it here")
    done = [done for done, total in told.amounts if total == SIZE]
    assert done == sorted(done) and 100_000 in done and done[-1] == SIZE


def test_doctor_lists_what_is_unfinished(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantkit.cli import doctor, main

    assert doctor._OURS == resume.PARTIAL
    cut_at(hub, cache, 100_000)
    orphan = unfinished(cache)[0].with_name("abc.12345678.incomplete")
    orphan.write_bytes(b"x" * 1000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert main.run(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 unfinished files of 101 kB" in shown
    assert f"find {cache} -name '*.incomplete' -delete" in shown
    assert "org/tiny: 100 kB, which the next download goes on with" in shown
    assert "org/tiny: 1.00 kB, which nothing goes on with" in shown
    assert main.run(["doctor", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["hub"]["unfinished"]
    assert sorted((item["repo"], item["bytes"], item["resumable"]) for item in left) == [
        ("org/tiny", 1000, False),
        ("org/tiny", 100_000, True),
    ]
