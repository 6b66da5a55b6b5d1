"""liger-kernel's RMSNorm, rotary embedding and SwiGLU in place of transformers' own.

In: a model on its device. Out: the same model, and what was done in words for the log. Written by hand is only the
choice: on CUDA, where the package is installed and knows the model. Its loss is `sft_core.train.loss`'s choice.

Source: Liger Kernel, arXiv 2410.10989.
"""

import importlib.util
from typing import Any

from sft_core.train.loss import causal_lm

KERNELS = ("rope", "swiglu", "geglu", "rms_norm")
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def liger_reason(model_type: str, device: str) -> str:
    """Why liger's kernels are not used for such a model on such a device; empty if they are."""
    if device != "cuda":
        return "they need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]

    return "" if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"liger-kernel does not know {model_type}"


def use_liger(model: Any) -> str:
    """Put its kernels into `model`, or say why not."""
    inner = causal_lm(model)
    if reason := liger_reason(inner.config.model_type, inner.get_input_embeddings().weight.device.type):
        return f"no liger kernels ({reason})"
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found]

    wanted = {**dict.fromkeys(KERNELS, True), **dict.fromkeys(LOSSES, False)}
    _apply_liger_kernel_to_instance(model=inner, **wanted)  # passes on what it has for this kind of model
    return "liger kernels"
