"""Whether a path is a GGUF model, and which file of it comes first."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint import header_file
from quantkit.errors import SourceError
from quantkit.gguf.files import NO_MODEL, SHARD, SUFFIX


def find_gguf(path: Path) -> Path | None:
    """The first file of the GGUF model at `path`, a file or a folder; None where there is no such model.

    Of files that were not downloaded it suffices that `header_file` keeps their headers.
    SourceError for a folder of several models.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() != SUFFIX or not (path.is_file() or header_file.stands_in(path)):
        return None
    shard = SHARD.fullmatch(path.name)
    return path if shard is None else path.with_name(f"{shard['stem']}-00001-of-{shard['count']}{SUFFIX}")


def _in_folder(path: Path) -> Path | None:
    names = sorted(header_file.names_in(path))
    files = [path / n for n in names if n.endswith(SUFFIX) and not n.lower().startswith(NO_MODEL)]
    if not files or any(name.endswith(".safetensors") for name in names):
        return None
    firsts = list(dict.fromkeys(find_gguf(file) or file for file in files))
    if len(firsts) > 1:
        raise SourceError(
            f"`{path}` holds {len(firsts):,} models: {', '.join(f.name for f in firsts[:6])}",
            remedy=f"name one of them, as `{firsts[0]}`",
        )
    return firsts[0]
