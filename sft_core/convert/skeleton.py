"""A model's names and shapes without its numbers, from `config.json` alone.

In: a base model folder. Out: a model on the meta device; which tensors an adapter for it has; under which names the
model's published files hold a weight that transformers keeps fused or renamed (Mixtral's experts).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sft_core.errors import ModelError, RecipeError
from sft_core.recipe import LoraConfig

Shape = tuple[int, ...]


def skeleton(base: Path, trust_remote_code: bool) -> Any:
    """The model without data. ModelError if `config.json` cannot be read or names no causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(f"{base / 'config.json'}: no causal language model can be made of it ({why})") from None


def peft_config(lora: LoraConfig, modules: Iterable[str], token_rows: dict[str, list[int]] | None = None) -> Any:
    """PEFT's form of the recipe's `train.lora`, for the modules and token rows of one model. Initial values are the
    training's to set."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(modules),
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=token_rows,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def short_names(modules: Iterable[str]) -> set[str]:
    """The modules' own names; a numbered one (`mlp.0`) keeps its parent's, as PEFT matches by suffix."""
    return {match[0] for name in modules if (match := re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name))}


def adapter_shapes(base: Path, lora: LoraConfig, trust_remote_code: bool) -> tuple[dict[str, Shape], Any]:
    """Name (PEFT's, as saved) and shape of every tensor of such an adapter on this base; and PEFT's settings, with the
    targets as short names where those mean the same modules.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    from sft_core.train.targets import adapted_modules
    from sft_core.train.token_rows import token_indices

    model = skeleton(base, trust_remote_code)
    try:
        modules = adapted_modules(model, lora)
        short = short_names(modules)
        matched = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{end}") for end in short)]
        token_rows = token_indices(model, base, lora, trust_remote_code)
        with torch.device("meta"):
            adapted = get_peft_model(model, peft_config(lora, modules, token_rows))
    except (ValueError, RecipeError) as error:
        raise ModelError(f"base {base}: {error}; the recipe's train.lora is of another model") from None
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    config = adapted.peft_config["default"]
    config.target_modules = short if set(matched) == set(modules) else set(modules)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, config


def transposed_modules(model: Any) -> frozenset[str]:
    """Names of the modules whose weights are stored (in, out): transformers' Conv1D, in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def model_shapes(model: Any) -> dict[str, Shape]:
    """Name and shape of every tensor that a file of the model must hold; of tied weights the first name only."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def published(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names, and in the parts, of the model's published files."""
    from transformers.core_model_loading import revert_weight_conversion

    result: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return result


def published_shapes(model: Any, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Name in the model -> its published parts. ModelError if a part needs several of the model's tensors at once."""
    metas = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    parts = {name: published(model, {name: meta}) for name, meta in metas.items()}
    found = {name: tuple(tensor.shape) for part in parts.values() for name, tensor in part.items()}
    if found != {name: tuple(tensor.shape) for name, tensor in published(model, metas).items()}:
        raise ModelError(
            f"{type(model).__name__}: transformers joins tensors across layers to write the published files; this "
            "version does not. Load the checkpoint with transformers and save it there"
        )
    return {name: {key: tuple(tensor.shape) for key, tensor in part.items()} for name, part in parts.items()}


def token_modules(model: Any) -> list[str]:
    """Names of the input embedding and of the output head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is table for table in tables)]
