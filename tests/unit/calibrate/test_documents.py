from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quantkit.calibrate.documents import documents, evaluation_text, join_rows, pinned
from quantkit.calibrate.text import EvalSpec, FileSource, HubSource, Part
from quantkit.errors import CalibrationError, HubError

TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def part(path: Path, **options: Any) -> Part:
    return Part(FileSource(path), **options)


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[Any]:
    """Stands for the Hub: `load_dataset` gives `rows` or raises, and its arguments are kept."""
    calls: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((arguments, options))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_a_raw_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é one\r\n\ntwo\n".encode())
    assert list(documents(part(path))) == ["é one\r\n\ntwo\n"]
    assert list(documents(part(path, max_chars=4))) == ["é on"]


def test_rows_of_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "w1", "body": "w3"}, {"text": "w2", "body": "w4"}])
    assert list(documents(part(path))) == ["w1", "w2"]
    assert list(documents(part(path, column="body"))) == ["w3", "w4"]
    assert list(documents(part(path, join="\n\n"))) == ["w1\n\nw2"]
    assert list(documents(part(path, max_chars=2))) == ["w1"]
    assert list(documents(part(path, max_chars=3))) == ["w1", "w2"]
    assert list(documents(part(path, join="\n\n", max_chars=3))) == ["w1\n"]


def test_conversations_of_jsonl(tmp_path: Path) -> None:
    assert list(documents(part(jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])))) == [TALK]
    named = jsonl(tmp_path / "b.jsonl", [{"text": "w9", "talk": TALK}])
    assert list(documents(part(named, column="talk"))) == [TALK]
    with pytest.raises(CalibrationError, match="conversations"):
        list(documents(part(named, column="talk", join="")))


def test_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["w1", "w2"], "messages": [TALK, TALK]})
    pyarrow.parquet.write_table(table, path)
    assert list(documents(part(path))) == ["w1", "w2"]
    assert list(documents(part(path, column="messages"))) == [TALK, TALK]


def test_parquet_without_pyarrow_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError) as caught:
        list(documents(part(tmp_path / "a.parquet")))
    assert caught.value.remedy == "pip install pyarrow"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text"\n', "a.jsonl:2"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1"),
        ("a.jsonl", b'{"body": "w1"}\n', "'text'"),
        ("a.jsonl", b'{"text": 5}\n', "row 1"),
        ("a.jsonl", b'{"text": [{"role": "user"}]}\n', "row 1"),
        ("a.txt", b"ab\xffc", "0xff at 2"),
        ("a.parquet", b"PAR", "a.parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        list(documents(part(path)))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CalibrationError):
        list(documents(part(tmp_path / name)))


def test_a_dataset_is_streamed_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, [{"text": "w1"}, {"text": "w2"}])
    source = HubSource("org/data", "small", "train", "a" * 40)
    assert list(documents(Part(source))) == ["w1", "w2"]
    options = {"split": "train", "revision": "a" * 40, "data_files": None, "streaming": True}
    assert calls == [(("org/data", "small"), options)]


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), FileNotFoundError("no such dataset"), ValueError("no such split")]
)
def test_an_unreachable_dataset_offers_the_embedded_text(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fake_hub(monkeypatch, error)
    with pytest.raises(HubError) as caught:
        list(documents(Part(HubSource("org/data"))))
    assert str(error) in caught.value.message
    assert caught.value.remedy is not None
    assert "--calib embedded" in caught.value.remedy


def test_datasets_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError) as caught:
        list(documents(Part(HubSource("org/data"))))
    assert caught.value.remedy is not None
    assert "pip install datasets" in caught.value.remedy


def test_a_branch_is_resolved_to_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(str):
        resolved = "b" * 40

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", lambda *_, **__: Answer("main"))
    assert pinned(Part(HubSource("org/data"))) == Part(HubSource("org/data", revision="b" * 40))


def test_a_commit_and_a_file_need_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", refuse)
    for settled in (Part(HubSource("org/data", revision="a" * 40)), Part(FileSource(Path("a.txt")))):
        assert pinned(settled) is settled
    with pytest.raises(HubError):
        pinned(Part(HubSource("org/data")))


def test_an_empty_row_was_a_line_with_a_space() -> None:
    rows = ["", " = Title = \n", "", " text \n"]
    assert join_rows(rows, "") == " \n = Title = \n \n text \n"
    assert join_rows(rows, "\n\n") == "\n\n = Title = \n\n\n\n\n text \n"


def test_the_two_styles_join_wikitext_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [{"text": ""}, {"text": " a \n"}, {"text": " b \n"}])
    assert evaluation_text(EvalSpec("wikitext2", style="llamacpp")) == " \n a \n b "
    assert evaluation_text(EvalSpec("wikitext2", style="gptq")) == "\n\n a \n\n\n b \n"


def test_a_local_evaluation_text_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n")
    assert evaluation_text(EvalSpec("a", file=path, style="gptq")) == "one\r\ntwo\n\n"
    assert evaluation_text(EvalSpec("a", file=path, style="llamacpp")) == "one\r\ntwo\n"
    rows = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    for style in ("gptq", "llamacpp"):
        assert evaluation_text(EvalSpec("a", file=rows, style=style)) == "one\n\ntwo"  # type: ignore[arg-type]
