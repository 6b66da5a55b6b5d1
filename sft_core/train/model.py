"""The model to train: base weights, 4-bit where asked, with a fresh LoRA adapter, or all weights trained.

Sources: QLoRA, arXiv 2305.14314 (nf4, double quantisation); LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA,
2402.09353; PEFT's and bitsandbytes' guides.
"""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_core.base_check.generation import saveable
from sft_core.errors import ModelError
from sft_core.recipe import TrainConfig
from sft_core.train.fit import adapter_settings, not_adaptable
from sft_core.train.four_bit import is_4bit
from sft_core.train.initial import initialise
from sft_core.train.machine import restore_rotary
from sft_core.train.targets import ALL_LINEAR, fused_experts
from sft_core.train.token_rows import train_rows_alone


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
    """The base as training sees it: on its device, quantised at load, SDPA attention, in the compute dtype; in float32
    where all of it is trained without DeepSpeed, which would keep float32 copies itself. ModelError if it lacks a
    weight."""
    quantization = quantization_config(train)
    placement = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    placed = not is_deepspeed_zero3_enabled() and (quantization is not None or torch.cuda.is_available())
    in_masters = train.lora is None and train.deepspeed is None
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if in_masters else getattr(torch, train.dtype),
        quantization_config=quantization,
        device_map=placement if placed else None,
        trust_remote_code=trust_remote_code,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if is_deepspeed_zero3_enabled():
        restore_rotary(model)
    parameters = {name for name, _ in model.named_parameters()}
    random = sorted(parameters.intersection(report["missing_keys"]))
    if random:
        raise ModelError(
            f"base model {path}: its files lack {random[0]} ({len(random)} weights in all), which would begin as "
            "random numbers; fetch it again, or take a config.json and weights that were saved together"
        )
    generation, changed = saveable(model.generation_config.to_diff_dict(), str(path))
    if changed:  # the first checkpoint of a full training could not be saved
        model.generation_config = GenerationConfig(**generation)
    keep_4bit_weights_unpacked(model)
    return model


def keep_4bit_weights_unpacked(model: Any) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward in eval mode:
    rounded to bf16, only for sizes divisible by 32, and for good. Training wants the weights as they were quantised."""
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False


def load_trainable(
    path: str | Path, train: TrainConfig, trust_remote_code: bool, work: Path | None = None
) -> tuple[Any, list[str]]:
    """Base plus adapter (or the base alone, to train whole), ready for the Trainer; and notes for whoever started the
    run. `work`: folder of the run, which may have to remember the adapter it began with. RecipeError if the targets
    name no module of this model."""
    model = load_base(path, train, trust_remote_code)
    model.config.use_cache = False
    notes = _notes(model, train)
    if train.lora is None:
        return model, notes
    if train.quantization != "none":
        freeze(model, in_float32=not torch.cuda.is_available())
    settings = adapter_settings(model, Path(path), train.lora, trust_remote_code)
    try:
        settings.init_lora_weights = "gaussian" if train.lora.init_lora_weights == "gaussian" else True
        model = get_peft_model(model, settings)  # `initialise` does the rest
    except ValueError as error:
        raise not_adaptable(train.lora, error) from None
    # A 16-bit sum swallows small updates. ZeRO-3 keeps float32 copies itself, and casts nothing that came in parts.
    dtype = getattr(torch, train.dtype) if is_deepspeed_zero3_enabled() else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
    train_rows_alone(model)
    initialise(model, Path(path), train, work)
    return model, notes


def freeze(model: Any, in_float32: bool) -> None:
    """Nothing of the 4-bit base is trained. `in_float32`: what of it is not in 4 bits (norms, embeddings, head) is
    computed in float32, as PEFT's guide has it. On a GPU it stays in 16 bits, as DeepSpeed would cast it anyway:
    else activations outside the products are in float32 as well, 321 KB a token and layer at 8B width for 181."""
    if in_float32:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)


def _notes(model: Any, train: TrainConfig) -> list[str]:
    names, fraction = fused_experts(model)
    if not names or train.lora is None:
        return []
    share = f"{len(names)} fused expert weights ({names[0]}, ...; {fraction:.0%} of the model)"
    notes = []
    if train.lora.target_modules == ALL_LINEAR:
        notes.append(f"note: all-linear adapts no experts of this model: {share} are no linear layers and stay as is")
    if train.quantization != "none":
        notes.append(f"note: quantization: nf4 leaves {share} in {train.dtype}")
    return notes
