"""What the documents say is true: generated tables are current, commands and names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import PAGE, page
from quantkit import registry
from quantkit.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def test_results_page_is_generated_from_the_results() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.tables"


@pytest.mark.parametrize("kind", ["methods", "formats"])
def test_every_plugin_has_a_line(kind: registry.Kind) -> None:
    text = (ROOT / "docs" / f"{kind}.md").read_text()
    for name in registry.names(kind):
        assert re.search(rf"(^## |`){name}", text, re.MULTILINE), f"docs/{kind}.md does not mention {name}"


def test_commands_in_the_readme_exist() -> None:
    known = {name for group in COMMANDS.values() for name in group}
    used = set(re.findall(r"^quantkit (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used <= known and {"convert", "plan", "inspect"} <= used


def test_links_in_documents_lead_somewhere() -> None:
    for page_path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page_path.read_text()):
            assert (page_path.parent / link).exists(), f"{page_path.name} links to {link}"
