"""Licences by their identifiers on the Hub: which there are, which restrict derivatives, what some ask for.

The duties are reminders in our words of what the public texts ask of those who distribute a derivative.
They are neither complete nor advice; the text of a licence decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

# https://huggingface.co/docs/hub/repositories-licenses
_IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
_KNOWN = frozenset(_IDENTIFIERS.split())
# Research alone, or terms of which nothing is known here.
_RESEARCH = frozenset(
    (
        "h-research",
        "intel-research",
        "apple-amlr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
    )
)
_UNREAD = frozenset(("unknown", "other", "grok2-community"))
_COPY = "give a copy of the licence with the files"
_CHANGED = "say that the files were changed"


def known_licences() -> frozenset[str]:
    """Identifiers that the Hub accepts as `license`."""
    return _KNOWN


def restriction(id: str) -> str | None:
    """Why a derivative may not be published without a look at the licence; None: nothing speaks against it.

    `id` is an identifier, or the name that a licence gives itself.
    """
    id = id.lower()
    if re.search(r"(^|[-_ .])nd([-_ .]|$)|no[-_ ]?deriv", id):
        return "forbids to share derivatives"
    if id in _RESEARCH or "research" in id:
        return "allows research alone"
    if id in _UNREAD or id not in _KNOWN:
        return "is none whose terms quantkit knows"
    return None


def duties(id: str) -> tuple[str, ...]:
    """What the licence asks of those who distribute a derivative, beside `name_prefix`."""
    id = id.lower()
    if id in _LLAMA:
        return _llama(*_LLAMA[id])
    found: tuple[str, ...] = _DUTIES.get(id, ())
    if id.startswith("cc-by"):
        found = ("name the authors, link the licence and " + _CHANGED,)
        found += ("publish it under the same licence",) if "-sa" in id else ()
    if "-nc" in id or "noncommercial" in id:
        found += ("it may not be used commercially",)
    return found


# identifier → name in the notice, name of the licence, what to display, how names of models must begin
_LLAMA = MappingProxyType(
    {
        "llama2": ("Llama 2", "LLAMA 2", "", ""),
        "llama3": ("Meta Llama 3", "Meta Llama 3", "Built with Meta Llama 3", "Llama 3"),
        **{
            f"llama{number}": (f"Llama {number}", f"Llama {number}", "Built with Llama", "Llama")
            for number in ("3.1", "3.2", "3.3", "4")
        },
    }
)
_RAIL = (_COPY, "pass its restrictions of use on to everybody who gets the files", _CHANGED)
_DUTIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gemma": (
            "give a copy of the Gemma Terms of Use with the files, and make their limits of use binding",
            'add a text file NOTICE with: "Gemma is provided under and subject to the Gemma Terms of Use '
            'found at ai.google.dev/gemma/terms"',
            _CHANGED,
        ),
        **dict.fromkeys(
            (
                "openrail",
                "bigscience-openrail-m",
                "creativeml-openrail-m",
                "bigscience-bloom-rail-1.0",
                "bigcode-openrail-m",
                "openrail++",
            ),
            _RAIL,
        ),
    }
)


def name_prefix(id: str) -> str | None:
    """How the name of a published model must begin, None: as it likes."""
    return _LLAMA[id][3] or None if id in _LLAMA else None


def _llama(name: str, licence: str, display: str, _: str) -> tuple[str, ...]:
    notice = f"{name} is licensed under the {licence} Community License, Copyright © Meta Platforms, Inc. "
    found = [_COPY, f'add a text file NOTICE with: "{notice}All Rights Reserved."']
    if display:
        found.append(f'show "{display}" prominently, as on the model card')
    return tuple(found)
