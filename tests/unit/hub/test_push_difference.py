"""Hashes of local files, what differs, and the limits that are known before anything is sent."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import UsageError, VerifyError
from quantkit.hub.listing import Listed
from quantkit.hub.manifest import FileSum
from quantkit.hub.push import advice, preflight
from quantkit.hub.push.difference import Row, Sums, difference, nothing_to_do
from quantkit.hub.push.publication import Item, publications
from quantkit.hub.push.remote import RemoteState
from quantkit.recipe.spec import Publish
from tests.targets import gguf


def test_hashes_of_the_hub_and_of_git(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    sums = Sums()
    # printf 'hello\n' | sha256sum; printf 'hello\n' | git hash-object --stdin
    sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    git = "ce013625030ba8dba906f756967f9e9ca394464a"
    for source in (path, b"hello\n"):
        assert sums.of(source) == FileSum(6, sha256) and sums.git(source) == git
        assert sums.match(source, Listed("x", 6, sha256, True))
        assert sums.match(source, Listed("x", 6, git, False))
        assert not sums.match(source, Listed("x", 6, git, True))
        assert not sums.match(source, Listed("x", 7, sha256, True))
        assert not sums.match(source, None)


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    sums = Sums()
    assert sums.of(path).bytes == 3 and sums.unchanged(path)
    state = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert sums.of(path).sha256 == hashlib.sha256(b"one").hexdigest()  # nothing says that it changed
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert not sums.unchanged(path)
    assert sums.of(path).sha256 == hashlib.sha256(b"two").hexdigest()
    path.unlink()
    with pytest.raises(VerifyError, match="cannot be published"):
        sums.of(path)


def test_rows() -> None:
    sums = Sums()
    listed = {
        name: Listed(name, 1, hashlib.sha256(b"a").hexdigest(), True)
        for name in ("same", "changed", "other", ".gitattributes")
    }
    items = [Item("new", b"n"), Item("same", b"a"), Item("changed", b"bb")]
    rows = difference(items, listed, sums)
    assert rows == (
        Row("new", "new", 1),
        Row("same", "same", 1, 1),
        Row("changed", "replace", 2, 1),
        Row("other", "untouched", 1, 1),
    )
    assert not nothing_to_do(rows) and nothing_to_do(difference(items[1:2], listed, sums))


def test_limits_of_the_hub(tmp_path: Path) -> None:
    (made,) = publications([gguf(tmp_path, "q4_k_m")], Publish("alice/Tiny"))
    large = replace(made, weights=(Item("a.gguf", b"", FileSum(501 * 10**9, "")),))
    (problem,) = preflight.unfit(large, (), RemoteState())
    assert isinstance(problem, UsageError) and "has 501 GB, the Hub takes 500 GB" in problem.message
    many = tuple(Item(f"report/{i}.json", b"") for i in range(10_001))
    (problem,) = preflight.unfit(made, many, RemoteState())
    assert "'report' would hold 10,001 files" in problem.message
    for name in ("a/../b", "-x", "a\nb", ".git/config", "x" * 256):
        assert list(preflight.unfit(made, (Item(name, b""),), RemoteState()))
    assert not list(preflight.unfit(made, (Item("report/Plot v1+2.png", b""),), RemoteState()))


def test_advice_on_sizes(tmp_path: Path) -> None:
    (made,) = publications([gguf(tmp_path, "q4_k_m")], Publish("alice/Tiny"))
    notes = list(advice.notes(made, RemoteState(), (Row("Tiny-Q4_K_M.gguf", "new", 120 * 10**9),), False))
    assert "120 GB in a private repository: free accounts have 100 GB" in notes
    assert "'Tiny-Q4_K_M.gguf' has 120 GB: above 50.0 GB only clients with Xet get it" in notes
