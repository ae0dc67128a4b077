"""`render`: a page becomes the whole README."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from quantkit.hub.card import engines, making, measured, memory, metadata
from quantkit.hub.card.markdown import bullets, code, fenced, folded, link, table, text
from quantkit.hub.card.own_text import marked
from quantkit.hub.card.page import Page

if TYPE_CHECKING:
    from jinja2 import Template


def render(page: Page, plot: str | None = None) -> str:
    """The README of one branch: metadata, and our part between marks.

    plot  path in the repository of the picture that `plot.draw` made
    UsageError when notes, recipe or chat template hold a mark of ours.
    """
    body = _template().render(_values(page, plot))
    return f"{metadata.front_matter(page)}\n{marked(body, page.notes)}"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    # what goes in is Markdown already; HTML of strangers was escaped where it came from
    environment = Environment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8"))


def _values(page: Page, plot: str | None) -> dict[str, Any]:
    whole = not page.of_branch
    quality = measured.quality_tables(page)
    return {
        "title": _title(page),
        "introduction": _introduction(page),
        "careful": text(page.source.quantized) if page.source.quantized else "",
        "main": "" if whole else _to_main(page),
        "overview": measured.overview(page),
        "quality": quality,
        "measured": bool(measured.conventions(page.listed)),
        "plot": plot or "",
        "plot_alt": "size against quality",
        "quality_notes": bullets(measured.quality_notes(page)),
        "engines_table": measured.engine_table(page),
        "instructions": [
            {"engine": engines.called(one.engine), "content": one.content, "only": text(", ".join(one.only))}
            for one in engines.instructions(page)
        ],
        "usual": _usual(page),
        "other_engines": text(", ".join(engines.others(page))),
        "engine_notes": bullets(engines.notes(page)),
        "endpoint": engines.endpoint_note(page),
        "memory": memory.memory_table(page) if whole else "",
        "memory_title": "Which one to take" if len(page.listed) > 1 else "Memory",
        "memory_notes": memory.assumptions(page),
        "notes": page.notes.marked if page.notes is not None else "",
        "notes_title": "Notes" if page.notes is not None and page.notes.text else "",
        "making": making.facts(page),
        "kept": making.kept_tables(page),
        "recipes": making.recipes(page),
        "context": f"{page.source.context:,}" if page.source.context and whole else "",
        "prompt": fenced(page.template) if page.template is not None and whole else "",
        "download": _download(page),
        "sums": _sums(page),
        "changes": bullets(text(line) for line in page.changes),
        "licence": _licence(page),
    }


def _title(page: Page) -> str:
    name = text(page.repo.rpartition("/")[2])
    return f"{name}, {text(page.branch)}" if page.of_branch and page.branch is not None else name


def _introduction(page: Page) -> str:
    origin = page.source
    source = link(text(origin.id), page.url(origin.id)) if origin.on_hub else code(origin.id)
    # what comes with another engine is named once
    loads = dict.fromkeys(engine.partition("+")[0] for v in page.listed for engine in v.manifest.engines)
    by = " and ".join(dict.fromkeys(f"quantkit {v.manifest.quantkit}" for v in page.listed))
    where = f", for {text(', '.join(loads))}" if loads else ""
    return f"{source} as {making.formats(page)}{where}. Quantized with {text(by)}."


def _to_main(page: Page) -> str:
    return (
        f"This branch holds one of {len(page.siblings) + len(page.variants)} versions; "
        f"{link('the main branch', page.url(page.repo))} lists and compares them."
    )


def _usual(page: Page) -> str:
    """Which of several the commands are for."""
    shown = page.labels()[page.listed.index(engines.usual(page.listed))]
    return (
        f"Commands are for {code(shown)}; put any other of the first table there."
        if len(page.listed) > 1
        else ""
    )


def _download(page: Page) -> str:
    shown = engines.usual(page.listed)
    folder = None if shown.gguf else engines.folder_of(page, shown)
    return fenced(engines.download(page, shown, folder), "sh")


def _sums(page: Page) -> str:
    rows = [
        (code(path, in_table=True), f"{found.bytes:,}", code(found.sha256))
        for variant in page.listed
        for path, found in variant.sums()
    ]
    if not rows:
        return ""
    if page.siblings and not page.of_branch:
        labelled = zip(page.listed, page.labels(), strict=True)
        labels = [label for v, label in labelled for _ in v.sums()]
        rows = [
            (f"{text(label)}: {name}", size, sha)
            for label, (name, size, sha) in zip(labels, rows, strict=True)
        ]
    return folded("sha256 of the weights", table(("file", "bytes", "sha256"), rows, right=(1,)))


def _licence(page: Page) -> str:
    found = page.licence
    bases = [link(text(id), page.url(id)) for id in found.base_models]
    stated = ", ".join(text(id) for id in (found.id, *found.more) if id is not None)
    named = f" ({text(found.name)})" if found.name else ""
    if found.link:
        target = (
            found.link
            if "://" in found.link
            else page.url(page.repo, "blob", page.branch or "main", found.link)
        )
        named = f" ({link(text(found.name or found.link), target)})"
    unstated = (
        "not known, for the card of the source cannot be read" if found.unread else "not stated by the source"
    )
    licence = f"Licence: {stated}{named}." if stated else f"Licence: {unstated}."
    gated = " Access to the source is gated." if found.gated else ""
    origin = f" The original card: {' and '.join(bases)}." if bases else ""
    return f"{licence}{gated}{origin}"
