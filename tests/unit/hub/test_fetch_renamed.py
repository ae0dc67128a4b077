"""A repository that gets another name while it is fetched: whatever is left is fetched from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.hub.fetch import headers
from tests.downloads import fetched, head
from tests.elsewhere import before
from tests.hubserver import HubServer

pytestmark = pytest.mark.usefixtures("sleeps")


@pytest.mark.parametrize("only_headers", [False, True], ids=["weights", "headers"])
def test_renamed_before_each_request(repo: Path, tmp_path: Path, only_headers: bool) -> None:
    number, happened = 0, True
    while happened:
        with HubServer() as hub:
            hub.add("org/tiny", repo)
            commit, cache = head(hub), tmp_path / f"{number}"
            before(hub, number, lambda hub=hub: hub.rename("org/tiny", "other/big"))  # type: ignore[misc]
            if only_headers:
                found = headers("org/tiny", cache_dir=cache, endpoint=hub.url)
            else:
                found = fetched("org/tiny", hub, cache)
                for path in sorted(found.path.glob("*.safetensors")):
                    assert path.read_bytes() == (repo / path.name).read_bytes()
            # the name that was asked for, which still leads there; the commit is what counts
            assert (found.id, found.revision) == ("org/tiny", commit)
            happened = not hub.has("org/tiny")
            number += 3 if only_headers else 2
    assert number > 10
