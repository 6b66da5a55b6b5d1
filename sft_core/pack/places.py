"""Which tokens hold which characters of a text.

In: a text's tokens. Out: for a span of characters, the first token and the one past the last that hold any of it.

Byte-level BPE spells every byte of a text, in order, so the places follow from the lengths of the tokens: `ByBytes`.
Then the tokenizer need not track offsets (`encode_batch_fast`), an eighth of its work. Everything else asks the
tokenizer: `ByOffsets`.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ByOffsets:
    """Places as a tokenizers.Encoding has them. Its list of offsets is made only where it must be: it is slow."""

    encoding: Any

    def span(self, start: int, end: int) -> tuple[int, int]:
        """First token and the one past the last that hold a character from `start` to `end`."""
        encoding = self.encoding
        first, last = encoding.char_to_token(start), encoding.char_to_token(end)
        if first is None or last is None:  # a border between tokens: white space that was dropped, the text's end
            offsets = encoding.offsets
            first = bisect_right(offsets, start, key=lambda offset: offset[1])
            return first, bisect_left(offsets, end, key=lambda offset: offset[0])
        while last and encoding.token_to_chars(last - 1)[0] >= end:  # tokens without a character of their own
            last -= 1
        while last < len(encoding) and encoding.token_to_chars(last)[0] < end:
            last += 1
        return first, last

    def begins_before(self, token: int, start: int) -> bool:
        """Whether `token` begins before character `start`."""
        return bool(self.encoding.token_to_chars(token)[0] < start)


@dataclass(frozen=True, slots=True)
class ByBytes:
    """Places in texts whose tokens are laid end to end, counted in bytes, for all texts at once."""

    borders: NDArray[np.int64]
    """Where each token begins, and where the last ends."""
    fits: list[bool]
    """Whether the tokens of each text are as long as it: not if the tokenizer dropped or added anything."""
    zeros: list[int]
    """Where each text begins."""

    @classmethod
    def of(cls, texts: Sequence[str], ids: Numbers, starts: Numbers, lengths: Numbers) -> "ByBytes":
        """`ids[starts[i] : starts[i + 1]]` are the tokens of text i, `lengths` the bytes of a token by its id."""
        borders = np.concatenate([[0], np.cumsum(lengths[ids])]).astype(np.int64)
        zeros = borders[starts]
        sizes = np.fromiter((bytes_before(text, len(text)) for text in texts), np.int64, len(texts))
        return cls(borders, (np.diff(zeros) == sizes).tolist(), zeros[:-1].tolist())

    def spans(self, starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers]:
        """First tokens and the ones past the last that hold any byte from `starts` to `ends`."""
        first = np.searchsorted(self.borders[1:], starts, side="right")
        return first, np.searchsorted(self.borders[:-1], ends, side="left")


def bytes_before(text: str, character: int) -> int:
    """Bytes of UTF-8 before a character."""
    return character if text.isascii() else len(text[:character].encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=8)
def byte_lengths(tokenizer: Any) -> NDArray[np.int64] | None:
    """Bytes of text by id, of a fast tokenizer whose tokens spell the bytes of a text; None for others."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = description["model"], description["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    spelled = (
        model["type"] == "BPE"
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and description["normalizer"] is None
        and steps[-1].get("type") == "ByteLevel"
        and not any(step.get("add_prefix_space") for step in steps)
        and all(step["type"] in ("ByteLevel", "Digits", "Split") for step in steps)
        and not any(step.get("behavior") == "Removed" for step in steps)
    )
    if not spelled:
        return None
    lengths = {token_id: len(piece) for piece, token_id in model["vocab"].items()}  # one character a byte
    lengths |= {token["id"]: len(token["content"].encode()) for token in description["added_tokens"]}
    table = np.zeros(max(lengths) + 1, np.int64)
    table[list(lengths)] = list(lengths.values())
    return table
