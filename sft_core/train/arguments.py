"""The recipe's `train` section as transformers' TrainingArguments."""

import math
import os
from typing import Any

import torch
from transformers import TrainingArguments

from sft_core.train.spec import TrainSpec
from sft_core.train.zero import PRESETS, deepspeed_config


def training_arguments(spec: TrainSpec, max_steps: int) -> TrainingArguments:
    """Made before the model: with it, ZeRO-3 is known while weights are loaded."""
    config = spec.config
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=spec.checkpoints,
        max_steps=max_steps,
        per_device_train_batch_size=config.rows_at_once,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        average_tokens_across_devices=True,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=math.ceil(config.warmup_ratio * max_steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",  # one pass over weights, gradients and both moments
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        neftune_noise_alpha=config.neftune_noise_alpha,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        gradient_checkpointing_kwargs=_checkpointing(spec) if config.gradient_checkpointing else None,
        deepspeed=_deepspeed(spec, cuda),
        use_cpu=not cuda,
        seed=spec.seed,
        data_seed=spec.seed,
        save_strategy="steps",
        save_steps=min(config.save_steps, max_steps),
        save_total_limit=None,  # RunLog deletes old checkpoints, once the new one is marked complete
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=True,
    )


def _checkpointing(spec: TrainSpec) -> dict[str, Any]:
    every = {"every_n_layers": spec.checkpoint_every} if spec.checkpoint_every > 1 else {}
    return {"use_reentrant": False, **every}


def _deepspeed(spec: TrainSpec, cuda: bool) -> dict[str, Any] | None:
    """The recipe's, told which form of checkpoint to begin from. Pinned memory is a GPU's; one rank has nothing to send
    while it computes, and would hold a second buffer for it."""
    config = deepspeed_config(spec.config)
    if config is None:
        return None
    if spec.config.deepspeed in PRESETS and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        config["zero_optimization"]["overlap_comm"] = False
    if spec.resize:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    for section in config.get("zero_optimization", {}).values() if not cuda else ():
        if isinstance(section, dict) and "pin_memory" in section:
            section["pin_memory"] = False
    return config
