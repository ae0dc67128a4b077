"""What is looked at before anything is published: licences of sources, a person's card, whose repository."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from quantkit.errors import HubError, UsageError
from quantkit.hub.client import connect
from quantkit.hub.licences import Licence
from quantkit.hub.manifest import Origin
from quantkit.hub.push.publication import Publication, publications
from quantkit.hub.push.remote import RemoteState
from quantkit.progress import SILENT
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Eval, Publish, Recipe
from quantkit.run import publish as publishing
from quantkit.run.cards import Cards
from quantkit.run.plan import plan
from tests.cards import LICENCE
from tests.gguf_files import byte_tokenizer
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import ALICE, tame
from tests.models import save_tiny
from tests.targets import ORIGIN, gptq

HOW = Publish("alice/model", visibility="public")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    tame(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quantkit.hub.problems.time.sleep", lambda seconds: None)
    with HubServer() as server:
        yield server


def judged(source: Origin, api: HfApi, how: Publish = HOW) -> Licence:
    return publishing._licences([source], how, api)[source.fingerprint]


def without_a_card(hub: HubServer, **files: bytes) -> Origin:
    """A source in a sub-folder of a repository, or in a cache that another tool filled."""
    commit = hub.add("org/nested", {"sub/config.json": b"{}", **files})
    return dataclasses.replace(ORIGIN, id="org/nested", revision=commit, card={})


def test_what_did_not_verify_is_not_published(tmp_path: Path) -> None:
    for name in ("gptq-w4g128", "gptq-w8.partial"):
        gptq(tmp_path, name)
    assert [folder.name for folder, _ in publishing._targets([tmp_path], ())] == ["gptq-w4g128"]
    with pytest.raises(UsageError, match=r"gptq-w8\.partial` was not finished, or .* did not verify"):
        publishing._targets([tmp_path / "gptq-w8.partial"], ())
    with pytest.raises(UsageError, match="holds nothing that quantkit made"):
        publishing._targets([tmp_path / "absent"], ())


def test_the_card_of_a_repository_counts_for_its_folders(hub: HubServer) -> None:
    source = without_a_card(hub, **{"README.md": b"---\nlicense: cc-by-nd-4.0\n---\n"})
    found = judged(source, connect(hub.url, ALICE))
    assert found.id == "cc-by-nd-4.0"
    assert found.blockers and "forbids to share derivatives" in found.blockers[0]


def test_a_card_without_a_licence_does_not_hide_that_of_the_repository(hub: HubServer) -> None:
    source = without_a_card(hub, **{"README.md": b"---\nlicense: cc-by-nd-4.0\nlanguage: en\n---\n"})
    nested = dataclasses.replace(source, card={"tags": ["fp8"], "language": ["de"]})
    assert judged(nested, connect(hub.url, ALICE)).blockers
    asked = len(hub.log)
    assert judged(dataclasses.replace(source, card={"license": "mit"}), connect(hub.url, ALICE)).id == "mit"
    assert not any("README" in line for line in hub.log[asked:])


def test_a_repository_without_a_card_states_no_licence(hub: HubServer) -> None:
    found = judged(without_a_card(hub), connect(hub.url, ALICE))
    assert found.id is None and "not stated by the source" in found.warnings[0]


def test_a_licence_that_nobody_tells_is_not_none(hub: HubServer) -> None:
    source = without_a_card(hub, **{"README.md": b"---\nlicense: cc-by-nd-4.0\n---\n"})
    hub.faults.append(Fault(r"resolve|api/models", "status", times=1000))
    with pytest.raises(HubError, match="The licence of org/nested is not known"):
        judged(source, connect(hub.url, ALICE))
    given = judged(source, connect(hub.url, ALICE), dataclasses.replace(HOW, license="mit"))
    assert given.id == "mit" and any("gated is not known" in warning for warning in given.warnings)


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Publication]:
    folder, made = gptq(tmp_path)
    (publication,) = publications([(folder, made)], HOW)
    return folder, publication


def written(publication: Publication) -> str:
    cards = Cards(HOW, "https://huggingface.co", (publication,), {"f" * 16: LICENCE}, False, SILENT)
    return cards(publication, RemoteState())["README.md"].decode()


def test_a_card_of_a_person_that_is_not_utf_8(own: tuple[Path, Publication]) -> None:
    folder, publication = own
    (folder / "README.md").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UsageError, match=r"README\.md` cannot be read"):
        written(publication)
    (folder / "README.md").write_text("# café\n")
    assert written(publication).count("# café\n") == 1


def test_a_template_with_a_mark_of_ours_is_left_out(own: tuple[Path, Publication]) -> None:
    folder, publication = own
    byte_tokenizer(save_tiny("llama", folder, vocab_size=420))
    for template, shown in (("<a>{}", True), ("<!-- quantkit:end -->{}", False)):
        (folder / "chat_template.jinja").write_text(template.format("{{ messages[0].content }}"))
        text = written(publication)
        assert (template.format("{prompt}") in text) == shown
        assert text.count("<!-- quantkit:end -->") == 1


def test_whose_repository_it_is_does_not_matter_to_a_pull_request(hub: HubServer, tmp_path: Path) -> None:
    source = byte_tokenizer(save_tiny("llama", tmp_path / "source", hidden_size=256, vocab_size=448))
    made = plan(Recipe(source=str(source), targets=parse_targets("gguf:q8_0"), eval=Eval(perplexity=())))
    hub.add("bob/theirs", {"x": b"x"}, private=False)
    how = Publish("bob/theirs", license="mit", base_model="org/tiny", create_pr=True)
    publishing.check_ready(how, made, token=ALICE, endpoint=hub.url)
    with pytest.raises(HubError, match="alice may not write to bob/theirs: it may write to alice, acme"):
        publishing.check_ready(dataclasses.replace(how, create_pr=False), made, token=ALICE, endpoint=hub.url)
