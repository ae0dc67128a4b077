"""GGUF files as sources: found, described, and seen as the checkpoint that they were made from."""

from quantkit.run.gguf_source.find import find_gguf
from quantkit.run.gguf_source.opening import open_gguf, tokenizer_folder
from quantkit.run.gguf_source.view import GgufCheckpoint

__all__ = ["GgufCheckpoint", "find_gguf", "open_gguf", "tokenizer_folder"]
