"""A tokenizer's ids against the rows of the embedding that is looked up with them.

In: a model folder (weights are not needed). Out: notes, or ModelError.
"""

import re
from pathlib import Path

from sft_core.convert.skeleton import skeleton
from sft_core.convert.tokenizer import VOCABULARIES, has_tokenizer
from sft_core.errors import ModelError

NOT_TEXT = re.compile("image|audio|video|vision|speech|sound", re.IGNORECASE)
"""Tokens that stand for something other than text: a text model's tokenizer may have one that it has no row for, as
google/gemma-3-1b-it has."""


def check_vocabulary(model: str, folder: Path) -> tuple[str, ...]:
    """ModelError if there is no tokenizer, or if it has text tokens that the embedding has no row for."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ModelError(
            f"base model {model}: no tokenizer in it (one of {', '.join(VOCABULARIES)}); copy the one it was trained "
            "with"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers raise their own errors
        why = (str(error).splitlines() or [""])[0]
        raise ModelError(f"base model {model}: its tokenizer does not load ({why}); fetch it again") from error
    rows = skeleton(folder, trust_remote_code=False).get_input_embeddings().weight.shape[0]
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    text = [beyond[number] for number in sorted(beyond) if not NOT_TEXT.search(beyond[number])]
    if text:
        raise ModelError(
            f"base model {model}: its tokenizer has {max(beyond) + 1:,} tokens, its embedding {rows:,} rows: "
            f"{', '.join(map(repr, text[:3]))}{' and others' if len(text) > 3 else ''} would be looked up outside "
            "of it. Take the tokenizer of these weights, or give the model more rows once: "
            f"model.resize_token_embeddings({max(beyond) + 1}), then save_pretrained"
        )
    if beyond:
        names = ", ".join(map(repr, beyond.values()))
        return (f"base model {model}: its embedding has no row for {names}, which is no text and must not occur",)
    return ()
