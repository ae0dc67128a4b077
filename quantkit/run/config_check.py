"""Whether the configuration beside the weights is that of the source, and names tokens that there are.

An engine reads the same config.json, so it computes with a wrong one without noticing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.skeleton import config_of
from quantkit.run.verification import Verification

GENERATION = "generation_config.json"
SPECIALS = ("bos_token_id", "eos_token_id", "pad_token_id")
# a pad token that is none, in older files
_NO_TOKEN = -1
_DTYPES = ("dtype", "torch_dtype")
# say where a model comes from, how it is trained or what is returned beside logits
_IDLE = (
    *(
        "_*",
        *_DTYPES,
        "quantization_config",
        "transformers_version",
        "architectures",
        "auto_map",
        "use_cache",
    ),
    *("return_dict", "output_*", "torchscript", "chunk_size_feed_forward", "gradient_checkpointing"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class"),
    *(
        "*dropout",
        "*dropout_rate",
        "*_pdrop",
        "layerdrop",
        "initializer_*",
        "*_coef",
        "*jitter*",
        "summary_*",
    ),
    *("pretraining_tp", "cache_implementation", "is_encoder_decoder"),
)
_TOKENS = ("*_token_id", "*_token_ids", "*_token_index")
_Config = Mapping[str, Any]


def check_config(report: Verification, own: Checkpoint, source: Checkpoint, *, ours: bool) -> None:
    """config.json and the ids of generation_config.json beside the source's.

    ours  quantkit wrote it, and copies all: other tools may have meant to name other tokens
    """
    said = report.problems if ours else report.notes
    found, wanted = _comparable(own, source)
    for line, token in differences(found, wanted):
        (said if token else report.problems).append(f"config.json: {line}")
    dtype, other = (next((c.config[k] for k in _DTYPES if k in c.config), None) for c in (own, source))
    if dtype != other and dtype is not None and other is not None:
        report.notes.append(f"config.json says {dtype}, that of the source {other}")
    generation, other = (_generation(c) for c in (own, source))
    for name in SPECIALS:
        if name in generation or name in other:
            ids, expected = ({**c.config, **g}.get(name) for c, g in ((own, generation), (source, other)))
            if _plain(ids) != _plain(expected):
                said.append(f"{GENERATION}: {name} is {ids!r}, that of the source {expected!r}")
    report.checks["configuration"] = "compared with the source's"


def check_token_ids(report: Verification, own: Checkpoint, like: Checkpoint | None) -> None:
    """Special tokens have rows in the embedding; what `like` has wrong, too, is only noted."""
    ids = dict(_ids(own))
    rows = _rows(own)
    if rows is None:
        return
    same = {} if like is None else dict(_ids(like))
    for place, numbers in ids.items():
        if wrong := [n for n in numbers if not 0 <= n < rows and (n, "pad" in place) != (_NO_TOKEN, True)]:
            said = report.notes if same.get(place) == numbers else report.problems
            said.append(f"{place} is {wrong[0]:,}, and there are {rows:,} tokens")


def differences(
    found: _Config, wanted: _Config, tolerance: float = 0.0, prefix: str = ""
) -> Iterator[tuple[str, bool]]:
    """(what differs of two configurations, whether it only names a token); absent is null."""
    for key in sorted(found.keys() | wanted.keys()):
        if any(fnmatchcase(key, pattern) for pattern in _IDLE):
            continue
        own, other = found.get(key), wanted.get(key)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            yield from differences(own, other, tolerance, f"{prefix}{key}.")
        elif not _same(own, other, tolerance):
            token = any(fnmatchcase(key, pattern) for pattern in _TOKENS)
            yield f"`{prefix}{key}` is {_shown(own)}, that of the source {_shown(other)}", token


def _comparable(own: Checkpoint, source: Checkpoint) -> tuple[_Config, _Config]:
    """Both as Transformers reads them, so that defaults and older spellings mean the same; as they are where
    it does not know the model."""
    if own.model_type != source.model_type:
        return {"model_type": own.model_type}, {"model_type": source.model_type}
    try:
        return _read(own), _read(source)
    except (SourceError, UnsupportedError):
        shared = own.config.keys() & source.config.keys()
        return {k: own.config[k] for k in shared}, {k: source.config[k] for k in shared}


def _read(checkpoint: Checkpoint) -> _Config:
    """What the class of the config knows: other keys change nothing."""
    config = config_of(checkpoint)
    known = type(config)().to_dict()
    return _filled({key: value for key, value in config.to_dict().items() if key in known})


def _filled(config: dict[str, Any]) -> _Config:
    """With what models compute where a config says nothing."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and width and "head_dim" in config:
        config["head_dim"] = config["head_dim"] or width // heads
    if heads and "num_key_value_heads" in config:
        config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    return {key: _filled(value) if isinstance(value, dict) else value for key, value in config.items()}


def _same(own: Any, other: Any, tolerance: float) -> bool:
    own, other = _plain(own), _plain(other)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (own, other))
    if numbers and tolerance:
        return math.isclose(own, other, rel_tol=tolerance)
    if isinstance(own, list) and isinstance(other, list) and len(own) == len(other):
        return all(_same(a, b, tolerance) for a, b in zip(own, other, strict=True))
    return bool(own == other)


def _plain(value: Any) -> Any:
    """A list of one is its element, an empty one or an empty object nothing."""
    if isinstance(value, list | tuple):
        return _plain(value[0]) if len(value) == 1 else list(value) or None
    return None if value == {} else value


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json, empty where there is none that reads."""
    file = (checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent) / GENERATION
    try:
        return folder.read_json(file) if file.is_file() else {}
    except SourceError:
        return {}


def _ids(checkpoint: Checkpoint) -> Iterator[tuple[str, list[int]]]:
    """Where special tokens are named → their ids."""
    for place, content in ((folder.CONFIG, checkpoint.config), (GENERATION, _generation(checkpoint))):
        for name in SPECIALS:
            value = content.get(name)
            numbers = value if isinstance(value, list) else [value]
            yield f"{place}: {name}", [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]


def _rows(checkpoint: Checkpoint) -> int | None:
    """Tokens that the model has; None where that is not known."""
    try:
        rows = config_of(checkpoint).get_text_config().to_dict().get("vocab_size")
    except (SourceError, UnsupportedError):
        rows = checkpoint.config.get("vocab_size")
    return rows if isinstance(rows, int) and rows > 0 else None
