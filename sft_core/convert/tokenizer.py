"""The tokenizer's files, chat template included, travel from checkpoint to adapter to merged model."""

import shutil
from pathlib import Path

from sft_core.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
"""What `save_pretrained` of transformers' tokenizers writes."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A folder has a tokenizer if it has one of these."""


def has_tokenizer(folder: Path) -> bool:
    """True if a tokenizer can be loaded from `folder`."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(folder: Path, out: Path) -> tuple[str, ...]:
    """Copy the tokenizer files of `folder` to `out`; their names."""
    names = tuple(name for name in TOKENIZER_FILES if (folder / name).is_file())
    for name in names:
        shutil.copyfile(folder / name, out / name)
    return names


def find_tokenizer(checkpoint: Path, tokenizer: Path | None) -> Path | None:
    """The folder asked for, else the checkpoint, or `tokenizer/` in it or beside it; None if none has one."""
    if tokenizer is not None:
        if not has_tokenizer(tokenizer):
            raise ModelError(f"tokenizer {tokenizer}: no tokenizer there (one of {', '.join(VOCABULARIES)})")
        return tokenizer
    places = (checkpoint, checkpoint / "tokenizer", checkpoint / "checkpoint", checkpoint.parent / "tokenizer")
    return next((folder for folder in places if has_tokenizer(folder)), None)
