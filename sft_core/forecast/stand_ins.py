"""What a GPU's kernels keep and move, for operations that tensors without numbers do otherwise.

In: a model on the meta device. Out: the same for a while: its dropout and, where they will be used, liger's RMSNorm,
SwiGLU and rotary embedding are replaced by functions that keep for the backward what those kernels keep. Each tells
`record` its floating-point operations and the bytes that it reads and writes.

Sources: FlashAttention-2, arXiv 2307.08691; `aten::native_dropout` on CUDA; liger_kernel.ops (rms_norm, swiglu, rope).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from sft_core.train.loss import causal_lm

Record = Callable[[int, int], None]
"""Told (floating-point operations, bytes moved) of a kernel."""
ATTENTION_SHARE = 0.5
"""Share of a matrix product's speed that attention kernels reach; their operations are counted as more by it."""


class Attention(torch.autograd.Function):
    """Flash attention: (rows, heads, tokens, head_dim) to (rows, tokens, heads, head_dim); one document a row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, record: Record) -> torch.Tensor:
        """Keeps the three, the result, and the logarithm of each sum in float32."""
        rows, heads, tokens, head_dim = query.shape
        result = query.new_empty(rows, tokens, heads, value.shape[-1])
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.record, ctx.flops = record, int(rows * heads * tokens**2 * (head_dim + value.shape[-1]) / ATTENTION_SHARE)
        record(ctx.flops, query.nbytes + key.nbytes + value.nbytes + result.nbytes)  # causal: half of the square
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the three; five products where forward has two."""
        query, key, value, result, _ = ctx.saved_tensors
        kept = query.nbytes + key.nbytes + value.nbytes + result.nbytes
        ctx.record(int(2.5 * ctx.flops), 2 * kept)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class Dropout(torch.autograd.Function):
    """CUDA's: one kernel, one byte a number kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Record) -> torch.Tensor:
        """Keeps the mask."""
        mask = x.new_empty(x.shape, dtype=torch.bool)
        ctx.save_for_backward(mask)
        ctx.record = record
        record(0, 2 * x.nbytes + mask.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient where the mask is."""
        (mask,) = ctx.saved_tensors
        ctx.record(0, 2 * grad_outputs[0].nbytes + mask.nbytes)
        return torch.empty_like(grad_outputs[0]), None


class LigerNorm(torch.autograd.Function):
    """RMSNorm in one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Record) -> torch.Tensor:
        """Keeps the input, and a float32 number a row of it."""
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.record = record
        record(0, 2 * x.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Written over the result's gradient."""
        ctx.record(0, 3 * grad_outputs[0].nbytes)
        return grad_outputs[0], None


class LigerSwiglu(torch.autograd.Function):
    """silu(gate) * up in one kernel each way."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, record: Record) -> torch.Tensor:
        """Keeps both."""
        ctx.save_for_backward(gate, up)
        ctx.record = record
        record(0, 3 * gate.nbytes)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Written over both."""
        gate, up = ctx.saved_tensors
        ctx.record(0, 5 * gate.nbytes)
        return gate.view_as(gate), up.view_as(up), None


class LigerRope(torch.autograd.Function):
    """Rotary embedding of query and key in place."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, record: Record) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps nothing but the tables, which all layers share."""
        ctx.record = record
        record(0, 2 * (query.nbytes + key.nbytes))
        return torch.empty_like(query), torch.empty_like(key)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Likewise."""
        ctx.record(0, 2 * sum(gradient.nbytes for gradient in grad_outputs))
        return *grad_outputs, None


@contextmanager
def standing_in(model: Any, liger: bool, record: Record) -> Iterator[None]:
    """Within, `model` keeps what it would keep on a GPU; `liger`: with liger's kernels."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)

        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p:
                put(module, "forward", lambda x: Dropout.apply(x, record))  # type: ignore[no-untyped-call]
            elif liger and type(module).__name__.endswith("RMSNorm"):
                put(module, "forward", lambda x: LigerNorm.apply(x, record))  # type: ignore[no-untyped-call]
            elif liger and all(hasattr(module, f"{part}_proj") for part in ("gate", "up", "down")):
                put(module, "forward", partial(_swiglu, module, record))
        code = sys.modules[type(causal_lm(model)).__module__]
        if liger and hasattr(code, "apply_rotary_pos_emb"):
            put(code, "apply_rotary_pos_emb", lambda q, k, *_, **__: LigerRope.apply(q, k, record))  # type: ignore[no-untyped-call]
        yield


def _swiglu(module: Any, record: Record, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.down_proj(LigerSwiglu.apply(module.gate_proj(x), module.up_proj(x), record))  # type: ignore[no-untyped-call]
    return result
