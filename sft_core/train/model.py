"""The model to train: base weights, 4-bit where asked, with a fresh LoRA adapter.

Sources: QLoRA, arXiv 2305.14314 (nf4, double quantisation); LoRA, arXiv 2106.09685; PEFT's and bitsandbytes' guides.
"""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig, TrainConfig


def quantization_config(train: TrainConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes' NF4 with double quantisation, or None for an unquantised base."""
    if train.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, train.dtype),
    )


def load_base(path: str | Path, train: TrainConfig, trust_remote_code: bool) -> Any:
    """The frozen base as training sees it: quantised at load, in the compute dtype, SDPA attention."""
    quantization = quantization_config(train)
    placement = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, train.dtype),
        quantization_config=quantization,
        device_map=placement if quantization is not None else None,
        trust_remote_code=trust_remote_code,
        attn_implementation="sdpa",
    )
    keep_4bit_weights_unpacked(model)
    return model


def keep_4bit_weights_unpacked(model: Any) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward in eval mode:
    rounded to bf16, only for sizes divisible by 32, and for good. Training wants the weights as they were quantised."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """PEFT's form of the recipe's `train.lora`."""
    targets = lora.target_modules
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_trainable(path: str | Path, train: TrainConfig, trust_remote_code: bool) -> Any:
    """Base plus adapter, ready for the Trainer. RecipeError if the targets name no module of this model."""
    if train.lora is None:
        raise RecipeError(
            "train.lora: null (full fine-tuning) is not supported by this version; give it a LoRA section"
        )
    model = load_base(path, train, trust_remote_code)
    model.config.use_cache = False
    if train.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    elif train.gradient_checkpointing:
        model.enable_input_require_grads()
    if train.gradient_checkpointing and train.quantization != "none":
        model.enable_input_require_grads()
    try:
        return get_peft_model(model, peft_config(train.lora))
    except ValueError as error:
        raise RecipeError(f"train.lora.target_modules {train.lora.target_modules!r}: {error}") from None
