"""The whole way: a repository of the Hub, one command, four repositories, and the engines that read them.

The command runs in a process of its own, loads its results in their engines and publishes them. What it
published is then downloaded by the Hub's own client for somebody who has nothing else, and loaded by the
engine as it is. Nothing is compared with files of the conversion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from quantkit import EvalText, resources
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.run.engine_check import own_logits
from quantkit.run.quantized import open_source
from quantkit.run.rows import evaluation_rows
from tests.hubplace import CARD, Ran, Workplace, nothing_private
from tests.hubserver import HubServer
from tests.interop.engines import engine_warnings, load

pytestmark = [
    pytest.mark.interop,
    # gptqmodel leaves temporary folders to the collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]


@dataclass(frozen=True)
class Published:
    """What is expected of one target; figures as tests/interop/test_verify.py has them.

    repo    repository, and within it a file where it holds several models
    kl      nats per token between the engine and quantkit, of the same files
    change  of the perplexity of the engine from the card's
    """

    repo: str
    engine: str
    packages: tuple[str, ...]
    kl: float
    change: float
    file: str = ""


LLAMA, GPTQ = ("llama_cpp",), ("gptqmodel", "optimum")
TARGETS = {
    "gguf-q4_k_m": Published("alice/demo-GGUF", "llama.cpp", LLAMA, 2e-3, 5e-3, "demo-llama-Q4_K_M.gguf"),
    "gguf-q8_0": Published("alice/demo-GGUF", "llama.cpp", LLAMA, 2e-3, 5e-3, "demo-llama-Q8_0.gguf"),
    # here on the kernel that the engine chooses, which rounds more than the one of the check
    "gptq-w4g128": Published("alice/demo-gptq-w4g128", "transformers+gptqmodel", GPTQ, 2e-4, 2e-3),
    "ct-w4g128": Published("alice/demo-ct-w4g128", "transformers", ("compressed_tensors",), 1e-4, 1e-3),
    "nf4": Published("alice/demo-nf4", "transformers", ("bitsandbytes",), 5e-4, 2e-3),
}
REPOS = sorted({target.repo for target in TARGETS.values()})
TEXT = EvalText(data="embedded", style="gptq", context=128, chunks=8)
RECIPE = """
quantkit: 1
source: org/demo-llama
output: {dir: out}
calibration: {set: embedded, rows: 8, length: 128}
targets:
  - gguf:q4_k_m@method=rtn,name=gguf-q4_k_m
  - gguf:q8_0@name=gguf-q8_0
  - gptq:w4g128@polish=0,name=gptq-w4g128
  - ct:w4g128@method=rtn,name=ct-w4g128
  - bitsandbytes:nf4@method=rtn,name=nf4
eval:
  perplexity: [{data: embedded, style: gptq, context: 128, chunks: 8}]
publish: {repo: "alice/demo-{target}", visibility: private-then-public}
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workplace, Ran]]:
    """One command."""
    missing = {name for target in TARGETS.values() for name in target.packages if find_spec(name) is None}
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    with HubServer() as hub:
        hub.add("org/demo-llama", resources.folder("demo-llama"))
        hub.add("org/demo-llama", {"README.md": CARD})
        place = Workplace(hub, tmp_path_factory.mktemp("publish") / "place")
        (place.folder / "recipe.yaml").write_text(RECIPE)
        done = place.run("convert", "-r", "recipe.yaml", "--push", "--log-file", "log.txt")
        assert done.code == 0, done.err
        yield place, done


@pytest.fixture(scope="module")
def fetched(published: tuple[Workplace, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every repository, downloaded by the client alone, without a login, into an empty cache."""
    place, _ = published
    cache = tmp_path_factory.mktemp("cache")
    return {repo: place.fetch(repo, cache) for repo in REPOS}


@cache
def rows(tokens_of: Path) -> Tensor:
    """(8, 128) tokens that the cards are measured on."""
    ((_, found),) = evaluation_rows((TEXT,), load_tokenizer(tokens_of))
    tokens: Tensor = found.tokens
    return tokens


def in_engine(target: Published, path: Path, tokens: Tensor) -> Tensor:
    """(rows, tokens, vocabulary) fp32 logits of the unmodified engine."""
    if target.engine == "llama.cpp":
        from tests.interop import llama

        return torch.stack([llama.logits(path, row.tolist()) for row in tokens])
    model = load(path)
    with engine_warnings(), torch.no_grad():
        found: Tensor = model(tokens).logits.float()
    return found


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(P ‖ Q) in nats per token."""
    p, q = (logits.double().log_softmax(-1) for logits in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """All tokens of a row count but its first."""
    logprobs = logits.double().log_softmax(-1)[:, :-1]
    return float(logprobs.gather(-1, tokens[:, 1:, None]).neg().mean().exp())


def stated(card: str, model: str) -> float:
    """The perplexity that `model-index` states of one model.

    The client's own reader puts several models into one.
    """
    index: list[dict[str, Any]] = yaml.safe_load(card.split("---\n")[1])["model-index"]
    (found,) = (entry for entry in index if entry["name"] == model)
    (value,) = (m["value"] for r in found["results"] for m in r["metrics"] if m["type"] == "perplexity")
    return float(value)


@pytest.mark.parametrize("name", TARGETS)
def test_the_engine_computes_what_was_published(name: str, fetched: dict[str, Path]) -> None:
    target, demo = TARGETS[name], resources.folder("demo-llama")
    folder = fetched[target.repo]
    path, tokens = folder / target.file, rows(demo)
    found = in_engine(target, path, tokens)
    cpu = torch.device("cpu")
    ours, source = (own_logits(open_source(place), tokens[0], cpu) for place in (path, demo))
    distance = divergence(ours, found[0])
    assert distance < target.kl
    if name != "gguf-q8_0":  # whose own rounding is as small as the engine's
        assert divergence(source, found[0]) > 10 * distance
    model = target.file.removesuffix(".gguf") or target.repo.partition("/")[2]
    told = stated((folder / "README.md").read_text(), model)
    assert perplexity(found, tokens) == pytest.approx(told, rel=target.change)


@pytest.mark.parametrize("name", TARGETS)
def test_it_is_said_which_engine_loaded_it(
    name: str, published: tuple[Workplace, Ran], fetched: dict[str, Path]
) -> None:
    place, done = published
    target = TARGETS[name]
    (check,) = json.loads((place.folder / "out" / name / "checks.json").read_text())["engines"]
    assert check["engine"] == target.engine and check["problem"] is None
    assert check["tokens"] == 128 and check["kl_mean"] < target.kl
    assert f"{name}: loaded by {target.engine} {check['version']}" in done.out
    card = (fetched[target.repo] / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if "| loads |" in line]
    label = name.removeprefix("gguf-").upper() if target.file else name.rpartition("-")[2]
    (cells,) = (cells for cells in lines if cells[0] == label)
    assert check["version"] in cells[1]
    assert cells[2:5] == ["cpu", "loads", "128"]
    assert float(cells[5]) == pytest.approx(check["kl_mean"], rel=0.1)
    if target.file:
        told = json.loads((fetched[target.repo] / "quantkit.json").read_text())
        assert told["checks"][name] == [check]


def test_what_was_published_is_public_and_tells_nothing(published: tuple[Workplace, Ran]) -> None:
    place, done = published
    for repo in REPOS:
        assert not place.hub.repo(repo).private
        assert f"{place.hub.url}/{repo}/tree/main" in done.out
    nothing_private(place, done, REPOS)
