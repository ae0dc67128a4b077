"""What a repository is and holds: info, listings, references, history, settings."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from tests.hubserver.access import commit_at, readable, visible, writable
from tests.hubserver.accounts import metadata
from tests.hubserver.state import Commit, Entry, State, pointer
from tests.hubserver.wire import Answer, Request, refusal, route, to_json


def info(state: State, request: Request) -> Answer:
    repo = visible(state, request)
    commit = commit_at(repo, request.params.get("revision") or "main")
    readme = commit.files.get("README.md")
    card = metadata(state.store.read(readme)) if readme is not None else {}
    told = {
        "_id": f"id-{repo.id}",
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": next(iter(repo.made.values())).date,
        "private": repo.private,
        "gated": "auto" if repo.gated is True else repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "siblings": [_sibling(entry, full=request.flag("blobs")) for entry in commit.files.values()],
    }
    for key in ("library_name", "pipeline_tag"):
        if isinstance(card.get(key), str):
            told[key] = card[key]
    told |= {"cardData": card} if card else {}
    if asked := parse_qs(urlsplit(request.target).query).get("expand"):
        told = {key: value for key, value in told.items() if key in ("_id", "id", *asked)}
    return to_json(told)


def _tags(card: dict[str, Any]) -> list[str]:
    """The card's own tags, and those that the Hub makes of other fields."""
    tags = _texts(card.get("tags"))
    for key in ("license", "base_model"):
        tags += [f"{key}:{value}" for value in _texts(card.get(key))]
    return tags


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _sibling(entry: Entry, *, full: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": entry.path}
    if full:
        told |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256 is not None:
            told["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return told


def _pointer_size(entry: Entry) -> int:
    return len(pointer(entry.key, entry.size))


def listed(entry: Entry) -> dict[str, Any]:
    """A file as a tree lists it."""
    told: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.sha256 is not None:
        told["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    if entry.xet is not None:
        told["xetHash"] = entry.xet
    return told


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def tree(state: State, request: Request) -> Answer:
    repo = visible(state, request)
    commit = commit_at(repo, request.params["revision"])
    folder = request.params["path"].strip("/")
    items = _tree(commit, folder, recursive=request.flag("recursive"))
    if folder and not items:
        raise refusal(404, f"{folder} does not exist on {request.params['revision']}", "EntryNotFound")
    return _paged(state, request, items)


def _tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    start = f"{folder}/" if folder else ""
    folders: dict[str, dict[str, Any]] = {}
    files = []
    for path, entry in sorted(commit.files.items()):
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            inner = start + "/".join(parts[:depth])
            folders[inner] = _directory(inner)
        if recursive or len(parts) == 1:
            files.append(listed(entry))
    return [*folders.values(), *files]


def _paged(state: State, request: Request, items: list[dict[str, Any]]) -> Answer:
    """A page of `items`; the next one is named in the header Link."""
    at = int(request.query.get("cursor", "0"))
    headers = {}
    if at + state.page < len(items):
        query = "&".join(f"{quote(k)}={quote(v)}" for k, v in request.query.items() if k != "cursor")
        address = f"{request.origin}{urlsplit(request.target).path}"
        headers["Link"] = f'<{address}?{query}&cursor={at + state.page}>; rel="next"'
    return to_json(items[at : at + state.page], headers=headers)


def paths_info(state: State, request: Request) -> Answer:
    """Some entries, files and folders; asked for as a form, by others in JSON."""
    repo = visible(state, request)
    commit = commit_at(repo, request.params["revision"])
    if "json" in request.headers.get("content-type", ""):
        paths = list(request.json()["paths"])
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    files = [listed(commit.files[path]) for path in paths if path in commit.files]
    folders = [
        _directory(path)
        for path in paths
        if path not in commit.files and any(name.startswith(f"{path}/") for name in commit.files)
    ]
    return to_json([*files, *folders])


def refs(state: State, request: Request) -> Answer:
    repo = visible(state, request)
    told: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
    groups = {"heads": "branches", "tags": "tags"}
    if request.flag("include_prs"):
        told["pullRequests"] = []
        groups["pr"] = "pullRequests"
    for ref, sha in repo.refs.items():
        _, group, name = ref.split("/", 2)
        if group in groups:
            told[groups[group]].append({"name": name, "ref": ref, "targetCommit": sha})
    return to_json(told)


def commits(state: State, request: Request) -> Answer:
    repo = visible(state, request)
    head = commit_at(repo, request.params["revision"])
    items = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author, "avatar": ""}],
        }
        for commit in repo.history(head.sha)
    ]
    return _paged(state, request, items)


def auth_check(state: State, request: Request) -> Answer:
    if request.params["write"]:
        writable(state, request)
    else:
        readable(state, request)
    return to_json({})


def settings(state: State, request: Request) -> Answer:
    repo, asked = writable(state, request), request.json()
    if "visibility" in asked:
        repo.private = asked["visibility"] == "private"
    if "gated" in asked:
        repo.gated = asked["gated"]
    return to_json({"private": repo.private, "gated": repo.gated})


def create_branch(state: State, request: Request) -> Answer:
    """From `startingPoint`, or main."""
    repo, ref = writable(state, request), f"refs/heads/{request.params['name']}"
    if request.params["name"].startswith("refs/"):
        raise refusal(400, f"Invalid reference for a branch: {request.params['name']}")
    if ref in repo.refs:
        raise refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit_at(repo, request.json().get("startingPoint") or "main").sha
    return Answer()


def delete_branch(state: State, request: Request) -> Answer:
    repo, name = writable(state, request), request.params["name"]
    if name == "main":
        raise refusal(403, "Cannot delete the default branch")
    if repo.refs.pop(f"refs/heads/{name}", None) is None:
        raise refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer()


def create_tag(state: State, request: Request) -> Answer:
    repo, ref = writable(state, request), f"refs/tags/{request.json()['tag']}"
    if ref in repo.refs:
        raise refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit_at(repo, request.params["name"]).sha
    return Answer()


def delete_tag(state: State, request: Request) -> Answer:
    repo, name = writable(state, request), request.params["name"]
    if repo.refs.pop(f"refs/tags/{name}", None) is None:
        raise refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer()


def xet_token(state: State, request: Request) -> Answer:
    """Where large files go and come from in Xet; 404 from a server that has none."""
    if request.params["right"] == "read":
        readable(state, request)
    else:
        writable(state, request, proposing=True)
    if state.store.xet is None:
        raise refusal(404, "Not Found")
    url, token, expires = state.store.xet.url, "xet_token", 4_000_000_000
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return to_json({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


ROUTES = (
    route("GET HEAD", "{api}", info),
    route("GET HEAD", "{api}/revision/(?P<revision>[^/]+)", info),
    route("GET", "{api}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", tree),
    route("POST", "{api}/paths-info/(?P<revision>[^/]+)", paths_info),
    route("GET", "{api}/refs", refs),
    route("GET", "{api}/commits/(?P<revision>[^/]+)", commits),
    route("GET", "{api}/auth-check(?P<write>/write)?", auth_check),
    route("PUT", "{api}/settings", settings),
    route("POST", "{api}/branch/(?P<name>[^/]+)", create_branch),
    route("DELETE", "{api}/branch/(?P<name>[^/]+)", delete_branch),
    route("POST", "{api}/tag/(?P<name>[^/]+)", create_tag),
    route("DELETE", "{api}/tag/(?P<name>[^/]+)", delete_tag),
    route("GET", "{api}/xet-(?P<right>read|write)-token/(?P<revision>[^/]+)", xet_token),
)
