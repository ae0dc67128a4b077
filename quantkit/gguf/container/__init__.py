"""The GGUF container: written tensor by tensor by the package gguf, read without copying by a parser of ours
that may be given anything (`reading` says why).

    "GGUF"  u32 version  u64 tensors  u64 keys
    key    { string name, u32 type, value }
    tensor { string name, u32 dimensions, u64 sizes (innermost first), u32 type, u64 offset }
    zeros up to the alignment, then the tensors, each padded with zeros to the alignment
A string is a u64 of bytes and UTF-8; an array a u32 type, a u64 count and the elements. Everything is
little endian. A model may lie in several files, each a whole GGUF; only the first has the metadata.
"""

from quantkit.gguf.container.metadata import Typed, Value
from quantkit.gguf.container.reading import (
    EndsEarly,
    FileHeader,
    Opened,
    check_filled,
    open_file,
    parse_header,
    read,
)
from quantkit.gguf.container.stored import Stored, as_bytes
from quantkit.gguf.container.writing import (
    file_bytes,
    plan_shards,
    shard_bytes,
    shard_names,
    write,
    write_shards,
)
from quantkit.gguf.tables import library

__all__ = [
    "EndsEarly",
    "FileHeader",
    "Opened",
    "Stored",
    "Typed",
    "Value",
    "as_bytes",
    "check_filled",
    "file_bytes",
    "library",
    "open_file",
    "parse_header",
    "plan_shards",
    "read",
    "shard_bytes",
    "shard_names",
    "write",
    "write_shards",
]
