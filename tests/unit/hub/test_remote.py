"""Headers without weights: what a plan fetches of a repository, and that nothing takes it for the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir
from safetensors.torch import save_file

from quantkit import resources
from quantkit.checkpoint import header_file
from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import HubError, QuantkitError, SourceError
from quantkit.hub.fetch import Source, resolve
from quantkit.model.build import build_graph
from quantkit.run import plan as plan_module
from quantkit.run.plan import plan
from tests import remote
from tests.hubserver import Fault, HubServer
from tests.remote import asked_bytes, recipe, use, weight_requests

pytestmark = pytest.mark.usefixtures("sleeps")
ALICE = "hf_alicealicealice"
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
HEADER = rf"GET /cdn/.*{SHARDS[0]}"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Three shards of 1.2 MB."""
    path = tmp_path / "repo"
    path.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        tensors = {f"t{number}.{i}": torch.randn(100, 1000) for i in range(3)}
        tensors[f"t{number}.shape"] = torch.tensor([100 + number, 1000])
        save_file(tensors, path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json", "README.md"):
        (path / name).write_text(json.dumps({"file": name}))
    return path


@pytest.fixture
def hub(repo: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/big", repo)
        yield server


def look(hub: HubServer, cache: Path, source: str = "org/big", **more: Any) -> Source:
    return remote.look(hub, cache, source, **more)


def refused(hub: HubServer, cache: Path, source: str = "org/big", **more: Any) -> QuantkitError:
    return remote.refused(hub, cache, source, **more)


def test_the_folder_is_the_checkpoint_without_its_values(hub: HubServer, cache: Path, repo: Path) -> None:
    source = look(hub, cache)
    assert (source.id, source.revision) == ("org/big", hub.repo("org/big").refs["refs/heads/main"])
    found, expected = Checkpoint.open(source.path), Checkpoint.open(repo)
    assert list(found.tensors) == list(expected.tensors)
    for name, info in expected.tensors.items():
        mine = found.tensors[name]
        assert (mine.dtype, mine.shape, mine.nbytes, mine.begin) == (
            info.dtype,
            info.shape,
            info.nbytes,
            info.begin,
        )
    assert (found.size_bytes, found.dtype, found.config) == (
        expected.size_bytes,
        expected.dtype,
        expected.config,
    )
    assert [file.name for file in found.extras()] == ["tokenizer.json"]
    for read in (lambda: found.read("t0.0"), lambda: found.read("t0.0", rows=slice(2)), found.fingerprint):
        with pytest.raises(NotDownloaded, match="was not downloaded, only its header"):
            read()
    assert found.read("t2.shape").tolist() == [102, 1000], "shapes are what some formats need to be planned"
    assert not list(cache.rglob("*.safetensors"))


def test_what_it_costs(hub: HubServer, cache: Path) -> None:
    """One request per shard, of 64 KiB, and one for shapes that lie behind those; nothing the second time."""
    source = look(hub, cache)
    assert asked_bytes(hub) == 3 * 2**16, "shapes are stored first, within what was fetched anyway"
    assert len(weight_requests(hub, "cdn")) == 3
    before = len(hub.log)
    assert look(hub, cache) == source
    assert hub.log[before:] == ["GET /api/models/org/big"]
    assert look(hub, cache, f"org/big@{source.revision}").path == source.path
    assert look(hub, cache, offline=True) == source
    assert len(hub.log) == before + 1


def state(number: int) -> torch.Tensor:
    """What bitsandbytes keeps of a weight of number + 1 rows."""
    return torch.tensor(list(json.dumps({"shape": [number + 1, 64], "blocksize": 64}).encode())).byte()


def test_long_headers_and_far_shapes(cache: Path, tmp_path: Path) -> None:
    names = {f"block.{i}.{'n' * 200}": torch.ones(1) for i in range(500)}
    states = {f"{i}.quant_state.x": state(i) for i in range(4)}
    path = tmp_path / "long"
    path.mkdir()
    save_file({**names, **states, "big": torch.randn(50_000)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    with HubServer() as hub:
        hub.add("org/long", path)
        found = Checkpoint.open(look(hub, cache, "org/long").path)
        assert len(found.tensors) == 505
        assert found.read("3.quant_state.x").equal(state(3))
        assert asked_bytes(hub) < 200_000 < found.size_bytes
        assert len(weight_requests(hub, "cdn")) == 3


def test_the_weights_are_used_where_they_are(hub: HubServer, cache: Path) -> None:
    whole = resolve("org/big", cache_dir=cache, endpoint=hub.url)
    assert look(hub, cache) == whole
    assert look(hub, cache, offline=True) == whole


def test_weights_after_headers(hub: HubServer, cache: Path, repo: Path) -> None:
    look(hub, cache)
    with pytest.raises(HubError, match="lacks"):
        resolve("org/big", cache_dir=cache, endpoint=hub.url, offline=True)
    whole = resolve("org/big", cache_dir=cache, endpoint=hub.url)
    assert (whole.path / SHARDS[0]).read_bytes() == (repo / SHARDS[0]).read_bytes()
    assert look(hub, cache) == whole
    assert not scan_cache_dir(cache).warnings, "the client's own tools still understand the cache"


def test_offline_without_anything(hub: HubServer, cache: Path) -> None:
    assert refused(hub, cache, offline=True).message == "Offline and 'org/big' is not in the cache"


def test_offline_with_some_headers(hub: HubServer, cache: Path) -> None:
    path = look(hub, cache).path
    (path / f"{SHARDS[1]}.header").unlink()
    assert "lacks 1 files" in refused(hub, cache, offline=True).message


def test_sub_folder(hub: HubServer, cache: Path, repo: Path) -> None:
    hub.add("org/nested", {f"bf16/{p.name}": p.read_bytes() for p in repo.iterdir()})
    source = look(hub, cache, "org/nested:bf16")
    assert len(Checkpoint.open(source.path).tensors) == 12
    assert look(hub, cache, "org/nested:bf16", offline=True) == source


def test_the_token_stays_at_the_hub(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    look(hub, cache, token=ALICE)
    assert {"authorization" in r.headers for r in weight_requests(hub) if "/resolve/" in r.path} == {True}
    assert {"authorization" in r.headers for r in weight_requests(hub) if "/cdn/" in r.path} == {False}
    assert ALICE not in caplog.text


@pytest.mark.parametrize(
    ("on", "action"),
    [
        *((HEADER, action) for action in ("drop_mid", "close_mid", "truncate", "ignore_range")),
        *(
            (on, action)
            for on in (HEADER, rf"GET /org/big/resolve/.*{SHARDS[0]}")
            for action in ("status", "drop")
        ),
    ],
)
def test_one_fault_is_tried_again(hub: HubServer, cache: Path, repo: Path, on: str, action: Any) -> None:
    fault = Fault(on, action, after=1000)
    hub.faults.append(fault)
    found = Checkpoint.open(look(hub, cache).path)
    assert fault.times == 0
    assert found.size_bytes == Checkpoint.open(repo).size_bytes


def test_a_server_without_ranges_does_not_send_everything(
    cache: Path, tmp_path: Path, hub: HubServer, repo: Path
) -> None:
    hub.faults.append(Fault("GET /cdn/", "ignore_range", times=99))
    found = Checkpoint.open(look(hub, cache).path)
    assert found.tensors["t1.2"].nbytes == 400_000


@pytest.mark.parametrize("status", [503, 429])
def test_faults_for_ever(hub: HubServer, cache: Path, status: int) -> None:
    hub.faults.append(Fault(HEADER, "status", status=status, times=99))
    assert refused(hub, cache).message == {503: "The Hub answered 503", 429: "Rate limited."}[status]
    hub.faults.clear()
    assert Checkpoint.open(look(hub, cache).path).tensors, "what failed leaves nothing behind"


def test_a_server_that_stalls(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.append(Fault(HEADER, "stall", seconds=0.3, after=10))
    assert look(hub, cache).id == "org/big"
    hub.faults.append(Fault("GET /cdn/", "stall", seconds=0.2, times=99))
    shutil.rmtree(cache)
    assert refused(hub, cache).message == f"{hub.url} did not answer in time"


def test_a_page_of_the_network_instead(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(HEADER, "html", times=99))
    assert isinstance(refused(hub, cache), (SourceError, HubError))
    assert not list(cache.rglob(f"{SHARDS[0]}*"))


def test_gated(hub: HubServer, cache: Path) -> None:
    hub.add("org/big", {}, gated=True)
    assert refused(hub, cache).message == "org/big is gated and you are not logged in."


def test_a_damaged_header_is_fetched_again(hub: HubServer, cache: Path) -> None:
    hub.faults.append(Fault(HEADER, "corrupt", after=3))
    assert len(Checkpoint.open(look(hub, cache).path).tensors) == 12


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff" * 200_000, "claims a header of"),
        ((10**6).to_bytes(8, "little") + b"{" * 1000, "is truncated inside the header"),
        ((2).to_bytes(8, "little") + b"{}" + b"x" * 500, "after the last tensor"),
        ((2).to_bytes(8, "little") + b"[]", "is not a JSON object"),
        (b"x", "is only 1 bytes"),
    ],
)
def test_hostile_headers(hub: HubServer, cache: Path, content: bytes, says: str) -> None:
    hub.add("org/evil", {"config.json": b"{}", "model.safetensors": content})
    error = refused(hub, cache, "org/evil")
    assert isinstance(error, SourceError)
    assert says in error.message
    assert "org/evil@" in error.message


def test_a_size_that_is_not_the_listed_one(hub: HubServer, cache: Path) -> None:
    """The listing and the storage must agree on how long the file is."""
    entry = hub.repo("org/big").files()[SHARDS[0]]
    hub.repo("org/big").store.blobs[entry.key] += b"more"
    assert refused(hub, cache).message == f"{hub.url} does not speak the Hub protocol."


def test_nothing_takes_a_header_for_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    kept = header_file.HeaderFile(99, b"first", ((40, b"abc"), (60, b"")))
    header_file.write(file, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors.header"]
    assert header_file.read(file) == kept
    assert header_file.data(file, "t", 41, 43) == b"bc"
    with pytest.raises(NotDownloaded):
        header_file.data(file, "t", 41, 44)
    whole = header_file.path_of(file).read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"x" + whole[1:], whole[:-9] + b"\xff" * 9):
        header_file.path_of(file).write_bytes(damaged)
        with pytest.raises(SourceError, match="is not what quantkit writes"):
            header_file.read(file)


def test_a_damaged_kept_header_is_fetched_again(hub: HubServer, cache: Path) -> None:
    path = look(hub, cache).path
    (path / f"{SHARDS[1]}.header").write_bytes(os.urandom(99))
    assert len(Checkpoint.open(look(hub, cache).path).tensors) == 12


# ---- the plan


def test_a_plan_needs_no_weights(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resources.folder("demo-llama")
    hub.add("org/llama", model)
    use(hub, monkeypatch)
    targets = ("gptq:w4g32", "gguf:q8_0")
    local = plan(recipe(str(model), *targets))
    remote = plan(recipe("org/llama", *targets), cache_dir=cache, headers_only=True)
    assert not list(cache.rglob("*.safetensors"))
    assert asked_bytes(hub) <= 2**16
    sizes = [[t["size_bytes"] for t in found.to_json()["targets"]] for found in (local, remote)]
    assert sizes[0][0] == sizes[1][0]
    assert abs(sizes[0][1] - sizes[1][1]) < 1000, "GGUF metadata name the source"
    assert remote.blockers == local.blockers == ()
    assert remote.estimate.memory == local.estimate.memory
    before = len(hub.log)
    again = plan(recipe("org/llama", *targets), cache_dir=cache, offline=True, headers_only=True)
    assert again.to_json() == remote.to_json()
    assert len(hub.log) == before


def test_a_plan_that_needs_values_is_refused(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are downloaded where they are asked for, never as a detour."""
    hub.add("org/llama", resources.folder("demo-llama"))
    use(hub, monkeypatch)
    build = build_graph

    def reading(checkpoint: Checkpoint) -> Any:
        checkpoint.read(next(iter(checkpoint.tensors)))
        return build(checkpoint)

    monkeypatch.setattr(plan_module, "build_graph", reading)
    with pytest.raises(NotDownloaded, match="was not downloaded") as caught:
        plan(recipe("org/llama", "gptq:w4g32"), cache_dir=cache, headers_only=True)
    assert caught.value.remedy
    assert not list(cache.rglob("*.safetensors"))
