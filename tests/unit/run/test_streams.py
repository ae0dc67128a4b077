from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from quantkit.errors import RunError
from quantkit.run.advance import Streams
from quantkit.run.store import RunStore
from quantkit.run.streams import RowSet, StreamFile, StreamWriter, sha256_file

CPU = torch.device("cpu")


def file_at(path: Path, dtype: torch.dtype = torch.bfloat16) -> StreamFile:
    return StreamFile(path / "sub" / "s.bin", rows=5, length=3, hidden=4, dtype=dtype)


def test_batches_hold_whole_rows() -> None:
    rows = RowSet("calibration", torch.zeros(5, 8, dtype=torch.int32), True)
    assert (rows.rows, rows.length) == (5, 8)
    assert [(s.start, s.stop) for s in rows.batches(16)] == [(0, 2), (2, 4), (4, 5)]
    assert [(s.start, s.stop) for s in rows.batches(1000)] == [(0, 5)]
    # a row longer than the batch still goes, alone
    assert [(s.start, s.stop) for s in rows.batches(1)] == [(n, n + 1) for n in range(5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_states_come_back_in_any_slices(tmp_path: Path, dtype: torch.dtype, rng: torch.Generator) -> None:
    states = torch.randn(5, 3, 4, generator=rng).to(dtype)
    file = file_at(tmp_path, dtype)
    writer = StreamWriter(file)
    for part in (states[:2], states[2:5].transpose(1, 2).contiguous().transpose(1, 2)):
        writer.append(part)
    digest = writer.commit()
    raw = file.path.read_bytes()
    assert len(raw) == 5 * file.row_bytes == 5 * 3 * 4 * dtype.itemsize
    assert digest == hashlib.sha256(raw).hexdigest() == sha256_file(file.path)
    for rows in (slice(0, 5), slice(1, 2), slice(3, 5)):
        found = file.read(rows, CPU)
        assert found.dtype == dtype and torch.equal(found, states[rows])


def test_a_short_file_is_refused_with_its_place(tmp_path: Path) -> None:
    file = file_at(tmp_path)
    file.path.parent.mkdir()
    file.path.write_bytes(bytes(3 * file.row_bytes + 4))
    with pytest.raises(RunError, match=r"20 bytes short at row 3") as caught:
        file.read(slice(3, 4), CPU)
    assert caught.value.remedy == "run again with --restart"
    assert torch.equal(file.read(slice(0, 3), CPU), torch.zeros(3, 3, 4, dtype=torch.bfloat16))


def test_nothing_is_left_of_a_discarded_stream(tmp_path: Path) -> None:
    file = file_at(tmp_path)
    writer = StreamWriter(file)
    writer.append(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert not file.path.exists()
    writer.discard()
    assert list(file.path.parent.iterdir()) == []


def test_discarding_after_a_commit_keeps_the_file(tmp_path: Path) -> None:
    file = file_at(tmp_path)
    writer = StreamWriter(file)
    writer.append(torch.zeros(5, 3, 4, dtype=torch.bfloat16))
    writer.commit()
    writer.discard()
    assert file.path.exists()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.open(tmp_path / "run")


def test_streams_move_from_generation_to_generation(store: RunStore, rng: torch.Generator) -> None:
    rows = RowSet("calibration", torch.zeros(5, 3, dtype=torch.int32), True)
    streams = Streams(store, 4, torch.float32, CPU, batch_tokens=6)
    states = torch.randn(5, 3, 4, generator=rng)
    streams.write(0, "reference", rows, iter(states.split(2)))
    first = streams.take_written()
    assert set(first) == {"reference.calibration"}
    assert first["reference.calibration"] == sha256_file(store.stream_path(0, "reference.calibration"))
    # no block has run at generation 0: a target starts from the reference
    streams.advance(0, "target", rows, lambda x: x * 2)
    assert set(streams.take_written()) == {"target.calibration"}
    assert streams.take_written() == {}
    parts = list(streams.batches(1, "target", rows))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 2), (2, 4), (4, 5)]
    assert torch.equal(torch.cat([x for _, x in parts]), states * 2)
    store.close()


def test_an_error_on_the_way_leaves_no_stream(store: RunStore) -> None:
    rows = RowSet("calibration", torch.zeros(2, 3, dtype=torch.int32), True)
    streams = Streams(store, 4, torch.float32, CPU, batch_tokens=3)

    def failing() -> object:
        yield torch.zeros(1, 3, 4)
        raise KeyError("block")

    with pytest.raises(KeyError):
        streams.write(1, "reference", rows, failing())  # type: ignore[arg-type]
    assert streams.take_written() == {}
    assert list((store.root / "streams" / "0001").iterdir()) == []
    store.close()
