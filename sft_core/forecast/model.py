"""The model that a recipe trains, without its numbers: shapes on the meta device, with the adapter of training.

In: a transformers configuration, the section `train`. Out: `TrainedModel`. Nothing is downloaded, nothing is allocated.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from sft_core.convert.skeleton import peft_config
from sft_core.recipe import TrainConfig
from sft_core.train.fused_lora import fuse_lora
from sft_core.train.targets import adapted_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model on the meta device, and its weights by kind: linear layers but the head, all others, trained ones."""

    model: Any
    linear: int
    other: int
    trained: int
    layers: int
    hidden_size: int


def trained_model(config: Any, train: TrainConfig, trust_remote_code: bool) -> TrainedModel:
    """RecipeError where the adapter names no module of this model. Initial values, and rows of single tokens, make no
    difference here."""
    dtype, config = getattr(torch, train.dtype), copy.deepcopy(config)  # a model keeps it, and counting changes it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).to(dtype)
    model.config.use_cache = False
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    if train.lora is not None:
        with torch.device("meta"):
            model = get_peft_model(model, peft_config(train.lora, adapted_modules(model, train.lora)))
        model.to(dtype)  # PEFT makes adapters in float32
        if train.fused_lora:
            fuse_lora(model)
    text = config.get_text_config()
    return TrainedModel(
        model=model,
        linear=linear,
        other=total - linear,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
    )
