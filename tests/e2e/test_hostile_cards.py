"""Cards of sources that anybody may have written, from `convert` to what is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from quantkit.gguf.container import open_file
from quantkit.hub.card.validation import problems
from tests.gguf_files import byte_tokenizer
from tests.hubplace import LICENSE, Ran, Workplace
from tests.hubserver import HubServer
from tests.hubserver.client import SENDS_FILES
from tests.models import save_tiny

pytestmark = SENDS_FILES
# one block, as wide as a group
TINY = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 448, "num_hidden_layers": 1}
REPO = "alice/tiny-GGUF"
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
PADDING = "# x\n" * (1 << 19)
UNREADABLE = {
    "bomb": (f"---\nlicense: cc-by-nc-nd-4.0\n{BOMB}\n---\n", "line 9: its aliases stand for too much"),
    "merged": ("---\nx: &x {license: cc-by-nc-nd-4.0}\n<<: *x\n---\n", "line 3: it merges the keys"),
    "large": (f"---\nlicense: cc-by-nc-nd-4.0\n{PADDING}---\n", "larger than 1,048,576 bytes"),
    "open": ("---\nlicense: cc-by-nc-nd-4.0\n# A model\n", "line 1: no second line of --- ends it"),
    "tab": ("---\nlicense: cc-by-nc-nd-4.0\nx:\n\t- y\n---\n", "line 4: "),
    "control": ("---\nlicense: cc-by-nc-nd-4.0\nx: \x1b[31m\n---\n", "line 3: it holds control characters"),
    "types": (
        "---\nlicense: {a: [b]}\ntags: [{a: b}]\ndatasets: {a: [b]}\n---\n",
        "`license` is no plain text",
    ),
    "twice": ("---\nlicense: cc-by-nc-nd-4.0\nlicense: mit\n---\n", "`license` is left out: it is"),
}
RESTRICTED = {
    "aliases": "---\nlicense: cc-by-nc-nd-4.0\ntags: &t\n- chat\ndatasets: *t\n---\n",
    "keys": "---\nlicense: cc-by-nc-nd-4.0\n[a, b]: 3\n2024-01-01: 4\n---\n",
    "escapes": '---\nlicense: cc-by-nc-nd-4.0\ntags: ["c\\0d"]\n---\n',
    "windows": "\ufeff---\r\nlicense: cc-by-nc-nd-4.0\r\n---\r\n# A model\r\n",
    "indented": "\n\n  ---\nlicense: cc-by-nc-nd-4.0\n---\n",
}
MARKUP = """---
license: other
license_name: "<img src=x>"
license_link: "https://example.org/a b)<script>"
pipeline_tag: <script>
language: ["<b>", en]
datasets: [x y, a/b/c, org/texts]
tags: [[x], {y: z}, "a\\x1bb", 2024-01-01, ok]
date: 2024-01-01
x: .nan
---
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **TINY))
    (folder / "chat_template.jinja").unlink()  # to render it takes a process each time
    (folder / "LICENSE").write_bytes(LICENSE)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def place(tmp_path: Path, source: dict[str, bytes]) -> Iterator[Workplace]:
    with HubServer() as hub:
        hub.add("org/tiny", source)
        yield Workplace(hub, tmp_path / "place")


def made(place: Workplace, card: str) -> None:
    """`out`, made from a source with this card."""
    place.hub.add("org/tiny", {"README.md": card.encode()})
    done = place.call("convert", "org/tiny", "--to", "gguf:q8_0", "-o", "out", "--no-eval", "--no-engine")
    assert done.code == 0 and "Traceback" not in done.err, done.err


def push(place: Workplace, *flags: str) -> Ran:
    done = place.call("push", "out", "--repo", REPO, "--visibility", "public", "--no-engine", *flags)
    assert "Traceback" not in done.err
    return done


def general(place: Workplace) -> dict[str, object]:
    """What the GGUF file says of licence, tags and origin."""
    (path,) = (place.folder / "out" / "gguf-q8_0").glob("*.gguf")
    return {key: value for key, value in open_file(path).metadata.items() if key.startswith("general.")}


def refused(place: Workplace, card: str) -> str:
    """What stops a conversion that is to be published to all, before the work."""
    place.hub.add("org/tiny", {"README.md": card.encode()})
    done = place.call(
        "convert", "org/tiny", "--to", "gguf:q8_0", "-o", "out", "--no-eval", "--no-engine",
        "--push", "--repo", REPO, "--set", "publish.visibility=public",
    )  # fmt: skip
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert not (place.folder / "out").exists() and not place.hub.has(REPO)
    return done.err


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_card_that_cannot_be_read_may_forbid_everything(place: Workplace, kind: str) -> None:
    card, why = UNREADABLE[kind]
    said = refused(place, card)
    assert "the card of org/tiny cannot be read (" in said and why in said
    assert "--license ID" in said and "--license-confirmed" in said


@pytest.mark.parametrize("kind", RESTRICTED)
def test_what_is_odd_does_not_hide_a_licence(place: Workplace, kind: str) -> None:
    said = refused(place, RESTRICTED[kind])
    assert "the licence `cc-by-nc-nd-4.0` forbids to share derivatives" in said


def test_a_person_may_have_read_it(place: Workplace) -> None:
    made(place, UNREADABLE["bomb"][0])
    assert "general.license" not in general(place)
    done = push(place)
    assert done.code == 2 and not place.hub.has(REPO)
    assert "the card of org/tiny cannot be read (" in done.err and "not stated" not in done.err
    confirmed = push(place, "--license-confirmed")
    assert confirmed.code == 0 and not place.hub.repo(REPO).private, confirmed.err
    text = place.hub.repo(REPO).read("README.md").decode()
    assert "Licence: not known, for the card of the source cannot be read." in text
    assert "not stated" not in text and "license" not in front(text) and problems(text) == []


def front(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_what_an_older_version_could_not_read_is_read_again(place: Workplace) -> None:
    """It wrote down that the card says nothing."""
    made(place, RESTRICTED["keys"])
    assert general(place)["general.license"] == "cc-by-nc-nd-4.0"
    path = place.folder / "out" / "gguf-q8_0" / "quantkit.json"
    told = json.loads(path.read_text())
    assert told["source"]["card"]["license"] == "cc-by-nc-nd-4.0"
    path.write_text(json.dumps({**told, "source": {**told["source"], "card": {}}}))
    assert "forbids to share derivatives" in push(place).err and not place.hub.has(REPO)


def test_markup_does_not_get_through(place: Workplace) -> None:
    made(place, MARKUP)
    done = push(place, "--license-confirmed")
    assert done.code == 0, done.err
    for key in ("pipeline_tag", "language", "datasets", "tags", "license_link"):
        assert f"the card of org/tiny: {key} is" in done.err
    text = place.hub.repo(REPO).read("README.md").decode()
    assert problems(text) == []
    found = front(text)
    assert found["pipeline_tag"] == "text-generation" and found["language"] == ["en"]
    assert found["datasets"] == ["org/texts"] and found["tags"] == ["quantkit", "gguf", "2024-01-01", "ok"]
    assert found["license_link"] == "https://example.org/a%20b)%3Cscript%3E"
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body and "<img" not in body
    in_file = general(place)
    assert in_file["general.tags"] == ("2024-01-01", "ok") and in_file["general.languages"] == ("en",)
    assert in_file["general.base_model.0.repo_url"] == "https://huggingface.co/org/tiny"
