"""The container against the `gguf` package, and against files that are not what they claim."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import BudgetError, RunError, SourceError, UnsupportedError
from quantkit.gguf.container import (
    Opened,
    Stored,
    Typed,
    Value,
    as_bytes,
    file_bytes,
    open_file,
    plan_shards,
    read,
    shard_bytes,
    shard_names,
    write,
    write_shards,
)

gguf = pytest.importorskip("gguf")

METADATA: dict[str, Value] = {
    "general.name": "tiny",
    "llama.block_count": 3,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "ä", "▁the", ""],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0, 3.0],
    "tokenizer.ggml.token_type": [1, 1, 3, 6],
    "llama.attention.sliding_window_pattern": [True, False],
}
TENSORS = [
    Stored("token_embd.weight", (6, 256), "q4_k"),
    Stored("blk.0.attn_norm.weight", (5,), "f32"),
    Stored("blk.0.ffn_down_exps.weight", (2, 3, 64), "q8_0"),
    Stored("output.weight", (6, 7), "bf16"),
]


def contents(tensors: Sequence[Stored] = TENSORS) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, t.byte_shape, generator=rng, dtype=torch.uint8) for t in tensors]


def written(folder: Path, tensors: Sequence[Stored] = TENSORS, **extra: Value) -> Path:
    path = folder / "model.gguf"
    write(path, "llama", {**METADATA, **extra}, tensors, contents(tensors))
    return path


def same_contents(opened: Opened) -> None:
    for stored, data in zip(TENSORS, contents(), strict=True):
        assert opened.tensors[stored.name] == stored
        assert torch.equal(opened.read_bytes(stored.name), data)


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    path = written(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_string("general.name", "tiny")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for key in list(METADATA)[4:]:
        writer.add_array(key, METADATA[key])
    for stored, data in zip(TENSORS, contents(), strict=True):
        kind = gguf.GGMLQuantizationType[stored.kind.upper()]
        array = data.numpy().view(np.float32) if stored.kind == "f32" else data.numpy()
        writer.add_tensor(stored.name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    opened = open_file(path)
    assert (opened.paths, opened.architecture) == ((path,), "llama")
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in METADATA.items()}
    assert dict(opened.metadata) == {"general.architecture": "llama", **plain}
    assert opened.widths["llama.block_count"] == "uint32"
    assert opened.widths["tokenizer.ggml.token_type"] == "int32"
    same_contents(opened)
    assert [stored for stored, _ in read(path)] == TENSORS


WIDTHS: list[tuple[Typed, Any]] = [
    *((Typed(7, width), 7) for width in ("uint8", "int8", "uint16", "int16", "uint32", "int32")),
    *((Typed(7, width), 7) for width in ("uint64", "int64")),
    (Typed(0.1, "float64"), 0.1),
    (Typed(0.5, "float32"), 0.5),
    (Typed(False, "bool"), False),
    (Typed("", "string"), ""),
    (Typed([1, 65_535], "uint16"), [1, 65_535]),
    (Typed([True, False, True], "bool"), [True, False, True]),
    (Typed([0.1, 1e300], "float64"), [0.1, 1e300]),
    (Typed([2**63], "uint64"), [2**63]),
]


@pytest.mark.parametrize(("value", "meaning"), WIDTHS, ids=str)
def test_every_width(value: Typed, meaning: Any, tmp_path: Path) -> None:
    opened = open_file(written(tmp_path, key=value))
    found = opened.metadata["key"]
    assert (list(found) if isinstance(found, tuple) else found) == meaning
    assert opened.widths["key"] == value.width
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("key")
    assert field.types[-1] == gguf.GGUFValueType[value.width.upper()]
    assert field.contents() == meaning
    # what was read can be written again as it was
    bare = list(found) if isinstance(found, tuple) else found
    again = written(tmp_path, key=Typed(bare, opened.widths["key"]))
    assert open_file(again).metadata["key"] == found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "`key` is an empty list, which the package gguf does not write"),
        (Typed([], "string"), "`key` is an empty list"),
        (-1, "`key` cannot be stored as uint32: -1"),
        (2**32, "`key` cannot be stored as uint32"),
        (Typed(256, "uint8"), "`key` cannot be stored as uint8"),
        (Typed("a", "uint8"), "`key` cannot be stored as uint8"),
        (Typed(3, "string"), "`key` cannot be stored as string"),
        (1e39, "`key` cannot be stored as float32"),
        (["a", 1], "`key` holds int, str: GGUF has strings, booleans and numbers, one kind a list"),
        ("\ud800", "has no UTF-8: surrogates not allowed"),
        (["a", "b\udc00"], r"'.udc00' in `key` has no UTF-8"),
    ],
)
def test_values_that_do_not_fit_are_refused(value: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        written(tmp_path, key=value)
    assert not list(tmp_path.iterdir())


def test_an_empty_string_is_a_value(tmp_path: Path) -> None:
    assert open_file(written(tmp_path, empty="")).metadata["empty"] == ""


def test_an_empty_list_of_another_writer_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "", {"key": Typed([7], "uint16")}, [], [])
    one, none = (struct.pack("<IIQ", 9, 2, count) for count in (1, 0))
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes().replace(one, none))
    opened = open_file(tmp_path / "a.gguf")
    assert (opened.metadata["key"], opened.widths["key"]) == ((), "uint16")


@pytest.mark.parametrize("value", [0, 48, "32", 32.0], ids=str)
def test_an_alignment_is_a_power_of_two(value: Value, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"`general.alignment` must be a power of two, not"):
        write(tmp_path / "model.gguf", "llama", {"general.alignment": value}, [], [])
    assert not list(tmp_path.iterdir())


def test_lists_of_mixed_numbers_are_floats(tmp_path: Path) -> None:
    opened = open_file(written(tmp_path, key=[1, 0.5]))
    assert (opened.metadata["key"], opened.widths["key"]) == ((1.0, 0.5), "float32")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([Stored("ä" * 32, (32,), "f32")], "longer than the 63 bytes"),
        ([Stored("a", (32,), "f32")] * 2, "`a` is there twice"),
        ([Stored("a", (1, 1, 1, 1, 32), "f32")], "1 to 4 dimensions"),
        ([Stored("a", (0, 32), "f32")], "1 to 4 dimensions"),
        ([Stored("a", (2, 100), "q4_k")], "Q4_K has super-blocks of 256 weights, and a row has 100"),
        ([Stored("a", (2, 100), "Q4_K")], "`a` is of the type 'Q4_K', which GGUF does not have"),
    ],
)
def test_tensors_that_the_container_cannot_hold(tensors: list[Stored], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        write(tmp_path / "model.gguf", "llama", {}, tensors, [])
    assert not list(tmp_path.iterdir())


def test_two_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'gpt2' in the metadata and 'llama' beside it"):
        write(tmp_path / "model.gguf", "llama", {"general.architecture": "gpt2"}, [], [])
    # a file that is no model has none
    write(tmp_path / "none.gguf", "", {"general.type": "imatrix"}, [], [])
    opened = open_file(tmp_path / "none.gguf")
    assert opened.architecture == "" and dict(opened.metadata) == {"general.type": "imatrix"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (contents()[:3], "`output.weight`: planned as .6, 14. bytes, got nothing"),
        ([*contents(), torch.zeros(1)], "more contents than planned tensors"),
        ([contents()[0].view(torch.int8), *contents()[1:]], "`token_embd.weight`: .*int8"),
        ([contents()[0].flatten(), *contents()[1:]], r"`token_embd.weight`: .*got \(864,\)"),
    ],
)
def test_contents_must_be_those_planned(data: list[Tensor], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=reason):
        write(tmp_path / "model.gguf", "llama", METADATA, TENSORS, data)
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_says_what_was_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BudgetError, match=r"disk full while writing .*model.gguf"):
        written(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 100, 3_000], ids=["at once", "in the metadata", "in a tensor"])
def test_what_the_disk_refuses_is_said(limit: int, tmp_path: Path) -> None:
    large = Stored("blk.0.ffn_up.weight", (64, 64), "f32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(BudgetError, match=r"size limit exceeded while writing .*model.gguf`: ") as caught:
            written(tmp_path, [TENSORS[1], large])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # a tensor counts until all of it is there
    assert caught.value.needed == large.nbytes + (20 if limit < 3_000 else 0)
    assert not list(tmp_path.iterdir())


@settings(max_examples=25)
@given(data=st.data())
def test_sizes_are_exact(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = st.tuples(st.sampled_from(["f32", "f16", "q4_0", "q6_k", "iq1_m"]), st.integers(1, 4))
    drawn = data.draw(st.lists(shapes, min_size=1, max_size=6))
    tensors = [Stored(f"t{n}", (rows, 256), kind) for n, (kind, rows) in enumerate(drawn)]
    name = data.draw(st.text(max_size=9).filter(lambda text: text.isprintable()))
    metadata = {**METADATA, "general.name": name, "general.alignment": data.draw(st.sampled_from([32, 64]))}
    shards = plan_shards(tensors, data.draw(st.sampled_from([1, 3_000, 10**9])))
    assert [tensor for shard in shards for tensor in shard] == tensors
    folder = tmp_path_factory.mktemp("sizes")
    paths = write_shards(folder, "m", "llama", metadata, shards, contents(tensors))
    assert [path.stat().st_size for path in paths] == shard_bytes("llama", metadata, shards)
    if len(shards) == 1:
        assert file_bytes("llama", metadata, tensors) == paths[0].stat().st_size
    opened = open_file(paths[-1])
    for tensor, expected in zip(tensors, contents(tensors), strict=True):
        assert torch.equal(opened.read_bytes(tensor.name), expected)


def split(folder: Path) -> list[Path]:
    shards = plan_shards(TENSORS, 900)
    return write_shards(folder, "tiny", "llama", METADATA, shards, iter(contents()))


def test_shards(tmp_path: Path) -> None:
    assert shard_names("m", 1) == ["m.gguf"]
    paths = split(tmp_path)
    assert [path.name for path in paths] == shard_names("tiny", 2)
    assert paths[1].name == "tiny-00002-of-00002.gguf"
    whole = [gguf.GGUFReader(path) for path in paths]
    first, second = ({k: f for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in whole)
    assert set(second) == {"split.no", "split.count", "split.tensors.count"}
    assert set(first) == {*second, *METADATA, "general.architecture"}
    for number, fields in enumerate((first, second)):
        found = {key: (fields[key].contents(), fields[key].types[0].name) for key in second}
        assert found == {
            "split.no": (number, "UINT16"),
            "split.count": (2, "UINT16"),
            "split.tensors.count": (len(TENSORS), "INT32"),
        }
    for path in paths:
        opened = open_file(path)
        assert opened.paths == tuple(paths) and opened.metadata["general.name"] == "tiny"
        same_contents(opened)
    # joined again, nothing of the cut is left
    write(tmp_path / "one.gguf", "llama", dict(METADATA, **{"split.count": 2}), TENSORS, contents())
    assert "split.count" not in open_file(tmp_path / "one.gguf").metadata


def test_a_shard_is_closed_before_it_is_too_large() -> None:
    tensors = [Stored(str(n), (size,), "f32") for n, size in enumerate((8, 8, 8, 80, 8))]
    planned = [[int(t.name) for t in shard] for shard in plan_shards(tensors, 64)]
    assert planned == [[0, 1], [2], [3], [4]]
    assert plan_shards([], 64) == [[]]


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = split(tmp_path)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(SourceError, match="is one of 2 shards and its name does not say which"):
        open_file(renamed)
    second = paths[1].read_bytes()
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(SourceError, match=r"says that it is shard 0 .from 0. of 2, and its name 1 of 2"):
        open_file(paths[0])
    first = paths[0].read_bytes()
    told = struct.pack("<i", len(TENSORS))
    at = first.index(b"split.tensors.count") + 23
    assert first[at : at + 4] == told
    paths[1].write_bytes(second)
    paths[0].write_bytes(first[:at] + struct.pack("<i", 9) + first[at + 4 :])
    with pytest.raises(SourceError, match="promises 9 tensors, and its shards hold 4"):
        open_file(paths[1])
    paths[1].unlink()
    with pytest.raises(SourceError, match=r"1 of 2 shards of .* are missing: tiny-00002-of-00002.gguf"):
        open_file(paths[0])


def patched(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


def at(position: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + new + data[position + len(new) :]


KEY = b"llama.block_count"
NORM = b"blk.0.attn_norm.weight"
HUGE = struct.pack("<Q", 2**63)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:20], "is no GGUF file: it has 20 bytes"),
        (at(0, b"PK\3\4"), "is no GGUF file: it begins with b'PK"),
        (at(4, struct.pack("<I", 1)), "version 1 where 2 or 3 are known"),
        (at(4, struct.pack(">I", 3)), "its bytes are in big-endian order"),
        (at(8, HUGE), "9,223,372,036,854,775,808 tensors and 9 keys do not fit"),
        (at(16, HUGE), "4 tensors and 9,223,372,036,854,775,808 keys do not fit"),
        (at(24, HUGE), "the name of a key goes beyond its end"),
        (lambda data: data[:300], "goes beyond its end at byte 300"),
        (lambda data: data[:-13], "`output.weight` ends at byte"),
        (patched(KEY, b"general.namex\xff\xff\xff\xff"), "the name of a key is not UTF-8"),
        (patched(b"general.name" + struct.pack("<I", 8), b"general.name" + struct.pack("<I", 13)), "type 13"),
        (
            patched(b"tokens" + struct.pack("<IIQ", 9, 8, 4), b"tokens" + struct.pack("<IIQ", 9, 8, 2**61)),
            "`tokenizer.ggml.tokens` holds 2,305,843,009,213,693,952 values, more than the file",
        ),
        (
            patched(b"tokens" + struct.pack("<IIQ", 9, 8, 4), b"tokens" + struct.pack("<IIQ", 9, 9, 4)),
            "`tokenizer.ggml.tokens` is of the unknown type 9",
        ),
        (patched(NORM + struct.pack("<I", 1), NORM + struct.pack("<I", 9)), "has 9 dimensions"),
        (patched(NORM + struct.pack("<IQ", 1, 5), NORM + struct.pack("<IQ", 1, 2**62)), "ends at byte"),
        (patched(NORM + struct.pack("<IQ", 1, 5), NORM + struct.pack("<IQ", 1, 0)), r"has the shape \(0,\)"),
        (
            patched(NORM + struct.pack("<IQI", 1, 5, 0), NORM + struct.pack("<IQI", 1, 5, 99)),
            "is of the unknown type 99",
        ),
        (
            patched(NORM + struct.pack("<IQI", 1, 5, 0), NORM + struct.pack("<IQI", 1, 5, 12)),
            r"has the shape \(5,\) in Q4_K",
        ),
        (
            patched(NORM + struct.pack("<IQIQ", 1, 5, 0, 864), NORM + struct.pack("<IQIQ", 1, 5, 0, 863)),
            "ends at byte",
        ),
        (patched(b"blk.0.ffn_down_exps.weight", b"blk.0.ffn_down_exps.weigh\xff"), "tensor is not UTF-8"),
    ],
)
def test_files_that_are_not_what_they_claim(
    change: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=reason):
        open_file(path)


@settings(max_examples=150)
@given(seed=st.integers(0, 10**9), flips=st.integers(1, 4))
def test_damage_is_a_source_error_or_harmless(
    seed: int, flips: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("damaged"))
    data = bytearray(path.read_bytes())
    head = len(data) - sum(-(-t.nbytes // 32) * 32 for t in TENSORS)
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, head, flips):
        data[at] = rng.integers(0, 256)
    path.write_bytes(data)
    try:
        opened = open_file(path)
    except SourceError as error:
        assert str(path.parent) in str(error)
        return
    for name, stored in opened.tensors.items():
        assert opened.read_bytes(name).numel() == stored.nbytes


def test_keys_and_tensors_are_there_once(tmp_path: Path) -> None:
    path = written(tmp_path, [TENSORS[1], Stored("blk.1.attn_norm.weight", (5,), "f32")])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"))
    with pytest.raises(SourceError, match=r"`blk.0.attn_norm.weight` is twice in"):
        open_file(path)
    path.write_bytes(whole.replace(b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"))
    with pytest.raises(SourceError, match=r"`tokenizer.ggml.tokens` is there twice"):
        open_file(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*: No such file"):
        open_file(tmp_path / "absent.gguf")
    path = written(tmp_path)
    opened = open_file(path)
    os.truncate(path, 100)
    with pytest.raises(SourceError, match=r"cannot read `output.weight`"):
        opened.read_bytes("output.weight")


def test_changing_what_was_read_changes_no_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    open_file(path).read_bytes("output.weight").zero_()
    assert path.read_bytes() == before


def test_floats_are_stored_as_they_are() -> None:
    assert Stored.plain("a", (2, 3), torch.bfloat16) == Stored("a", (2, 3), "bf16")
    assert Stored("a", (2, 3), "bf16").byte_shape == (2, 6)
    assert as_bytes(torch.ones(2, 3)).shape == (2, 12)
    with pytest.raises(UnsupportedError, match="GGUF stores `a` as float32, float16 or bfloat16"):
        Stored.plain("a", (2,), torch.float64)
