"""What the server remembers: users, repositories, their commits, and the bytes of their files."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from tests.hubserver.xet import XetStore

Kind = Literal["model", "dataset", "space"]

REGULAR_LIMIT = 10_000_000
_LARGE = re.compile(r".*\.(safetensors|gguf|bin|pt|onnx|npz|parquet|zip|png|imatrix)", re.IGNORECASE)
_ATTRIBUTES = b"".join(
    b"*.%s filter=lfs diff=lfs merge=lfs -text\n" % kind
    for kind in (b"safetensors", b"bin", b"pt", b"onnx", b"npz", b"parquet", b"zip")
)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file as a large one (LFS): by its name, its size, or a NUL byte in its
    first bytes."""
    return size > 0 and (size > REGULAR_LIMIT or b"\0" in sample or _LARGE.fullmatch(path) is not None)


@dataclass(frozen=True, slots=True)
class User:
    """Who a token belongs to; `orgs` maps organizations to the role there, `role` is the token's own."""

    name: str
    orgs: Mapping[str, str] = field(default_factory=dict)
    role: str = "write"

    def may_read(self, namespace: str) -> bool:
        """Whether private repositories of `namespace` are visible."""
        return namespace == self.name or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        """Whether repositories of `namespace` may be made and changed."""
        member = namespace == self.name or self.orgs.get(namespace) in ("write", "admin")
        return self.role != "read" and member


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit. `oid` is git's hash of what git stores: the content, or for a large file the
    pointer; `sha256` is that of a large file's content, None for a regular file."""

    path: str
    size: int
    oid: str
    sha256: str | None = None
    xet: str | None = None

    @property
    def key(self) -> str:
        """Where the store keeps the content."""
        return self.sha256 or self.oid


@dataclass(frozen=True, slots=True)
class Commit:
    """A state of all files, and who made it out of which other state."""

    sha: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, Entry]
    author: str
    date: str


@dataclass(slots=True)
class PullRequest:
    """A pull request or (`pull_request` False) a discussion; its files are the commit of `ref`."""

    num: int
    title: str
    description: str
    author: str
    status: str = "open"
    pull_request: bool = True
    date: str = ""

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Store:
    """The bytes of all files by hash: sha256 for large files, git's for regular ones.

    Nothing is checked on the way in, so a store whose bytes are not what their name says is possible.
    """

    def __init__(self, xet: XetStore | None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet = xet

    def regular(self, path: str, content: bytes) -> Entry:
        """Keep a regular file."""
        oid = git_hash(content)
        self.blobs[oid] = content
        return Entry(path, len(content), oid)

    def large(self, path: str, content: bytes) -> Entry:
        """Keep a large file."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return self.pointer(path, sha256, len(content))

    def pointer(self, path: str, sha256: str, size: int) -> Entry:
        """A file whose content is (or is not) in the store already."""
        xet = self.xet.hash_of(sha256) if self.xet is not None else None
        return Entry(path, size, git_hash(pointer(sha256, size)), sha256, xet)

    def holds(self, sha256: str) -> bool:
        return sha256 in self.blobs or (self.xet is not None and self.xet.hash_of(sha256) is not None)

    def size(self, sha256: str) -> int:
        """Bytes of a large file that is there."""
        if sha256 in self.blobs or self.xet is None:
            return len(self.blobs[sha256])
        return self.xet.size_of(sha256)

    def read(self, entry: Entry) -> bytes:
        """The content as it would be downloaded now."""
        if entry.key in self.blobs or self.xet is None or entry.xet is None:
            return self.blobs[entry.key]
        return self.xet.read(entry.xet, entry.size)

    def corrupt(self, entry: Entry) -> None:
        """Flip every bit of the byte in the middle of a stored file."""
        if entry.key in self.blobs:
            self.blobs[entry.key] = flip(self.blobs[entry.key], entry.size // 2)
        if self.xet is not None and entry.xet is not None:
            self.xet.corrupt(entry.xet)


@dataclass
class Repo:
    """A repository; `refs` maps full names such as refs/heads/main to commits."""

    kind: Kind
    id: str
    store: Store
    private: bool = False
    gated: bool | str = False
    refs: dict[str, str] = field(default_factory=dict)
    made: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)
    admitted: set[str] = field(default_factory=set)
    """Users who were let into a gated repository."""

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def commits(self) -> list[Commit]:
        """All commits of all branches, newest first."""
        return list(reversed(self.made.values()))

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        found, sha = [], self.resolve(revision)
        while sha is not None:
            found.append(self.made[sha])
            sha = self.made[sha].parent
        return found

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, full reference or (start of a) hash names."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        known = [sha for sha in self.made if len(revision) >= 7 and sha.startswith(revision)]
        return known[0] if len(known) == 1 else None

    def files(self, revision: str = "main") -> dict[str, Entry]:
        """All files at `revision`; KeyError when there is no such revision."""
        sha = self.resolve(revision)
        if sha is None:
            raise KeyError(f"{self.id} has no revision {revision!r}, but {sorted(self.refs)}")
        return dict(self.made[sha].files)

    def read(self, path: str, revision: str = "main") -> bytes:
        """The bytes of a file as a download would give them."""
        return self.store.read(self.files(revision)[path])

    def commit(
        self, ref: str, title: str, files: Mapping[str, Entry], *, description: str = "", author: str
    ) -> Commit:
        """Make a commit the new head of `ref`. Its hash is the same in every run."""
        parent = self.refs.get(ref)
        told = (self.id, len(self.made), parent, title, sorted((e.path, e.oid) for e in files.values()))
        sha = hashlib.sha1(repr(told).encode()).hexdigest()
        made = Commit(sha, parent, title, description, dict(files), author, now())
        self.made[sha], self.refs[ref] = made, sha
        return made

    def open_pull_request(self, title: str, description: str, author: str, *, status: str) -> PullRequest:
        """A pull request that has the files of main so far."""
        request = PullRequest(len(self.pull_requests) + 1, title, description, author, status, date=now())
        self.pull_requests.append(request)
        self.refs[request.ref] = self.refs["refs/heads/main"]
        return request


class State:
    """All that requests read and change; `lock` is held while one is answered."""

    def __init__(self, xet: XetStore | None, *, multipart: int | None, verify: bool, page: int) -> None:
        self.store = Store(xet)
        self.multipart, self.verify, self.page = multipart, verify, page
        self.lock = threading.RLock()
        self.cdn = ""
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.moved: dict[tuple[Kind, str], str] = {}
        self.tokens: dict[str, User] = {
            "hf_alicealicealice": User("alice", {"acme": "write"}),
            "hf_bobbobbobbob": User("bob"),
            "hf_readonlyreadonly": User("alice", {"acme": "write"}, role="read"),
        }

    def create(self, kind: Kind, id: str, author: str) -> Repo:
        """A new repository as the Hub makes them: one commit with a .gitattributes."""
        repo = Repo(kind, id, self.store)
        attributes = {".gitattributes": self.store.regular(".gitattributes", _ATTRIBUTES)}
        repo.commit("refs/heads/main", "initial commit", attributes, author=author)
        self.repos[kind, id] = repo
        self.moved.pop((kind, id), None)
        return repo

    def rename(self, kind: Kind, old: str, new: str) -> None:
        """Another name for a repository; requests to the old one are told where it is."""
        repo = self.repos.pop((kind, old))
        repo.id = new
        self.repos[kind, new] = repo
        self.moved.pop((kind, new), None)
        self.moved[kind, old] = new

    def find(self, kind: Kind, id: str) -> Repo | None:
        """A repository by its name or one that it had."""
        while (kind, id) not in self.repos and (kind, id) in self.moved:
            id = self.moved[kind, id]
        return self.repos.get((kind, id))


def git_hash(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git stores instead of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def flip(content: bytes, at: int) -> bytes:
    """`content` with every bit of one byte flipped: byte `at`, or the last one if there are fewer."""
    if not content:
        return content
    at = min(at, len(content) - 1)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
