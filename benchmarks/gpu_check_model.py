"""Models and batches for `gpu_check.py`: a Llama of a preset's shape with random weights, 4-bit where asked.

In: a preset, a method. Out: the frozen base on its device, and packed batches.
"""

from dataclasses import dataclass
from typing import Any

import torch


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
    "toy": Preset(  # the smallest vocabulary whose loss is taken in chunks, as of the large one
        config={
            "vocab_size": 16_384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
        },
        row_tokens=96,
        rows=2,
        document_tokens=24,
    ),
}


def device_at_hand() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def random_base(preset: Preset, method: str, device: torch.device) -> tuple[Any, int]:
    """The frozen base in bf16, made on the device; and how many parameters it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16
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
