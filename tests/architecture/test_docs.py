"""What the documents say is true: generated tables are current, commands and names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import PAGE, page
from quantkit import registry
from quantkit.cli.main import COMMANDS
from quantkit.recipe.plugins import shortcuts
from quantkit.recipe.shorthand import parse_targets
from quantkit.schemes import COMMON

ROOT = Path(__file__).parents[2]


def test_results_page_is_generated_from_the_results() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.tables"


@pytest.mark.parametrize(
    ("kind", "document"), [("methods", "methods"), ("formats", "formats"), ("transforms", "methods")]
)
def test_every_plugin_has_a_line(kind: registry.Kind, document: str) -> None:
    text = (ROOT / "docs" / f"{document}.md").read_text()
    for name in registry.names(kind):
        found = re.search(rf"(^## (Transforms: )?|`){name}", text, re.MULTILINE)
        assert found, f"docs/{document}.md does not mention {name}"


def test_every_part_of_the_name_of_a_scheme_is_explained() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    parts = {part for name in COMMON for part in re.findall(r"_[a-z]+|[a-z]+4|fp8|a8", name)}
    assert parts >= {"_asym", "_asymf", "_block", "_dq", "_mixed", "_static", "_tensor", "a8", "nf4"}
    missing = sorted(part for part in parts if f"`{part}`" not in text)
    assert not missing, f"docs/formats.md does not explain {missing}"


def test_targets_in_the_documents_can_be_made() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    targets = {target for text in texts for target in re.findall(r"--to `?([A-Za-z0-9_:.@=,]+\w)", text)}
    assert {"gptq:w4g128", "nf4", "int8"} <= targets
    for target in targets:
        assert parse_targets(target), target
    short = {name for text in texts for name in re.findall(r"`(\w+)`", text) if name in shortcuts()}
    assert {"nf4", "fp4", "int8", "fp8", "w8a8", "mxfp4", "nvfp4"} <= short


def test_commands_in_the_readme_exist() -> None:
    known = {name for group in COMMANDS.values() for name in group}
    used = set(re.findall(r"^quantkit (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used <= known and {"convert", "plan", "inspect"} <= used


def test_links_in_documents_lead_somewhere() -> None:
    for page_path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page_path.read_text()):
            assert (page_path.parent / link).exists(), f"{page_path.name} links to {link}"
