"""`Checkpoint`: which files count, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.header import TORCH_DTYPES
from quantkit.checkpoint.reader import Checkpoint, first_nonfinite
from quantkit.errors import SourceError


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.arange(6, dtype=torch.float32).view(3, 2) + i for i, name in enumerate(names)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def shards(path: Path, *, index: dict[str, str] | None = None) -> None:
    """Two shards, a and b in the first, c in the second, with an index."""
    save_file(tensors("a", "b"), path / "model-00001-of-00002.safetensors")
    save_file(tensors("c"), path / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = index if index is not None else {"a": first, "b": first, "c": second}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(path: Path, match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        Checkpoint.open(path)
    assert caught.value.remedy
    return caught.value


def test_single_file(path: Path) -> None:
    save_file(tensors("a", "b"), path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.path == path
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.dtype == "float32"
    assert torch.equal(checkpoint.read("b"), tensors("a", "b")["b"])


def test_shards_by_index_in_file_order(path: Path) -> None:
    shards(path)
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].file.name == "model-00002-of-00002.safetensors"
    assert torch.equal(checkpoint.read("c"), tensors("c")["c"])


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_is_read_bit_for_bit(path: Path, name: str) -> None:
    dtype = TORCH_DTYPES[name]
    raw = (torch.arange(12 * dtype.itemsize) % (2 if dtype is torch.bool else 251)).to(torch.uint8)
    from quantkit.checkpoint.writer import ShardedWriter, TensorSpec, plan_shards

    with ShardedWriter(path, plan_shards([TensorSpec("w", dtype, (4, 3))], 10**6)) as writer:
        writer.write("w", raw.view(dtype).view(4, 3))
    read = Checkpoint.open(path).read("w")
    assert read.dtype is dtype
    assert torch.equal(read.view(-1).view(torch.uint8), raw)


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(1, 3), slice(None), slice(2, 2), slice(-1, None), slice(1, 99), slice(2, 1)]
)
def test_rows(path: Path, rows: slice) -> None:
    save_file(tensors("a", "b"), path / "model.safetensors")
    read = Checkpoint.open(path).read("b", rows=rows)
    expected = tensors("a", "b")["b"][rows]
    assert read.shape == expected.shape
    assert torch.equal(read, expected)


def test_scalar_and_empty(path: Path) -> None:
    save_file({"s": torch.tensor(3.5), "e": torch.zeros(0, 4)}, path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.read("s").item() == 3.5
    assert checkpoint.read("e").shape == (0, 4)
    assert checkpoint.read("e", rows=slice(0, 0)).shape == (0, 4)


def test_what_is_read_may_be_changed(path: Path) -> None:
    save_file(tensors("a"), path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    checkpoint.read("a").fill_(7)
    assert torch.equal(checkpoint.read("a"), tensors("a")["a"])


def test_unknown_name_suggests(path: Path) -> None:
    save_file(tensors("model.norm.weight"), path / "model.safetensors")
    with pytest.raises(SourceError, match=r"did you mean `model\.norm\.weight`"):
        Checkpoint.open(path).read("model.norm.weigth")


def test_file_cut_after_opening(path: Path) -> None:
    save_file(tensors("a"), path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    with (path / "model.safetensors").open("r+b") as f:
        f.truncate(checkpoint.tensors["a"].end - 5)
    with pytest.raises(SourceError, match="5 bytes"):
        checkpoint.read("a")


def test_symlinked_files_as_in_the_hub_cache(path: Path, tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "blob")
    (path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(Checkpoint.open(path).read("a"), tensors("a")["a"])


def test_odd_file_names_without_index(path: Path) -> None:
    save_file(tensors("a"), path / "gptq_model-4bit-128g.safetensors")
    save_file(tensors("b"), path / "rest.safetensors")
    assert list(Checkpoint.open(path).tensors) == ["a", "b"]
    save_file(tensors("b"), path / "twice.safetensors")
    assert "rest.safetensors" in refused(path, "`b` is in both").message


def test_consolidated_copies_are_ignored(path: Path) -> None:
    save_file(tensors("tok.weight"), path / "consolidated.safetensors")
    assert list(Checkpoint.open(path).tensors) == ["tok.weight"]
    save_file(tensors("a"), path / "model-q.safetensors")
    assert list(Checkpoint.open(path).tensors) == ["a"]


def test_single_file_wins_over_an_index_as_in_transformers(path: Path) -> None:
    shards(path)
    save_file(tensors("z"), path / "model.safetensors")
    assert list(Checkpoint.open(path).tensors) == ["z"]


def test_no_folder_suggests_a_close_one(tmp_path: Path) -> None:
    (tmp_path / "qwen-7b").mkdir()
    assert "qwen-7b" in refused(tmp_path / "qwen-7B", "did you mean").message
    refused(tmp_path / "absent" / "x", "no folder")


def test_a_file_is_not_a_folder(path: Path) -> None:
    save_file(tensors("a"), path / "model.safetensors")
    refused(path / "model.safetensors", "is a file")


def test_pickles_are_refused(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"PK")
    assert "safetensors" in str(refused(path, "pickle checkpoints are refused").remedy)


def test_no_weights_and_no_config(path: Path) -> None:
    refused(path, "no safetensors files")
    (path / "config.json").unlink()
    refused(path, "has no config.json")
    (path / "adapter_config.json").write_text("{}")
    refused(path, "adapter")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": "\udcff"}'])
def test_bad_config(path: Path, text: str) -> None:
    save_file(tensors("a"), path / "model.safetensors")
    (path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(path, "config.json")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ".safetensors", 7],
)
def test_index_cannot_point_outside(path: Path, file: str) -> None:
    shards(path, index={"a": file})
    refused(path, "not to a safetensors file next to it")


def test_index_against_shards(path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards(path, index={"a": first, "b": second, "c": second})
    refused(path, "'b' should be in .*00002-of.*it is in `model-00001")
    shards(path, index={"a": first, "d": second})
    refused(path, "no shard has it")
    shards(path, index={})
    refused(path, "no weight_map")
    shards(path)
    (path / second).unlink()
    refused(path, f"lacks 1 of 2 weight files: `{second}`")


def test_tensor_in_two_shards(path: Path) -> None:
    shards(path)
    save_file(tensors("a", "c"), path / "model-00002-of-00002.safetensors")
    refused(path, "`a` is in both")


def test_numbered_shards_without_index_must_be_complete(path: Path) -> None:
    save_file(tensors("a"), path / "model-00001-of-00003.safetensors")
    save_file(tensors("b"), path / "model-00003-of-00003.safetensors")
    refused(path, "lacks 1 of 3 weight files: `model-00002-of-00003.safetensors`")


def test_extras(path: Path) -> None:
    save_file(tensors("a"), path / "model.safetensors")
    wanted = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    other = ["README.md", "tokenizer_code.py", "tokenizer.pkl", "optimizer.pt", "notes.txt"]
    for name in (*wanted, *other):
        (path / name).write_text("x")
    assert [p.name for p in Checkpoint.open(path).extras()] == wanted


def test_fingerprint_notices_changes(path: Path, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(8192), "b": torch.zeros(3)}
    seen = set()

    def fingerprint() -> str:
        save_file(weights, path / "model.safetensors")
        return Checkpoint.open(path).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    seen.add(first)
    for name, index in (("a", 0), ("a", 8191), ("b", 1)):
        weights[name][index] = 1
        seen.add(fingerprint())
    weights["b"] = weights["b"].view(1, 3)
    seen.add(fingerprint())
    (path / "config.json").write_text("{}")
    seen.add(fingerprint())
    assert len(seen) == 6
    copy = path.rename(tmp_path / "elsewhere")
    assert Checkpoint.open(copy).fingerprint() in seen


def test_dtype_is_that_of_most_parameters(path: Path) -> None:
    mixed = {"q": torch.zeros(100, dtype=torch.int32), "w": torch.zeros(9).bfloat16(), "n": torch.zeros(4)}
    save_file(mixed, path / "model.safetensors")
    assert Checkpoint.open(path).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_first_nonfinite(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 5)
    assert first_nonfinite(weight.to(dtype)) is None
    weight[3, 1] = float("nan")
    weight[2, 4] = float("inf")
    assert first_nonfinite(weight.to(dtype)) == (2, 4)
    assert first_nonfinite(weight.to(dtype).t()) == (1, 3)


def test_first_nonfinite_beyond_one_slice_and_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.checkpoint.reader._SCAN_ELEMENTS", 4)
    assert first_nonfinite(torch.tensor([[1.0, 2, 3], [4, 5, float("nan")]])) == (1, 2)
    assert first_nonfinite(torch.tensor(float("nan"))) == ()
    assert first_nonfinite(torch.empty(0)) is None
    assert first_nonfinite(torch.tensor([1, 2])) is None
    nan = torch.tensor([126, 127], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert first_nonfinite(nan) == (1,)
