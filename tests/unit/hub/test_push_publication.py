"""Which files of which targets go where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.hub.push.publication import publications
from quantkit.recipe.spec import Publish
from tests.targets import gguf, gptq, target


def paths(publication: object) -> list[str]:
    return [item.path_in_repo for item in publication.weights]  # type: ignore[attr-defined]


def test_auto_puts_gguf_files_together_and_all_else_apart(tmp_path: Path) -> None:
    targets = [gguf(tmp_path, "q4_k_m"), gptq(tmp_path), gguf(tmp_path, "q8_0")]
    made = publications(targets, Publish("alice/Tiny-{target}"))
    assert [p.repo for p in made] == ["alice/Tiny-gptq-w4g128", "alice/Tiny-GGUF"]
    assert paths(made[1]) == ["LICENSE", "Tiny-Q4_K_M.gguf", "Tiny-Q8_0.gguf"]
    assert [t.name for t in made[1].targets] == ["gguf-q4_k_m", "gguf-q8_0"]
    assert made[1].placed[1].files == ("LICENSE", "Tiny-Q8_0.gguf")
    assert made[1].placed[0].checks is not None
    assert made[1].several and not made[0].several
    assert all(p.branch is None for p in made)


def test_nothing_but_what_the_manifest_lists_is_published(tmp_path: Path) -> None:
    folder, made = gptq(tmp_path, shards=1)
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / ".gitattributes").write_bytes(b"x")
    (publication,) = publications([(folder, made)], Publish("alice/t"))
    assert paths(publication) == [
        "LICENSE", "config.json", "model-00001-of-00001.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert all(item.source == folder / item.path_in_repo for item in publication.weights)
    assert all(item.expected == made.files[item.path_in_repo] for item in publication.weights)


def test_a_name_without_a_placeholder_is_taken_as_it_is_for_one_repository(tmp_path: Path) -> None:
    only = [gptq(tmp_path)]
    assert publications(only, Publish("alice/Tiny"))[0].repo == "alice/Tiny"
    both = [*only, gguf(tmp_path, "q4_k_m")]
    names = [p.repo for p in publications(both, Publish("alice/Tiny"))]
    assert names == ["alice/Tiny-gptq-w4g128", "alice/Tiny-GGUF"]


def test_a_repository_each(tmp_path: Path) -> None:
    both = [gguf(tmp_path, "q4_k_m"), gguf(tmp_path, "q8_0")]
    made = publications(both, Publish("alice/{target}", layout="repo-per-target"))
    assert [p.repo for p in made] == ["alice/gguf-q4_k_m", "alice/gguf-q8_0"]


def test_shards_of_a_gguf_file_lie_in_a_folder(tmp_path: Path) -> None:
    shards = {f"Tiny-Q8_0-0000{i}-of-00002.gguf": b"GGUF%d" % i for i in (1, 2)}
    both = [gguf(tmp_path, "q4_k_m"), target(tmp_path, "gguf-q8_0", "gguf", "q8_0", shards)]
    (made,) = publications(both, Publish("alice/Tiny"))
    assert paths(made)[2:] == [f"Q8_0/Tiny-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert made.placed[1].files == tuple(paths(made)[2:])


def test_two_targets_with_one_file_name(tmp_path: Path) -> None:
    both = [gptq(tmp_path, "a", shards=1), gptq(tmp_path, "b", shards=1)]
    with pytest.raises(UsageError, match=r"`a` and `b` both have a file 'model-00001-of-00001.safetensors'"):
        publications(both, Publish("alice/Tiny", layout="files"))


def test_side_files_of_one_name_must_be_alike(tmp_path: Path) -> None:
    one = gguf(tmp_path, "q4_k_m")
    other = target(tmp_path, "x", "gguf", "q8_0", {"Tiny-Q8_0.gguf": b"GGUF", "LICENSE": b"MIT"})
    with pytest.raises(UsageError, match="'LICENSE'"):
        publications([one, other], Publish("alice/Tiny"))


def test_exl3_gets_branches_and_a_main_that_describes_them(tmp_path: Path) -> None:
    files = {"model.safetensors": b"x", "config.json": b"{}"}
    both = [target(tmp_path, f"exl3-{b}", "exl3", "w4", files, bits=b) for b in (4.04, 5.5)]
    four, five, main = publications(both, Publish("alice/Tiny-{target}", tag="v1"))
    assert [p.repo for p in (four, five, main)] == ["alice/Tiny-EXL3"] * 3
    assert (four.branch, five.branch, main.branch) == ("4.0bpw", "5.5bpw", None)
    assert four.fork_from_first and not main.fork_from_first
    assert paths(main) == [] and paths(four) == ["config.json", "model.safetensors"]
    assert [p.branch for p in main.placed] == ["4.0bpw", "5.5bpw"]
    assert main.tag == "v1" and four.tag is None
    (only, _) = publications(both[:1], Publish("alice/T", branch="{target}_{bpw}"))
    assert only.branch == "exl3-4.04_4.0"


def test_branches_must_differ(tmp_path: Path) -> None:
    files = {"model.safetensors": b"x"}
    both = [target(tmp_path, f"exl3-{b}", "exl3", "w4", files, bits=b) for b in (4.01, 4.04)]
    with pytest.raises(UsageError, match=r"`exl3-4.01` and `exl3-4.04` .* branch 4.0bpw"):
        publications(both, Publish("alice/Tiny"))
    with pytest.raises(UsageError, match="'main' cannot be the branch"):
        publications(both[:1], Publish("alice/Tiny", branch="main"))


def test_any_format_can_have_branches(tmp_path: Path) -> None:
    made = publications([gptq(tmp_path)], Publish("alice/Tiny", layout="branches"))
    assert [(p.branch, len(p.weights)) for p in made] == [("gptq-w4g128", 5), (None, 0)]


def test_a_branch_of_other_layouts_is_the_one_to_commit_to(tmp_path: Path) -> None:
    both = [gguf(tmp_path, "q4_k_m"), gguf(tmp_path, "q8_0")]
    (made,) = publications(both, Publish("alice/Tiny", branch="next-{target}"))
    assert made.branch == "next-GGUF" and not made.fork_from_first
    assert publications(both, Publish("alice/Tiny", branch="main"))[0].branch is None
    with pytest.raises(UsageError, match=r"no one \{bpw\}"):
        publications(both, Publish("alice/Tiny", branch="{bpw}"))


def test_names_that_no_repository_can_have(tmp_path: Path) -> None:
    folder, made = gptq(tmp_path)
    with pytest.raises(UsageError, match="'alice/Tiny-a--b' cannot be a repository"):
        publications([(folder, replace(made, name="a--b"))], Publish("alice/Tiny-{target}"))
    with pytest.raises(UsageError, match="both named gptq-w4g128"):
        publications([(folder, made), (tmp_path / "again", made)], Publish("alice/Tiny"))
    with pytest.raises(UsageError, match="nothing to publish"):
        publications([], Publish("alice/Tiny"))
