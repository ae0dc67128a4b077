"""Metadata of a GGUF file, asked for by name and type; what nobody asked for is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import SourceError, UnsupportedError

_OWN_CONFIG = "put the config.json of the model it was made from beside the file: it is preferred"
# say nothing about what is computed
_IDLE = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")


@dataclass(slots=True)
class Keys:
    """The keys of one architecture in `metadata`, by their names without its prefix.

    where  the file, for messages
    """

    where: str
    architecture: str
    metadata: Mapping[str, Any]
    _asked: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """A count; a list of one per block counts where all of them are the same."""
        found = self._get(key, default)
        if isinstance(found, Sequence) and not isinstance(found, str):
            if len(set(found)) != 1:
                raise UnsupportedError(
                    f"`{self.where}`: {self.architecture}.{key} differs between blocks: {list(found[:8])}",
                    remedy=_OWN_CONFIG,
                )
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise self._wrong(key, found, "a count")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(key, found, "a number")
        # a float of 32 bits reads as the shortest decimal that is the same number
        return _shortest(float(found))

    def text(self, key: str, default: str | None = None) -> str:
        found = self._get(key, default)
        if not isinstance(found, str):
            raise self._wrong(key, found, "a text")
        return found

    def flags(self, key: str, blocks: int) -> list[bool] | int | None:
        """One flag per block, or the period of a pattern; None when the key is absent."""
        if key not in self:
            return None
        found = self._get(key, None)
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != blocks:
            raise self._wrong(key, found, f"{blocks} flags")
        return [bool(flag) for flag in found]

    def token(self, key: str) -> int | None:
        """The id of a special token, None where the file has none."""
        found = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return found if isinstance(found, int) else None

    def require(self, key: str, value: float, why: str) -> None:
        """UnsupportedError unless the key is absent or says `value`."""
        if key in self and (found := self.number(key)) != value:
            raise UnsupportedError(
                f"`{self.where}`: {self.architecture}.{key} is {found:g}: {why}", remedy=_OWN_CONFIG
            )

    def finish(self) -> None:
        """UnsupportedError names the keys that nobody asked for and that might change what is computed."""
        prefix = f"{self.architecture}."
        unknown = [
            f"{key} = {value!r:.60}"
            for key, value in self.metadata.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in (*_IDLE, *self._asked) and value
        ]
        if unknown:
            raise UnsupportedError(
                f"`{self.where}` says what quantkit does not know: {', '.join(unknown)}", remedy=_OWN_CONFIG
            )

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise SourceError(
                f"`{self.where}` does not say {self.architecture}.{key}, which its model needs",
                remedy="the file is incomplete: download it again, or make it anew",
            )
        return found

    def _wrong(self, key: str, found: object, expected: str) -> SourceError:
        return SourceError(
            f"`{self.where}`: {self.architecture}.{key} is {found!r:.60}, not {expected}",
            remedy="the file is damaged or was tampered with: download it again",
        )


def _shortest(value: float) -> float:
    """The decimal with fewest digits that is the same 32-bit float."""
    import struct

    single = struct.pack("<f", value)
    for digits in range(1, 9):
        text = f"{value:.{digits}g}"
        if struct.pack("<f", float(text)) == single:
            return float(text)
    return value
