"""Files that are whole or absent: written to a sibling, flushed to the disk, then renamed.

Every OSError while writing becomes a RunError; running out of space says how much was still needed.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from quantkit.errors import BudgetError, RunError

PARTIAL = ".partial"
_NO_SPACE = {
    errno.ENOSPC: ("disk full", "free space"),
    errno.EDQUOT: ("disk quota exceeded", "free space or have the quota raised"),
    errno.EFBIG: ("file size limit exceeded", "raise the limit (`ulimit -f`), write smaller shards"),
}


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the newlines it has; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Replace `path` by `data` whole or not at all; RunError when the disk refuses."""
    file = AtomicFile(path, size=memoryview(data).nbytes)
    try:
        file.write(data)
        file.commit()
    finally:
        file.discard()


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut; OSError when the folder cannot be opened."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush folders; there is nothing better to do there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace_dir(partial: Path, final: Path) -> None:
    """Rename the finished folder `partial` to `final`, replacing it; both must be on one file system.

    A rename cannot replace a folder that has content, so the old one steps aside first. Killed between
    the two renames, `final` is absent and its old content is in the sibling ``<name>.old``.
    """
    old = final.with_name(f"{final.name}.old")
    try:
        fsync_dir(partial)
        if final.exists():
            if old.exists():
                shutil.rmtree(old)
            final.rename(old)
        partial.rename(final)
        fsync_dir(final.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        if old.exists() and not final.exists():
            old.rename(final)
        raise write_error(error, final, needed=0) from error


def write_error(error: OSError, path: Path, *, needed: int) -> RunError:
    """The RunError for an OSError while writing `path` with `needed` bytes still to come."""
    if error.errno not in _NO_SPACE:
        reason = error.strerror or str(error)
        return RunError(f"cannot write `{path}`: {reason}", remedy="check the folder and its permissions")
    what, remedy = _NO_SPACE[error.errno]
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return BudgetError(
        f"{what} while writing `{path}`: {needed:,} bytes still needed, {free:,} bytes free",
        needed=needed,
        available=free,
        remedy=f"{remedy} and run the same command again, it continues",
    )


class AtomicFile:
    """A file under construction at ``<path>.partial``; `commit` puts it in place, `discard` removes it.

    `size` is how many bytes will be written, `beyond` how many more follow in other files; both only
    serve to say what was still needed when the disk fills up. After `commit`, `discard` does nothing.
    """

    def __init__(self, path: Path, *, size: int, beyond: int = 0) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self._missing = size + beyond
        try:
            self._file = self.partial.open("wb", buffering=0)
        except OSError as error:
            raise write_error(error, path, needed=self._missing) from error

    def write(self, data: bytes | bytearray | memoryview, *, at: int | None = None) -> None:
        """Append `data`, or write it from byte position `at`."""
        rest = memoryview(data)
        rest = rest.cast("B") if rest.nbytes else rest  # Python refuses to cast an empty view
        try:
            if at is not None:
                self._file.seek(at)
            while rest:
                written = self._file.write(rest)
                self._missing -= written
                rest = rest[written:]
        except OSError as error:
            raise write_error(error, self.path, needed=self._missing) from error

    def commit(self) -> None:
        """Flush to the disk and rename to `path`."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self.partial.replace(self.path)
            fsync_dir(self.path.parent)
        except OSError as error:
            raise write_error(error, self.path, needed=self._missing) from error

    def discard(self) -> None:
        """Close and remove what was written, unless it was committed."""
        self._file.close()
        self.partial.unlink(missing_ok=True)
