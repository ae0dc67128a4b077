"""GGUF models without their weights: a header has no stated length, and is asked for until it is whole."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import header_file
from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import HubError, SourceError
from quantkit.gguf.container import Opened, Stored, open_file, plan_shards, write, write_shards
from quantkit.hub import headers, ranges
from quantkit.hub.fetch import resolve
from quantkit.run.gguf_source import GgufCheckpoint, open_gguf
from quantkit.run.inspect import inspect
from quantkit.run.plan import plan
from quantkit.run.quantized import open_source
from tests.gguf_files import byte_tokenizer, rewrite, write_gguf
from tests.hubplace import Workplace
from tests.hubserver import Fault, HubServer
from tests.models import save_tiny
from tests.remote import asked, asked_bytes, look, recipe, refused, use, weight_requests

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("sleeps")
FILE = "tiny-Q8_0.gguf"
FIRST = 2**11
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 500 kB whose header of 14 kB is several times what is asked for first, with rotary divisors
    at its end."""
    root = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "head_dim": 128, "intermediate_size": 256, "vocab_size": 416}
    tiny = save_tiny("llama", root / "s", rope_parameters=ROPE, max_position_embeddings=65_536, **sizes)
    byte_tokenizer(tiny)
    whole = open_file(write_gguf(tiny, root / "x.gguf", "q8_0"))
    order = sorted(whole.tensors.values(), key=lambda stored: stored.name == "rope_freqs.weight")
    contents = (whole.read_bytes(stored.name) for stored in order)
    write(root / FILE, "llama", metadata_of(whole), order, contents)
    return root / FILE


def metadata_of(opened: Opened) -> dict[str, Any]:
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in opened.metadata.items()}
    kept.pop("general.architecture")
    return kept


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Files are small here, and what is asked for first is, too."""
    monkeypatch.setattr(headers, "_FIRST_GGUF", FIRST)
    monkeypatch.setattr(headers, "_GAP", 2**6)
    with HubServer() as server:
        server.add("org/x-GGUF", {FILE: model.read_bytes(), "README.md": b"# x"})
        use(server, monkeypatch)
        yield server


def header_bytes(path: Path) -> int:
    """Bytes before the data."""
    return min(position for _, position in open_file(path).places.values())


def test_the_header_is_the_file_without_its_values(hub: HubServer, cache: Path, model: Path) -> None:
    source = look(hub, cache, "org/x-GGUF")
    assert source.revision == hub.repo("org/x-GGUF").refs["refs/heads/main"]
    assert source.path.name == FILE and not source.path.exists()
    found, expected = open_file(source.path), open_file(model)
    assert found == replace(expected, paths=(source.path,), places=found.places)
    assert {n: p for n, (_, p) in found.places.items()} == {n: p for n, (_, p) in expected.places.items()}
    view, local = open_gguf(source.path), open_gguf(model)
    assert view.config == local.config and view.config["rope_parameters"]["rope_type"] == "llama3"
    assert (view.size_bytes, view.dtype, view.types) == (local.size_bytes, local.dtype, local.types)
    name = "model.layers.0.mlp.up_proj.weight"
    for read in (lambda: view.read(name), lambda: view.read(name, rows=slice(2)), view.fingerprint):
        with pytest.raises(NotDownloaded, match=f"`{FILE}` with `.*` was not downloaded, only its header"):
            read()
    assert found.read_bytes("rope_freqs.weight").equal(expected.read_bytes("rope_freqs.weight"))
    assert not list(cache.rglob("*.gguf"))


def test_what_it_costs(hub: HubServer, cache: Path, model: Path) -> None:
    """Twice as much each time until the header is there, then the divisors; nothing the second time."""
    length, size = header_bytes(model), model.stat().st_size
    source = look(hub, cache, "org/x-GGUF")
    *beginning, rope = asked(hub)
    assert beginning == [(0, 2048), (2048, 4096), (4096, 8192), (8192, 16384)]
    assert 8192 < length <= 16384 and size > 400_000
    assert rope == (size - 256, size)
    assert len(weight_requests(hub, "resolve")) == 1, "the storage is asked where the Hub said once"
    before = len(hub.log)
    assert look(hub, cache, "org/x-GGUF") == source
    assert hub.log[before:] == ["GET /api/models/org/x-GGUF"]
    assert look(hub, cache, "org/x-GGUF", offline=True) == source
    assert look(hub, cache, "org/x-GGUF:Q8_0", offline=True).path == source.path
    assert len(hub.log) == before + 1


def test_a_long_vocabulary(cache: Path, tmp_path: Path) -> None:
    """With the sizes that are asked for in earnest: 2.5 MB of tokens, 8 MB of weights."""
    tokens = [f"token{n:08}" for n in range(120_000)]
    tensors = [Stored(f"blk.{n}.ffn_up.weight", (512, 1024), "f32") for n in range(4)]
    contents = (torch.zeros(t.byte_shape, dtype=torch.uint8) for t in tensors)
    write(tmp_path / "v.gguf", "llama", {"tokenizer.ggml.tokens": tokens}, tensors, contents)
    with HubServer() as hub:
        hub.add("org/v", {"v.gguf": (tmp_path / "v.gguf").read_bytes()})
        opened = open_file(look(hub, cache, "org/v").path)
        assert opened.metadata["tokenizer.ggml.tokens"] == tuple(tokens)
        assert asked(hub) == [(0, 2**20), (2**20, 2**21), (2**21, 2**22)]


def test_shards(hub: HubServer, cache: Path, model: Path, tmp_path: Path) -> None:
    whole = open_file(model)
    shards = plan_shards(list(whole.tensors.values()), 200_000)
    contents = (whole.read_bytes(name) for name in whole.tensors)
    paths = write_shards(tmp_path, "s-Q8_0", "llama", metadata_of(whole), shards, contents)
    assert len(paths) == 5
    hub.add("org/s", {f"q8/{p.name}": p.read_bytes() for p in paths})
    source = look(hub, cache, "org/s")
    found = open_file(source.path)
    assert [p.name for p in found.paths] == [p.name for p in paths]
    assert found.tensors == whole.tensors
    assert open_source(source.path).config == open_source(model).config
    assert sum(begin == 0 for begin, _ in asked(hub)) == 5
    assert asked_bytes(hub) < 30_000
    assert look(hub, cache, "org/s", offline=True) == source
    (source.path.parent / f"{paths[1].name}.header").unlink()
    assert "lacks 1 files" in refused(hub, cache, "org/s", offline=True).message
    with pytest.raises(SourceError, match="1 of 5 shards"):
        open_file(source.path)
    look(hub, cache, "org/s")
    assert len(open_file(source.path).tensors) == len(whole.tensors), "what is missing is fetched again"


def test_several_models_in_one_repository(hub: HubServer, cache: Path, model: Path, tmp_path: Path) -> None:
    other = rewrite(model, tmp_path / "o.gguf", {"general.name": "other"})
    config = b'{"model_type": "llama"}'
    hub.add("org/x-GGUF", {"tiny-Q4_K_M.gguf": other.read_bytes(), "config.json": config})
    assert "has 2 GGUF models: Q4_K_M, Q8_0" in refused(hub, cache, "org/x-GGUF").message
    paths = [look(hub, cache, f"org/x-GGUF:{tag}").path for tag in ("Q4_K_M", "Q8_0")]
    assert paths[0].parent == paths[1].parent, "what lies beside them is there once"
    assert (paths[0].parent / "config.json").read_bytes() == config
    assert [open_file(path).metadata.get("general.name") for path in paths] == ["other", None]


def test_the_weights_are_used_where_they_are(hub: HubServer, cache: Path, model: Path) -> None:
    kept = look(hub, cache, "org/x-GGUF")
    with pytest.raises(HubError, match="lacks 1 files"):
        resolve("org/x-GGUF", cache_dir=cache, endpoint=hub.url, offline=True)
    whole = resolve("org/x-GGUF", cache_dir=cache, endpoint=hub.url)
    assert whole.path != kept.path and whole.path.read_bytes() == model.read_bytes()
    before = len(weight_requests(hub))
    assert look(hub, cache, "org/x-GGUF") == whole == look(hub, cache, "org/x-GGUF", offline=True)
    assert len(weight_requests(hub)) == before


def test_the_token_stays_at_the_hub(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    look(hub, cache, "org/x-GGUF", token="hf_alicealicealice")
    for origin, sent in (("resolve", True), ("cdn", False)):
        assert {"authorization" in r.headers for r in weight_requests(hub, origin)} == {sent}
    assert "hf_alicealicealice" not in caplog.text


BODY = "GET /cdn/"


@pytest.mark.parametrize("skip", [0, 2, 4], ids=["beginning", "rest", "divisors"])
@pytest.mark.parametrize("action", ["status", "drop", "drop_mid", "close_mid", "truncate", "ignore_range"])
def test_one_fault_is_tried_again(
    action: Any, skip: int, hub: HubServer, cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FAR", 2**14)
    hub.faults.append(Fault(BODY, action, skip=skip, after=100))
    found = open_file(look(hub, cache, "org/x-GGUF").path)
    assert hub.faults[0].times == 0
    assert found.metadata == open_file(model).metadata
    assert found.read_bytes("rope_freqs.weight").equal(open_file(model).read_bytes("rope_freqs.weight"))


@pytest.mark.parametrize("at", [0, 4, 9, 17, 24])
def test_a_damaged_header_is_fetched_again(at: int, hub: HubServer, cache: Path, model: Path) -> None:
    """Magic, version, numbers of tensors and keys, the length of a name: none is believed."""
    hub.faults.append(Fault(BODY, "corrupt", after=at))
    found = open_file(look(hub, cache, "org/x-GGUF").path)
    assert found.tensors == open_file(model).tensors
    assert hub.faults[0].times == 0
    shutil.rmtree(cache)
    hub.faults.append(Fault(BODY, "corrupt", after=at, times=99))
    assert isinstance(refused(hub, cache, "org/x-GGUF"), SourceError)
    assert not list(cache.rglob("*.header"))


@pytest.mark.parametrize("status", [503, 429])
def test_faults_for_ever(hub: HubServer, cache: Path, status: int) -> None:
    hub.faults.append(Fault(BODY, "status", status=status, times=99, skip=1))
    assert refused(hub, cache, "org/x-GGUF").message in ("The Hub answered 503", "Rate limited.")
    assert not list(cache.rglob("*.header"))
    hub.faults.clear()
    assert open_file(look(hub, cache, "org/x-GGUF").path).tensors


def test_a_server_without_ranges(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault(BODY, "ignore_range", times=99))
    assert open_file(look(hub, cache, "org/x-GGUF").path).tensors
    shutil.rmtree(cache)
    monkeypatch.setattr(ranges, "FAR", 2**13)
    error = refused(hub, cache, "org/x-GGUF")
    assert isinstance(error, HubError)
    assert f"sends '{FILE}' of org/x-GGUF only whole" in error.message


KEYS = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)


def listed(count: int, kind: int = 8) -> bytes:
    """A key "k" that is a list of so many elements."""
    return KEYS + struct.pack("<Q1sIIQ", 1, b"k", 9, kind, count)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes"),
        (b"GGUF", "it has 4 bytes"),
        (b"x" * 100_000, "it begins with b'xxxx'"),
        (b"GGUF" * 9, "version 1179993927"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'vers'"),
        (KEYS + b"\xff" * 100_000, "goes beyond its end"),
        (listed(2**40) + bytes(100_000), "more than the file"),
        (listed(12_000) + bytes(100_000), "is of the unknown type|dimensions"),
        (KEYS + struct.pack("<Q", 90_000) + b"n" * 50_000, "goes beyond its end at byte"),
        (KEYS + struct.pack("<Q", 40_000) + b"n" * 90_000, "is of the unknown type"),
    ],
)
def test_hostile_headers(hub: HubServer, cache: Path, content: bytes, says: str) -> None:
    hub.add("org/evil", {"evil.gguf": content})
    error = refused(hub, cache, "org/evil")
    assert isinstance(error, SourceError)
    assert re.search(says, error.message) and "org/evil@" in error.message
    assert not list(cache.rglob("*.header"))


def test_a_header_that_never_ends(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fit the file, and is longer than any header: by its own word, or as it comes."""
    monkeypatch.setattr(headers, "_LONGEST", 2**14)
    claims = KEYS + struct.pack("<Q", 80_000) + b"n" * 99_000
    hub.add("org/claims", {"c.gguf": claims})
    assert "has a header of more than 16,384 bytes" in refused(hub, cache, "org/claims").message
    assert asked(hub) == [(0, FIRST)] * 2
    hub.add("org/long", {"l.gguf": listed(2_000) + struct.pack("<Q50s", 50, b"t") * 2_000})
    assert "has a header of more than 16,384 bytes" in refused(hub, cache, "org/long").message
    assert max(end for _, end in asked(hub)) == 2**14


def test_headers_must_fit_the_size_that_is_listed(
    hub: HubServer, cache: Path, model: Path, tmp_path: Path
) -> None:
    """Cut, lengthened, or with a hole: what a file on the disk may get away with, a header alone may not."""
    raw = model.read_bytes()
    longer = raw + bytes(32)
    assert open_file(model).places["rope_freqs.weight"][1] + 256 == len(raw), "it ends without zeros"
    name = b"blk.0.attn_k.weight"
    at = raw.index(name) + len(name) + 4 + 16
    kind, offset = struct.unpack_from("<IQ", raw, at)
    hole = raw[:at] + struct.pack("<IQ", kind, offset + 32) + raw[at + 12 :]
    short = raw[: at - 16] + struct.pack("<Q", 64) + raw[at - 8 :]  # half as wide, and a hole behind it
    for number, (content, says) in enumerate(
        [
            (raw[:-1], r"ends at byte [\d,]+ of [\d,]+"),
            (longer, r"its tensors end at byte [\d,]+ of [\d,]+"),
            (hole, "begins at byte"),
            (short, "begins at byte"),
        ]
    ):
        hub.add(f"org/e{number}", {"e.gguf": content})
        error = refused(hub, cache, f"org/e{number}")
        assert isinstance(error, SourceError)
        assert re.search(says, error.message), error.message
    odd = tmp_path / "odd.gguf"
    tensors = [Stored("a", (5,), "f32"), Stored("b", (3,), "f32")]
    write(odd, "llama", {}, tensors, [torch.zeros(t.byte_shape, dtype=torch.uint8) for t in tensors])
    for zeros in (0, 20):  # of the last tensor, which some writers leave out
        content = odd.read_bytes()[: odd.stat().st_size - zeros]
        hub.add(f"org/odd{zeros}", {"o.gguf": content})
        assert list(open_file(look(hub, cache, f"org/odd{zeros}").path).tensors) == ["a", "b"]


def test_a_size_that_is_not_the_listed_one(hub: HubServer, cache: Path) -> None:
    entry = hub.repo("org/x-GGUF").files()[FILE]
    hub.repo("org/x-GGUF").store.blobs[entry.key] += b"more"
    assert refused(hub, cache, "org/x-GGUF").message == f"{hub.url} does not speak the Hub protocol."


def test_a_kept_header_that_is_damaged(hub: HubServer, cache: Path) -> None:
    """By its own format it is fetched again; what was changed inside of it is refused when it is opened."""
    path = look(hub, cache, "org/x-GGUF").path
    kept = header_file.read(path)
    header_file.path_of(path).write_bytes(b"quantkit")
    with pytest.raises(SourceError, match="is not what quantkit writes"):
        open_file(path)
    assert open_file(look(hub, cache, "org/x-GGUF").path).tensors
    header_file.write(path, replace(kept, first=kept.first[:-9]))
    with pytest.raises(SourceError, match="its header does not end there"):
        open_file(path)


def test_a_folder_of_headers_is_a_model(hub: HubServer, cache: Path) -> None:
    path = look(hub, cache, "org/x-GGUF").path
    assert isinstance(open_source(path.parent), GgufCheckpoint)


# ---- plan, inspect, and what comes after


def test_a_plan_is_that_of_the_file(hub: HubServer, cache: Path, model: Path) -> None:
    def planned(source: str, **more: Any) -> dict[str, Any]:
        found = plan(recipe(source, "gptq:w4g32", "gguf:q4_0"), cache_dir=cache, headers_only=True, **more)
        told = found.to_json()
        del told["source"]["id"], told["source"]["revision"], told["disk_bytes"]
        for target in told["targets"]:
            target["size_bytes"] = round(target["size_bytes"], -3)  # the file names its source
            del target["bits_per_weight"]
        return dict(json.loads(json.dumps(told).replace(source, "SOURCE")))

    remote = planned("org/x-GGUF")
    assert remote == planned(str(model))
    assert remote["status"] == "ok" and "already quantized (gguf, Q8_0" in remote["warnings"][0]
    assert asked_bytes(hub) < 20_000
    assert planned("org/x-GGUF", offline=True) == remote
    shown, local = inspect(look(hub, cache, "org/x-GGUF").path), inspect(model)
    assert {**shown.to_json(), "name": ""} == {**local.to_json(), "name": ""}
    assert shown.table().rows == local.table().rows


def test_the_commands(hub: HubServer, tmp_path: Path, model: Path) -> None:
    place = Workplace(hub, tmp_path / "place")
    target = ("org/x-GGUF:Q8_0", "--to", "gptq:w8g32@method=rtn")
    for _ in range(2):
        shown = place.call("inspect", "org/x-GGUF", "--json")
        planned = place.call("plan", *target, "--json")
        assert (shown.code, planned.code) == (0, 0), shown.err + planned.err
    assert json.loads(shown.out)["gguf"]["tokenizer"].startswith("byte-level BPE, 4")
    for command in (("inspect", "org/x-GGUF"), ("plan", *target)):
        assert place.call(*command, "--offline").code == 0
    assert asked_bytes(hub) < 20_000 and not list(place.folder.rglob("*.gguf"))
    hub.faults.append(Fault("GET /cdn/", "status", times=99))
    assert place.call("convert", *target, "-o", "out", "--no-eval", "--no-engine").code == 3
    hub.faults.clear()
    done = place.call("convert", *target, "-o", "out", "--no-eval", "--no-engine")
    assert done.code == 0, done.err
    written = next(place.folder.glob("out/*/model.safetensors"))
    assert written.stat().st_size == json.loads(planned.out)["targets"][0]["size_bytes"]
    assert Checkpoint.open(written.parent).tensors
    (whole,) = (place.folder / "hf").rglob(f"snapshots/*/{FILE}")
    assert whole.read_bytes() == model.read_bytes()
