"""The front matter of a README: found, and merged so that the lines of a person stay as they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.checkpoint.card import listed
from quantkit.errors import UsageError

# `args.engine` of our results in model-index begins so, by which they are told from those of others.
BY = "quantkit"
_RULE = re.compile(r"---[ \t]*")
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
# what ends a line for the YAML parser
_YAML_LINES = re.compile("[^\n\x85\u2028\u2029]*[\n\x85\u2028\u2029]|[^\n\x85\u2028\u2029]+")
_OURS = ("model-index", "quantkit", "base_model_relation", "quantized_by")
_UNITED = ("tags", "language", "datasets")
_LICENCE = ("license", "license_name", "license_link")
_EMPTY: tuple[Any, ...] = (None, "", [])
# Digests of what a card of ours wrote, by key: of the value, or of each item of what is united.
Written = Mapping[str, frozenset[str]]
DIGEST = 6
NOTHING: Written = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """`yaml` between the rules, with newlines alone; `rest` of the text as it is; where the YAML begins."""

    yaml: str
    rest: str
    first_line: int


@dataclass(frozen=True, slots=True)
class Merged:
    """YAML, and what of it is ours."""

    yaml: str
    written: Written


def find(text: str) -> FrontMatter | None:
    """The front matter of `text`, None: it has none. Empty lines and a byte order mark may come before."""
    lines = _LINES.findall(text.removeprefix("\ufeff"))
    start = next((n for n, line in enumerate(lines) if line.strip()), None)
    if start is None or not _RULE.fullmatch(lines[start].rstrip("\r\n")):
        return None
    end = next((n for n in range(start + 1, len(lines)) if _RULE.fullmatch(lines[n].rstrip("\r\n"))), None)
    if end is None:
        return None
    inside = "".join(line.rstrip("\r\n") + "\n" for line in lines[start + 1 : end])
    return FrontMatter(inside, "".join(lines[end + 1 :]), start + 2)


def load(text: str) -> Any:
    """What YAML makes of `text`; yaml.YAMLError, ValueError or RecursionError when it makes nothing.

    With the parser that the Hub's client has, not the one in C, which understands other bytes.
    """
    return yaml.safe_load(text)


def compose(text: str) -> yaml.Node | None:
    """The nodes of `text`, which know their lines."""
    return yaml.compose(text, Loader=yaml.SafeLoader)


def dump(values: Mapping[str, Any]) -> str:
    """YAML that reads back as `values`, in their order."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=110))


def merged(ours: str, theirs: str, *, made_before: bool, before: Written = NOTHING) -> Merged:
    """The YAML of `theirs` with what `ours` adds.

    Theirs win, and keep their lines and comments, except for what only we can know; lists of tags, languages
    and datasets are united; results of others in `model-index` stay.
    made_before  `theirs` is of a card of ours, so that what it says of us and `ours` does not is outdated
    before       what of `theirs` an earlier card of ours wrote: replaced or dropped while it is unchanged
    UsageError when `theirs` is not YAML.
    """
    found, new = _mapping(theirs), _mapping(ours)
    if not found:
        # comments alone are kept, too
        text = theirs + ours if _reads_as(theirs + ours, new) else ours
        return Merged(text, _written(new, {}, {}, new, before))
    own, texts = _of_a_person(found, _listed_texts(theirs), new, before)
    decided = dict(_decided(own, texts, new, made_before))
    expected = {key: decided[key] for key in dict.fromkeys([*found, *new]) if key in decided}
    changed = {key: value for key, value in expected.items() if key not in found or found[key] != value}
    dropped = {key for key in found if key not in expected}
    text = "".join(_rewritten(theirs, changed, dropped))
    text += "".join(dump({key: value}) for key, value in changed.items() if key not in found)
    # anchors, one line of braces and the like do not survive such surgery; values always do
    text = text if _reads_as(text, expected) else dump(expected)
    return Merged(text, _written(expected, own, texts, new, before))


def _of_a_person(
    found: Mapping[Any, Any], texts: Mapping[str, list[str]], new: Mapping[Any, Any], before: Written
) -> tuple[dict[Any, Any], dict[str, list[str]]]:
    """`found` and its `texts` without what we wrote; of what is united, without what we write no more."""
    own, left = dict(found), dict(texts)
    ours = {key for key, value in found.items() if _digest(value) in before.get(key, ())}
    licence = {key for key in _LICENCE if found.get(key) not in _EMPTY}
    if not licence <= ours and found.get("license") not in (None, new.get("license")):
        # a licence is a person's as a whole: without our name for it theirs may be incomplete
        ours -= licence
    for key in ours.difference(_UNITED, _OURS):
        del own[key]
    for key in own.keys() & set(_UNITED):
        wanted = listed(new.get(key))
        left[key] = [t for t in texts[key] if t in wanted or _digest(t) not in before.get(key, ())]
        if texts[key] and not left[key]:
            del own[key]
        elif left[key] != texts[key]:
            own[key] = left[key]
    return own, left


def _written(
    expected: Mapping[Any, Any],
    own: Mapping[Any, Any],
    texts: Mapping[str, list[str]],
    new: Mapping[Any, Any],
    before: Written,
) -> Written:
    """What of `expected` is ours: `own` has not said it, or only since an earlier card did."""
    out = {}
    for key, value in expected.items():
        held = before.get(key, frozenset())
        if key in _UNITED:
            there = texts.get(key, [])
            digests = {d for t in listed(new.get(key)) if (d := _digest(t)) in held or t not in there}
        elif key not in _OURS:
            ours = own.get(key) in _EMPTY and value == new.get(key)
            digests = {d for d in [_digest(value)] if ours or d in held}
        else:
            continue
        if known := frozenset(d for d in digests if d is not None):
            out[key] = known
    return out


def _digest(value: Any) -> str | None:
    """Of a text or a list of texts, which is all that we write where a person may; None: something else."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return None
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]


def _mapping(text: str) -> dict[Any, Any]:
    try:
        values = load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise _unreadable(f"is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _unreadable(f"holds no keys, but {type(values).__name__}")
    return values


def _unreadable(what: str) -> UsageError:
    return UsageError(
        f"README.md: what stands between its first two lines of --- {what}",
        remedy="repair it, or give --replace-card to write it anew",
    )


def _listed_texts(text: str) -> Mapping[str, list[str]]:
    """What is united, as it is written: YAML takes the language `no` for a truth value."""
    values = yaml.load(text, Loader=yaml.BaseLoader)
    return {key: listed(values.get(key)) for key in _UNITED}


def _decided(
    found: Mapping[Any, Any], texts: Mapping[str, list[str]], new: Mapping[Any, Any], made_before: bool
) -> Iterator[tuple[Any, Any]]:
    """(key, value) of all that is there in the end, theirs first."""
    same_licence = found.get("license") in (None, new.get("license"))
    for key in dict.fromkeys([*found, *new]):
        mine, yours = new.get(key), found.get(key)
        if key == "model-index":
            value = _index(mine, yours)
        elif key in _OURS:
            value = yours if mine is None and not made_before else mine
        elif key in _UNITED:
            value = _united(texts[key], yours, mine)
        elif key in _LICENCE and not same_licence:
            value = yours
        else:
            value = mine if yours in _EMPTY and mine is not None else yours
        if value is not None or (key in found and key not in _OURS):
            yield key, value


def _united(written: Sequence[str], yours: Any, mine: Any) -> Any:
    """Theirs as it is when it holds ours already, else both."""
    added = [text for text in listed(mine) if text not in written]
    return yours if yours not in _EMPTY and not added else [*written, *added] or yours


def _index(mine: Any, yours: Any) -> Any:
    """Our entries, and those of others."""
    ours = list(mine) if isinstance(mine, list) else []
    entries = [_without_ours(e) for e in (yours if isinstance(yours, list) else []) if not _is_ours(e)]
    names = [entry["name"] for entry in ours]
    beside = [e for e in entries if isinstance(e, dict) and e.get("name") in names]
    for entry in beside:
        # results of others under the name of one of ours
        number = names.index(entry["name"])
        ours[number] = {**ours[number], "results": [*ours[number]["results"], *_foreign(entry)]}
    return [*ours, *(e for e in entries if e not in beside)] or None


def _is_ours(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("results")) and not _foreign(entry)


def _without_ours(entry: Any) -> Any:
    """An entry of others without the results that an earlier card of ours put beside theirs."""
    if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
        return entry
    return {**entry, "results": _foreign(entry)}


def _foreign(entry: Mapping[str, Any]) -> list[Any]:
    """Results that somebody else measured."""
    results = entry.get("results")
    return [r for r in results if not _measured_by_us(r)] if isinstance(results, list) else []


def _measured_by_us(result: Any) -> bool:
    metrics = result.get("metrics") if isinstance(result, dict) else None
    engines = [
        str(m["args"].get("engine", ""))
        for m in (metrics if isinstance(metrics, list) else [])
        if isinstance(m, dict) and isinstance(m.get("args"), dict)
    ]
    return bool(engines) and all(re.match(rf"{BY}\b", engine) for engine in engines)


def _rewritten(text: str, changed: Mapping[Any, Any], dropped: set[Any]) -> Iterator[str]:
    """The lines of `text`; a value that changed is written anew in its place."""
    node = compose(text)
    lines = _YAML_LINES.findall(text)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    starts = [key.start_mark.line for key, _ in pairs]
    yield "".join(lines[: starts[0]] if starts else lines)
    written = set()
    for (key, value), start, end in zip(pairs, starts, [*starts[1:], len(lines)], strict=True):
        segment = lines[start:end]
        last = max((n for n, line in enumerate(segment) if not _is_between(line)), default=-1)
        if key.value not in changed and key.value not in dropped:
            yield "".join(segment[: last + 1])
        else:
            yield from _comments(start, value, lines[: start + last + 1])
            if key.value in changed and key.value not in written:
                yield dump({key.value: changed[key.value]})
        written.add(key.value)
        yield "".join(segment[last + 1 :])


def _comments(start: int, value: yaml.Node, lines: Sequence[str]) -> Iterator[str]:
    """What a person says behind a value, or between its items, as lines of their own."""
    items = value.value if isinstance(value, yaml.SequenceNode) else []
    ends = [(node.end_mark.line, node.end_mark.column) for node in (*items, value)]
    between = [(line, 0) for line in range(start, len(lines) if items else start)]
    # one for each line: of two ends, and an end and the whole line, the later
    for line, column in dict(sorted([*between, *ends])).items():
        behind = lines[line][column:].strip() if line < len(lines) else ""
        if behind.startswith("#"):
            yield f"{behind}\n"


def _is_between(line: str) -> bool:
    """A comment or an empty line, which belongs to no value."""
    return not line.strip() or line.startswith("#")


def _reads_as(text: str, expected: Mapping[Any, Any]) -> bool:
    try:
        return bool(load(text) == expected)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
