"""A tokenizer's ids against the rows of the embedding that is looked up with them; a base with rows for all of them.

In: a model folder. Out: notes, or ModelError; of `resize`, another folder.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from sft_core.base_check.generation import saveable
from sft_core.convert.skeleton import skeleton, token_modules
from sft_core.convert.tokenizer import VOCABULARIES, copy_tokenizer, has_tokenizer
from sft_core.errors import ModelError
from sft_core.quiet import transformers_silent

NOT_TEXT = re.compile("image|audio|video|vision|speech|sound", re.IGNORECASE)
"""Tokens that stand for something other than text: a text model's tokenizer may have one that it has no row for, as
google/gemma-3-1b-it has."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`rows` of the embedding; the tokens `beyond` them by id, and of these the ones that are `text`."""

    rows: int
    beyond: dict[int, str]

    @property
    def text(self) -> list[str]:
        """In the order of their ids."""
        return [token for _, token in sorted(self.beyond.items()) if not NOT_TEXT.search(token)]

    @property
    def needed(self) -> int:
        """Rows with which every token has one."""
        return max(self.beyond, default=self.rows - 1) + 1


def check_vocabulary(model: str, folder: Path) -> tuple[str, ...]:
    """ModelError if there is no tokenizer, or if it has text tokens that the embedding has no row for. Weights are not
    needed."""
    found = _read(model, folder)
    if found.text:
        raise ModelError(
            f"base model {model}: its tokenizer has {found.needed:,} tokens, its embedding {found.rows:,} rows: "
            f"{', '.join(map(repr, found.text[:3]))}{' and others' if len(found.text) > 3 else ''} would be looked up "
            "outside of it. Take the tokenizer of these weights, or give the model more rows: sft convert resize "
            f"{model} OUT"
        )
    if found.beyond:
        names = ", ".join(map(repr, found.beyond.values()))
        return (f"base model {model}: its embedding has no row for {names}, which is no text and must not occur",)
    return ()


@dataclass(frozen=True, slots=True)
class Resized:
    """Rows before and after, and the tokens whose rows are new and have to be trained, by their ids."""

    before: int
    after: int
    tokens: tuple[str, ...]


def resize(folder: Path, out: Path, add: Sequence[str] = ()) -> Resized:
    """Write the model to `out` with a row for every token of its tokenizer, which gets the special tokens `add` first.
    A new row is the mean of the others, in the input and in the output embedding: no number is drawn. ModelError if
    there is nothing to do, or if a token is there already. The model is in memory once, in its own dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from sft_core.base_check import check_folder, read_json, require_unquantized

    found = _read(str(folder), folder)
    added = _add_tokens(folder, out, add) if add else {}
    new = {**found.beyond, **added}
    if not new:
        raise ModelError(f"base model {folder}: its {found.rows:,} rows are enough for its tokenizer; use it as it is")
    require_unquantized(str(folder), read_json(folder / "config.json"))
    check_folder(folder, whole=False, numbers=True)
    with transformers_silent(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        rows = max(found.rows, max(new) + 1)
        if rows > found.rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        known = [number for number in range(found.rows) if number not in added]  # a base may have rows to spare
        names = token_modules(model)
        for parameter in {id(p): p for name in names for p in model.get_submodule(name).parameters()}.values():
            mean = parameter[known].float().mean(0)  # (width,); of a head's bias: ()
            for number in (*range(found.rows, rows), *added):
                parameter[number] = mean.to(parameter.dtype)
        generation = saveable(model.generation_config.to_diff_dict(), str(folder))[0]
        model.generation_config = GenerationConfig(**generation)
        model.save_pretrained(out)
    if not add:
        copy_tokenizer(folder, out)
    for code in folder.glob("*.py"):
        shutil.copyfile(code, out / code.name)
    return Resized(found.rows, rows, tuple(token for _, token in sorted(new.items())))


def _add_tokens(folder: Path, out: Path, tokens: Sequence[str]) -> dict[int, str]:
    """Write the tokenizer with `tokens` as special ones to `out`; their ids. ModelError if it has one already."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    there = [token for token in tokens if token in vocabulary]
    if there or len(set(tokens)) != len(tokens):
        raise ModelError(
            f"base model {folder}: its tokenizer has {there[0]!r} already; train.lora.trainable_tokens trains its rows"
            if there
            else f"{', '.join(tokens)}: a token is named twice"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    return {tokenizer.convert_tokens_to_ids(token): token for token in tokens}


def _read(model: str, folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ModelError(
            f"base model {model}: no tokenizer in it (one of {', '.join(VOCABULARIES)}); copy the one it was trained "
            "with"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers raise their own errors
        why = (str(error).splitlines() or [""])[0]
        raise ModelError(f"base model {model}: its tokenizer does not load ({why}); fetch it again") from error
    rows = int(skeleton(folder, trust_remote_code=False).get_input_embeddings().weight.shape[0])
    return Vocabulary(rows, {number: token for token, number in tokenizer.get_vocab().items() if number >= rows})
