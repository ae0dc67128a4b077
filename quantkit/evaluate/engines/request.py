"""What a process with an engine is asked, and what it says: JSON files in a folder that both know."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Engine = Literal["transformers", "gptqmodel", "hqq", "llamacpp"]
Stage = Literal["starting", "loading", "done"]
_REQUEST, _ANSWER, _LOGITS, _TOKENS = "request.json", "answer.json", "logits.npy", "tokens.json"


@dataclass(frozen=True, slots=True)
class Request:
    """A model to load, and tokens to run through it; or texts to make tokens of, for which the vocabulary is
    enough.

    path     folder of safetensors, or a GGUF file; absolute
    ids      one sequence
    texts    each by itself, without tokens around them; special tokens in them are known
    device   as torch names it; llama.cpp runs on the CPU whatever it says
    dtype    what floats are computed in: float32, or what the files hold
    seconds  after which an answer is not waited for any more
    """

    engine: Engine
    path: str
    ids: tuple[int, ...]
    device: str = "cpu"
    threads: int = 1
    dtype: Literal["float32", "stored"] = "float32"
    seconds: float = 600.0
    texts: tuple[str, ...] = ()

    def write(self, room: Path) -> None:
        (room / _REQUEST).write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, room: Path) -> Request:
        found: dict[str, Any] = json.loads((room / _REQUEST).read_text("utf-8"))
        return cls(**{**found, "ids": tuple(found["ids"]), "texts": tuple(found["texts"])})


@dataclass(frozen=True, slots=True)
class Answer:
    """How far an engine came.

    version  of the engine and of the packages that it needs for these files; empty: it did not come so far
    problem  what went wrong in `stage`; None: nothing
    starved  it ended as processes do that ask for more memory than there is
    late     it was ended because it took too long
    """

    stage: Stage
    version: str = ""
    problem: str | None = None
    peak_bytes: int | None = None
    starved: bool = False
    late: bool = False

    def write(self, room: Path) -> None:
        """Whole or not at all: the process may be killed at any moment."""
        partial = room / f"{_ANSWER}.partial"
        partial.write_text(json.dumps(asdict(self)), "utf-8")
        partial.replace(room / _ANSWER)

    @classmethod
    def read(cls, room: Path) -> Answer | None:
        """What was written last, None: nothing."""
        file = room / _ANSWER
        return cls(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def logits_file(room: Path) -> Path:
    """Where the logits of an answer that is done lie, as numpy saves them."""
    return room / _LOGITS


def tokens_file(room: Path) -> Path:
    """Where the tokens of texts lie, as JSON: a list of ids for each."""
    return room / _TOKENS


def names() -> tuple[Engine, ...]:
    """The engines that there are modules for."""
    return get_args(Engine)
