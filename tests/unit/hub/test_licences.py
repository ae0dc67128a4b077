"""Licences of sources, and what stands in the way of publishing under them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from quantkit.checkpoint import card
from quantkit.hub.licence_terms import duties, known_licences, restriction
from quantkit.hub.licences import Licence, judge
from quantkit.hub.manifest import Origin
from quantkit.recipe.spec import Publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def origin(front: str = "", *, id: str = "org/model", revision: str | None = COMMIT, **more: Any) -> Origin:
    found = card.inherited(card.front_matter(f"---\n{front}\n---\n"))
    return Origin(id, revision, "f", "A", "a", 1, 2, 16.0, "bfloat16", None, None, None, found | more)


def folder(front: str = "") -> Origin:
    return origin(front, id="my-model", revision=None)


def publish(**how: Any) -> Publish:
    return Publish(**{"repo": "me/model-GPTQ", "visibility": "public", **how})


def test_the_licence_of_the_source_is_passed_on() -> None:
    assert judge(origin("license: apache-2.0"), publish()) == Licence(
        "apache-2.0", None, None, ("org/model",), False, (), (), ()
    )


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("LICENSE", f"https://huggingface.co/org/model/blob/{COMMIT}/LICENSE"),
        ("./a b/LICENSE.md#x", f"https://huggingface.co/org/model/blob/{COMMIT}/a%20b/LICENSE.md#x"),
        ("javascript:alert(1)", f"https://huggingface.co/org/model/blob/{COMMIT}/javascript%3Aalert%281%29"),
        ("https://example.org/licence", "https://example.org/licence"),
        ("/home/someone/LICENSE", None),
        ("../LICENSE", None),
    ],
)
def test_links_lead_somewhere(link: str, expected: str | None) -> None:
    found = judge(
        origin(f"license: other\nlicense_name: own-1\nlicense_link: '{link}'"),
        publish(license_confirmed=True),
    )
    assert (found.id, found.name, found.link) == ("other", "own-1", expected)


def test_the_endpoint_of_the_source() -> None:
    found = judge(origin("license: mit\nlicense_link: LICENSE"), publish(), endpoint="http://127.0.0.1:7/")
    assert found.link == f"http://127.0.0.1:7/org/model/blob/{COMMIT}/LICENSE"


def test_links_of_a_folder() -> None:
    how = publish(base_model="org/base")
    assert judge(folder("license: mit\nlicense_link: LICENSE.txt"), how).link == "LICENSE.txt"
    lost = judge(folder("license: mit\nlicense_link: terms/mine.txt"), how)
    assert lost.link is None
    assert any("'terms/mine.txt', which is not published" in warning for warning in lost.warnings)


def test_what_is_not_stated_is_not_invented() -> None:
    found = judge(origin("tags: [chat]"), publish())
    assert (found.id, found.name, found.link, found.blockers) == (None, None, None, ())
    (warning,) = found.warnings
    assert warning.startswith(
        "the licence is left out: it is not stated by the source (org/model); a LICENSE file"
    )


@pytest.mark.parametrize(
    ("front", "why"),
    [
        ("license: cc-by-nd-4.0\ntags: [", "line 4: "),
        ("license: cc-by-nd-4.0\nx: \x1b", "line 3: it holds control characters"),
        (f"license: cc-by-nd-4.0\n#{'x' * card.MAX_BYTES}", "is larger than 1,048,576 bytes"),
        ("license: {cc-by-nd-4.0: x}", "`license` is no plain text that names a licence"),
    ],
)
@pytest.mark.parametrize("visibility", ["public", "private", None])
def test_a_card_that_cannot_be_read_may_state_anything(front: str, why: str, visibility: str | None) -> None:
    source = origin(front)
    found = judge(source, publish(visibility=visibility))
    (blocker,) = found.blockers
    assert "the card of org/model cannot be read (" in blocker and why in blocker
    assert "--license ID" in blocker and "--license-confirmed" in blocker
    assert found.unread and found.id is None
    assert not any("not stated" in warning for warning in found.warnings)
    confirmed = judge(source, publish(visibility=visibility, license_confirmed=True))
    assert (
        confirmed.blockers == ()
        and confirmed.unread
        and "the licence is left out: the card" in confirmed.warnings[0]
    )
    given = judge(source, publish(visibility=visibility, license="mit"))
    assert given.blockers == () and (given.id, given.unread) == ("mit", True)
    assert "the licence is written as `mit`: the card of org/model cannot be read" in given.warnings[0]
    assert judge(source, publish(visibility=visibility, license="cc-by-nd-4.0")).blockers


def test_a_word_of_a_person_lifts_no_restriction_that_could_be_read() -> None:
    (blocker,) = judge(origin("license: [cc-by-nd-4.0, {a: b}]"), publish(license="mit")).blockers
    assert "`cc-by-nd-4.0` forbids to share derivatives" in blocker


def test_aliases_do_not_hide_a_licence() -> None:
    found = judge(origin("license: cc-by-nc-nd-4.0\ntags: &t\n- chat\ndatasets: *t"), publish())
    assert found.id == "cc-by-nc-nd-4.0" and "forbids to share derivatives" in found.blockers[0]


def test_a_folder_whose_card_cannot_be_read() -> None:
    found = judge(folder("- x"), publish())
    assert len(found.blockers) == 2 and "--base-model ID" in found.blockers[1]
    assert len(judge(folder("- x"), publish(license_confirmed=True)).blockers) == 1
    assert judge(folder("- x"), publish(license="mit", base_model="org/base")).blockers == ()


def test_what_is_not_taken_over_is_said() -> None:
    front = "license: mit\n[a]: 1\nlanguage: <b>\nlicense_link: 'https://x.org/a b'"
    found = judge(origin(front), publish())
    assert found.link == "https://x.org/a%20b" and found.blockers == ()
    assert found.warnings == (
        "the card of org/model: line 3 is left out: its key is no text",
        "the card of org/model: language is left out: not the code of a language, as en",
        "the card of org/model: license_link is written with %XX for what no address has",
    )
    # an older quantkit.json holds it as it is
    older = dataclasses.replace(origin(), card={"license": "mit", "language": ["<b>"], "datasets": [3]})
    assert [w.split(": ")[1] for w in judge(older, publish()).warnings] == [
        "language is left out", "datasets is left out"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("front", "why", "quoted"),
    [
        ("license: cc-by-nd-4.0", "forbids to share derivatives", "`cc-by-nd-4.0`"),
        ("license: cc-by-nc-nd-3.0", "forbids to share derivatives", "`cc-by-nc-nd-3.0`"),
        ("license: fair-noncommercial-research-license", "allows research alone", "`fair-noncomm"),
        ("license: other\nlicense_name: Qwen-Research", "allows research alone", "`other` (Qwen-Research)"),
        (
            "license: other\nlicense_name: own-1\nlicense_link: https://example.org/x",
            "is none whose terms quantkit knows",
            "`other` (own-1), https://example.org/x",
        ),
        ("license: other", "is none whose terms quantkit knows", "`other`"),
        ("license: unknown", "is none whose terms quantkit knows", "`unknown`"),
        ("license: proprietary-7", "is none whose terms quantkit knows", "`proprietary-7`"),
    ],
)
def test_what_needs_a_person(front: str, why: str, quoted: str) -> None:
    (blocker,) = judge(origin(front), publish()).blockers
    assert why in blocker and quoted in blocker and "--license-confirmed" in blocker
    confirmed = judge(origin(front), publish(license_confirmed=True))
    assert confirmed.blockers == ()
    assert dataclasses.replace(judge(origin(front), publish()), blockers=()) == confirmed


def test_a_licence_that_the_hub_does_not_know() -> None:
    found = judge(origin("license: Proprietary-7"), publish(license_confirmed=True))
    assert (found.id, found.name) == ("other", "Proprietary-7")
    assert any("knows no licence `Proprietary-7`" in warning for warning in found.warnings)
    assert judge(origin("license: Apache-2.0"), publish()).id == "apache-2.0"


def test_of_several_licences_one_may_choose() -> None:
    found = judge(origin("license: [mit, cc-by-nd-4.0]"), publish())
    assert (found.id, found.more, found.blockers) == ("mit", ("cc-by-nd-4.0",), ())
    both = judge(origin("license: [cc-by-nc-nd-4.0, cc-by-nd-4.0]"), publish())
    assert len(both.blockers) == 1


def test_the_word_of_the_person_wins_and_is_compared() -> None:
    found = judge(origin("license: mit\nlicense_link: LICENSE"), publish(license="apache-2.0"))
    assert (found.id, found.link) == ("apache-2.0", None)
    (warning,) = found.warnings
    assert "publish.license is `apache-2.0`" in warning and "`mit`" in warning
    same = judge(origin("license: mit\nlicense_link: LICENSE"), publish(license="MIT"))
    assert same.id == "mit" and same.link is not None and same.warnings == ()


def test_another_word_does_not_lift_a_restriction() -> None:
    (blocker,) = judge(origin("license: cc-by-nd-4.0"), publish(license="mit")).blockers
    assert "`cc-by-nd-4.0`" in blocker


@pytest.mark.parametrize("id", ["llama3.1", "llama3.2", "llama3.3", "llama4"])
def test_llama_asks_for_three_things_and_a_name(id: str) -> None:
    number = id.removeprefix("llama")
    found = judge(origin(f"license: {id}"), publish())
    assert found.blockers == found.warnings == ()
    text = "\n".join(found.reminders)
    assert 'show "Built with Llama"' in text and "copy of the licence" in text
    assert f"Llama {number} is licensed under the Llama {number} Community License" in text
    assert f'{id}: let the name of the model begin with "Llama"' in found.reminders
    named = judge(origin(f"license: {id}"), publish(repo="me/llama-3.1-8B-GPTQ"))
    assert len(named.reminders) == len(found.reminders) - 1


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: llama3", 'show "Built with Meta Llama 3"'),
        ("license: llama3", 'begin with "Llama 3"'),
        ("license: llama2", "LLAMA 2 Community License"),
        ("license: gemma", "NOTICE"),
        ("license: openrail++", "restrictions of use"),
        ("license: cc-by-sa-4.0", "under the same licence"),
        ("license: cc-by-nc-4.0", "not be used commercially"),
        ("license: other\nlicense_name: Llama 3.2", "Built with Llama"),
    ],
)
def test_reminders(front: str, said: str) -> None:
    found = judge(origin(front), publish())
    assert any(said in reminder for reminder in found.reminders) and found.blockers == ()


def test_names_that_begin_as_they_must() -> None:
    found = judge(origin("license: llama3"), publish(repo="me/Llama-3-8B-GPTQ"))
    assert not any("begin with" in reminder for reminder in found.reminders)
    meta = judge(origin("license: llama3"), publish(repo="me/Meta-Llama-3-8B"))
    assert any("begin with" in reminder for reminder in meta.reminders)


@pytest.mark.parametrize(
    ("front", "told"), [("license: mit\nextra_gated_prompt: x", False), ("license: mit", True)]
)
def test_gated_sources(front: str, told: bool) -> None:
    found = judge(origin(front), publish(), gated=told)
    assert found.gated and found.warnings == () and found.blockers == ()
    assert not judge(origin("license: mit"), publish()).gated


def test_a_folder_without_a_card() -> None:
    (blocker,) = judge(folder(), publish()).blockers
    assert "--base-model ID" in blocker and "--license ID" in blocker and "my-model" in blocker
    (blocker,) = judge(folder(), publish(license="mit")).blockers
    assert "--base-model ID" in blocker and "--license ID" not in blocker
    assert judge(folder(), publish(license="mit", base_model="org/base")).blockers == ()
    for visibility in ("private", None):  # one that is there may be public, whatever was asked for
        found = judge(folder(), publish(visibility=visibility))
        assert found.blockers == () and "--base-model ID" in found.blockers_if_public[0]
    assert len(judge(folder(), publish(visibility="private-then-public")).blockers) == 1


def test_base_models_are_never_paths() -> None:
    assert judge(folder("license: mit\nbase_model: org/older"), publish()).base_models == ()
    found = judge(folder("license: mit"), publish(base_model="org/base"))
    assert found.base_models == ("org/base",) and found.warnings == ()
    local = dataclasses.replace(folder("license: mit"), id="/home/someone/model")
    assert judge(local, publish()).base_models == ()
    other = judge(origin("license: mit\nbase_model: org/older"), publish(base_model="org/else"))
    assert other.base_models == ("org/model",) and "org/else" in other.warnings[0]


def test_the_table_of_licences() -> None:
    known = known_licences()
    assert {"mit", "apache-2.0", "other", "llama4", "gemma"} <= known
    assert all(id == id.strip().lower() for id in known)
    assert {id for id in known if restriction(id) == "forbids to share derivatives"} == {
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
    }
    for id in ("mit", "apache-2.0", "gpl-3.0", "openmdw-1.0"):
        assert restriction(id) is None and duties(id) == ()
    for id in known:
        assert all(duty and not duty.endswith(".") for duty in duties(id))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, quantkit.hub.licences, quantkit.hub.scrub\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gate_that_nobody_could_ask_for() -> None:
    found = judge(origin("license: mit"), publish(), gated=None)
    assert not found.gated
    assert found.warnings == ("whether access to org/model is gated is not known: the Hub did not tell",)
    known = judge(origin("license: mit\nextra_gated_prompt: please"), publish(), gated=None)
    assert known.gated and known.warnings == ()
