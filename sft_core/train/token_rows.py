"""Rows of single tokens, trained beside the adapter: `train.lora.trainable_tokens`.

In: a model, its tokenizer, texts of tokens. Out: PEFT's `trainable_token_indices`, and a forward that touches these
rows alone. PEFT's own puts them into a copy of the whole embedding at each forward (1 GB for 128,256 tokens of width
4096, and as much again for its gradient); the values are the same. Source: PEFT's `tuners/trainable_tokens/layer.py`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn.functional import embedding, linear

from sft_core.convert.skeleton import token_modules
from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig
from sft_core.train.targets import adapted_modules, is_trained_whole

KEY = "train.lora.trainable_tokens"


def token_indices(
    model: Any, tokenizer: Path, lora: LoraConfig, trust_remote_code: bool
) -> dict[str, list[int]] | None:
    """Module -> ids of the rows to train, in the input embedding and, where that is a weight of its own, in the output
    head; None for no tokens. RecipeError for a text that is no token of this tokenizer, or has no row, and where all
    rows are trained already.
    """
    tokens = lora.trainable_tokens
    if not tokens:
        return None
    from transformers import AutoTokenizer

    for name in token_modules(model):
        if is_trained_whole(name, lora.modules_to_save) or name in adapted_modules(model, lora):
            raise RecipeError(
                f"{KEY}: {name} is trained by modules_to_save or target_modules already; take one of both"
            )

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    ids = _ids(loaded, tokens, int(model.get_input_embeddings().weight.shape[0]))
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise RecipeError(
            f"{KEY}: the output head of {type(model).__name__} has a bias, which PEFT leaves out of single rows; take "
            f"train.lora.modules_to_save: [{', '.join(_short(name) for name in token_modules(model))}]"
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {_short(name): list(ids) for name in token_modules(model) if f"{name}.weight" not in tied}


def train_rows_alone(model: Any) -> None:
    """Give every such layer of PEFT's a forward that makes no copy of its weight."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, given: torch.Tensor) -> torch.Tensor:
    """`given`: ids (batch, length) for an embedding, hidden states (batch, length, width) for a head."""
    base = layer.base_layer
    found: torch.Tensor = base(given)
    if layer.disable_adapters or layer.merged:
        return found
    for name in layer.active_adapters:
        rows = layer.trainable_tokens_delta[name]  # (tokens, width)
        ids = torch.tensor(layer.token_indices[name], device=found.device)
        if not isinstance(base, torch.nn.Embedding):
            found = found.index_copy(-1, ids, linear(given, rows.to(base.weight.dtype)).to(found.dtype))
            continue
        same = given[..., None] == ids  # (batch, length, tokens)
        ours = embedding(same.int().argmax(-1), rows).to(found.dtype)
        scale = layer._get_embed_scale()  # Gemma's, in the embedding's own forward
        ours = ours if scale is None else ours * scale.to(found.dtype)
        found = torch.where(same.any(-1, keepdim=True), ours, found)
    return found


def _ids(tokenizer: Any, tokens: Sequence[str], rows: int) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise RecipeError(
                f"{KEY}: {token!r} is no token of the base model's tokenizer; to add it: sft convert resize BASE OUT "
                f"--add {token!r}"
            )
        if vocabulary[token] >= rows:
            raise RecipeError(f"{KEY}: {token!r} has no row in the embedding; give it one: sft convert resize BASE OUT")
    return sorted({vocabulary[token] for token in tokens})


def _short(name: str) -> str:
    return name.rpartition(".")[2]
