"""Which files of a folder or repository make up a checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint.strict_json import parse_object
from quantkit.errors import SourceError, UnsupportedError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# where AutoGPTQ, auto-round and AutoAWQ keep what belongs into config.json
QUANTIZATION_FILES = ("quantize_config.json", "quantization_config.json", "quant_config.json")
_EXTRAS = (
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.tiktoken",
)
_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_MAX_JSON_BYTES = 100_000_000
_MAX_SHARDS = 100_000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d+)-of-(?P<count>\d{1,6})\.safetensors")
_DOWNLOAD_AGAIN = "the file is damaged or was tampered with: download it again"


def is_extra(name: str) -> bool:
    """Whether a file belongs next to the weights: tokenizer, template, licence; never code or pickles."""
    suffix = PurePosixPath(name).suffix.lower()
    known = any(fnmatchcase(name, pattern) for pattern in (*_EXTRAS, *_TERMS))
    return known and suffix not in _PICKLES and suffix != ".py"


def is_terms(name: str) -> bool:
    """Whether a file is of those extras that say under which terms the model may be used."""
    return is_extra(name) and any(fnmatchcase(name, p) for p in _TERMS)


def weight_files(
    where: str, names: Collection[str], read_index: Callable[[str], Mapping[str, str]]
) -> tuple[str, ...]:
    """The safetensors files that make up the model, in order, out of the file `names` of one folder.

    `model.safetensors` wins over an index, as in transformers; without either, every safetensors file
    counts, apart from the `consolidated*` copies that some repositories carry. `read_index` gives the
    weight_map of the index file it is asked for. SourceError, naming `where`, when files are missing or
    only pickles are there.
    """
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    if (index := index_file(names)) is not None:
        return _present(where, names, set(read_index(index).values()))
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise _no_weights(where, names)
    if any(name.startswith("model") for name in found):
        found = [name for name in found if not name.startswith("consolidated")]
    return _present(where, names, _complete(found))


def index_file(names: Collection[str]) -> str | None:
    """The index that lists the shards, unless `model.safetensors` makes it irrelevant."""
    if SINGLE_FILE in names:
        return None
    preferred = SINGLE_FILE.removesuffix(".safetensors") + INDEX_SUFFIX
    return (
        preferred if preferred in names else min((n for n in names if n.endswith(INDEX_SUFFIX)), default=None)
    )


def read_index(file: Path) -> dict[str, str]:
    """The weight_map of an index file: tensor name → the plain name of a file next to it."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"`{file}` has no weight_map", remedy=_DOWNLOAD_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard) or not shard.endswith(".safetensors"):
            shown = repr(shard)[:200]
            raise SourceError(
                f"`{file}`: tensor {name[:200]!r} points to {shown}, not to a safetensors file next to it",
                remedy=_DOWNLOAD_AGAIN,
            )
    return weight_map


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder.

    SourceError when it is missing or malformed, UnsupportedError for a folder with a GGUF file instead.
    """
    file = folder / CONFIG
    if file.is_file():
        return read_json(file)
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"`{folder}` is an adapter, not a model", remedy="merge it into its base model first"
        )
    if holds_gguf(folder):
        raise UnsupportedError(
            f"`{folder}` holds a GGUF file, whose codes cannot be moved to another format",
            remedy="quantize it anew: quantkit convert FILE.gguf --to FORMAT:SCHEME",
        )
    raise SourceError(f"`{folder}` has no {CONFIG}", remedy="copy it from where the weights came from")


def holds_gguf(folder: Path) -> bool:
    """Whether a GGUF file is there and no checkpoint around it."""
    return not (folder / CONFIG).is_file() and any(folder.glob("*.gguf"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys; SourceError otherwise."""
    try:
        size = file.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise SourceError(
                f"`{file}` has {size:,} bytes; the limit is {_MAX_JSON_BYTES:,}", remedy=_DOWNLOAD_AGAIN
            )
        return parse_object(file.read_bytes())
    except OSError as error:
        raise SourceError(
            f"cannot read `{file}`: {error.strerror}", remedy="check its permissions"
        ) from error
    except ValueError as error:
        reason = str(error)[:200]
        raise SourceError(f"`{file}` is not a JSON object: {reason}", remedy=_DOWNLOAD_AGAIN) from error


def check_folder(path: Path) -> None:
    """SourceError with close names unless `path` is a folder."""
    if path.is_dir():
        return
    if path.exists():
        raise SourceError(
            f"`{path}` is a file, not a checkpoint folder", remedy=f"give the folder `{path.parent}`"
        )
    raise SourceError(
        f"no folder `{path}`{did_you_mean(path)}",
        remedy="check the path; a model of the Hub has to be downloaded first",
    )


def did_you_mean(path: Path, others: Collection[str] = ()) -> str:
    """``"; did you mean `a` or `b`?"`` out of the folders next to `path` and `others`, or ``""``."""
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {p.name: str(p) for p in siblings if p.is_dir()}
    close = [folders[name] for name in difflib.get_close_matches(path.name, folders, n=2)]
    close += difflib.get_close_matches(str(path), others, n=2)
    return f"; did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def _is_plain(name: str) -> bool:
    """No separators, drives, hidden or unprintable names: the file can only be in the folder itself."""
    return name.isprintable() and not name.startswith(".") and not any(c in name for c in '/\\:*?"<>|')


def _complete(names: Sequence[str]) -> set[str]:
    """`names` and every sibling that a name like ``model-00001-of-00003.safetensors`` promises."""
    expected = set(names)
    for name in names:
        shard = _SHARD.fullmatch(name)
        if shard is not None and (count := int(shard["count"])) <= _MAX_SHARDS:
            digits = len(shard["index"])
            siblings = range(1, count + 1)
            expected |= {f"{shard['stem']}-{i:0{digits}d}-of-{shard['count']}.safetensors" for i in siblings}
    return expected


def _present(where: str, names: Collection[str], expected: set[str]) -> tuple[str, ...]:
    missing = sorted(expected.difference(names))
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise SourceError(
            f"{where} lacks {len(missing):,} of {len(expected):,} weight files: {listed}{more}",
            remedy="the download did not finish: download the missing files",
        )
    return tuple(sorted(expected))


def _no_weights(where: str, names: Collection[str]) -> SourceError:
    pickles = sorted(name for name in names if PurePosixPath(name).suffix.lower() in _PICKLES)
    if not pickles:
        return SourceError(
            f"{where} has no safetensors files", remedy="name the folder that holds the weights"
        )
    return SourceError(
        f"pickle checkpoints are refused: {where} has `{pickles[0]}` and no safetensors",
        remedy="convert it to safetensors: load it with transformers where you trust it and call "
        "save_pretrained, or use https://huggingface.co/spaces/safetensors/convert",
    )
