"""Files on their way out: `resolve` on the API's origin, large contents on the CDN's."""

from __future__ import annotations

import re
from urllib.parse import quote

from tests.hubserver.access import commit_at, kind_of, readable
from tests.hubserver.state import Entry, State
from tests.hubserver.wire import Answer, Refused, Request, refusal, route

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_BINARY = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}


def resolve(state: State, request: Request) -> Answer:
    """A regular file itself; of a large one where it is and what it must be."""
    repo = readable(state, request)
    commit = commit_at(repo, request.params["revision"])
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.files.get(request.params["path"])
    if entry is None:
        raise refusal(404, "Entry not found", "EntryNotFound", headers)
    if entry.sha256 is None:
        return _content(state, request, entry, headers | {"ETag": f'"{entry.oid}"'})
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    kind = kind_of(request)
    if entry.xet is not None:
        token = f"{request.origin}/api/{kind}s/{repo.id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
    # The address names the file so that faults can; the client does not care.
    headers["Location"] = f"{state.cdn}/cdn/{kind}s/{repo.id}/{commit.sha}/{quote(entry.path)}"
    return Answer(302, headers=headers)


def deliver(state: State, request: Request) -> Answer:
    """The content of a large file, to whoever has its address."""
    repo = state.find(kind_of(request), request.params["id"])
    if repo is None:
        raise refusal(403, "AccessDenied")
    entry = commit_at(repo, request.params["revision"]).files[request.params["path"]]
    return _content(state, request, entry, {"ETag": f'"{entry.key}"'})


def _content(state: State, request: Request, entry: Entry, headers: dict[str, str]) -> Answer:
    """All of a file, or the range that was asked for."""
    content, headers = state.store.read(entry), {**_BINARY, **headers}
    if "range" not in request.headers:
        return Answer(200, content, headers)
    found = _RANGE.fullmatch(request.headers["range"])
    if found is None or not (found[1] or found[2]):
        raise refusal(400, f"Cannot read the range {request.headers['range']}")
    first = int(found[1]) if found[1] else max(0, len(content) - int(found[2]))
    last = min(int(found[2]), len(content) - 1) if found[1] and found[2] else len(content) - 1
    if first >= len(content):
        raise Refused(Answer(416, headers={"Content-Range": f"bytes */{len(content)}"}))
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], headers)


_KIND = "(?:(?P<kind>datasets|spaces)/)?"
ROUTES = (
    route("GET HEAD", rf"/{_KIND}{{id}}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    route(
        "GET HEAD",
        r"/cdn/(?P<kind>models|datasets|spaces)/{id}/(?P<revision>[0-9a-f]+)/(?P<path>.+)",
        deliver,
    ),
)
