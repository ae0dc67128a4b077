"""The rules of the design that no linter knows, checked on the syntax tree of every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "quantkit"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module imports from its own line or from lines above; the plugin folders of one
# line never import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "table"),
    ("registry", "resources", "schemes", "tensors", "numerics"),
    ("checkpoint",),
    ("model", "calibrate", "gguf"),
    ("protocols",),
    ("transforms", "methods", "allocate", "formats"),
    ("recipe",),
    ("evaluate",),
    ("hub",),
    ("run",),
    ("cli",),
)
PLUGINS = frozenset(LAYERS[5])
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 600, 60, 7
FORBIDDEN_NAMES = ("utils", "common", "helpers", "base", "misc")


def part_of(path: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"quantkit/{part} has no layer: add it to LAYERS")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything imported anywhere in a file, also inside functions."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            for alias in found.names:
                yield found.lineno, alias.name
        elif isinstance(found, ast.ImportFrom) and found.module is not None:
            yield found.lineno, found.module
            for alias in found.names:
                yield found.lineno, f"{found.module}.{alias.name}"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_only_upwards(path: Path) -> None:
    own = part_of(path)
    if own in ("__init__", "__main__"):
        pytest.skip("the package's front door may name everything, lazily")
    for line, module in imports(tree(path)):
        parts = module.split(".")
        if parts[0] != "quantkit" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        other = parts[1]
        if not (PACKAGE / other).is_dir() and not (PACKAGE / f"{other}.py").exists():
            continue
        assert level(other) <= level(own), (
            f"{relative(path)}:{line}: {own} imports {other}, which is above it"
        )
        if own in PLUGINS and other in PLUGINS and own == other:
            mine = ".".join(path.relative_to(ROOT).with_suffix("").parts[:3])
            inside = module.startswith(mine) or len(parts) < 3
            assert inside, f"{relative(path)}:{line}: plugins do not import each other"
        elif own in PLUGINS:
            assert other not in PLUGINS, f"{relative(path)}:{line}: {own} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_ceilings(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{relative(path)}:{node.lineno} {node.name}"
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{where} is too long"
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            assert len(given) + len(node.args.kwonlyargs) <= MAX_PARAMETERS, f"{where} takes too much"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES, "a thing that cannot be named has not been understood"
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        for name in names:
            assert name != "block_size", f"{relative(path)}: `block_size` means five things; say which"
            words = name.strip("_").lower().split("_")
            assert not {"layer", "layers"} & set(words), f"{relative(path)}: {name}: say block, or weight"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_forbidden(path: Path) -> None:
    own = part_of(path)
    for node in ast.walk(tree(path)):
        where = f"{relative(path)}:{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else relative(path)
        assert not isinstance(node, ast.Global), f"{where}: state has one owner; no `global`"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name != "torch.load", f"{where}: pickles are refused"
            assert own == "cli" or name not in ("os.environ", "os.getenv"), (
                f"{where}: only cli/ reads the environment"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{where}: files from strangers are hostile"
            if node.func.id == "getattr" and len(node.args) == 3:
                line = path.read_text("utf-8").splitlines()[node.lineno - 1]
                assert "#" in line, f"{where}: if it may be absent, its type says so; or say why not"
        assert not isinstance(node, ast.Assert), f"{where}: raise an error that says what to do"
        if isinstance(node, ast.ExceptHandler) and own != "cli":
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            assert node.type is not None and caught not in ("Exception", "BaseException"), (
                f"{where}: too broad"
            )
    for line, module in imports(tree(path)):
        assert module.split(".")[0] not in ("pickle", "dill", "joblib"), (
            f"{relative(path)}:{line}: no pickles"
        )


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) == "numerics"], ids=relative)
def test_numerics_are_pure(path: Path) -> None:
    """numerics/ knows torch, the standard library, and the types it works on; no devices, no seeds."""
    standard = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "types"}
    allowed = {"torch", "quantkit", "typing", *standard}
    for line, module in imports(tree(path)):
        assert module.split(".")[0] in allowed, (
            f"{relative(path)}:{line}: numerics import torch and nothing else"
        )
    source = path.read_text("utf-8")
    for word in (".cuda(", "manual_seed", "empty_cache", "set_default_dtype"):
        assert word not in source, f"{relative(path)}: {word} belongs into run/"


def test_every_folder_has_a_layer() -> None:
    parts = {part_of(p) for p in SOURCES} - {"__init__", "__main__", "data"}
    for part in parts:
        assert level(part) >= 0
