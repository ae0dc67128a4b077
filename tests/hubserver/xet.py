"""Xet without a server of its own: `hf_xet` stores chunks in a folder that is named ``local://<dir>``.

Layout of a shard file (``**/shards/*.mdb``): 48 bytes of header; then per file a record of 48 bytes
(hash 32, flags u32, count u32, 8 unused), `count` segments of 48 bytes (hash of the xorb 32, flags u32,
bytes u32, first chunk u32, end chunk u32), as many verification records if bit 31 of the flags is set,
and, if bit 30 is, one record of 48 bytes that begins with the sha256; the end is a record of 0xFF.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER, _RECORD, _CHUNK = 48, 48, 8
_END = b"\xff" * 32
_VERIFIED, _NAMED = 1 << 31, 1 << 30


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a shard; it begins in chunk `chunk` of the container `xorb`."""

    hash: str
    size: int
    sha256: str | None
    xorb: str
    chunk: int


class XetStore:
    """A folder that the client's own Xet code fills and reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.url = f"local://{self.folder}"
        self._read: dict[Path, tuple[_File, ...]] = {}

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of a file that was uploaded, by its sha256."""
        return next((file.hash for file in self._files() if file.sha256 == sha256), None)

    def size_of(self, sha256: str) -> int:
        return next(file.size for file in self._files() if file.sha256 == sha256)

    def read(self, hash: str, size: int) -> bytes:
        """The bytes of a file, put together by the client's own code."""
        import hf_xet  # type: ignore[import-untyped]

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
                group.start_download_file(hf_xet.XetFileInfo(hash, size), str(target))
            return target.read_bytes()

    def corrupt(self, hash: str) -> None:
        """Flip a byte of the chunk that a file begins with (and of every file that shares it)."""
        file = next(file for file in self._files() if file.hash == hash)
        (xorb,) = self.folder.rglob(f"xorbs/*.{file.xorb}")
        content = bytearray(xorb.read_bytes())
        at = 0
        for _ in range(file.chunk):
            at += _CHUNK + _length(content, at)
        content[at + _CHUNK + _length(content, at) // 2] ^= 0xFF
        xorb.chmod(0o644)
        xorb.write_bytes(content)

    def _files(self) -> Iterator[_File]:
        """All files of all shards; a shard never changes once it is there."""
        for path in sorted(self.folder.rglob("shards/*.mdb")):
            if path not in self._read:
                self._read[path] = tuple(_parse(path.read_bytes()))
            yield from self._read[path]


def _parse(shard: bytes) -> Iterator[_File]:
    at = _HEADER
    while shard[at : at + 32] != _END:
        hash = _hex(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        segments = [at + _RECORD * (1 + i) for i in range(count)]
        at += _RECORD * (1 + count * (2 if flags & _VERIFIED else 1))
        sha256 = _hex(shard[at : at + 32]) if flags & _NAMED else None
        at += _RECORD if flags & _NAMED else 0
        size = sum(struct.unpack_from("<I", shard, segment + 36)[0] for segment in segments)
        chunk = struct.unpack_from("<I", shard, segments[0] + 40)[0]
        yield _File(hash, size, sha256, _hex(shard[segments[0] : segments[0] + 32]), chunk)


def _length(xorb: bytearray, chunk: int) -> int:
    """Bytes of the chunk's data in the container, which follow its head: version u8, length u24,
    compression u8, length of the data when unpacked u24."""
    return int.from_bytes(xorb[chunk + 1 : chunk + 4], "little")


def _hex(hash: bytes) -> str:
    """Hashes are four little-endian integers of 64 bits, printed as numbers."""
    return "".join(hash[i : i + 8][::-1].hex() for i in range(0, 32, 8))
