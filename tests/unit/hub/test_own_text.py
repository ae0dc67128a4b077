"""What a person wrote into a README survives every publication."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.card import listed
from quantkit.errors import UsageError
from quantkit.hub.card import render
from quantkit.hub.card.front_matter import find
from quantkit.hub.card.own_text import marked, merge, notes
from quantkit.hub.card.validation import problems
from tests import cards

CARD = merge(render(cards.page()), None)
NEWER = merge(render(cards.page(cards.gguf("q8_0", 8.5, 0.0004), changes=("Q8_0 instead",))), None)
PERSON = """\
---
# what I want to keep
license: mit  # mine
tags: [mine, gguf]
my_key:
  - 1   # spaced
language: en
---
# My model

---

Words of mine.
"""


def block(text: str) -> str:
    begin = text.index("<!-- quantkit:begin")
    return text[begin : text.index("<!-- quantkit:end -->") + len("<!-- quantkit:end -->")]


def plain(text: str) -> str:
    """Without what the mark says of the metadata."""
    return re.sub(r" front=\S*", "", text)


def front(text: str) -> dict[str, object]:
    found = find(text)
    assert found is not None
    values = yaml.safe_load(found.yaml)
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("existing", [None, "", " \n", "\ufeff\n"])
def test_nothing_there(existing: str | None) -> None:
    assert merge(CARD, existing) == CARD
    assert plain(CARD) == render(cards.page())


def test_the_block_carries_its_sum() -> None:
    first, rest = block(CARD).split("\n", 1)
    inner = rest.removesuffix("<!-- quantkit:end -->")
    assert plain(first) == f"<!-- quantkit:begin sha256={hashlib.sha256(inner.encode()).hexdigest()} -->"


def test_our_card_is_replaced_by_the_newer() -> None:
    made = merge(NEWER, CARD)
    assert block(made) == block(NEWER)
    assert front(made)["model-index"] == front(NEWER)["model-index"]
    assert merge(CARD, CARD) == CARD


def test_text_around_our_part_stays_byte_for_byte() -> None:
    written = CARD.replace("---\n\n<!--", "---\n\nabove  \n\n<!--") + "\nbelow\t\nno newline at the end"
    made = merge(NEWER, written)
    assert block(made) == block(NEWER)
    assert find(made).rest.startswith("\nabove  \n\n<!--")  # type: ignore[union-attr]
    assert made.endswith("<!-- quantkit:end -->\n\nbelow\t\nno newline at the end")


def test_text_without_our_marks_stays_and_ours_is_appended() -> None:
    made = merge(CARD, PERSON)
    found = find(made)
    assert found is not None
    assert plain(found.rest) == plain(f"# My model\n\n---\n\nWords of mine.\n\n{block(CARD)}\n")
    assert merge(CARD, made) == made


def test_metadata_of_a_person_wins_and_keeps_its_lines() -> None:
    made = merge(CARD, PERSON)
    assert made.startswith(
        "---\n# what I want to keep\nlicense: mit  # mine\ntags:\n- mine\n- gguf\n- quantkit\n- chat\n"
    )
    assert "my_key:\n  - 1   # spaced\n" in made
    values = front(made)
    assert values["license"] == "mit" and values["language"] == ["en", "no"]
    assert values["quantized_by"] == "alice" and values["base_model_relation"] == "quantized"
    assert values["library_name"] == "gguf"


def test_what_only_we_know_is_ours() -> None:
    theirs = "quantkit: {bpw: 1}\nquantized_by: bob\nbase_model_relation: finetune\nbase_model: bob/own\n"
    values = front(merge(CARD, f"---\n{theirs}---\n"))
    assert values["quantkit"] == front(CARD)["quantkit"] and values["quantized_by"] == "alice"
    assert values["base_model_relation"] == "quantized" and values["base_model"] == "bob/own"


def test_results_of_others_stay_and_our_outdated_ones_go() -> None:
    theirs = (
        "---\nmodel-index:\n- name: Tiny-1B-Instruct-GGUF\n  results:\n"
        "  - task: {type: text-generation}\n"
        "    dataset: {type: mmlu, name: MMLU}\n    metrics: [{type: acc, value: 0.5}]\n"
        "- name: elsewhere\n  results:\n"
        "  - {task: {type: x}, dataset: {type: y, name: z}, metrics: []}\n---\n"
    )
    made = merge(CARD, theirs)
    index = front(made)["model-index"]
    assert isinstance(index, list)
    assert [entry["name"] for entry in index] == ["Tiny-1B-Instruct-GGUF", "elsewhere"]
    assert [len(entry["results"]) for entry in index] == [2, 1]
    assert merge(CARD, made) == made
    bare = render(cards.page(cards.variant(cards.manifest(quality=()))))
    left = front(merge(bare, made))["model-index"]
    assert isinstance(left, list)
    assert [entry["name"] for entry in left] == ["Tiny-1B-Instruct-GGUF", "elsewhere"]
    assert left[0]["results"][0]["dataset"]["name"] == "MMLU" and len(left[0]["results"]) == 1
    assert "model-index" not in front(merge(bare, CARD))


def test_a_licence_is_taken_whole() -> None:
    other = dataclasses.replace(cards.LICENCE, id="other", name="tiny", link="https://example.org/l")
    card = render(cards.page(licence=other))
    assert "license_name" not in front(merge(card, "---\nlicense: mit\n---\nx\n"))
    assert front(merge(card, "---\nlicense: other\n---\nx\n"))["license_name"] == "tiny"
    assert front(merge(card, "---\nlicense:\n---\nx\n"))["license"] == "other"


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.replace("## Licence", "## Licence\n\nmy own words"),
        lambda t: t.replace("sha256=", "sha256=0", 1),
        lambda t: t.replace("<!-- quantkit:end -->", ""),
        lambda t: t.replace("<!-- quantkit:begin", "<!-- begin"),
        lambda t: t + block(t) + "\n",
    ],
)
def test_an_edited_part_is_not_lost(edit: object) -> None:
    assert callable(edit)
    written = edit(CARD) + "\nbelow\n"
    with pytest.raises(UsageError, match="was edited since") as caught:
        merge(NEWER, written)
    assert "--replace-card" in str(caught.value) and "outside" in str(caught.value)
    made = merge(NEWER, written, replace=True)
    assert plain(block(NEWER)) in plain(made) and made.endswith("\nbelow\n") == ("quantkit:begin" in written)
    assert "below" in made


def test_without_its_end_nothing_after_the_mark_is_lost() -> None:
    made = merge(NEWER, CARD.replace("<!-- quantkit:end -->", "and mine"), replace=True)
    assert block(made) == block(NEWER)
    assert "\nand mine\n" in made and "## Licence" in made.split("<!-- quantkit:end -->")[1]


def test_line_ends_of_windows_stay() -> None:
    written = (PERSON + "\n" + CARD.split("---\n", 2)[2]).replace("\n", "\r\n")
    made = merge(NEWER, written)
    assert made.replace("\r\n", "").count("\n") == 0
    assert plain(block(made).replace("\r\n", "\n")) == plain(block(NEWER))
    assert merge(NEWER, made) == made
    # a checkout may change all line ends: the part is still ours
    assert plain(block(merge(CARD, made.replace("\r\n", "\n")))) == plain(block(CARD))


def test_a_rule_is_no_metadata() -> None:
    for text in ("---\n\nA rule, and nothing below it\n", "Words\n\n---\n\nmore\n", "----\nx\n---\n"):
        made = merge(CARD, text)
        assert made.startswith("---\nbase_model:") and f"---\n\n{text}" in made
        assert merge(CARD, made) == made


@pytest.mark.parametrize(
    "text", ["---\n---\nwords\n", "---\n# only a comment\n---\nwords\n", "\ufeff\n---\nx: 1\n---\nwords\n"]
)
def test_odd_metadata(text: str) -> None:
    made = merge(CARD, text)
    assert "words\n" in made and front(made)["library_name"] == "gguf"
    assert ("# only a comment" in made) == ("comment" in text)
    assert merge(CARD, made) == made


@pytest.mark.parametrize("text", [PERSON, PERSON.replace("\n", "\r\n"), "Words alone.\n", CARD])
def test_a_byte_order_mark_stays_where_it_is(text: str) -> None:
    made = merge(NEWER, "\ufeff" + text)
    assert made == "\ufeff" + merge(NEWER, text)
    assert merge(NEWER, made) == made and made.count("\ufeff") == 1
    assert problems(made)[0].startswith("README.md:1 front matter: stands behind a byte order mark")


@pytest.mark.parametrize(
    "yaml_text",
    [
        "{license: mit, tags: [a]}",
        "tags: &t [a]\nother: *t",
        "text: |\n  # no comment\n\n  more\ntags: [a]",
        'quoted: "a\n  b"\ntags: [a] # note\n# between\nlast: 1',
        "x: 1\n...",
        "language: no",
        "date: 2024-01-01\ntags:\n- a\n\n# end",
    ],
)
def test_yaml_of_all_kinds_keeps_its_values(yaml_text: str) -> None:
    before = yaml.safe_load(yaml_text)
    made = merge(CARD, f"---\n{yaml_text}\n---\nwords\n")
    after = front(made)
    for key, value in before.items():
        if key == "tags":
            assert after[key] == [*value, "quantkit", "gguf", "chat"]
        elif key == "language":
            assert after[key] == ["no", "en"]
        else:
            assert after[key] == value
    assert merge(CARD, made) == made


@pytest.mark.parametrize("text", ["---\na: b: c\n---\nx\n", "---\n- a\n---\nx\n", "---\n\t- a\n---\nx\n"])
def test_metadata_that_does_not_read_is_not_touched(text: str) -> None:
    with pytest.raises(UsageError, match="first two lines of ---"):
        merge(CARD, text)
    made = merge(CARD, text, replace=True)
    assert front(made) == front(CARD) and "\nx\n" in made


def test_a_body_may_not_hold_marks() -> None:
    with pytest.raises(UsageError, match="would hold"):
        marked("a <!-- quantkit:end --> b")


def pushed(licence: str | None = "mit", base: str | None = "org/old", **card: object) -> str:
    """A card of which the source says `card`, as `push --license --base-model` renders it."""
    made = cards.manifest(source=cards.origin(card=card))
    bases = () if base is None else (base,)
    terms = dataclasses.replace(cards.LICENCE, id=licence, base_models=bases)
    return render(cards.page(cards.variant(made), licence=terms))


OLD = merge(pushed(tags=["chat", "old"], language=["en", "de"], datasets=["org/a"]), None)
NEW = pushed("apache-2.0", "org/new", tags=["chat", "new"], language=["en"])


def test_what_an_earlier_push_wrote_is_replaced() -> None:
    made = merge(NEW, OLD)
    assert front(made) == front(NEW) and block(made) == block(merge(NEW, None))
    assert front(merge(OLD, made)) == front(OLD)
    assert merge(NEW, made) == made
    # and what it wrote no more is gone
    bare = front(merge(pushed(None, None), made))
    assert not bare.keys() & {"license", "base_model", "base_model_relation", "datasets", "language"}
    assert bare["tags"] == ["quantkit", "gguf"]


def test_what_a_person_changed_since_stays() -> None:
    written = OLD.replace("license: mit", "license: bsd-3-clause").replace("- old\n", "- old\n- mine\n")
    written = written.replace("base_model: org/old", "base_model: [org/old, org/more]")
    made = merge(NEW, written)
    values = front(made)
    assert values["license"] == "bsd-3-clause" and values["base_model"] == ["org/old", "org/more"]
    assert values["tags"] == ["quantkit", "gguf", "chat", "mine", "new"] and values["language"] == ["en"]
    assert "datasets" not in values and merge(NEW, made) == made
    assert front(merge(pushed(None, None), made))["tags"] == ["quantkit", "gguf", "mine"]


def test_a_value_that_agrees_with_ours_by_chance_stays_a_persons() -> None:
    made = merge(pushed(tags=["chat"]), "---\nlicense: mit\ntags: [chat]\n---\nwords\n")
    values = front(merge(NEW, made))
    assert values["license"] == "mit" and values["tags"] == ["chat", "quantkit", "gguf", "new"]
    # the same after an edit in between
    written = OLD.replace("license: mit", "license: apache-2.0")
    assert front(merge(OLD, merge(NEW, written)))["license"] == "apache-2.0"


def test_what_a_person_deletes_of_ours_and_we_still_write_comes_back() -> None:
    written = OLD.replace("license: mit\n", "").replace("- chat\n", "")
    made = merge(NEW, written)
    assert front(made)["license"] == "apache-2.0" and "chat" in listed(front(made)["tags"])
    assert front(merge(pushed(None, None), made)).keys() & {"license", "datasets"} == set()


def test_comments_of_a_person_outlive_our_values() -> None:
    written = OLD.replace("license: mit\n", "# above\nlicense: mit  # behind\n")
    assert "# above\n# behind\nlicense: apache-2.0\n" in merge(NEW, written)
    assert "# above\n# behind\n" in merge(pushed(None, None), written)
    written = OLD.replace("- old\n", "# between\n- old # this\n")
    assert "# between\n# this\ntags:\n- quantkit\n- gguf\n- chat\n- new\n" in merge(NEW, written)


def test_a_licence_of_ours_goes_whole_and_one_of_a_person_stays_whole() -> None:
    terms = dataclasses.replace(cards.LICENCE, id="other", name="tiny", link="https://example.org/l")
    other = merge(render(cards.page(licence=terms)), None)

    def licence(text: str) -> list[object]:
        return [front(text).get(key) for key in ("license", "license_name", "license_link")]

    assert licence(merge(NEW, other)) == ["apache-2.0", None, None]
    edited = merge(NEW, other.replace("license_name: tiny", "license_name: mine"))
    assert licence(edited) == ["other", "mine", "https://example.org/l"]
    moved = render(cards.page(licence=dataclasses.replace(terms, link="https://example.org/2")))
    assert licence(merge(moved, edited)) == ["other", "mine", "https://example.org/2"]
    # without our name theirs would be incomplete
    filled = merge(other, "---\nlicense: other\n---\n")
    assert licence(merge(NEW, filled)) == ["other", "tiny", "https://example.org/l"]


def test_a_card_that_does_not_say_what_was_ours_keeps_all() -> None:
    values = front(merge(NEW, plain(OLD)))
    assert values["license"] == "mit" and values["base_model"] == "org/old"
    assert values["tags"] == ["quantkit", "gguf", "chat", "old", "new"] and values["language"] == ["en", "de"]


@pytest.mark.parametrize(
    "said",
    ["front=", "front=license", "front=license:xyz", "front=license:12345", "front=::,,:", "front", "x y=1"],
)
def test_a_mark_that_was_edited_by_hand_says_nothing(said: str) -> None:
    written = re.sub(r"front=\S*", said, OLD)
    made = merge(NEW, written)
    assert front(made)["license"] == "mit" and front(made)["base_model"] == "org/old"
    assert merge(NEW, made) == made and f" {said} " not in made
    # what is left of it still holds
    half = re.sub(r"front=\S*(license:\w{6})\S*", r"front=\1,tags:no", OLD)
    assert front(merge(NEW, half))["license"] == "apache-2.0"
    assert "old" in listed(front(merge(NEW, half))["tags"])


def test_the_mark_is_a_line_of_moderate_length() -> None:
    many = merge(pushed(language=[f"l{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(100)]), None)
    assert len(block(OLD).split("\n")[0]) < 300 and len(block(many).split("\n")[0]) < 900
    assert front(merge(NEW, many))["language"] == ["en"]


PIECES = st.sampled_from(
    [
        *("---\n", "--- \n", "words\n", "words", "# title\n", "\n", "\r\n", "words\r\n", "```\n", "\tx\n"),
        *("tags: [a, b]\n", "tags: a\n", "license: mit\n", "x: 1 # y\n", "# comment\n", "- item\n"),
        *("  nested: 1\n", "\ufeff", "\x0c", "\u2028", "language: no\n", "<!-- comment -->\n"),
        *("model-index: []\n", "model-index:\n- name: a\n  results: [1]\n"),
    ]
)
BARE = render(cards.page(cards.variant(cards.manifest(quality=()))))


@settings(max_examples=50, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join), st.lists(PIECES, max_size=6).map("".join))
def test_notes_are_read_back_as_they_were_given(given: str, around: str) -> None:
    own = notes(given, None)
    quiet = cards.page(cards.variant(cards.manifest(quality=())), notes=own)
    made = merge(render(quiet), f"{around}\n{CARD}" if "---" not in around else CARD)
    for there in (made, made.replace("\r\n", "\n").replace("\n", "\r\n")):
        assert notes(None, there) == own == notes(given, there)
        assert (own is None) == (given.strip() == "") == ("## Notes" not in there)
        other = notes("other", there)
        assert other is not None and other.text == "other" and not other.edited


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.booleans())
def test_merging_again_changes_nothing_and_loses_nothing(existing: str, with_front: bool) -> None:
    if with_front:
        existing = f"---\n{existing}---\n{existing}"
    try:
        made = merge(BARE, existing)
    except UsageError:
        return
    assert merge(BARE, made) == made
    assert plain(block(made).replace("\r\n", "\n")) == plain(block(BARE))
    found = find(existing)
    text = existing.removeprefix("\ufeff") if found is None else found.rest
    # nothing but spaces is nothing
    text = text if text.strip() else ""
    assert text in made
    newer = merge(NEWER, made)
    assert text in newer and plain(block(newer).replace("\r\n", "\n")) == plain(block(NEWER))
    # what is ours comes and goes, what is theirs was never ours
    again = merge(BARE, newer)
    assert (front(again), text in again) == (front(made), True)
