"""What a rehearsal tells about the real run: optimizer steps and tokens from the sampled lengths, memory from the real
model's configuration.

In: the recipe, what was packed, how many rows the sources have; the configuration. Out: figures, with what they assume.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.recipe import LoraConfig, Recipe
from sft_core.rehearse.rows import SampledRows
from sft_core.shards import read_shard_list

NF4_BYTES = 0.52
"""A 4-bit weight with its share of doubly quantised scales (QLoRA, arXiv 2305.14314)."""
TRAINED_BYTES = 16
"""Weight, gradient and two moments in float32; or bfloat16 weight and gradient, float32 master and moments."""
LOGIT_BYTES = 8
"""A float32 logit and its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """The real run, with `ranks` ranks; tokens and packed rows of one epoch."""

    epoch_tokens: int
    packed_rows: int
    optimizer_steps: int
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Counts of the real model: weights of linear layers (not the head), all others, trained ones; its shape."""

    linear: int
    other: int
    trained: int
    layers: int
    hidden_size: int
    vocab_size: int


def estimate_length(
    recipe: Recipe, rehearsed: Recipe, packed: Path, samples: Sequence[SampledRows]
) -> RunLength | None:
    """From the training tokens that each source's sampled rows gave; None where a source's rows cannot be counted.

    `samples` are of `recipe.datasets`, in order; `rehearsed` has another eval_fraction. Packed rows are taken as full.
    """
    if any(sample.total is None or not sample.rows for sample in samples):
        return None
    totals = {str(sample.file): (sample.total or 0) / sample.rows for sample in samples}
    kept_in_training = (1 - recipe.eval_fraction) / (1 - rehearsed.eval_fraction)
    tokens, sequences = 0.0, 0.0
    for shard in read_shard_list(packed):
        factor = totals[shard.place["dataset"]] * max(shard.place.get("weight", 1.0), 1.0) * kept_in_training
        sequences += shard.facts["kept"][0] * factor
        tokens += shard.facts["kept"][1] * factor
    train = recipe.train
    rows = sequences if recipe.pack.packing == "none" else tokens / recipe.pack.max_length
    ranks = train.num_processes or 1
    steps = train.optimizer_steps(rows * train.num_train_epochs, ranks)
    return RunLength(epoch_tokens=round(tokens), packed_rows=math.ceil(rows), optimizer_steps=steps, ranks=ranks)


def count_weights(config: Any, lora: LoraConfig | None, trust_remote_code: bool) -> Weights:
    """Of the real model, built without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from sft_core.train.targets import adapted_modules

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in modules.values() if isinstance(m, torch.nn.Linear) and m is not head)
    trained = total
    if lora is not None:
        adapted = [modules[name] for name in adapted_modules(model, lora)]
        trained = sum(lora.r * sum(module.weight.shape) for module in adapted)
    text = config.get_text_config()
    return Weights(
        linear=linear,
        other=total - linear,
        trained=trained,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def estimate_memory(recipe: Recipe, weights: Weights) -> Mapping[str, float]:
    """Bytes by what they hold. The work of one layer comes on top; ZeRO spreads what is trained over the ranks."""
    train = recipe.train
    tokens = recipe.pack.max_length * train.per_device_train_batch_size
    parts: dict[str, float] = {}
    if train.lora is None:
        parts["weights, gradients and moments"] = weights.trained * TRAINED_BYTES
    elif train.quantization == "nf4":
        parts["4-bit linear weights"] = weights.linear * NF4_BYTES
        parts["other weights in float32"] = weights.other * 4
        parts["adapter with its moments"] = weights.trained * TRAINED_BYTES
    else:
        parts["frozen weights"] = (weights.linear + weights.other) * (4 if train.dtype == "float32" else 2)
        parts["adapter with its moments"] = weights.trained * TRAINED_BYTES
    if train.gradient_checkpointing:
        parts["inputs of layers"] = weights.layers * tokens * weights.hidden_size * 2
    parts["logits and their gradient"] = tokens * weights.vocab_size * LOGIT_BYTES
    return parts
