"""Special tokens that somebody typed stay text.

In: a fast tokenizer. Out: `Controls`, which rewrites ("cloaks") special-token strings inside contents with private-use
characters, one for one, so that positions and a template's string handling stay as they are; and encodes a text whose
cloaked strings are ordinary text and whose plain ones are the template's control tokens. The latter by a copy of the
tokenizer in which the control tokens are spelled in cloaked characters: it reads everything else as the original does.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from sft_core.errors import ModelError, RowError

CLOAK = 0xF0000
"""First code point of Unicode's Supplementary Private Use Area A."""


@dataclass(frozen=True)
class Controls:
    """The special tokens of one tokenizer, by string, longest first."""

    tokenizer: Any
    ids: dict[str, int]
    ends: tuple[str, ...]
    """All added tokens, special or not, that can end an answer: by one of them generation can stop."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any special token."""
        return re.compile("|".join(map(re.escape, self.ids)) or "(?!)")

    @cached_property
    def id_set(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self.ids.values())

    @cached_property
    def _cloaked(self) -> dict[int, int]:
        return {ord(c): CLOAK + k for k, c in enumerate(sorted(set("".join(self.ids))))}

    @cached_property
    def _uncloaked(self) -> dict[int, int]:
        return {cloaked: plain for plain, cloaked in self._cloaked.items()}

    def typed_in(self, value: object) -> bool:
        """Whether a special token's string occurs in any text of `value`, keys of mappings included."""
        if isinstance(value, str):
            return self.pattern.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.typed_in, value)) or any(map(self.typed_in, value.values()))
        return isinstance(value, list | tuple) and any(map(self.typed_in, value))

    def cloak(self, value: Any) -> Any:
        """`value` with every special token's string in it cloaked."""
        if isinstance(value, str):
            if any(ord(c) in self._uncloaked for c in value):
                raise RowError(
                    "private_use_text", f"special tokens beside characters of U+{CLOAK:X}.. cannot be told apart"
                )
            return self.pattern.sub(lambda match: match.group().translate(self._cloaked), value)
        if isinstance(value, dict):
            return {key: self.cloak(part) for key, part in value.items()}
        return [self.cloak(part) for part in value] if isinstance(value, list) else value

    def uncloak(self, text: str) -> str:
        """The text as it was typed."""
        return text.translate(self._uncloaked)

    def encoding_of_cloaked(self, text: str) -> Any:
        """The copy's tokenizers.Encoding of `text`: cloaked strings are ordinary text, plain ones control tokens."""
        pieces, end = [], 0
        for match in self.pattern.finditer(text):
            pieces += [self.uncloak(text[end : match.start()]), match.group().translate(self._cloaked)]
            end = match.end()
        return self._copy[0].encode("".join([*pieces, self.uncloak(text[end:])]), add_special_tokens=False)

    def ids_of_cloaked(self, encoding: Any) -> list[int]:
        """The tokenizer's own ids of what `encoding_of_cloaked` gave."""
        ids_by_copy = self._copy[1]
        return [ids_by_copy.get(token, token) for token in encoding.ids]

    @cached_property
    def _copy(self) -> tuple[Any, dict[int, int]]:
        from tokenizers import Tokenizer  # needed by rows with typed special tokens only

        spelled = {string: string.translate(self._cloaked) for string in self.ids}
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        copy = Tokenizer.from_str(json.dumps(_respell(description, spelled)))
        of_copy = copy.get_vocab(with_added_tokens=True)
        return copy, {of_copy[cloaked]: self.ids[string] for string, cloaked in spelled.items()}


@lru_cache(maxsize=8)
def controls_of(tokenizer: Any) -> Controls:
    """The special tokens of `tokenizer`. ModelError if it cannot map tokens to characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{tokenizer.name_or_path}: {type(tokenizer).__name__} is not a fast tokenizer, so tokens cannot "
            "be mapped to characters; the model folder needs a tokenizer.json"
        )
    added = tokenizer.added_tokens_decoder
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    ordered = sorted(special.items(), key=lambda entry: (-len(entry[0]), entry[0]))
    ends = tuple(token.content for token in added.values() if token.content.strip())
    return Controls(tokenizer, dict(ordered), ends)


def _respell(description: dict[str, Any], spelled: dict[str, str]) -> dict[str, Any]:
    """tokenizer.json's content with special tokens respelled, in the list of added tokens and in the vocabulary."""
    model = dict(description["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelled.get(piece, piece): number for piece, number in vocabulary.items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[spelled.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        pairs = (tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if not spelled.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    added = [{**t, "content": spelled.get(t["content"], t["content"])} for t in description["added_tokens"]]
    off = {"truncation": None, "padding": None, "post_processor": None}
    return {**description, **off, "model": model, "added_tokens": added}
