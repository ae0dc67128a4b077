"""`ShardedWriter`: files that the safetensors library reads, of exactly the planned size."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantkit.checkpoint import writer as module
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.writer import ShardedWriter, ShardPlan, TensorSpec, plan_shards
from quantkit.errors import BudgetError, RunError


def specs(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = 10**9) -> ShardPlan:
    plan = plan_shards(specs(tensors), shard_bytes)
    with ShardedWriter(folder, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return plan


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 5, generator=generator)
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": dense.half(),
        "transposed": dense.t(),
        "every_other": dense.bfloat16()[::2],
        "expanded": torch.tensor([1.5]).expand(4, 3),
        "mask": dense > 0,
        "fp8": dense.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "grad": dense.clone().requires_grad_(),
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = mixed()
    plan = write(tmp_path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size == plan.total_bytes == plan.files[0].bytes
    loaded = load_file(file)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            for read in (loaded[name], opened.get_tensor(name)):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(as_bytes(read), as_bytes(tensor))


def test_header_keeps_the_order_of_writing_and_the_data_is_aligned(tmp_path: Path) -> None:
    write(tmp_path, mixed())
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert list(json.loads(raw[8 : 8 + length])) == ["__metadata__", *mixed()]
    for info in read_header(tmp_path / "model.safetensors").tensors.values():
        assert info.begin % info.torch_dtype.itemsize == 0


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {name: torch.full((10,), i, dtype=torch.float32) for i, name in enumerate("abcde")}
    tensors["large"] = torch.zeros(50)
    plan = write(tmp_path, tensors, shard_bytes=80)
    assert [(f.name, [s.name for s in f.specs]) for f in plan.files] == [
        ("model-00001-of-00004.safetensors", ["a", "b"]),
        ("model-00002-of-00004.safetensors", ["c", "d"]),
        ("model-00003-of-00004.safetensors", ["e"]),
        ("model-00004-of-00004.safetensors", ["large"]),
    ]
    assert [(tmp_path / f.name).stat().st_size for f in plan.files] == [f.bytes for f in plan.files]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 400}
    assert index["weight_map"]["d"] == "model-00002-of-00004.safetensors"
    assert set(index["weight_map"]) == set(tensors)
    assert torch.equal(load_file(tmp_path / index["weight_map"]["d"])["d"], tensors["d"])


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_give_the_same_bytes_and_stay_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 64)
    large = torch.arange(3 * 7 * 33, dtype=torch.int16).view(3, 7, 33)
    tensor = large.transpose(0, 2) if transposed else large
    assert max(piece.numel() for piece in module._slices(tensor)) <= 64
    write(tmp_path, {"one": tensor, "row": torch.arange(1000).view(1, 1, 1000)})
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["one"], tensor)
    assert torch.equal(loaded["row"], torch.arange(1000).view(1, 1, 1000))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, mixed())
    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()


def test_metadata_is_part_of_the_plan(tmp_path: Path) -> None:
    metadata = {"format": "pt", "made_by": "tests, ünïcode"}
    plan = plan_shards([TensorSpec("a", torch.float32, (2,))], 100, metadata=metadata)
    with ShardedWriter(tmp_path, plan, metadata) as writer:
        writer.write("a", torch.ones(2))
    assert (tmp_path / "model.safetensors").stat().st_size == plan.total_bytes
    assert read_header(tmp_path / "model.safetensors").metadata == metadata
    with pytest.raises(ValueError, match="plan_shards"):
        ShardedWriter(tmp_path, plan, {"format": "np"})


PLANNED = [TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (2,))]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("b", torch.zeros(2), "expects `a`"),
        ("x", torch.zeros(2), "`x`"),
        ("a", torch.zeros(3), r"planned as torch.float32 \(2,\), got torch.float32 \(3,\)"),
        ("a", torch.zeros(2).half(), "got torch.float16"),
    ],
)
def test_unplanned_tensors(tmp_path: Path, name: str, tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(RunError, match=says), ShardedWriter(tmp_path, plan_shards(PLANNED, 100)) as writer:
        writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


def test_missing_and_superfluous_tensors(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="`b` was never written; 1 planned"),
        ShardedWriter(tmp_path, plan_shards(PLANNED, 100)) as writer,
    ):
        writer.write("a", torch.zeros(2))
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(RunError, match="`c` was not planned"),
        ShardedWriter(tmp_path, plan_shards(PLANNED, 100)) as w,
    ):
        for name in "abc":
            w.write(name, torch.zeros(2))


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [PLANNED[0], PLANNED[0]],
        [TensorSpec("__metadata__", torch.float32, (1,))],
        [TensorSpec("c", torch.complex64, (1,))],
    ],
)
def test_plans_that_cannot_be_written(bad: list[TensorSpec]) -> None:
    with pytest.raises(RunError):
        plan_shards(bad, 100)


def test_an_exception_removes_the_partial_file_and_writes_no_index(tmp_path: Path) -> None:
    three = [*PLANNED, TensorSpec("c", torch.float32, (2,))]
    with pytest.raises(KeyError), ShardedWriter(tmp_path, plan_shards(three, 16)) as writer:
        for name in "abc":
            writer.write(name, torch.zeros(2))
            if name == "a":
                assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
                continue
            if name == "c":
                raise KeyError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_full_disk_says_what_was_still_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shards(PLANNED, 8)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BudgetError, match="disk full") as caught, ShardedWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(2))
    assert caught.value.needed == plan.files[1].bytes
    assert "free space" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_in_the_middle_of_a_tensor(tmp_path: Path) -> None:
    program = f"""
        import resource, torch
        from pathlib import Path
        from quantkit.checkpoint.writer import ShardedWriter, TensorSpec, plan_shards
        from quantkit.errors import BudgetError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        plan = plan_shards([TensorSpec("a", torch.uint8, (100_000,))], 10**6)
        try:
            with ShardedWriter(Path({str(tmp_path)!r}), plan) as writer:
                writer.write("a", torch.zeros(100_000, dtype=torch.uint8))
        except BudgetError as error:
            assert error.needed == plan.total_bytes - 50_000, error
            assert "file size limit" in error.message, error
        else:
            raise SystemExit("nothing was raised")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert not list(tmp_path.iterdir())
