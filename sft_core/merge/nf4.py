"""What a 4-bit base computes with: weights rounded to NF4 and back. Source: QLoRA, arXiv 2305.14314, and bitsandbytes.

In: a base model folder; a weight. Out: the names of the weights that transformers quantises at load; the weight after
the round trip, on a GPU if there is one, as in training.
"""

from pathlib import Path

import torch

from sft_core.convert.skeleton import skeleton
from sft_core.errors import ModelError

BLOCK = 64


def quantized_weights(base: Path, trust_remote_code: bool) -> frozenset[str]:
    """Names of the weights that `BitsAndBytesConfig(load_in_4bit=True)` replaces, found on a model without data."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model = skeleton(base, trust_remote_code)
    skip = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    model = replace_with_bnb_linear(
        model, modules_to_not_convert=skip, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantized = {n: module for n, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if any(module.source_cls is not torch.nn.Linear for module in quantized.values()):
        raise ModelError(f"base {base}: has Conv1D layers (GPT-2), whose 4-bit form is not read; set merge.base: full")
    names = frozenset(f"{name}.weight" for name in quantized)
    if not names:
        raise ModelError(f"base {base}: transformers quantises none of its layers; set merge.base: full")
    return names


def round_trip(weight: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """The weight as a 4-bit layer of the model uses it, in the compute dtype, on CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes, state = quantize_4bit(
        weight.to(device, compute_dtype), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    restored: torch.Tensor = dequantize_4bit(codes, state)
    return restored.to("cpu")
