"""The imatrix files of llama.cpp: their bytes, hostile ones, merging, and names between the two worlds."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError
from quantkit.gguf import imatrix
from quantkit.gguf.architectures import Placed, Source
from quantkit.gguf.imatrix import Entry, Imatrix

DOWN, EXPERTS = "blk.0.ffn_down.weight", "blk.1.ffn_down_exps.weight"


def entry(sums: Any, counts: Any) -> Entry:
    return Entry(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


@pytest.fixture
def small() -> Imatrix:
    """Two rows of eight tokens; of three experts one saw nothing."""
    entries = {
        EXPERTS: entry([[4.0, 8.0], [0.0, 0.0], [9.0, 27.0]], [4, 0, 9]),
        DOWN: entry([[16.0, 32.0, 64.0]], [16]),
    }
    return Imatrix(entries, ("calibration.txt",), chunks=2, chunk_size=8)


LEGACY = b"".join(
    [
        struct.pack("<i", 2),
        struct.pack("<i", len(DOWN)) + DOWN.encode(),
        # 16 tokens are two calls of eight; means 1, 2, 4
        struct.pack("<ii3f", 2, 3, 2.0, 4.0, 8.0),
        struct.pack("<i", len(EXPERTS)) + EXPERTS.encode(),
        # 9 tokens of the busiest expert are two calls; ones where there was no token
        struct.pack("<ii6f", 2, 6, 2.0, 4.0, 2.0, 2.0, 2.0, 6.0),
        struct.pack("<ii", 2, 15) + b"calibration.txt",
    ]
)


def same(a: Imatrix, b: Imatrix) -> bool:
    return (a.datasets, a.chunks, a.chunk_size, set(a.entries)) == (
        b.datasets,
        b.chunks,
        b.chunk_size,
        set(b.entries),
    ) and all(
        torch.equal(a.entries[n].sums, b.entries[n].sums)
        and torch.equal(a.entries[n].counts, b.entries[n].counts)
        for n in a.entries
    )


def test_means_of_experts(small: Imatrix) -> None:
    found = small.entries[EXPERTS].importance()
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0, 2.0], [1.0, 1.0], [1.0, 3.0]]


def test_legacy_byte_by_byte(small: Imatrix, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "x.dat", small)
    assert (tmp_path / "x.dat").read_bytes() == LEGACY
    assert [p.name for p in tmp_path.iterdir()] == ["x.dat"]


def test_legacy_is_read_as_means(tmp_path: Path) -> None:
    (tmp_path / "named.gguf").write_bytes(LEGACY)
    found = imatrix.read(tmp_path / "named.gguf", chunk_size=8)
    assert (found.datasets, found.chunks, found.chunk_size) == (("calibration.txt",), 2, 8)
    assert found.entries[DOWN].sums.tolist() == [[16.0, 32.0, 64.0]]
    assert found.entries[DOWN].counts.tolist() == [16.0]
    # how many experts there are is not in the file
    assert found.entries[EXPERTS].importance().tolist() == [[1.0, 2.0, 1.0, 1.0, 1.0, 3.0]]
    three = found.entries[EXPERTS].of_experts(3)
    assert three is not None and three.importance().tolist() == [[1.0, 2.0], [1.0, 1.0], [1.0, 3.0]]
    assert found.entries[EXPERTS].of_experts(4) is None


def test_legacy_without_its_tail(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(LEGACY[: -8 - 15])
    found = imatrix.read(tmp_path / "old.dat", chunk_size=8)
    assert (found.datasets, found.chunks, len(found.entries)) == ((), 2, 2)


def test_legacy_leaves_out_what_was_never_reached(small: Imatrix, tmp_path: Path) -> None:
    entries = {**small.entries, "blk.2.x.weight": entry([[0.0], [0.0]], [0, 0])}
    imatrix.write(tmp_path / "x.dat", Imatrix(entries, small.datasets, 2, 8))
    assert (tmp_path / "x.dat").read_bytes() == LEGACY


def test_gguf_field_by_field(small: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    imatrix.write(path, small)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    reader = gguf.GGUFReader(path)
    keys = {name: (field.contents(), field.types[0].name) for name, field in reader.fields.items()}
    assert [name for name in keys if not name.startswith("GGUF.")] == [
        "general.type",
        *(f"imatrix.{key}" for key in ("datasets", "chunk_count", "chunk_size")),
    ]
    assert keys["general.type"] == ("imatrix", "STRING")
    assert keys["imatrix.datasets"] == (["calibration.txt"], "ARRAY")
    assert keys["imatrix.chunk_count"] == (2, "UINT32") and keys["imatrix.chunk_size"] == (8, "UINT32")
    tensors = [(t.name, t.shape.tolist(), t.tensor_type.name) for t in reader.tensors]
    assert tensors == [
        (f"{DOWN}.in_sum2", [3], "F32"),
        (f"{DOWN}.counts", [1], "F32"),
        (f"{EXPERTS}.in_sum2", [2, 3], "F32"),
        (f"{EXPERTS}.counts", [1, 3], "F32"),
    ]
    assert reader.tensors[2].data.tolist() == [[4.0, 8.0], [0.0, 0.0], [9.0, 27.0]]
    assert reader.tensors[3].data.tolist() == [[4.0], [0.0], [9.0]]
    assert same(imatrix.read(path), small)


def test_a_text_is_always_named(small: Imatrix, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "x.gguf", Imatrix(small.entries, (), 2, 8))
    assert imatrix.read(tmp_path / "x.gguf").datasets == ("unknown",)


def gguf_file(path: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    """A file by the library's own hand; keys are those of the specification unless given as None."""
    writer = gguf.GGUFWriter(path, "imatrix")
    known: dict[str, Any] = {"datasets": ["t"], "chunk_count": 1, "chunk_size": 8} | keys
    for key, value in known.items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(sums: Any = (1.0, 2.0), counts: Any = (1.0,), dtype: type = np.float32) -> dict[str, Any]:
    return {"a.weight.in_sum2": np.array(sums, dtype), "a.weight.counts": np.array(counts, dtype)}


def test_shapes_of_others_and_tensors_of_other_kinds(tmp_path: Path) -> None:
    tensors = {**pair([[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0]), "a.weight.max": np.ones(2, np.float32)}
    found = imatrix.read(gguf_file(tmp_path / "x.gguf", tensors))
    assert list(found.entries) == ["a.weight"]
    assert found.entries["a.weight"].importance().tolist() == [[1.0, 2.0], [1.5, 2.0]]


@pytest.mark.parametrize(
    ("tensors", "keys", "said"),
    [
        (pair(), {"datasets": None}, "without imatrix.datasets: no imatrix"),
        (pair(), {"datasets": 3}, "found int, int and int"),
        (pair(), {"chunk_size": ["8"]}, "found tuple, int and tuple"),
        (pair(), {"chunk_count": None, "chunk_size": None}, "imatrix.chunk_count, imatrix.chunk_size"),
        ({}, {}, "no entries"),
        ({"a.weight.counts": np.ones(1, np.float32)}, {}, r"a.weight.in_sum2.*found nothing"),
        ({"a.weight.in_sum2": np.ones(1, np.float32)}, {}, r"a.weight.counts.*found nothing"),
        (pair(dtype=np.float64), {}, "expected to hold float32"),
        (pair((1.0, 2.0, 3.0), (1.0, 1.0)), {}, "3 sums are no multiple of 2 counts"),
        (pair((1.0, float("nan"))), {}, "sums are expected to be finite"),
        (pair((1.0, -1.0)), {}, "found -1.0 to 1.0"),
        (pair(counts=(float("inf"),)), {}, "counts are expected to be finite"),
    ],
)
def test_gguf_that_is_not_sound(
    tensors: dict[str, Any], keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = gguf_file(tmp_path / "x.gguf", tensors, **keys)
    with pytest.raises(SourceError, match=said) as caught:
        imatrix.read(path)
    assert caught.value.remedy


def changed(at: int, value: int) -> bytes:
    """LEGACY with another number at a byte."""
    return LEGACY[:at] + struct.pack("<i", value) + LEGACY[at + 4 :]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no imatrix"),
        (b"PK\x03\x04" + bytes(400), "no imatrix, neither"),
        (changed(0, 0), "0 entries"),
        (changed(0, -1), "-1 entries"),
        (changed(0, 3), "ends early"),
        (changed(4, 1 << 30), "takes 1,073,741,824 bytes"),
        (changed(4, -5), "-5, not 1 or more"),
        (changed(8 + len(DOWN), -2), "calls of `blk.0.ffn_down.weight`"),
        (changed(12 + len(DOWN), 0), "length of `blk.0.ffn_down.weight`"),
        (changed(12 + len(DOWN), 1 << 30), "takes 4,294,967,296 bytes"),
        (changed(16 + len(DOWN), 0x7F800000), "sums are expected to be finite"),
        (changed(8, -1), "not text"),
        (LEGACY[:-1], "name of the text"),
        (LEGACY + b"\0", "1 bytes after its end"),
        (struct.pack("<i", 2) + 2 * LEGACY[4 : 4 + 4 + len(DOWN) + 8 + 12], "two entries"),
    ],
)
def test_legacy_that_is_not_sound(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=said) as caught:
        imatrix.read(path)
    assert caught.value.remedy


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        imatrix.read(tmp_path / "absent")


@pytest.mark.parametrize("name", ["x.gguf", "x.dat"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, or a byte changed: SourceError or a sound imatrix, nothing else."""
    path = tmp_path_factory.mktemp("damage") / name
    entries = {"blk.0.a.weight": entry([[1.0, 2.0]], [3])}
    imatrix.write(path, Imatrix(entries, ("t",), 1, 8))
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole = whole[:at]
    else:
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        found = imatrix.read(path)
    except SourceError:
        return
    assert all(bool(torch.isfinite(e.importance()).all()) for e in found.entries.values())


def test_merge_adds(small: Imatrix) -> None:
    other = Imatrix(
        {DOWN: entry([[1.0, 1.0, 1.0]], [8]), "blk.9.x.weight": entry([[1.0]], [8])}, ("more.txt",), 1, 8
    )
    found = imatrix.merge([small, other])
    assert found.entries[DOWN].sums.tolist() == [[17.0, 33.0, 65.0]]
    assert found.entries[DOWN].counts.tolist() == [24.0]
    assert found.entries[EXPERTS] is small.entries[EXPERTS]
    assert (found.datasets, found.chunks, found.chunk_size) == (("calibration.txt", "more.txt"), 3, 8)
    assert imatrix.unshared([small, other]) == (EXPERTS, "blk.9.x.weight")
    assert imatrix.merge([small]).entries == small.entries


def test_merge_across_formats(small: Imatrix, tmp_path: Path) -> None:
    """A legacy file has one count for all experts: each weighs as the busiest."""
    (tmp_path / "x.dat").write_bytes(LEGACY)
    legacy = imatrix.read(tmp_path / "x.dat", chunk_size=8)
    for pair_ in ([small, legacy], [legacy, small]):
        found = imatrix.merge(pair_).entries[EXPERTS]
        assert found.counts.tolist() == [20.0, 16.0, 25.0]
        assert found.sums.tolist() == [[20.0, 40.0], [16.0, 16.0], [25.0, 75.0]]


def test_merge_of_different_models(small: Imatrix) -> None:
    other = Imatrix({DOWN: entry([[1.0, 1.0]], [8])}, ("t",), 1, 8)
    with pytest.raises(SourceError, match="3 values in one file and 2 in another"):
        imatrix.merge([small, other])
    with pytest.raises(SourceError, match="no tensor in common"):
        imatrix.merge([small, Imatrix({"b": other.entries[DOWN]}, ("t",), 1, 8)])


# a fused matrix of the checkpoint that is two tensors of the file, and the reverse
HALVES = [
    Placed(f"blk.0.ffn_{half}_exps.weight", (2, 1, 2), (Source("gu[0]"), Source("gu[1]")), matrix=True)
    for half in ("gate", "up")
]
FUSED = Placed("blk.0.attn_qkv.weight", (9, 2), (Source("q"), Source("k"), Source("v")), matrix=True)
NORM = Placed("blk.0.attn_norm.weight", (2,), (Source("norm"),), matrix=False)
EMBEDDING = Placed("token_embd.weight", (4, 2), (Source("embed"),), matrix=True)


def test_entries_under_their_names() -> None:
    """Every tensor of the file whose weights were seen has the vector of its inputs, experts stacked."""
    ones = torch.ones(2, dtype=torch.float64)
    seen = {"gu[0]": (ones, 3), "gu[1]": (2 * ones, 5), **dict.fromkeys("qkv", (4 * ones, 8))}
    found = imatrix.entries_of([EMBEDDING, NORM, FUSED, *HALVES], seen)
    assert list(found) == [FUSED.name, HALVES[0].name, HALVES[1].name]
    assert found[FUSED.name].sums.tolist() == [[4.0, 4.0]]
    assert found[FUSED.name].counts.tolist() == [8.0]
    assert found[HALVES[1].name].sums.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert found[HALVES[0].name].counts.tolist() == [3.0, 5.0]


def test_importance_by_weight() -> None:
    entries = {
        FUSED.name: entry([[4.0, 8.0]], [2]),
        HALVES[0].name: entry([[6.0, 6.0], [0.0, 0.0]], [2, 0]),
        HALVES[1].name: entry([[2.0, 6.0], [0.0, 0.0]], [2, 0]),
    }
    known = Imatrix(entries, ("t",), 1, 8)
    placements = [EMBEDDING, NORM, FUSED, *HALVES]
    found = imatrix.importance_for(known, placements)
    assert {key: value.tolist() for key, value in found.items()} == {
        **{key: [2.0, 4.0] for key in "qkv"},
        "gu[0]": [2.0, 3.0],
        "gu[1]": [1.0, 1.0],
    }
    assert imatrix.missing(known, placements) == ()
    assert imatrix.missing(Imatrix({FUSED.name: entries[FUSED.name]}, ("t",), 1, 8), placements) == tuple(
        half.name for half in HALVES
    )


def test_experts_of_a_legacy_file_are_told_apart_by_the_model() -> None:
    known = Imatrix({HALVES[0].name: entry([[1.0, 2.0, 3.0, 4.0]], [1])}, ("t",), 1, 8)
    found = imatrix.importance_for(known, HALVES)
    assert {key: value.tolist() for key, value in found.items()} == {"gu[0]": [1.0, 2.0], "gu[1]": [3.0, 4.0]}


def test_a_prior_of_all_experts() -> None:
    """(Σ_e + λ · mean) / (n_e + λ), the mean over all experts being (2, 4)."""
    known = Imatrix({HALVES[0].name: entry([[8.0, 8.0], [0.0, 8.0]], [4, 0])}, ("t",), 1, 8)
    found = imatrix.importance_for(known, HALVES, prior=4)
    assert found["gu[0]"].tolist() == [2.0, 3.0]
    assert found["gu[1]"].tolist() == [2.0, 6.0]


@pytest.mark.parametrize("sums", [[[1.0] * 3], [[1.0] * 3] * 2, [[1.0, 1.0]] * 3])
def test_columns_are_checked_against_the_model(sums: list[list[float]]) -> None:
    known = Imatrix({HALVES[0].name: entry(sums, [1] * len(sums))}, ("t",), 1, 8)
    with pytest.raises(SourceError, match="where the model has 2 × 2 inputs"):
        imatrix.importance_for(known, HALVES)
