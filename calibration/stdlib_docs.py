"""Collect documentation from the running interpreter's standard library.

What: one `Document` per Python module, per C module and per language-reference
topic, in a fixed order, each passage being one docstring under its qualified
name. Why apart from `make_text.py`: collecting depends on CPython, splitting
does not. How to run: it is imported by `make_text.py`, never run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# A passage that states a licence of its own is left out: the shipped text is
# meant to be under one licence.
OWN_LICENCE = re.compile(r"copyright|licen[cs]ed? under|all rights reserved", re.IGNORECASE)
LEAST_CHARACTERS = 40
# Members of classes of modules are documented; anything deeper is an attribute
# of an attribute and repeats what its own class says.
DEEPEST_MEMBER = 2
SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One module's or one topic's passages, and the comments of its source."""

    name: str
    passages: tuple[str, ...]
    comments: tuple[str, ...] = ()


class Novelty:
    """Accepts each passage once, and only if it is prose long enough to matter."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def accepts(self, passage: str) -> bool:
        if len(passage) < LEAST_CHARACTERS or OWN_LICENCE.search(passage):
            return False
        lines = [line.strip() for line in passage.splitlines() if line.strip()]
        prompts = sum(line.startswith((">>>", "...")) for line in lines)
        # With a third of its lines typed at a prompt, the rest is mostly output.
        if prompts * 3 > len(lines) or passage in self._seen:
            return False
        self._seen.add(passage)
        return True


def collect() -> list[Document]:
    """Every document of the running interpreter, in a fixed order."""
    novelty = Novelty()
    stdlib = Path(sysconfig.get_path("stdlib"))
    return [
        *_python_modules(stdlib, novelty),
        *_c_modules(stdlib, novelty),
        *_topics(novelty),
    ]


def _python_modules(stdlib: Path, novelty: Novelty) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        # The two kinds of build record hold the building machine's paths.
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(
            ("config-", "_sysconfigdata")
        ):
            continue
        source = path.read_text(encoding="utf-8")
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        passages = tuple(
            f"{name}\n\n{doc}" for name, doc in _docstrings(ast.parse(source), module) if novelty.accepts(doc)
        )
        comments = tuple(text for text in _comments(source) if novelty.accepts(text))
        if passages or comments:
            yield Document(module, passages, comments)


def _tidy(doc: str) -> str:
    """Dedented, without trailing spaces or the blank lines around."""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(doc).splitlines()).strip()


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) in source order."""
    if isinstance(node, (ast.Module, *SCOPES)):
        doc = ast.get_docstring(node, clean=False)
        if doc:
            yield name, _tidy(doc)
    for child in ast.iter_child_nodes(node):
        own = f"{name}.{child.name}" if isinstance(child, SCOPES) else name
        yield from _docstrings(child, own)


def _comments(source: str) -> Iterator[str]:
    """Yield each run of comments that stand on consecutive lines of their own."""
    run: list[str] = []
    last_row = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        if not alone:
            continue
        if run and token.start[0] != last_row + 1:
            yield "\n".join(run).strip()
            run = []
        run.append(token.string.lstrip("#").strip())
        last_row = token.start[0]
    yield "\n".join(run).strip()


def _c_modules(stdlib: Path, novelty: Novelty) -> Iterator[Document]:
    extensions = {path.name.split(".")[0] for path in (stdlib / "lib-dynload").glob("*.so")}
    for name in sorted(extensions | set(sys.builtin_module_names)):
        if "test" in name or name.startswith(("xx", "_xx")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            # An extension whose system library is absent documents nothing here.
            continue
        passages = tuple(f"{owner}\n\n{doc}" for owner, doc in _members(module, name) if novelty.accepts(doc))
        if passages:
            yield Document(f"c:{name}", passages)


def _members(owner: object, name: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of an object and of what it defines."""
    doc = getattr(owner, "__doc__", None)
    if isinstance(doc, str) and not isinstance(owner, str | int | float | bytes):
        yield name, _tidy(doc)
    if depth < DEEPEST_MEMBER and isinstance(owner, type | types.ModuleType):
        for key, member in sorted(vars(owner).items()):
            # A class of another module is that module's to document.
            if isinstance(member, types.ModuleType):
                continue
            yield from _members(member, f"{name}.{key}", depth + 1)


def _topics(novelty: Novelty) -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        # Some builds of Python leave the reference topics out.
        return
    for name in sorted(topics):
        doc = _tidy(topics[name])
        if novelty.accepts(doc):
            yield Document(f"topic:{name}", (doc,))
