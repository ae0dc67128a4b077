"""Discussions and pull requests."""

from __future__ import annotations

from typing import Any

from tests.hubserver.access import logged_in, visible, writable
from tests.hubserver.state import PullRequest, Repo, State, now
from tests.hubserver.wire import Answer, Request, refusal, route, to_json

_PAGE = 10


def create(state: State, request: Request) -> Answer:
    """Pull requests that are made before their commits begin as drafts."""
    repo, asked = writable(state, request, proposing=True), request.json()
    author = logged_in(state, request).name
    if asked.get("pullRequest"):
        made = repo.open_pull_request(asked["title"], asked["description"], author, status="draft")
    else:
        made = PullRequest(
            len(repo.pull_requests) + 1,
            asked["title"],
            asked["description"],
            author,
            pull_request=False,
            date=now(),
        )
        repo.pull_requests.append(made)
    url = f"{request.origin}/{repo.id}/discussions/{made.num}"
    return to_json({"num": made.num, "url": url, "pullRequest": made.pull_request})


def listing(state: State, request: Request) -> Answer:
    """Newest first; drafts count as open."""
    repo, query = visible(state, request), request.query
    found = [_told(repo, made) for made in reversed(repo.pull_requests)]
    if query.get("type") in ("pull_request", "discussion"):
        found = [item for item in found if item["isPullRequest"] == (query["type"] == "pull_request")]
    if query.get("status") in ("open", "closed"):
        wanted = ("open", "draft") if query["status"] == "open" else ("closed", "merged")
        found = [item for item in found if item["status"] in wanted]
    if "author" in query:
        found = [item for item in found if item["author"]["name"] == query["author"]]
    start = int(query.get("p", "0")) * _PAGE
    return to_json({"discussions": found[start : start + _PAGE], "count": len(found), "start": start})


def details(state: State, request: Request) -> Answer:
    repo = visible(state, request)
    made = _numbered(repo, request)
    told = _told(repo, made) | {"events": [_event(made)], "diff": ""}
    if made.pull_request:
        told |= {"filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}
    return to_json(told)


def change(state: State, request: Request) -> Answer:
    """Open, close or merge."""
    repo = writable(state, request)
    made = _numbered(repo, request)
    if request.params["change"] == "merge":
        made.status, repo.refs["refs/heads/main"] = "merged", repo.refs[made.ref]
    else:
        made.status = request.json()["status"]
    event = _event(made) | {"type": "status-change", "data": {"status": made.status}}
    return to_json({"newStatus": event})


def _numbered(repo: Repo, request: Request) -> PullRequest:
    number = int(request.params["num"])
    if not 0 < number <= len(repo.pull_requests):
        raise refusal(404, f"There is no discussion {number}")
    return repo.pull_requests[number - 1]


def _told(repo: Repo, made: PullRequest) -> dict[str, Any]:
    return {
        "num": made.num,
        "title": made.title,
        "status": made.status,
        "isPullRequest": made.pull_request,
        "createdAt": made.date,
        "author": {"name": made.author},
        "repo": {"name": repo.id, "type": repo.kind},
    }


def _event(made: PullRequest) -> dict[str, Any]:
    """The description, which is the first comment."""
    text = {"latest": {"raw": made.description, "html": made.description, "updatedAt": made.date}}
    return {
        "id": f"event-{made.num}",
        "type": "comment",
        "createdAt": made.date,
        "author": {"name": made.author},
        "data": {"edited": False, "hidden": False, "history": [text["latest"]], **text},
    }


ROUTES = (
    route("POST", "{api}/discussions", create),
    route("GET", "{api}/discussions", listing),
    route("GET", "{api}/discussions/(?P<num>[0-9]+)", details),
    route("POST", "{api}/discussions/(?P<num>[0-9]+)/(?P<change>merge|status)", change),
)
