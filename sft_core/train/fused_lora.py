"""LoRA's update added to the base product by the matrix product itself, forward and backward.

In: a PEFT model. Out: the same model, its plain LoRA layers computing `y = x W'` and then `y += s (x A') B'` in place
(`addmm`), with a backward that does the same for the input's gradient. PEFT's own forward copies y, writes the update,
scales it and adds it: 16 bytes of traffic an output element in half precision, where one `addmm` moves 4. Equal to
PEFT's but for rounding: the same products, summed in another order.

Only what PEFT computes that way is replaced: `Linear` and bitsandbytes' `Linear4bit` with a frozen base and one plain
adapter. DoRA, merged or disabled adapters, evaluation (no gradient) and layers held in parts (ZeRO-3 gathers the
weights of `lora_A` and `lora_B` when they are called) stay with PEFT.

Sources: LoRA, arXiv 2106.09685; the same step in Unsloth (`kernels/utils.py`, `matmul_lora`) and Axolotl
(`kernels/lora.py`).
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

from sft_core.train.four_bit import is_4bit

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def fuse_lora(model: Any) -> str:
    """Give every plain LoRA layer of `model` the quick forward; how many and why not the others, in words for the
    log."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    chosen = [layer for layer in layers if _is_plain(layer)]
    for layer in chosen:
        layer.forward = MethodType(_forward, layer)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "LoRA by PEFT (ZeRO-3 holds the weights in parts)"
    return f"LoRA by addmm in {len(chosen)} of {len(layers)} layers"


def _is_plain(layer: Any) -> bool:
    """Whether the layer's forward is the base product plus one scaled update, of weights that are here whole."""
    if not isinstance(layer, LoraLayer) or list(layer.lora_A) != [ADAPTER]:
        return False
    base, pair = layer.get_base_layer(), (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
    weights = [base.weight, *(part.weight for part in pair)]
    return (
        (type(layer), type(base)) in _kinds(base)
        and not layer.lora_variant
        and not any(parameter.requires_grad for parameter in base.parameters())
        and all(type(part) is torch.nn.Linear and part.bias is None for part in pair)
        and not any(hasattr(weight, "ds_id") for weight in weights)
    )


def _kinds(base: Any) -> list[tuple[type, type]]:
    """Kinds of layer and base that are replaced."""
    if not is_4bit(base):
        return [(LoraLinear, torch.nn.Linear)]
    from bitsandbytes.nn import Linear4bit  # slow to import; here it is loaded
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    return [(LoraLinear4bit, Linear4bit)]


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`x` (..., in_features) to (..., out_features). PEFT's own forward wherever it would do something else."""
    base = layer.get_base_layer()
    dtype = _product_dtype(layer, base, x)
    if dtype is None or args or kwargs or layer.disable_adapters or layer.merged or not x.numel():
        return type(layer).forward(layer, x, *args, **kwargs)
    state = getattr(base.weight, "quant_state", None)
    a, b = (part[ADAPTER].weight.to(dtype) for part in (layer.lora_A, layer.lora_B))
    given = x.to(dtype)
    dropout = layer.lora_dropout[ADAPTER]
    seen = given if isinstance(dropout, torch.nn.Identity) else dropout(given)
    bias = None if base.bias is None else base.bias.to(dtype)
    fixed = (base.weight, state, bias, layer.scaling[ADAPTER])
    y: torch.Tensor = _AddedUpdate.apply(given, seen, a, b, fixed)  # type: ignore[no-untyped-call]
    return y.to(x.dtype) if state is not None else y


def _product_dtype(layer: Any, base: Any, x: torch.Tensor) -> torch.dtype | None:
    """The dtype of both products, as PEFT and autocast would have it; None where they differ, or no gradient is
    asked for (bitsandbytes then has kernels of its own)."""
    if not torch.is_grad_enabled() or layer.active_adapters != [ADAPTER]:
        return None
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    update: torch.dtype = autocast or layer.lora_A[ADAPTER].weight.dtype
    if is_4bit(base):
        product = base.compute_dtype if getattr(base.weight, "quant_state", None) is not None else None
    else:
        product = autocast or (base.weight.dtype if base.weight.dtype == x.dtype else None)
    return update if product == update else None


class _AddedUpdate(torch.autograd.Function):
    """`given W' + scale (seen A') B' + bias`; `seen` is `given`, or what dropout left of it."""

    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        seen: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        fixed: tuple[torch.Tensor, Any, torch.Tensor | None, float],
    ) -> torch.Tensor:
        """`given`, `seen` (..., in), `a` (r, in), `b` (out, r); `fixed`: weight (out, in), or its 4-bit form with its
        state, a bias (out,), the scale. All in one dtype. The result is (..., out)."""
        weight, state, bias, scale = fixed
        rows, seen_rows = given.reshape(-1, given.shape[-1]), seen.reshape(-1, seen.shape[-1])  # (n, in)
        if state is None:
            y = torch.nn.functional.linear(rows, weight.to(rows.dtype), bias)  # (n, out)
        else:
            from bitsandbytes import matmul_4bit

            y = matmul_4bit(rows, weight, quant_state=state, bias=bias)
        low = seen_rows @ a.t()  # (n, r)
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(seen_rows, low, a, b)
        ctx.frozen, ctx.scale, ctx.shape, ctx.same = (weight, state), scale, given.shape, seen is given
        return y.view(*given.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of `given`, `seen` (none of its own where it is `given`), `a` and `b`."""
        seen_rows, low, a, b = ctx.saved_tensors
        gradient = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])  # (n, out)
        of_low = (gradient @ b).mul_(ctx.scale)  # (n, r)
        of_given, of_seen = None, None
        if ctx.needs_input_grad[0]:
            weight, state = ctx.frozen
            whole = weight if state is None else _dequantized(weight, state)
            of_given = gradient @ whole.to(gradient.dtype)  # (n, in)
            if ctx.same:
                of_given.addmm_(of_low, a)
            of_given = of_given.view(ctx.shape)
        if not ctx.same and ctx.needs_input_grad[1]:
            of_seen = (of_low @ a).view(ctx.shape)
        return of_given, of_seen, of_low.t() @ seen_rows, (gradient.t() @ low).mul_(ctx.scale), None


def _dequantized(weight: torch.Tensor, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    whole: torch.Tensor = dequantize_4bit(weight, state)
    return whole
