"""The tokenizer of the pack step: loaded from where it comes from, saved with its template, and loaded as saved.

In: a model folder or a hub id. Out: a tokenizer with a pad token; and the one that was saved, once a process.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft_core.errors import ModelError


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer comes from: a folder or a hub id; `trust_remote_code`: whether code in it may run."""

    path: Path | str
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class SavedTokenizer:
    """The tokenizer as the step saved it: the same wherever its files, known by their hash, lie."""

    path: Path = field(compare=False)
    content: str
    trust_remote_code: bool


def load_tokenizer(source: TokenizerSource) -> Any:
    """The tokenizer. ModelError if none can be loaded."""
    from transformers import AutoTokenizer  # imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source.path}: no tokenizer can be loaded: {str(error).splitlines()[0]}") from None
    tokenizer.init_kwargs.pop("local_files_only", None)  # follows HF_HUB_OFFLINE, and would be saved
    return tokenizer


@lru_cache(maxsize=1)
def load_saved_tokenizer(saved: SavedTokenizer) -> Any:
    """The tokenizer; the same object for every shard."""
    return load_tokenizer(TokenizerSource(saved.path, saved.trust_remote_code))


def pad_with_eos(tokenizer: Any, source: TokenizerSource) -> None:
    """Fill rows with eos where there is no pad token: padding is untrained and apart, so any token of the vocabulary
    serves, and the vocabulary is never resized."""
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{source.path}: the tokenizer has neither a pad nor an eos token; set one in tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token
