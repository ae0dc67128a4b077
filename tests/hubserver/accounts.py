"""Who am I; making, deleting and judging repositories."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import date
from typing import Any

import yaml

from tests.hubserver.access import logged_in
from tests.hubserver.state import Kind, State
from tests.hubserver.wire import Answer, Request, refusal, route, to_json

_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_MAX_BYTES, _MAX_VALUES = 1 << 20, 100_000
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_TEXT = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")


def whoami(state: State, request: Request) -> Answer:
    user = logged_in(state, request)
    orgs = [
        {"type": "org", "id": f"org-{name}", "name": name, "fullname": name.title(), "roleInOrg": role}
        for name, role in user.orgs.items()
    ]
    token = {"displayName": "test", "role": user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    told = {"type": "user", "id": f"user-{user.name}", "name": user.name, "fullname": user.name.title()}
    return to_json({**told, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


def create(state: State, request: Request) -> Answer:
    user, asked = logged_in(state, request), request.json()
    kind, id = _named(asked, user.name)
    url = f"{request.origin}/{'' if kind == 'model' else f'{kind}s/'}{id}"
    if not user.may_write(id.partition("/")[0]):
        message = (
            f'You don\'t have the rights to create a {kind} under the namespace "{id.partition("/")[0]}"'
        )
        raise refusal(403, message)
    if (kind, id) in state.repos:
        return to_json({"error": f"You already created this {kind} repo", "url": url}, 409)
    repo = state.create(kind, id, user.name)
    repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    return to_json({"url": url, "name": id, "id": f"repo-{len(state.repos)}"})


def delete(state: State, request: Request) -> Answer:
    user = logged_in(state, request)
    kind, id = _named(request.json(), user.name)
    if not user.may_write(id.partition("/")[0]):
        raise refusal(403, "Forbidden: you need write access to delete a repository.")
    if state.repos.pop((kind, id), None) is None:
        raise refusal(404, "Repository not found", "RepoNotFound")
    return Answer(200, b"OK", {"Content-Type": "text/plain"})


def validate(state: State, request: Request) -> Answer:
    """The check of a card's front matter: a few of the types that the Hub insists on."""
    found = _FRONT_MATTER.match(request.json()["content"])
    if found is None:
        return to_json({"errors": [], "warnings": [_told("empty or missing yaml metadata in repo card")]})
    errors = problems(found[1])
    answer = {"errors": [_told(error) for error in errors], "warnings": []}
    return to_json(answer, 400 if errors else 200)


def problems(front_matter: str) -> list[str]:
    """What is wrong with the metadata of a card."""
    try:
        data = _loaded(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: expected a mapping"] if data is not None else []
    found = [f'"{key}" must be a string' for key in _TEXT if not isinstance(data.get(key, ""), str)]
    for key in ("license", "base_model", "language"):
        if not _strings(data.get(key, [])) and not isinstance(data[key], str):
            found.append(f'"{key}" must be a string or an array of strings')
    for key in ("tags", "datasets", "metrics"):
        if not _strings(data.get(key, [])):
            found.append(f'"{key}" must be an array of strings')
    if not isinstance(data.get("model-index", []), list):
        found.append('"model-index" must be an array')
    return found


def metadata(readme: bytes) -> dict[str, Any]:
    """The front matter of a card, {} where there is none or it cannot be read."""
    found = _FRONT_MATTER.match(readme.decode("utf-8", "replace"))
    try:
        data = _loaded(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _loaded(front_matter: str) -> Any:
    """What JSON can say of it; ValueError for too much, whether it is written or aliases stand for it."""
    if len(front_matter) > _MAX_BYTES:
        raise ValueError("too large")
    return _json(yaml.load(front_matter, Loader=_LOADER), iter(range(_MAX_VALUES)))


def _json(value: Any, left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise ValueError("too many values")
    match value:
        case dict():
            return {str(key): _json(held, left) for key, held in value.items()}
        case list() | tuple() | set():
            return [_json(item, left) for item in value]
        case date():
            return value.isoformat()
        case bytes():
            return value.hex()
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _told(message: str) -> dict[str, str]:
    return {"message": message}


def _named(asked: dict[str, Any], user: str) -> tuple[Kind, str]:
    kind: Kind = asked.get("type") or "model"
    return kind, f"{asked.get('organization') or user}/{asked['name']}"


ROUTES = (
    route("GET", "/api/whoami-v2", whoami),
    route("POST", "/api/repos/create", create),
    route("DELETE", "/api/repos/delete", delete),
    route("POST", "/api/validate-yaml", validate),
)
