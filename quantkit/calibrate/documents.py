"""Reads the documents of a text source: local files, and datasets on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from quantkit.calibrate.text import EvalSpec, FileSource, HubSource, Part
from quantkit.errors import CalibrationError, HubError

Messages = list[dict[str, Any]]
Document = str | Messages
Row = Mapping[str, Any]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTEAD = (
    "use an embedded text (--calib embedded, --eval embedded), or a local .txt, .jsonl or .parquet file"
)


def documents(part: Part) -> Iterator[Document]:
    """The documents of a part, up to its `max_chars`; CalibrationError or HubError if it cannot be read."""
    if isinstance(part.source, FileSource) and not _has_rows(part.source):
        yield read_text(part.source.path, part.max_chars)
        return
    rows = _limited(_column(part.source, part.column), part.max_chars)
    if part.join is None:
        yield from rows
    else:
        yield join_rows(_texts(rows, part.source.label), part.join)[: part.max_chars]


def evaluation_text(spec: EvalSpec) -> str:
    """The text an evaluation measures on, joined as its style prescribes.

    A raw file is taken as it is, less one final newline in the ``llamacpp`` style. Rows of a dataset
    are joined with ``"\\n\\n"``, except that ``llamacpp`` measures the built-in ``wikitext2`` on the
    raw file, which its rows restore.
    """
    source = spec.source
    if isinstance(source, FileSource) and not _has_rows(source):
        text = read_text(source.path)
    else:
        restored = isinstance(source, HubSource) and spec.style == "llamacpp"
        text = join_rows(_texts(_column(source, "text"), source.label), "" if restored else "\n\n")
    return text.removesuffix("\n") if spec.style == "llamacpp" else text


def join_rows(rows: Iterable[str], join: str) -> str:
    """One text of many rows. Joined with ``""``, an empty row is the line ``" \\n"`` that it was."""
    return join.join(rows) if join else "".join(row or " \n" for row in rows)


def read_text(path: Path, max_chars: int = -1) -> str:
    """The first `max_chars` characters of a UTF-8 file (all of it by default), line ends kept."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(max_chars)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"`{path}` is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start:,}",
            remedy="convert it to UTF-8",
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read `{path}`: {error.strerror}") from error


def pinned(part: Part) -> Part:
    """`part` with the revision of its dataset resolved to a commit; HubError if the Hub does not answer."""
    source = part.source
    if isinstance(source, FileSource) or _COMMIT.fullmatch(source.revision):
        return part
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        revision = HfApi().resolve_revision(source.id, repo_type="dataset", revision=source.revision)
    except (OSError, HFValidationError) as error:
        raise HubError(
            f"cannot resolve revision '{source.revision}' of dataset `{source.id}`: {_first_line(error)}",
            remedy=f"name a commit as the revision, or {_INSTEAD}",
        ) from error
    return replace(part, source=replace(source, revision=revision.resolved))


def _has_rows(source: FileSource) -> bool:
    return source.path.suffix in (".jsonl", ".parquet")


def _column(source: FileSource | HubSource, column: str) -> Iterator[Document]:
    """The column of every row; rows without the default column may hold ``messages`` instead."""
    for number, row in enumerate(_rows(source), start=1):
        name = "messages" if column == "text" and "text" not in row and "messages" in row else column
        if name not in row:
            raise CalibrationError(
                f"row {number:,} of `{source.label}` has no column '{column}'",
                remedy=f"set `column` to one of: {', '.join(row)}",
            )
        yield _document(row[name], f"'{name}' in row {number:,} of `{source.label}`")


def _document(value: object, where: str) -> Document:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise CalibrationError(f"{where} is neither text nor a list of messages with role and content")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _texts(rows: Iterable[Document], label: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row, str):
            raise CalibrationError(f"`{label}` holds conversations, which cannot be joined to one text")
        yield row


def _limited(rows: Iterable[Document], max_chars: int) -> Iterator[Document]:
    """Rows up to the one that reaches `max_chars`, which is the last."""
    seen = 0
    for row in rows:
        yield row
        seen += len(row) if isinstance(row, str) else sum(len(str(m["content"] or "")) for m in row)
        if seen >= max_chars:
            return


def _rows(source: FileSource | HubSource) -> Iterator[Row]:
    match source:
        case HubSource():
            return _hub_rows(source)
        case FileSource() if source.path.suffix == ".parquet":
            return _parquet_rows(source.path)
        case FileSource():
            return _json_rows(source.path)
        case _:
            assert_never(source)


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise CalibrationError(f"{path}:{number}: expected a JSON object on every line")
                    yield row
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}:{number}: not JSON: {error}") from error
    except OSError as error:
        raise CalibrationError(f"cannot read `{path}`: {error.strerror}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CalibrationError(
            f"reading `{path}` needs the `pyarrow` package", remedy="pip install pyarrow"
        ) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"cannot read `{path}`: {_first_line(error)}") from error


def _hub_rows(source: HubSource) -> Iterator[Row]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise CalibrationError(
            f"reading dataset `{source.id}` needs the `datasets` package",
            remedy=f"pip install datasets, or {_INSTEAD}",
        ) from error
    # Of httpx or requests, whichever this version is built on; not part of its __all__.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield from load_dataset(
            source.id,
            source.config,
            split=source.split,
            revision=source.revision,
            data_files=source.data_files,
            streaming=True,
        )
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise HubError(
            f"cannot read dataset `{source.label}`: {_first_line(error)}", remedy=_INSTEAD
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
