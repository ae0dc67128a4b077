from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from quantkit.errors import ResumeError, UsageError
from quantkit.run.results import BlockResult
from quantkit.run.store import JOURNAL, RunStore
from quantkit.schemes import Scheme
from tests.quantized import random_linear, same

KEY, STREAMS = "target-key", "streams-key"
NAMES = ("reference.calibration", "target.calibration")


@contextmanager
def opened(root: Path, *, restart: bool = False) -> Iterator[RunStore]:
    store = RunStore.open(root, restart=restart)
    try:
        yield store
    finally:
        store.close()


def result(seed: int) -> BlockResult:
    """A weight, and a norm that a transform rewrote."""
    rng = torch.Generator().manual_seed(seed)
    linear = random_linear("w.weight", (4, 8), Scheme(4, 4), rng)
    return BlockResult([linear], {"norm.weight": torch.randn(8, generator=rng).to(torch.bfloat16)})


def commit(store: RunStore, block: int, *targets: str) -> None:
    """Commit a block: streams entering the next one are in place first."""
    sums = {}
    for name in NAMES:
        path = store.stream_path(block + 1, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} {block}".encode())
        sums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    made = {target: (result(block), {"block": block}) for target in targets or (KEY,)}
    store.commit(block, made, STREAMS, sums)


def test_an_empty_store_knows_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "b") as store:
        assert store.done(KEY, 3) == 0
        assert store.generation(STREAMS, NAMES) == 0
        assert store.final(KEY, STREAMS) is None


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        commit(store, 1)
        store.commit_final(STREAMS, {KEY: {"kl": 0.5}})
    with opened(tmp_path) as store:
        assert store.done(KEY, 5) == 2
        assert store.done(KEY, 1) == 1
        assert store.done("another", 5) == 0
        assert store.generation(STREAMS, NAMES) == 2
        assert store.generation("other streams", NAMES) == 0
        assert store.generation(STREAMS, ["missing.calibration"]) == 0
        assert store.metrics(KEY, 1) == {"block": 1}
        assert store.final(KEY, STREAMS) == {"kl": 0.5}
        assert store.final(KEY, "other streams") is None
        found, expected = store.load(KEY, 1), result(1)
        assert same(found.by_name()["w.weight"].weight, expected.linears[0].weight)
        assert list(found.tensors) == ["norm.weight"]
        assert same(found.tensors["norm.weight"], expected.tensors["norm.weight"])


def test_the_journal_has_a_line_per_commit(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        commit(store, 1)
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert [line["block"] for line in lines] == [0, 1]
    path = tmp_path / "results" / KEY / "0000.safetensors"
    assert lines[0]["results"] == {KEY: hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_never_counted(tmp_path: Path, cut: int) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        commit(store, 1)
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-cut])
    with opened(tmp_path) as store:
        assert store.done(KEY, 5) == 1
        assert journal.read_bytes() == whole[: whole.index(b"\n") + 1]
        commit(store, 1)
        assert store.done(KEY, 5) == 2
    with opened(tmp_path) as store:
        assert store.done(KEY, 5) == 2


# see test_a_refused_store_is_let_go: until then the lock's file is closed by the collector, with a warning
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("line", [b"nonsense\n", b"{}\n", b"5\n", b'{"block": 0}\n', b"\xff\n"])
def test_a_whole_line_that_is_no_commit_is_refused(tmp_path: Path, line: bytes) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(line)
    with pytest.raises(ResumeError, match=r"journal\.jsonl:2.*is not a commit") as caught:
        RunStore.open(tmp_path)
    assert caught.value.remedy == "run again with --restart"
    del caught
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_refused_store_is_let_go(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b"nonsense\n")
    refusal: BaseException | None = None
    try:
        RunStore.open(tmp_path)
    except ResumeError as error:
        refusal = error
    try:
        with opened(tmp_path, restart=True) as store:
            assert store.done(KEY, 1) == 0
    finally:
        assert refusal is not None
        del refusal
        gc.collect()


@pytest.mark.parametrize("damage", ["changed", "removed", "truncated"])
def test_a_damaged_result_ends_what_is_believed(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as store:
        for block in range(3):
            commit(store, block)
    path = tmp_path / "results" / KEY / "0001.safetensors"
    data = path.read_bytes()
    match damage:
        case "changed":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "removed":
            path.unlink()
        case _:
            path.write_bytes(data[:-1])
    with opened(tmp_path) as store:
        assert store.done(KEY, 3) == 1
        if damage != "removed":
            with pytest.raises(ResumeError, match="changed since it was committed"):
                store.load(KEY, 1)


def test_a_damaged_stream_falls_back_to_the_generation_before(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        commit(store, 1)
        store.stream_path(2, NAMES[0]).write_bytes(b"something else")
        assert store.generation(STREAMS, NAMES) == 1
        assert store.generation(STREAMS, NAMES[1:]) == 2


def test_two_generations_of_streams_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for block in range(4):
            commit(store, block)
        assert sorted(p.name for p in (tmp_path / "streams").iterdir()) == ["0003", "0004"]
        store.drop_streams()
        assert not (tmp_path / "streams").exists()
        store.drop_streams()
        assert store.done(KEY, 4) == 4
        assert store.generation(STREAMS, NAMES) == 0


def test_targets_do_not_disturb_each_other(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0, "a", "b")
        commit(store, 1, "a")
    with opened(tmp_path) as store:
        assert (store.done("a", 3), store.done("b", 3)) == (2, 1)
        commit(store, 1, "b")
        assert (store.done("a", 3), store.done("b", 3)) == (2, 2)


def test_two_runs_in_one_folder_refuse(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(UsageError, match="another run is at work") as caught:
            RunStore.open(tmp_path)
        assert caught.value.remedy is not None
    with opened(tmp_path) as store:
        assert store.done(KEY, 1) == 0


def test_restart_forgets_everything(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        store.commit_final(STREAMS, {KEY: {"kl": 0.5}})
    with opened(tmp_path, restart=True) as store:
        assert store.done(KEY, 3) == 0
        assert store.generation(STREAMS, NAMES) == 0
        assert store.final(KEY, STREAMS) is None
        commit(store, 0)
    with opened(tmp_path) as store:
        assert store.done(KEY, 3) == 1


def test_restart_of_a_fresh_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "new", restart=True) as store:
        assert store.done(KEY, 3) == 0


def test_restart_leaves_a_store_alone_that_another_run_holds(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        commit(store, 0)
        with pytest.raises(UsageError, match="another run is at work"):
            RunStore.open(tmp_path, restart=True)
        assert (tmp_path / JOURNAL).exists()
