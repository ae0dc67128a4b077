"""Large files on their way in: the LFS batch, a PUT or many, and the check afterwards.

Like the object store behind the Hub, nothing but the check looks at what was sent.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tests.hubserver.access import writable
from tests.hubserver.state import State
from tests.hubserver.wire import Answer, Request, refusal, route, to_json

_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def batch(state: State, request: Request) -> Answer:
    """Where each file goes; no actions for those that are there."""
    writable(state, request, proposing=True)
    asked = request.json()
    transfer = "basic"
    if state.multipart is not None and "multipart" in asked.get("transfers", ()):
        transfer = "multipart"
    told = [_where(state, request, file, transfer) for file in asked["objects"]]
    return to_json({"transfer": transfer, "objects": told}, headers=_JSON)


def _where(state: State, request: Request, file: dict[str, Any], transfer: str) -> dict[str, Any]:
    oid, size = file["oid"], file["size"]
    told: dict[str, Any] = {"oid": oid, "size": size}
    if oid in state.store.blobs:
        return told
    address, part = f"{request.origin}/lfs/{oid}", state.multipart
    upload: dict[str, Any] = {"href": address}
    if transfer == "multipart" and part is not None and size > part:
        numbers = range(1, -(-size // part) + 1)
        header = {"chunk_size": str(part)} | {f"{i:05d}": f"{address}/part/{i}" for i in numbers}
        upload = {"href": f"{address}/complete", "header": header}
    actions = {"upload": upload} | ({"verify": {"href": f"{address}/verify"}} if state.verify else {})
    return told | {"authenticated": True, "actions": actions}


def put(state: State, request: Request) -> Answer:
    state.store.blobs[request.params["oid"]] = request.body
    return Answer(headers=_tag(request.body))


def put_part(state: State, request: Request) -> Answer:
    parts = state.store.parts.setdefault(request.params["oid"], {})
    parts[int(request.params["number"])] = request.body
    return Answer(headers=_tag(request.body))


def complete(state: State, request: Request) -> Answer:
    """Put the parts together; each must be the one that was sent."""
    asked, parts = request.json(), state.store.parts.get(request.params["oid"], {})
    for part in asked["parts"]:
        number = part["partNumber"]
        if number not in parts or part["etag"].strip('"') != _tag(parts[number])["ETag"].strip('"'):
            raise refusal(400, f"InvalidPart: {number}")
    content = b"".join(parts[part["partNumber"]] for part in asked["parts"])
    state.store.blobs[request.params["oid"]] = content
    return to_json({})


def verify(state: State, request: Request) -> Answer:
    """Size and sha256 of what came in; what is wrong is thrown away."""
    oid = request.params["oid"]
    content = state.store.blobs.get(oid)
    if content is None:
        raise refusal(404, f"Object not found: {oid}")
    if len(content) != request.json()["size"] or hashlib.sha256(content).hexdigest() != oid:
        del state.store.blobs[oid]
        raise refusal(422, "LFS object does not match its sha256")
    return to_json({})


def _tag(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}


_OBJECT = "/lfs/(?P<oid>[0-9a-f]{64})"
ROUTES = (
    route("POST", r"/(?:(?P<kind>datasets|spaces)/)?{id}\.git/info/lfs/objects/batch", batch),
    route("PUT", _OBJECT, put),
    route("PUT", rf"{_OBJECT}/part/(?P<number>[0-9]+)", put_part),
    route("POST", rf"{_OBJECT}/complete", complete),
    route("POST", rf"{_OBJECT}/verify", verify),
)
