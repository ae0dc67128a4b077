"""What a commit needs before, and the commit itself."""

from __future__ import annotations

import base64
import fnmatch
import json
from typing import Any

from tests.hubserver.access import commit_at, logged_in, writable
from tests.hubserver.state import Entry, Repo, State, Store, is_large
from tests.hubserver.wire import Answer, Request, refusal, route, to_json


def preupload(state: State, request: Request) -> Answer:
    """Which files are large, which are to be left out, and what is there now under their names."""
    repo = writable(state, request, proposing=request.flag("create_pr"))
    commit = commit_at(repo, request.params["revision"])
    asked = request.json()
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
    told = [_judged(file, commit.files.get(file["path"]), ignored) for file in asked["files"]]
    return to_json({"commitOid": commit.sha, "files": told})


def _judged(file: dict[str, Any], stored: Entry | None, ignored: list[str]) -> dict[str, Any]:
    path = file["path"]
    large = is_large(path, file["size"], base64.b64decode(file["sample"]))
    told = {
        "path": path,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
    }
    return told | ({"oid": stored.key} if stored is not None else {})


def commit(state: State, request: Request) -> Answer:
    """A list of changes, one JSON object per line, the header first."""
    create_pr = request.flag("create_pr")
    repo = writable(state, request, proposing=create_pr)
    author = logged_in(state, request).name
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    ref = _reference(repo, request.params["revision"])
    head = repo.made[repo.refs[ref]]
    parent = header.get("parentCommit")
    if parent and not head.sha.startswith(parent):
        raise refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(state.store, files, line["key"], line["value"])
    title, description = header["summary"], header.get("description", "")
    told: dict[str, Any] = {"success": True, "hookOutput": ""}
    if create_pr:
        made = repo.open_pull_request(title, description, author, status="open")
        ref = made.ref
        told["pullRequestUrl"] = f"{request.origin}/{_prefix(repo)}{repo.id}/discussions/{made.num}"
    done = repo.commit(ref, title, files, description=description, author=author)
    told |= {"commitOid": done.sha}
    told |= {"commitUrl": f"{request.origin}/{_prefix(repo)}{repo.id}/commit/{done.sha}"}
    return to_json(told)


def _prefix(repo: Repo) -> str:
    return "" if repo.kind == "model" else f"{repo.kind}s/"


def _reference(repo: Repo, revision: str) -> str:
    """What a commit goes on top of: a branch or a pull request, never a tag or a bare commit."""
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if ref not in repo.refs:
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return ref


def _apply(store: Store, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    """One change."""
    path = value["path"]
    match key:
        case "file":
            files[path] = store.regular(path, base64.b64decode(value["content"]))
        case "lfsFile":
            if not store.holds(value["oid"]):
                message = f"LFS pointer pointed to a file that does not exist: {path} {value['oid']}"
                raise refusal(400, message)
            size = value["size"] if "size" in value else store.size(value["oid"])
            files[path] = store.pointer(path, value["oid"], size)
        case "deletedFile":
            if files.pop(path, None) is None:
                raise refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        case "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        case _:
            raise refusal(400, f"Unknown change {key}")


ROUTES = (
    route("POST", "{api}/preupload/(?P<revision>[^/]+)", preupload),
    route("POST", "{api}/commit/(?P<revision>[^/]+)", commit),
)
