"""A server on 127.0.0.1 that speaks the Hub's protocol, reads and writes, with faults on request.

    with HubServer() as hub:
        hub.add("alice/tiny", {"config.json": b"{}"})
        hub.faults.append(Fault("GET /cdn/.*model", "drop_mid", after=1000))
        HfApi(endpoint=hub.url, token="hf_alicealicealice").model_info("alice/tiny")

It needs nothing but the standard library (and PyYAML for the front matter of cards). A flaw of the
server itself is answered with 500 and raised again when the context ends.
"""

from __future__ import annotations

from tests.hubserver.faults import Fault
from tests.hubserver.server import HubServer
from tests.hubserver.state import Commit, Entry, PullRequest, Repo, User
from tests.hubserver.wire import Request

__all__ = ["Commit", "Entry", "Fault", "HubServer", "PullRequest", "Repo", "Request", "User"]
