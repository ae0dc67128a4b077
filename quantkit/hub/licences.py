"""Under which licence a quantized model is published: that of its source, or what stands in the way.

Nothing is invented and nothing is decided for the user: the source's own words are passed on, what is not
stated stays unstated, and licences that restrict derivatives, or that cannot be read, need a person who has
read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import quote

from quantkit.checkpoint.card import FAULTS, HUB, UNREADABLE, hub_ids, inherited, listed
from quantkit.hub.licence_terms import duties, known_licences, name_prefix, restriction
from quantkit.hub.manifest import Origin
from quantkit.recipe.spec import Publish

_WEB = re.compile(r"https?://", re.IGNORECASE)
_SPACE = re.compile(r"[\s_-]+")
# The files of a licence are copied beside the weights, so a link to one of them stays right.
_COPIED = re.compile(r"(LICENSE|NOTICE|USE_POLICY)[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model card says of a licence, and what a person should know before publishing under it.

    id           identifier as the Hub knows it, None: the source states none
    name, link   of a licence that is `other`; link is an address, or a file beside the card
    base_models  the immediate source, as ids of the Hub
    gated        the source gives access on terms: the copy should, too
    reminders    what the licence asks of those who distribute derivatives
    warnings     what is unusual
    blockers     why nothing may be published before something is done
    blockers_if_public  the same, in a repository that all can see
    more         further identifiers, where the source states several
    unread       the source's card cannot be read: what it states is not known
    """

    id: str | None
    name: str | None
    link: str | None
    base_models: tuple[str, ...]
    gated: bool
    reminders: tuple[str, ...]
    warnings: tuple[str, ...]
    blockers: tuple[str, ...]
    more: tuple[str, ...] = ()
    blockers_if_public: tuple[str, ...] = ()
    unread: bool = False


@dataclass(frozen=True, slots=True)
class _Stated:
    """A licence in somebody's words."""

    ids: tuple[str, ...]
    name: str | None
    link: str | None

    @property
    def terms(self) -> tuple[str, ...]:
        """What to look it up by: `other` is known by its name."""
        name = _plain(self.name or "")
        return tuple(name if id == "other" and name else id for id in self.ids)

    @property
    def quoted(self) -> str:
        names = ", ".join(f"`{id}`" for id in self.ids)
        called = f" ({self.name})" if self.name else ""
        return f"{names}{called}{f', {self.link}' if self.link else ''}"


def judge(origin: Origin, how: Publish, *, endpoint: str = HUB, gated: bool | None = False) -> Licence:
    """The licence of what was made from `origin`, to be published as `how` says.

    endpoint  where the source lies, when it is on the Hub
    gated     the Hub says that the source gives access on terms; None: it did not say
    """
    # an older quantkit.json may hold what is not valid
    origin = replace(origin, card=inherited(origin.card))
    source, link_warning = _of_source(origin, endpoint)
    chosen = _chosen(source, how)
    bases = hub_ids(origin.id if origin.on_hub else how.base_model)
    asked = gated is not None
    gated = bool(gated or origin.card.get("gated"))
    written, name = _as_the_hub_knows(chosen)
    warnings = [link_warning] if link_warning else []
    warnings += _warnings(origin, how, source, chosen)
    if not gated and not asked:
        warnings.append(f"whether access to {origin.id} is gated is not known: the Hub did not tell")
    unknown = tuple(_unknown_source(origin, how, chosen))
    public = how.visibility in ("public", "private-then-public")
    return Licence(
        id=written[0] if written else None,
        name=name,
        link=chosen.link,
        base_models=tuple(bases),
        gated=gated,
        reminders=tuple(_reminders(chosen, how)),
        warnings=tuple(warnings),
        blockers=(
            *_unread(origin, how),
            *_unconfirmed(source, chosen, how),
            *(unknown if public else ()),
        ),
        more=written[1:],
        blockers_if_public=() if public else unknown,
        unread=UNREADABLE in origin.card,
    )


def _of_source(origin: Origin, endpoint: str) -> tuple[_Stated, str | None]:
    """What the card of the source says, and what could not be taken over."""
    card = origin.card
    ids = tuple(dict.fromkeys(_identifier(text) for text in listed(card.get("license"))))
    name = next(iter(listed(card.get("license_name"))), None)
    link = next(iter(listed(card.get("license_link"))), None)
    if link is None or _WEB.match(link):
        return _Stated(ids, name, link), None
    if origin.on_hub:
        place = f"{endpoint.rstrip('/')}/{origin.id}/blob/{origin.revision}"
        return _Stated(ids, name, f"{place}/{quote(link, safe='/#')}"), None
    if _COPIED.fullmatch(link):
        return _Stated(ids, name, link), None
    return _Stated(ids, name, None), f"the card links its licence to {link!r}, which is not published"


def _chosen(source: _Stated, how: Publish) -> _Stated:
    """The words of the person win over those of the card."""
    if how.license is None:
        return source
    given = _identifier(how.license)
    if given in source.ids:
        return _Stated((given,), source.name, source.link)
    return _Stated((given,), None, None)


def _as_the_hub_knows(stated: _Stated) -> tuple[tuple[str, ...], str | None]:
    """Identifiers and name for a card; the Hub takes what it does not know as `other` with a name."""
    unknown = [id for id in stated.ids if id not in known_licences()]
    ids = tuple(dict.fromkeys("other" if id in unknown else id for id in stated.ids))
    return ids, stated.name or (unknown[0] if unknown else None)


def _warnings(origin: Origin, how: Publish, source: _Stated, chosen: _Stated) -> Iterator[str]:
    unread = origin.card.get(UNREADABLE)
    if unread is not None:
        told = "the licence is left out" if not chosen.ids else f"the licence is written as {chosen.quoted}"
        yield f"{told}: the card of {origin.id} cannot be read ({unread})"
    elif not chosen.ids:
        beside = "a LICENSE file is passed on, and says nothing here"
        yield f"the licence is left out: it is not stated by the source ({origin.id}); {beside}"
    for key, fault in origin.card.get(FAULTS, {}).items():
        yield f"the card of {origin.id}: {key} {fault}"
    if how.license is not None and source.ids and not set(chosen.ids) & set(source.ids):
        yield f"publish.license is `{how.license}`, but the card of {origin.id} says {source.quoted}"
    for id in chosen.ids:
        if id not in known_licences():
            yield f"the Hub knows no licence `{id}`: it is written as `other`, with a name"
    if "other" in chosen.ids and chosen.name is None:
        yield "the licence is `other` and the source gives it no name"
    if origin.on_hub and how.base_model not in (None, origin.id):
        yield f"publish.base_model is {how.base_model}, but the source is {origin.id}, which is written"
    if not origin.on_hub and how.base_model is None and chosen.ids:
        named = "so no base model is named; give --base-model (publish.base_model)"
        yield f"the source ({origin.id}) is a folder, {named}"


def _unread(origin: Origin, how: Publish) -> Iterator[str]:
    """A card that may state anything, until somebody reads it."""
    why = origin.card.get(UNREADABLE)
    if why is not None and how.license is None and not how.license_confirmed:
        yield (
            f"the card of {origin.id} cannot be read ({why}), so its licence is not known: read it, and give "
            "--license ID (publish.license), or --license-confirmed (publish.license_confirmed: true)"
        )


def _unconfirmed(source: _Stated, chosen: _Stated, how: Publish) -> Iterator[str]:
    """Licences that a person must have read, those of the source also where another one was given."""
    if how.license_confirmed:
        return
    for stated in dict.fromkeys((source, chosen)):
        reasons = [reason for term in stated.terms if (reason := restriction(term)) is not None]
        # of several licences one may choose
        if reasons and len(reasons) == len(stated.ids):
            yield (
                f"the licence {stated.quoted} {reasons[0]}: read it, and if a quantized copy may be "
                "published, say so with --license-confirmed (publish.license_confirmed: true)"
            )


def _unknown_source(origin: Origin, how: Publish, chosen: _Stated) -> Iterator[str]:
    """A folder that does not say where it comes from is only for oneself."""
    if origin.on_hub or origin.card.keys() - {UNREADABLE, FAULTS}:
        return
    missing = [
        *(["--base-model ID (publish.base_model)"] if how.base_model is None else []),
        *([] if chosen.ids else ["--license ID (publish.license)"]),
    ]
    if missing:
        yield (
            f"the source ({origin.id}) is a folder without a model card: give {' and '.join(missing)}, "
            "or make the repository private (--visibility private)"
        )


def _reminders(chosen: _Stated, how: Publish) -> Iterator[str]:
    for id, term in zip(chosen.ids, chosen.terms, strict=True):
        asked = [*duties(term)]
        prefix = name_prefix(term)
        if prefix is not None and not _begins(how.repo.partition("/")[2], prefix):
            asked.append(f'let the name of the model begin with "{prefix}"')
        for duty in asked:
            yield f"{id if term == id else chosen.name}: {duty}"


def _begins(name: str, prefix: str) -> bool:
    return _SPACE.sub("", name).lower().startswith(_SPACE.sub("", prefix).lower())


def _plain(name: str) -> str:
    """``Llama 3.1`` as ``llama3.1``: how an identifier of the Hub is written."""
    text = name.strip().lower()
    return joined if (joined := _SPACE.sub("", text)) in known_licences() else text


def _identifier(text: str) -> str:
    """As it is written, in small letters where the Hub knows it so."""
    return small if (small := text.strip().lower()) in known_licences() else text.strip()
