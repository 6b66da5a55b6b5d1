"""Models and batches for `train_gpu.py`: random weights of a shape, NF4 where asked, LoRA, and what makes them quick.

In: a preset's name, a method, the variants to apply. Out: a model ready for a step, and packed batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

VARIANTS = ("baseline", "no-checkpointing", "loss", "attention", "half-norms", "liger", "compile")
"""In the order of ../shared/notes/gpu_budget.md; each keeps those before it."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A Llama's shape, and the batch that goes with it."""

    config: dict[str, Any]
    row_tokens: int
    rows: int
    document_tokens: int


PRESETS = {
    "8b": Preset(
        config={
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        row_tokens=4096,
        rows=4,
        document_tokens=512,
    ),
    "toy": Preset(
        config={
            "vocab_size": 20_000,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
        },
        row_tokens=96,
        rows=2,
        document_tokens=24,
    ),
}


@dataclass(slots=True)
class Ready:
    """A model with the loss to call on it: `step_loss(model, batch)` gives the mean over supervised tokens."""

    model: Any
    step_loss: Callable[[Any, dict[str, Any]], torch.Tensor]
    parameters: int
    notes: list[str] = field(default_factory=list)


def device_at_hand() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def random_base(preset: Preset, method: str, device: torch.device) -> tuple[Any, int]:
    """The frozen base, made on the device: bf16 on CUDA and float32 on CPU; and how many parameters it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**preset.config), dtype=dtype, attn_implementation="sdpa")
    parameters = model.num_parameters()
    if method == "qlora":
        _to_nf4(model, dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model, parameters


def _to_nf4(model: Any, dtype: torch.dtype) -> None:
    """Every linear layer but the head, as `BitsAndBytesConfig` with double quantisation makes it at load."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from sft_core.train.model import keep_4bit_weights_unpacked

    for layer in model.get_decoder().layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]:
            packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
            packed.quant_type = "nf4"
            weight = linear.weight.data
            packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, packed.to(weight.device))
            del linear, weight
    model.is_loaded_in_4bit = True  # PEFT looks for it
    keep_4bit_weights_unpacked(model)


def ready_model(preset: Preset, method: str, variants: tuple[str, ...], device: torch.device) -> Ready:
    """Base, LoRA r=16 on all linear layers but the head, and every one of `variants`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from sft_core.train.attention import use_packed_attention
    from sft_core.train.loss import choose_loss, supervised_loss

    base, parameters = random_base(preset, method, device)
    notes = []
    if "liger" in variants:
        notes.append(_use_liger(base))
    if method == "qlora" and "half-norms" not in variants:  # norms, embeddings and head go to float32
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    if "no-checkpointing" not in variants:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "attention" in variants:
        notes.append("attention {}: {}".format(*use_packed_attention(model)))
    way = "own"
    if "loss" in variants:
        with autocast(device):
            way, reason = choose_loss(model)
        notes.append(f"loss {way}: {reason}")
    if "compile" in variants and device.type == "cuda":
        for layer in base.get_decoder().layers:
            layer.compile(dynamic=False)
    model.train()
    return Ready(model, lambda model, batch: supervised_loss(model, batch, None, way), parameters, notes)


def _use_liger(base: Any) -> str:
    """liger-kernel's rotary, SwiGLU and RMSNorm on this model; its loss is `sft_core.train.loss`'s choice."""
    if base.device.type != "cuda":
        return "liger: its kernels need CUDA, left out"
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        return "liger: not installed, left out"
    apply_liger_kernel_to_llama(
        rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False, model=base
    )
    return "liger: rotary, SwiGLU, RMSNorm"


def autocast(device: torch.device) -> Any:
    """As the Trainer's `bf16: true`; nothing on a CPU, where all is float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")


def packed_documents(preset: Preset, rows: int, seed: int) -> list[list[Any]]:
    """Rows of random documents, log-normal lengths around `document_tokens`, filled to the last token; the first 30%
    of each document is prompt."""
    from sft_core.pack import IGNORE_INDEX, Sequence

    drawn = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        left, row = preset.row_tokens, []
        while left:
            length = int((torch.randn((), generator=drawn) * 0.7).exp() * preset.document_tokens)
            length = min(left, max(8, length))
            ids = torch.randint(3, preset.config["vocab_size"], (length,), generator=drawn).tolist()
            prompt = length * 3 // 10
            row.append(Sequence(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
            left -= length
        made.append(row)
    return made


def batch_of(rows: list[list[Any]], device: torch.device) -> dict[str, Any]:
    """`collate`'s batch on the device."""
    from sft_core.pack.collate import collate

    return {name: tensor.to(device) for name, tensor in collate(rows, 0).items()}
