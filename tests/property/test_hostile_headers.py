"""Any damage to a safetensors file is either harmless or a SourceError, and never costs memory."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.header import Header, build_header, parse_header, read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError

HEADER = build_header(
    [
        ("a", torch.float32, (2, 3), 0, 24),
        ("b", torch.bfloat16, (4,), 24, 32),
        ("c", torch.uint8, (), 32, 33),
    ],
    {"format": "pt"},
)
VALID = HEADER + bytes(range(33))


def parsed(content: bytes) -> Header | None:
    """The header of a file with this content; None when it was refused the right way."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(content)
        try:
            header = read_header(file)
        except SourceError:
            return None
        check_sound(header, len(content))
        (Path(folder) / "config.json").write_text("{}")
        checkpoint = Checkpoint.open(Path(folder))
        for name, info in header.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        return header


def check_sound(header: Header, size: int) -> None:
    """Tensors tile the file from the header to the end, and each is as long as its shape says."""
    position = size - sum(info.nbytes for info in header.tensors.values())
    for info in header.tensors.values():
        assert info.begin == position
        assert info.nbytes == torch.empty(info.shape, dtype=info.torch_dtype, device="meta").nbytes
        position = info.end
    assert position == size


def test_the_undamaged_file() -> None:
    header = parsed(VALID)
    assert header is not None
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b": (4,), "c": ()}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    header = parsed(bytes(content))
    if content[: len(HEADER)] == HEADER:
        assert header is not None


@given(st.integers(0, len(VALID) - 1))
@settings(max_examples=50, deadline=None)
def test_every_truncation_is_refused(length: int) -> None:
    assert parsed(VALID[:length]) is None


@given(st.binary(min_size=1, max_size=20), st.integers(0, len(VALID)))
@settings(max_examples=50, deadline=None)
def test_inserted_bytes(extra: bytes, at: int) -> None:
    header = parsed(VALID[:at] + extra + VALID[at:])
    assert header is None or at < len(HEADER)


numbers = st.one_of(
    st.integers(-5, 40),
    st.integers(-(2**70), 2**70),
    st.booleans(),
    st.floats(),
    st.none(),
    st.text(max_size=2),
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "F9"]), numbers),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
    }
)
documents = st.dictionaries(
    st.one_of(st.text(max_size=3), st.just("__metadata__")), st.one_of(entries, numbers)
)


@given(documents, st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_any_json(document: dict[str, Any], data: int) -> None:
    raw = json.dumps(document).encode()
    size = 8 + len(raw) + data
    try:
        header = parse_header(raw, Path("x.safetensors"), size)
    except SourceError as error:
        assert error.remedy
        return
    check_sound(header, size)


@pytest.mark.parametrize("claimed", [10**7, 99_999_999, 10**8, 10**12, 2**63, 2**64 - 1])
def test_a_claimed_length_costs_no_memory(tmp_path: Path, claimed: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(claimed.to_bytes(8, "little") + VALID[8:])
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
