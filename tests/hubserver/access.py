"""Who may see and change what."""

from __future__ import annotations

from tests.hubserver.state import Commit, Kind, Repo, State, User
from tests.hubserver.wire import Answer, Refused, Request, refusal

NO_LOGIN = "Invalid username or password."
NO_TOKEN = "Invalid credentials in Authorization header"


def user_of(state: State, request: Request) -> User | None:
    """Who asks. A token that nobody has (any more) is refused, whatever is asked for."""
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    if sent and sent not in state.tokens:
        raise refusal(401, NO_TOKEN)
    return state.tokens[sent] if sent else None


def logged_in(state: State, request: Request) -> User:
    user = user_of(state, request)
    if user is None:
        raise refusal(401, NO_LOGIN)
    return user


def kind_of(request: Request) -> Kind:
    """Models are not named in the addresses of files."""
    match request.params.get("kind"):
        case "datasets":
            return "dataset"
        case "spaces":
            return "space"
    return "model"


def visible(state: State, request: Request) -> Repo:
    """The repository, if who asks may know of it: its files' names, not their content.

    A name that it had answers with a redirect to the one that it has, whatever is asked for.
    """
    user, id = user_of(state, request), request.params["id"]
    repo = state.find(kind_of(request), id)
    if repo is None or (repo.private and not (user and user.may_read(repo.namespace))):
        raise refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
    if repo.id != id:
        raise Refused(Answer(307, headers={"Location": request.target.replace(id, repo.id, 1)}))
    return repo


def readable(state: State, request: Request) -> Repo:
    """The repository, if who asks may read its files."""
    repo, user = visible(state, request), user_of(state, request)
    if not repo.gated:
        return repo
    if user is None:
        message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
        raise refusal(401, f"{message} Please log in.", "GatedRepo")
    if not user.may_read(repo.namespace) and user.name not in repo.admitted:
        message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
        raise refusal(403, f"{message} Ask for access at {request.origin}/{repo.id}", "GatedRepo")
    return repo


def writable(state: State, request: Request, *, proposing: bool = False) -> Repo:
    """The repository, if who asks may change it, or (`proposing`) propose a change."""
    repo, user = visible(state, request), user_of(state, request)
    if user is None:
        raise refusal(401, NO_LOGIN, "RepoNotFound")
    if not user.may_write(repo.namespace) and not (proposing and user.role != "read"):
        raise forbidden()
    return repo


def forbidden() -> Refused:
    return refusal(403, "Forbidden: you must use a write token to upload to a repository.")


def commit_at(repo: Repo, revision: str) -> Commit:
    """What a revision names."""
    sha = repo.resolve(revision)
    if sha is None:
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.made[sha]
