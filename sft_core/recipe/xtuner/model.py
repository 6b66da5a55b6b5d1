"""XTuner's `model` as the recipe's `base_model`, `train.quantization`, `train.dtype` and `train.lora`.

In: `model.llm` (a `from_pretrained` call with BitsAndBytesConfig) and `model.lora` (PEFT's LoraConfig). Out: lines.
Only `SupervisedFinetune` is supervised fine-tuning of texts; RecipeError for any other model.
"""

from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig
from sft_core.recipe.xtuner.config import MERGED, Config, last_name
from sft_core.recipe.xtuner.literals import Unread

LLM = "model.llm"
QUANTIZATION = f"{LLM}.quantization_config"
DTYPES = ("float16", "bfloat16", "float32")
EIGHT_BITS = "8-bit bases are not supported; choose train.quantization nf4 or none"
NAMES_OF_DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def read_model(config: Config) -> None:
    """Set `base_model`, `train.quantization`, `train.dtype` and `train.lora`."""
    kind = config.get("model.type")
    if kind is not None and last_name(kind) != "SupervisedFinetune":
        raise RecipeError(
            f"{config.file}: model is {kind}: only SupervisedFinetune (supervised fine-tuning of texts) can be imported"
        )
    path = config.get(f"{LLM}.pretrained_model_name_or_path")
    if not isinstance(path, str):
        what = f"is {path}, which only running the config would tell" if isinstance(path, Unread) else "is not there"
        raise RecipeError(
            f"{config.file}: {LLM}.pretrained_model_name_or_path {what}. If it comes from another file: {MERGED}"
        )
    config.set("base_model.path", path, f"{LLM}.pretrained_model_name_or_path")
    config.copy("base_model.revision", f"{LLM}.revision")
    if config.literal(f"{LLM}.trust_remote_code"):
        why = "XTuner's configs all set it; leave it out where transformers has the model"
        config.set("base_model.trust_remote_code", True, f"{LLM}.trust_remote_code: {why}")
    quantized = _read_quantization(config)
    _read_dtype(config, quantized)
    _read_lora(config, quantized)
    if config.literal("model.use_activation_checkpointing") is False:
        config.set("train.gradient_checkpointing", False, "model.use_activation_checkpointing")


def _read_quantization(config: Config) -> bool:
    if config.literal(f"{LLM}.load_in_8bit"):
        config.remark(f"{LLM}.load_in_8bit", True, EIGHT_BITS)
    if config.get(QUANTIZATION) is None:
        config.set("train.quantization", "none", f"no {QUANTIZATION}")
        return False
    four = bool(config.literal(f"{QUANTIZATION}.load_in_4bit"))
    if config.literal(f"{QUANTIZATION}.load_in_8bit"):
        config.remark(f"{QUANTIZATION}.load_in_8bit", True, EIGHT_BITS)
    kind = config.literal(f"{QUANTIZATION}.bnb_4bit_quant_type")
    if four and kind != "nf4":
        config.remark(f"{QUANTIZATION}.bnb_4bit_quant_type", kind or "fp4", "4-bit bases are nf4")
    if four and not config.literal(f"{QUANTIZATION}.bnb_4bit_use_double_quant"):
        config.remark(f"{QUANTIZATION}.bnb_4bit_use_double_quant", False, "nf4 is always double quantised")
    config.set("train.quantization", "nf4" if four else "none", f"{QUANTIZATION}.load_in_4bit")
    return four


def _read_dtype(config: Config, quantized: bool) -> None:
    """What the base computes in; XTuner's other dtype, of AmpOptimWrapper, is dropped under DeepSpeed."""
    path = f"{QUANTIZATION}.bnb_4bit_compute_dtype" if quantized else f"{LLM}.torch_dtype"
    for also in (f"{QUANTIZATION}.bnb_4bit_compute_dtype", f"{LLM}.torch_dtype"):
        config.get(also)
    name = last_name(config.get(path))
    name = NAMES_OF_DTYPES.get(name, name)
    if name in DTYPES:
        hint = "; bfloat16 has float16's speed and needs no loss scale, on Ampere or later" if name == "float16" else ""
        config.set("train.dtype", name, f"{path}{hint}")
    elif config.get(path) not in (None, "auto"):
        config.remark(path, config.get(path), f"no dtype of that name; train.dtype is one of {', '.join(DTYPES)}")


def _read_lora(config: Config, quantized: bool) -> None:
    lora = config.get("model.lora")
    if not isinstance(lora, dict):
        if quantized:
            raise RecipeError(
                f"{config.file}: {QUANTIZATION} is 4-bit and model.lora is {lora}: the weights of a 4-bit base cannot "
                "be trained; add a lora section, or drop quantization_config"
            )
        config.set("train.lora", None, "no model.lora: all weights are trained")
        return
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # PEFT's
    for key in LoraConfig.model_fields:
        path = f"model.lora.{key}"
        value = config.literal(path)
        if value is not None:
            config.set(f"train.lora.{key}", value, path)
        elif key in defaults:
            config.set(f"train.lora.{key}", defaults[key], f"PEFT's default: no {path}")
    if config.get("model.lora.target_modules") is None:
        config.set("train.lora.target_modules", "all-linear", "no model.lora.target_modules")
    for key, plain in (("bias", "none"), ("task_type", "CAUSAL_LM")):
        value = config.literal(f"model.lora.{key}")
        if value not in (None, plain):
            config.remark(f"model.lora.{key}", value, f"always {plain} here")
