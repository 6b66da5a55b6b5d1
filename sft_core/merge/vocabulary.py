"""An adapter that was trained with another number of token rows than its base has.

In: the adapter's tensors, the model without data. Out: the number of rows, None where it is the base's. Tokens are
added by `resize_token_embeddings` before training; PEFT then saves the whole embeddings beside the adapter.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.skeleton import token_modules
from sft_core.errors import ModelError

WHOLE = r"(?:\.token_adapter)?(?:\.base_layer|\.modules_to_save|\.original_module)?\.weight"
"""Behind a module's name: the forms in which PEFT saves its weight whole."""
ROWS_OF = {r"\.lora_embedding_A": 1, r"\.lora_B\.weight": 0}
"""Behind a module's name: a part of its update, and which axis counts tokens."""


def resized_rows(tensors: Mapping[str, torch.Tensor], model: Any, prefix: str, source: Path) -> int | None:
    """Rows of the embeddings in training. ModelError if two tensors disagree, or if rows that the base lacks are not in
    the adapter.
    """
    base_rows = int(model.get_input_embeddings().weight.shape[0])
    tables = token_modules(model)
    rows: dict[str, int] = {}
    whole = set()
    for name, tensor in tensors.items():
        for module in tables:
            behind = name.removeprefix(prefix + module)
            if behind == name or tensor.dim() != 2:
                continue
            if re.fullmatch(WHOLE, behind):
                whole.add(module)
                rows[name] = tensor.shape[0]
            for form, axis in ROWS_OF.items():
                if re.fullmatch(form, behind):
                    rows[name] = tensor.shape[axis]
    others = {name: count for name, count in rows.items() if count != base_rows}
    if not others:
        return None
    name, count = next(iter(others.items()))
    differing = next((other for other, found in rows.items() if found != count), None)
    if differing is not None:
        raise ModelError(
            f"{source}: {name} has {count} token rows, {differing} {rows[differing]}; save input and output embeddings "
            "of one size"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    needed = [module for module in tables if f"{module}.weight" not in tied]
    lacking = [module for module in needed if module not in whole]
    if lacking and not (len(needed) == 1 and whole):
        raise ModelError(
            f"{source}: was trained with {count} token rows, the base has {base_rows}, and the rows of {lacking[0]} "
            "are not in the adapter; save it with save_embedding_layers=True, or give the resized base"
        )
    return count


def require_untied_updates(tensors: Mapping[str, torch.Tensor], model: Any, prefix: str, source: Path) -> None:
    """ModelError where PEFT's own merge would add two updates to one weight: LoRA on an embedding that is tied."""
    if not getattr(model, "all_tied_weights_keys", None):
        return
    for module in token_modules(model):
        if any(name.startswith(f"{prefix}{module}.lora_") for name in tensors):
            raise ModelError(
                f"{source}: has a low-rank update of {module}, whose weight the base ties to another; together with "
                "the adapter's other settings PEFT cannot merge that rightly. If tokens were added, resize the base as "
                "in training (resize_token_embeddings, save_pretrained) and give that one"
            )
