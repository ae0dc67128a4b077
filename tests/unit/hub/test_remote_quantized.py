"""Quantized models without their weights: every dialect that is read is planned and shown from headers."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import HubError, SourceError
from quantkit.hub import headers, ranges
from quantkit.run.inspect import inspect
from quantkit.run.plan import plan
from quantkit.run.quantized import open_source
from tests.gguf_files import byte_tokenizer
from tests.hubplace import Workplace
from tests.hubserver import Fault, HubServer
from tests.models import save_tiny
from tests.remote import asked, asked_bytes, look, recipe, refused, use, weight_requests

pytestmark = pytest.mark.usefixtures("sleeps")
# What quantkit writes is what it reads, of each format in each layout
MADE = (
    *("gptq:w4g32@method=rtn", "gptq:w3g32_asym@method=rtn", "awq:w4g32@method=rtn", "hqq:w4g32"),
    *(
        "hqq:w3g32_asymf",
        "bitsandbytes:nf4g32@method=rtn",
        "bitsandbytes:nf4g32_dq@method=rtn",
        "int8@report_outliers=false",
    ),
    *("compressed_tensors:w4g32@method=rtn", "compressed_tensors:w8@method=rtn"),
    *("compressed_tensors:w8a8@method=rtn", "compressed_tensors:fp8a8@method=rtn"),
    *("nvfp4@method=rtn", "mxfp4@method=rtn"),
)
NF4 = "bitsandbytes-nf4g32-rtn"
GPTQ = "gptq-w4g32-rtn"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model in each of `MADE`."""
    root = tmp_path_factory.mktemp("made")
    source = save_tiny("llama", root / "source", hidden_size=128, intermediate_size=256, vocab_size=416)
    asked_for = quantkit.Recipe(
        source=str(source),
        targets=tuple(target for text in MADE for target in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(root)),
        eval=quantkit.Eval(enabled=False),
        engine_check=False,
    )
    quantkit.convert(asked_for)
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Files are small here, and what is asked for at once is, too: a header ends where a real one would."""
    monkeypatch.setattr(headers, "_FIRST", 2**11)
    monkeypatch.setattr(headers, "_GAP", 2**6)
    with HubServer() as server:
        use(server, monkeypatch)
        yield server


def folder_of(made: Path, target: str) -> Path:
    return made / quantkit.parse_targets(target)[0].name


def look_at_plan(source: str, cache: Path, **more: Any) -> dict[str, Any]:
    found = plan(recipe(source, "gptq:w8g32"), cache_dir=cache, headers_only=True, **more).to_json()
    del found["source"]["id"], found["source"]["revision"]
    return dict(json.loads(json.dumps(found).replace(source, "SOURCE")))


@pytest.mark.parametrize("target", MADE)
def test_a_plan_of_each_dialect_needs_no_weights(
    target: str, made: Path, hub: HubServer, cache: Path
) -> None:
    folder = folder_of(made, target)
    hub.add("org/x", folder)
    planned = look_at_plan("org/x", cache)
    assert planned == look_at_plan(str(folder), cache)
    assert planned["status"] == "ok" and "already quantized" in planned["warnings"][0]
    shown, local = inspect(look(hub, cache, "org/x").path), inspect(folder)
    assert (shown.kinds, shown.quantization, shown.writer) == (local.kinds, local.quantization, local.writer)
    assert shown.traits is None and local.traits
    assert any("only headers are here" in note for note in shown.table().notes) is (shown.manifest is None)
    assert asked_bytes(hub) < (folder / FILE).stat().st_size / 8
    assert not list(cache.rglob("*.safetensors"))
    before = len(weight_requests(hub))
    assert look_at_plan("org/x", cache, offline=True) == planned
    assert len(weight_requests(hub)) == before, "what is kept is not asked for again"


def test_states_that_are_strewn_over_the_file(made: Path, hub: HubServer, cache: Path) -> None:
    """One request for each quantized weight, of its state alone; where the file is, the Hub is asked once."""
    folder = made / NF4
    hub.add("org/nf4", folder)
    stored = Checkpoint.open(folder)
    states = {n: i for n, i in stored.tensors.items() if ".quant_state." in n}
    assert len(states) == 14
    found = Checkpoint.open(look(hub, cache, "org/nf4").path)
    header = {span for span in asked(hub) if span not in {(i.begin, i.end) for i in states.values()}}
    assert len(asked(hub)) == 14 + len(header) and len(header) == 2
    length = min(info.begin for info in stored.tensors.values())
    assert asked_bytes(hub) == length + sum(info.nbytes for info in states.values())
    assert len(weight_requests(hub, "resolve")) == 1
    assert all(found.read(name).equal(stored.read(name)) for name in states)
    with pytest.raises(NotDownloaded):
        found.read("model.layers.0.mlp.up_proj.weight.absmax")


def test_eight_ask_at_once(made: Path, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are not waited for one by one: nobody gets an answer before eight have asked."""
    hub.add("org/nf4", made / NF4)
    read, asking, all_ask = ranges.Ranges.get, [], threading.Event()

    def together(self: ranges.Ranges, begin: int, end: int) -> bytes:
        if end - begin < 200:
            asking.append(begin)
            if len(asking) == 8:
                all_ask.set()
            assert all_ask.wait(10)
        return read(self, begin, end)

    monkeypatch.setattr(ranges.Ranges, "get", together)
    look(hub, cache, "org/nf4")
    assert len(asking) == 14


STATE = "GET /cdn/"  # the third request there is for the first state


@pytest.mark.parametrize(
    "fault",
    [
        Fault(STATE, "status", status=503, skip=2),
        Fault(STATE, "status", status=429, skip=4),
        Fault(STATE, "drop", skip=2),
        Fault(STATE, "drop_mid", skip=3, after=20),
        Fault(STATE, "close_mid", skip=2, after=20),
        Fault(STATE, "truncate", skip=5, after=20),
        Fault(STATE, "corrupt", skip=2, after=1),
        Fault(STATE, "ignore_range", skip=2),
    ],
    ids=lambda fault: f"{fault.action} {fault.status}",
)
def test_one_fault_is_tried_again(
    fault: Fault, made: Path, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FAR", 100)
    monkeypatch.setattr(headers, "FAR", 100)
    hub.add("org/nf4", made / NF4)
    fault = Fault(**{name: getattr(fault, name) for name in Fault.__dataclass_fields__})
    hub.faults.append(fault)
    found = open_source(look(hub, cache, "org/nf4").path)
    assert fault.times == 0
    assert found.tensors.keys() == open_source(made / NF4).tensors.keys()


def test_a_place_in_the_storage_that_expired_is_asked_for_again(
    made: Path, hub: HubServer, cache: Path
) -> None:
    hub.add("org/nf4", made / NF4)
    hub.faults.append(Fault("GET /cdn/", "status", status=403, skip=5))
    assert len(Checkpoint.open(look(hub, cache, "org/nf4").path).tensors)
    assert hub.faults[0].times == 0
    assert 2 <= len(weight_requests(hub, "resolve")) <= 1 + 8


def test_a_server_without_ranges(
    made: Path, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies near the beginning comes with one answer; for what lies far the whole file is not read."""
    hub.add("org/nf4", made / NF4)
    hub.faults.append(Fault("GET /cdn/", "ignore_range", times=999))
    assert len(open_source(look(hub, cache, "org/nf4").path).tensors)
    assert len(asked(hub)) == 3, "the beginning, the rest of the header, all states"
    shutil.rmtree(cache)
    monkeypatch.setattr(ranges, "FAR", 2**14)
    monkeypatch.setattr(headers, "FAR", 2**14)
    error = refused(hub, cache, "org/nf4")
    assert isinstance(error, HubError)
    assert re.fullmatch(
        rf"{hub.url} sends 'model.safetensors' of org/nf4 only whole, and [\d,]+ bytes of it would come "
        "before what is needed.",
        error.message,
    )
    hub.faults.clear()
    assert len(open_source(look(hub, cache, "org/nf4").path).tensors), "nothing is left of what failed"


def test_states_that_stay_damaged_are_not_kept(made: Path, hub: HubServer, cache: Path) -> None:
    hub.add("org/nf4", made / NF4)
    hub.faults.append(Fault("GET /cdn/", "corrupt", skip=2, after=0, times=99))
    error = refused(hub, cache, "org/nf4")
    assert isinstance(error, SourceError)
    assert re.search(r"`model.*quant_state.*` in `org/nf4@.*` does not hold a shape", error.message)
    hub.faults.clear()
    assert len(open_source(look(hub, cache, "org/nf4").path).tensors)


def test_tensors_that_are_only_called_shape(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """Names decide what is fetched; what cannot be a shape of ours is the model's own affair."""
    (tmp_path / "x").mkdir()
    tensors = {"a.shape": torch.arange(3), "b.shape": torch.ones(2), "c.shape": torch.tensor([2, 3])}
    save_file({**tensors, "d": torch.randn(64, 64)}, tmp_path / "x" / FILE)
    hub.add("org/x", {FILE: (tmp_path / "x" / FILE).read_bytes(), "config.json": b"{}"})
    found = Checkpoint.open(look(hub, cache, "org/x").path)
    assert found.read("c.shape").tolist() == [2, 3]
    for name in ("a.shape", "b.shape"):
        with pytest.raises(NotDownloaded):
            found.read(name)


@pytest.fixture
def odd(made: Path, tmp_path: Path) -> Callable[[float], Path]:
    """The GPTQ model as AutoGPTQ writes it, with a bias of `value` for every linear."""

    def build(value: float) -> Path:
        folder = shutil.copytree(made / GPTQ, tmp_path / f"odd{value}")
        (folder / "quantkit.json").unlink()
        tensors = load_file(folder / FILE)
        for name in [n for n in tensors if n.endswith(".scales")]:
            bias = torch.full((tensors[name].shape[1],), value, dtype=torch.float16)
            tensors[name.replace("scales", "bias")] = bias
        save_file(tensors, folder / FILE)
        return folder

    return build


def test_what_only_values_tell_is_believed_and_said(
    odd: Callable[[float], Path], hub: HubServer, cache: Path
) -> None:
    hub.add("org/odd", odd(0.0))
    planned = look_at_plan("org/odd", cache)
    assert planned["status"] == "ok"
    why = "a bias of zeros that the model does not have, as far as headers tell"
    assert planned["warnings"][1] == f"14 tensors of `SOURCE` are left out: {why}"
    notes = inspect(look(hub, cache, "org/odd").path).table().notes
    assert any("only headers are here" in note for note in notes)
    hub.add("org/odd", odd(0.5))
    with pytest.raises(SourceError, match="does not use"):
        plan(recipe("org/odd", "gptq:w8g32"), cache_dir=cache)


def test_the_commands(made: Path, hub: HubServer, tmp_path: Path) -> None:
    """Plan and inspect fetch no weights, online and offline; convert then does, and works."""
    hub.add("org/nf4", made / NF4)
    hub.add("org/nf4", byte_tokenizer(tmp_path / "tokenizer"))
    place = Workplace(hub, tmp_path / "place")
    target = ("org/nf4", "--to", "gptq:w8g32@method=rtn")
    for _ in range(2):
        shown = place.call("inspect", "org/nf4", "--json")
        planned = place.call("plan", *target, "--json")
        assert (shown.code, planned.code) == (0, 0), shown.err + planned.err
    assert {kind["kind"]: kind["tensors"] for kind in json.loads(shown.out)["kinds"]}[
        "bitsandbytes 4 bit"
    ] == 14
    offline = place.call("plan", *target, "--offline", "--json")
    assert offline.out == planned.out
    assert not list(place.folder.rglob("*.safetensors")), "asked for by ranges only"
    assert asked_bytes(hub) < (made / NF4 / FILE).stat().st_size / 8
    done = place.call("convert", *target, "-o", "out", "--no-eval", "--no-engine")
    assert done.code == 0, done.err
    written = next(place.folder.glob("out/*/model.safetensors"))
    size = json.loads(planned.out)["targets"][0]["size_bytes"]
    assert sum(i.nbytes for i in Checkpoint.open(written.parent).tensors.values()) <= size
    whole = list((place.folder / "hf").rglob("snapshots/*/model.safetensors"))
    assert len(whole) == 1 and whole[0].read_bytes() == (made / NF4 / FILE).read_bytes()
