"""The safetensors header: what is accepted, and every way in which a file can lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.header import (
    MAX_HEADER_BYTES,
    NAMES,
    TORCH_DTYPES,
    Header,
    build_header,
    parse_header,
    read_header,
)
from quantkit.errors import SourceError

FILE = Path("model.safetensors")


def parse(entries: dict[str, Any] | str, data: int) -> Header:
    raw = (entries if isinstance(entries, str) else json.dumps(entries)).encode("utf-8", "surrogatepass")
    return parse_header(raw, FILE, 8 + len(raw) + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {"dtype": dtype, "shape": plain(shape), "data_offsets": plain(offsets)}


def test_worked_example() -> None:
    entries = {
        "b": entry("F32", (2,), (6, 14)),
        "a": entry("BF16", (3, 1), (0, 6)),
        "__metadata__": {"format": "pt"},
    }
    header = parse(entries, 14)
    begin = header.size - 14
    assert list(header.tensors) == ["a", "b"]
    assert header.metadata == {"format": "pt"}
    a = header.tensors["a"]
    assert (a.dtype, a.shape, a.begin, a.end) == ("BF16", (3, 1), begin, begin + 6)
    assert (a.nbytes, a.torch_dtype, a.file) == (6, torch.bfloat16, FILE)


def test_build_is_padded_to_eight_bytes_with_metadata_first() -> None:
    raw = build_header([("b", torch.float16, (3,), 0, 6), ("a", torch.bool, (), 6, 7)], {"format": "pt"})
    length = int.from_bytes(raw[:8], "little")
    assert len(raw) == 8 + length
    assert length % 8 == 0
    text = (
        '{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},'
        '"a":{"dtype":"BOOL","shape":[],"data_offsets":[6,7]}}'
    )
    assert raw[8:].decode().rstrip(" ") == text


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_round_trips(name: str) -> None:
    dtype = TORCH_DTYPES[name]
    raw = build_header([("w", dtype, (3, 2), 0, 6 * dtype.itemsize)], {})
    header = parse_header(raw[8:], FILE, len(raw) + 6 * dtype.itemsize)
    assert header.tensors["w"].torch_dtype is dtype
    assert NAMES[dtype] == name


def test_empty_and_scalar_tensors_are_fine() -> None:
    entries = {
        "e": entry("F32", (0, 4), (0, 0)),
        "s": entry("F64", (), (0, 8)),
        "z": entry("I8", (0,), (8, 8)),
    }
    assert list(parse(entries, 8).tensors) == ["e", "s", "z"]
    assert not parse({}, 0).tensors


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        pytest.param("[]", 0, id="not an object"),
        pytest.param("{", 0, id="not JSON"),
        pytest.param("", 0, id="nothing"),
        pytest.param('{"a":' + "[" * 100_000, 0, id="nested too deeply"),
        pytest.param('{"a":1' + "0" * 5000 + "}", 0, id="a number of 5,000 digits"),
        pytest.param(
            '{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", 8, id="duplicate name"
        ),
        pytest.param(
            '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, id="duplicate key"
        ),
        pytest.param({"__metadata__": {"a": 1}}, 0, id="metadata of numbers"),
        pytest.param({"__metadata__": "pt"}, 0, id="metadata not an object"),
        pytest.param({"a\0b": entry()}, 8, id="NUL in the name"),
        pytest.param({"\x1b[2J": entry()}, 8, id="terminal escape in the name"),
        pytest.param({"\ud800": entry()}, 8, id="lone surrogate in the name"),
        pytest.param({"": entry()}, 8, id="empty name"),
        pytest.param({"a": None}, 8, id="entry not an object"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, 8, id="no offsets"),
        pytest.param({"a": entry(dtype="F4")}, 8, id="unknown dtype"),
        pytest.param({"a": entry(dtype=["F32"])}, 8, id="dtype not a string"),
        pytest.param({"a": entry(shape="2")}, 8, id="shape not a list"),
        pytest.param({"a": entry(shape=(-2, -1))}, 8, id="negative shape"),
        pytest.param({"a": entry(shape=(2.0,))}, 8, id="fractional shape"),
        pytest.param({"a": entry("U8", (True,), (0, 1))}, 1, id="bool in the shape"),
        pytest.param({"a": entry(shape=[1] * 64 + [2])}, 8, id="65 dimensions"),
        pytest.param({"a": entry(shape=(2**62, 4))}, 8, id="product wraps around to 0"),
        pytest.param({"a": entry(shape=(2**64,))}, 8, id="beyond 64 bits"),
        pytest.param(
            {"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, id="empty, but strides overflow"
        ),
        pytest.param({"a": entry(shape=(3,))}, 8, id="shape and offsets disagree"),
        pytest.param({"a": entry(offsets=(8, 0))}, 8, id="end before begin"),
        pytest.param({"a": entry(offsets=(-8, 0))}, 8, id="negative offset"),
        pytest.param({"a": entry(offsets=(0, 8, 16))}, 8, id="three offsets"),
        pytest.param({"a": entry("U8", (1,), (False, True))}, 1, id="bools as offsets"),
        pytest.param({"a": entry(offsets=(8, 16))}, 16, id="hole at the start"),
        pytest.param({"a": entry(), "b": entry(offsets=(16, 24))}, 24, id="hole in the middle"),
        pytest.param({"a": entry(), "b": entry(offsets=(4, 12))}, 12, id="overlap"),
        pytest.param({"a": entry(), "b": entry()}, 8, id="shared bytes"),
        pytest.param({"a": entry()}, 9, id="bytes after the last tensor"),
        pytest.param({"a": entry()}, 7, id="truncated"),
    ],
)
def test_refused(entries: dict[str, Any] | str, data: int) -> None:
    with pytest.raises(SourceError) as caught:
        parse(entries, data)
    assert str(FILE) in caught.value.message
    assert caught.value.remedy


def test_truncation_says_how_many_bytes_are_missing() -> None:
    with pytest.raises(SourceError, match=r"truncated: 1,000 of [\d,]+ bytes are missing"):
        parse({"a": entry("U8", (5000,), (0, 5000))}, 4000)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "0 bytes", id="empty"),
        pytest.param(b"abc", "3 bytes", id="shorter than the length"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", "limit", id="2^63 bytes of header"),
        pytest.param((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "limit", id="one above the limit"),
        pytest.param(
            (MAX_HEADER_BYTES).to_bytes(8, "little") + b"{}", "truncated", id="longer than the file"
        ),
        pytest.param((3).to_bytes(8, "little") + b'{"\xff', "JSON", id="not UTF-8"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS", id="LFS pointer"
        ),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        read_header(write(tmp_path / "x.safetensors", content))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError, match="not a regular file"):
            read_header(path)
