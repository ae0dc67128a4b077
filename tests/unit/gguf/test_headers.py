"""Headers of GGUF files without the files: what is here in part, and what a header alone must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import header_file
from quantkit.checkpoint.header_file import HeaderFile, NotDownloaded
from quantkit.errors import SourceError
from quantkit.gguf.container import EndsEarly, Stored, Value, check_filled, open_file, parse_header, write
from quantkit.run.gguf_source import find_gguf

pytest.importorskip("gguf")
TENSORS = [Stored("a", (6, 256), "q4_k"), Stored("b", (5,), "f32"), Stored("c", (2, 3, 64), "q8_0")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "x.gguf"
    metadata: dict[str, Value] = {
        "general.name": "tiny",
        "tokenizer.ggml.tokens": ["a", "ä", "", "the"] * 9,
        "k": [1, 2, 3],
    }
    write(path, "llama", metadata, TENSORS, [torch.zeros(t.byte_shape, dtype=torch.uint8) for t in TENSORS])
    return path


def test_every_cut_is_told_from_damage(file: Path) -> None:
    """Wherever it ends, what is needed is more than is here and never more than the header."""
    raw = file.read_bytes()
    whole = parse_header(file, raw, len(raw))
    assert [stored for stored, _ in whole.tensors] == TENSORS
    for length in range(whole.end):
        with pytest.raises(EndsEarly) as caught:
            parse_header(file, raw[:length], len(raw))
        assert length < caught.value.needed <= whole.end
        with pytest.raises(SourceError) as damaged:
            parse_header(file, raw[:length], length)
        assert not isinstance(damaged.value, EndsEarly), "a file that ends there is damaged"
    assert parse_header(file, raw[: whole.end], len(raw)) == whole


def test_tensors_fill_the_file(file: Path) -> None:
    size = file.stat().st_size
    whole = parse_header(file, file.read_bytes(), size)
    check_filled(whole, size)
    last, start = whole.tensors[-1]
    end = start + last.nbytes
    assert size == -(-end // 32) * 32
    check_filled(whole, end)  # some writers leave out the last zeros
    for other in (end - 1, end + 1, size + 1, size + 32):
        with pytest.raises(SourceError, match="its tensors end at byte"):
            check_filled(whole, other)
    for moved in (-32, 32):
        tensors = [*whole.tensors[:-1], (last, start + moved)]
        with pytest.raises(SourceError, match="`c` begins at byte"):
            check_filled(replace(whole, tensors=tensors), size + moved)
    check_filled(replace(whole, tensors=whole.tensors[::-1]), size)


def test_a_header_stands_in_for_the_file(file: Path, tmp_path: Path) -> None:
    raw = file.read_bytes()
    whole = open_file(file)
    name, place = "b", whole.places["b"][1]
    path = tmp_path / "x.gguf"
    end = parse_header(file, raw, len(raw)).end
    header_file.write(path, HeaderFile(len(raw), raw[:end], ((place, raw[place : place + 20]),)))
    assert find_gguf(path) == path == find_gguf(tmp_path)
    found = open_file(path)
    assert (found.tensors, found.metadata) == (whole.tensors, whole.metadata)
    assert found.read_bytes(name).equal(whole.read_bytes(name))
    with pytest.raises(NotDownloaded, match=r"`x\.gguf` with `a`"):
        found.read_bytes("a")
    path.write_bytes(raw)
    assert open_file(path).read_bytes("a").equal(whole.read_bytes("a")), "the file goes first"
    (tmp_path / "y.safetensors.header").write_bytes(b"")
    assert find_gguf(tmp_path) is None
