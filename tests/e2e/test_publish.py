"""From a repository of the Hub to published ones in one command, against the loopback Hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.gguf.container import open_file
from tests.e2e.runs import sums
from tests.gguf_files import byte_tokenizer
from tests.hubplace import CARD, LICENSE, Ran, Workplace, nothing_private
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import READER, SENDS_FILES
from tests.models import save_tiny, tiny_tokens

pytestmark = SENDS_FILES
# one block, as wide as a superblock of GGUF
TINY = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 448, "num_hidden_layers": 1}
TARGETS = {
    "alice/tiny-GGUF": ("gguf-q4_k_m", "gguf-q8_0"),
    "alice/tiny-gptq-w4g32": ("gptq-w4g32",),
    "alice/tiny-compressed_tensors-w8": ("compressed_tensors-w8",),
    "alice/tiny-bitsandbytes-nf4": ("bitsandbytes-nf4",),
}
RECIPE = """
quantkit: 1
source: org/tiny
output: {dir: out}
calibration: {file: calibration.txt, rows: 4, length: 32}
targets:
  - gguf:q4_k_m@method=rtn,name=gguf-q4_k_m
  - gguf:q8_0@name=gguf-q8_0
  - gptq:w4g32@polish=0,name=gptq-w4g32
  - ct:w8
  - nf4
eval:
  perplexity: [{file: evaluation.txt, style: gptq, context: 32, chunks: 4}]
publish: {repo: "alice/tiny-{target}", visibility: private-then-public}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a card and a licence."""
    folder = byte_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **TINY))
    (folder / "README.md").write_bytes(CARD)
    (folder / "LICENSE").write_bytes(LICENSE)
    return folder


def workplace(hub: HubServer, folder: Path, source: Path, calibration: Path, evaluation: Path) -> Workplace:
    hub.add("org/tiny", source)
    place = Workplace(hub, folder / "place")
    for name, text in (("calibration", calibration), ("evaluation", evaluation)):
        (place.folder / f"{name}.txt").write_text(text.read_text())
    (place.folder / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, source: Path, calibration_text: Path, evaluation_text: Path
) -> Iterator[tuple[Workplace, Ran]]:
    """What one command made, from the repository to four others, in a process of its own."""
    with HubServer() as hub:
        folder = tmp_path_factory.mktemp("publish")
        place = workplace(hub, folder, source, calibration_text, evaluation_text)
        done = place.run(
            "convert", "-r", "recipe.yaml", "--push", "--no-engine", "--log-file", "log.txt", "-vv"
        )
        assert done.code == 0, done.err
        yield place, done


@pytest.fixture(scope="module")
def fetched(published: tuple[Workplace, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every published repository, downloaded by the client alone."""
    place, _ = published
    cache = tmp_path_factory.mktemp("cache")
    return {repo: place.fetch(repo, cache) for repo in TARGETS}


def test_every_target_is_published_byte_for_byte(
    published: tuple[Workplace, Ran], fetched: dict[str, Path]
) -> None:
    place, done = published
    commit = place.hub.repo("org/tiny").commits[0].sha
    for repo, targets in TARGETS.items():
        assert not place.hub.repo(repo).private
        assert repo in done.out
        for target in targets:
            made = sums(place.folder / "out", target)
            told = json.loads((place.folder / "out" / target / "quantkit.json").read_text())
            assert told["source"]["revision"] == commit
            weights = {file for file in told["files"] if file.endswith((".gguf", ".safetensors"))}
            assert weights
            for file, told_sum in told["files"].items():
                if file in weights or len(targets) == 1:
                    assert told_sum["sha256"] == made[f"{target}/{file}"]
                    here = place.folder / "out" / target / file
                    assert (fetched[repo] / file).read_bytes() == here.read_bytes()
        assert (fetched[repo] / "LICENSE").read_bytes() == LICENSE
    assert (place.folder / "out" / "publish.json").is_file()


def test_what_was_published_is_sound(fetched: dict[str, Path]) -> None:
    for repo, folder in fetched.items():
        paths = sorted(folder.glob("*.gguf")) if repo.endswith("GGUF") else [folder]
        assert len(paths) == len(TARGETS[repo])
        for path in paths:
            found = quantkit.verify(path, engine=False)
            assert found.sound, found.problems
            assert "sums" in found.checks


def test_without_engines_none_is_run(published: tuple[Workplace, Ran]) -> None:
    place, _ = published
    assert not list((place.folder / "out").glob("*/checks.json"))


def test_what_was_published_loads_and_computes_the_same(
    published: tuple[Workplace, Ran], fetched: dict[str, Path]
) -> None:
    place, _ = published
    tokens = tiny_tokens()
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (
            fetched["alice/tiny-compressed_tensors-w8"],
            place.folder / "out" / "compressed_tensors-w8",
        )
    ]
    assert torch.equal(*logits)


def test_cards_say_what_was_measured(published: tuple[Workplace, Ran], fetched: dict[str, Path]) -> None:
    place, _ = published
    report = json.loads((place.folder / "out" / "report.json").read_text())
    measured = {target["name"]: target["quality"][0] for target in report["targets"]}
    for repo, targets in TARGETS.items():
        card = ModelCard.load(fetched[repo] / "README.md")
        assert card.data.base_model == "org/tiny" and card.data.license == "apache-2.0"
        assert card.data.to_dict()["base_model_relation"] == "quantized"
        for target in targets:
            assert f"{measured[target]['target']['value']:.3f}" in card.text
            assert f"{measured[target]['kl_mean']:.5f}" in card.text
        index = json.loads(json.dumps(card.data.to_dict()["model-index"]))
        values = {m["value"] for entry in index for r in entry["results"] for m in r["metrics"]}
        assert {measured[target]["target"]["value"] for target in targets} <= values


def test_nothing_tells_the_token_or_the_machine(published: tuple[Workplace, Ran]) -> None:
    place, done = published
    assert (place.folder / "log.txt").stat().st_size > 100
    nothing_private(place, done, list(TARGETS))


def test_a_second_push_has_nothing_to_do(published: tuple[Workplace, Ran]) -> None:
    place, _ = published
    before = {repo: place.hub.repo(repo).commits for repo in TARGETS}
    again = place.call("push", "out", "--no-engine")
    assert again.code == 0, again.err
    assert again.out.count("nothing to do") == len(TARGETS)
    assert before == {repo: place.hub.repo(repo).commits for repo in TARGETS}


def test_a_published_model_is_a_source(published: tuple[Workplace, Ran]) -> None:
    """Every command takes what was published by its name."""
    place, _ = published
    shown = place.call("inspect", "alice/tiny-GGUF:Q4_K_M", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["quantkit"]["name"] == "gguf-q4_k_m"
    found = place.call("verify", "alice/tiny-gptq-w4g32", "--against", "org/tiny", "--no-engine")
    assert found.code == 0, found.err
    assert "sound" in found.out


@pytest.fixture
def place(tmp_path: Path, source: Path, calibration_text: Path, evaluation_text: Path) -> Iterator[Workplace]:
    with HubServer() as hub:
        yield workplace(hub, tmp_path, source, calibration_text, evaluation_text)


def test_a_sub_folder_is_published_under_the_licence_of_its_repository(
    place: Workplace, source: Path
) -> None:
    inside = {path.name: path.read_bytes() for path in source.iterdir()}
    above = {name: inside.pop(name) for name in ("LICENSE", "README.md")} | {"NOTICE.txt": b"by them"}
    place.hub.add("org/nested", above | {f"f32/{name}": content for name, content in inside.items()})
    done = place.call(
        "convert", "org/nested:f32", "--to", "gptq:w4g32@method=rtn,name=gptq-w4g32", "--to", "gguf:q8_0",
        "-o", "nested", "--set", "eval.perplexity=[]",
        "--push", "--repo", "alice/nested-{target}", "--no-engine",
    )  # fmt: skip
    assert done.code == 0, done.err
    for repo in ("alice/nested-gptq-w4g32", "alice/nested-GGUF"):
        published = place.hub.repo(repo)
        assert published.read("LICENSE") == LICENSE and published.read("NOTICE.txt") == b"by them"
        assert b"\nlicense: apache-2.0\n" in published.read("README.md")
    assert "not stated" not in done.err
    (file,) = (place.folder / "nested" / "gguf-q8_0").glob("*.gguf")
    assert open_file(file).metadata["general.license"] == "apache-2.0"
    # where the sub-folder has its own, that one counts
    place.hub.add(
        "org/nested", {"f32/LICENSE": b"Other terms.", "f32/README.md": b"---\nlicense: mit\n---\n"}
    )
    done = place.call(
        "convert", "org/nested:f32", "--to", "gptq:w4g32@method=rtn", "-o", "own",
        "--set", "eval.perplexity=[]", "--push", "--repo", "alice/own", "--no-engine",
    )  # fmt: skip
    assert done.code == 0, done.err
    published = place.hub.repo("alice/own")
    assert published.read("LICENSE") == b"Other terms." and published.read("NOTICE.txt") == b"by them"
    assert b"\nlicense: mit\n" in published.read("README.md")


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "There is no token"), ("hf_expiredexpired", "not valid"), (READER, "may not write")],
    ids=["none", "expired", "of a reader"],
)
def test_a_token_that_does_not_serve_is_found_before_the_long_part(
    place: Workplace, token: str, says: str
) -> None:
    done = place.call("convert", "-r", "recipe.yaml", "--push", HF_TOKEN=token)
    assert done.code == 3, done.err
    assert says in done.err and "Traceback" not in done.err
    assert not (place.folder / "out").exists()


def test_a_broken_gate_keeps_it_from_being_published(place: Workplace) -> None:
    done = place.call(
        "convert", "-r", "recipe.yaml", "--push", "--no-engine", "--only", "gptq-w4g32",
        "--set", "eval.gates.kl_mean_max=0.0",
    )  # fmt: skip
    assert done.code == 4, done.err
    assert "nothing was pushed: a gate failed" in done.err
    assert not place.hub.has("alice/tiny-gptq-w4g32")


def test_an_upload_that_fails_for_good_goes_on_later(place: Workplace) -> None:
    """With the command that the error names."""
    place.hub.faults.append(Fault(r"PUT /lfs/", "status", times=1000, status=500))
    done = place.call("convert", "-r", "recipe.yaml", "--push", "--no-engine", "--only", "gptq-w4g32")
    assert done.code == 3 and "Traceback" not in done.err, done.err
    repo = place.hub.repo("alice/tiny-gptq-w4g32")
    assert repo.private and "README.md" not in repo.files()
    place.hub.faults.clear()
    told = done.err.rpartition("try again later: quantkit ")[2].splitlines()[0]
    again = place.call(*shlex.split(told), "--no-engine")
    assert again.code == 0, again.err
    assert {"README.md", "model.safetensors"} <= repo.files().keys()
    assert not repo.private, f"`{told}` left it private, which the recipe does not say"
