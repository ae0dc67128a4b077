"""What gives access to something, known by its value or by its shape.

Hiding may be generous, for a word too many in a log harms nobody. Refusing to publish may not, so `shown`
leaves out what no service would give out: placeholders of instructions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

# Shorter values are no secrets, and hiding them would hide half of the text.
SHORTEST = 8
_HIDDEN = "***"
_GENEROUS = (
    (re.compile(r"\bhf_(?:oauth_[\w.-]{8,}|[A-Za-z0-9]{8,})"), f"hf_{_HIDDEN}"),
    (re.compile(r"\bapi_org_[A-Za-z0-9]{8,}"), f"api_org_{_HIDDEN}"),
    (re.compile(r"\b([Bb]earer\s+)[^\s\"'<>,;\\]{8,}"), rf"\g<1>{_HIDDEN}"),
)
# (what every one of them contains, shape, what it is); texts without the first are not searched
_SHAPES = (
    ("hf_", re.compile(r"\bhf_(?:oauth_[\w.-]{20,}|[A-Za-z0-9]{20,})"), "a token of the Hub"),
    ("api_org_", re.compile(r"\bapi_org_[A-Za-z0-9]{20,}"), "a token of the Hub"),
    ("earer", re.compile(r"\b[Bb]earer\s+[\w.~+/-]{20,}"), "a token of a request"),
    ("gh", re.compile(r"\bgh[opsur]_[A-Za-z0-9]{36,}"), "a token of GitHub"),
    ("github_pat_", re.compile(r"\bgithub_pat_\w{50,}"), "a token of GitHub"),
    ("glpat-", re.compile(r"\bglpat-[\w-]{20,}"), "a token of GitLab"),
    ("IA", re.compile(r"\bA[KS]IA[0-9A-Z]{16}\b"), "a key of AWS"),
    ("AIza", re.compile(r"\bAIza[\w-]{35}"), "a key of Google"),
    ("sk-", re.compile(r"\bsk-[\w-]{20,}"), "a key of a model service"),
    ("xox", re.compile(r"\bxox[abprs]-[\w-]{10,}"), "a token of Slack"),
    ("pypi-AgE", re.compile(r"\bpypi-AgE[\w-]{50,}"), "a token of PyPI"),
    ("eyJ", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"), "a signed token (JWT)"),
    ("PRIVATE KEY", re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"), "a private key"),
    (
        "://",
        re.compile(r"(?<=://)[^\s/:@]+:(?!pass|token|secret)[^\s/:@*${}<>]{4,}(?=@)"),
        "a password in an address",
    ),
)


def masked(text: str, known: Collection[str] = ()) -> str:
    """`text` without `known` secrets and without what looks like one."""
    for value in sorted((v.strip() for v in known), key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, _HIDDEN)
    for shape, instead in _GENEROUS:
        text = shape.sub(instead, text)
    for _, shape, _ in _SHAPES:
        text = shape.sub(lambda found: found[0] if _HIDDEN in found[0] else _HIDDEN, text)
    return text


def shown(text: str, known: Collection[str] = ()) -> Iterator[tuple[int, str]]:
    """(position, what it is) of every secret that `text` would give away."""
    for value in {v.strip() for v in known}:
        if len(value) >= SHORTEST:
            yield from ((found.start(), "the token in use") for found in re.finditer(re.escape(value), text))
    for within, shape, what in _SHAPES:
        if within in text:
            matches = shape.finditer(text)
            yield from ((found.start(), what) for found in matches if _is_random(found[0]))


def _is_random(text: str) -> bool:
    """Whether it mixes capitals and small letters, or has digits; ``hf_xxxx…`` does neither."""
    if text.startswith("-----") or ":" in text:
        return True
    value = re.split(r"[-_\s]", text, maxsplit=1)[-1]
    mixed = value.lower() != value and value.upper() != value
    return len(set(value)) > 6 and (mixed or any(c.isdigit() for c in value))
