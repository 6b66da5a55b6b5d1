"""Attention inside packed documents only, for a model whose rows hold several.

In: a causal LM. Out: the model set to an attention that knows the borders, and the reason for the choice. Borders come
from `position_ids`, which restart at 0 in each document, once a forward, and travel under the names that transformers'
flash attention takes (`cu_seq_lens_q`, `max_length_q`, ...).

The rule, in this order (figures of it: benchmarks/README.md):

1. CUDA with flash-attention installed: transformers' own `flash_attention_2`.
2. CUDA, half precision, full causal attention: `torch.nn.attention.varlen` under the name `NAME`.
3. CPU, full causal attention: SDPA document by document, under the same name. A mask costs the square of the row.
4. Else what the model was loaded with: sliding windows, capped scores, attention dropout, unknown interfaces.

Sources: FlashAttention's varlen interface; transformers' AttentionInterface guide.
"""

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from sft_core.errors import RecipeError
from sft_core.train.loss import causal_lm
from sft_core.train.sequence_parallel import AcrossRanks, across_ranks, check_heads

NAME = "packed_documents"
HALF = (torch.bfloat16, torch.float16)
VARLEN_HEAD_DIM = 256
"""Largest head of PyTorch's flash kernels."""


def use_packed_attention(model: Any, sequence_parallel_size: int = 1) -> tuple[str, str]:
    """Set `model` to what `choose_attention` says and feed it the borders; the choice and why, for the log.
    RecipeError where ranks are to share rows and the model does not allow it."""
    chosen, reason = choose_attention(model, shared=sequence_parallel_size > 1)
    inner, across = causal_lm(model), across_ranks(sequence_parallel_size)
    if across is not None:
        check_heads(inner.config.get_text_config(), across.size)
        if chosen != NAME:
            raise RecipeError(f"train.sequence_parallel_size {across.size}: attention of whole rows only: {reason}")
    if chosen == NAME:
        AttentionInterface.register(NAME, partial(_shared_attention, across) if across else packed_attention)
        AttentionMaskInterface.register(NAME, mask_where_padded)
    if chosen != inner.config._attn_implementation:
        inner.set_attn_implementation(chosen)
    if chosen in (NAME, "flash_attention_2"):
        inner.get_decoder().register_forward_pre_hook(partial(_add_borders, across), with_kwargs=True)
    return chosen, reason


def choose_attention(model: Any, shared: bool = False) -> tuple[str, str]:
    """An attention implementation for packed rows of this model on its device, and why. `shared`: for `NAME` only."""
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    default = inner.config._attn_implementation
    weight = inner.get_input_embeddings().weight
    cuda = weight.is_cuda or (hasattr(weight, "ds_id") and torch.cuda.is_available())  # ZeRO-3 may keep it elsewhere
    if not shared and cuda and is_flash_attn_2_available() and inner._supports_flash_attn and config.dtype in HALF:
        return "flash_attention_2", "flash-attention is installed"
    refusal = _not_covered(inner, config)
    if refusal:
        return default, refusal
    if not cuda:
        return NAME, "SDPA document by document: no work between documents"
    if config.dtype not in HALF:
        return default, f"variable-length kernels take half precision, not {config.dtype}"
    if torch.cuda.get_device_capability() < (8, 0):
        return default, "variable-length kernels need compute capability 8.0"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return default, f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return NAME, "torch.nn.attention.varlen"


def _not_covered(inner: Any, config: Any) -> str:
    """Why `packed_attention` cannot stand in for this model's attention; empty if it can."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not (inner._supports_attention_backend and inner._supports_sdpa):
        return f"{type(inner).__name__} takes no other attention function"
    if kinds != {"full_attention"}:
        return f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) is not None and not hasattr(config, "layer_types"):
        return f"a sliding window of {config.sliding_window} tokens"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "capped attention scores"
    if getattr(config, "attention_dropout", 0.0):
        return "attention dropout"
    if head_dim % 8 or head_dim > VARLEN_HEAD_DIM:
        return f"heads of {head_dim} numbers"
    return ""


def borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of variable-length attention for `position_ids` (batch, length), rows laid end to end.

    >>> borders(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]))["cu_seq_lens_q"]
    tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    """
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten().to(torch.int32)  # (documents,)
    ends = torch.cat([starts, torch.tensor([flat.numel()], dtype=torch.int32, device=flat.device)])
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _add_borders(
    across: AcrossRanks | None, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.get("position_ids")
    others = ("attention_mask", "past_key_values", "cu_seq_lens_q")
    if positions is None or positions.dim() != 2 or any(kwargs.get(name) is not None for name in others):
        return args, kwargs
    inputs = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    positions = positions.expand(inputs.shape[:2])
    return args, kwargs | borders(across.whole(positions) if across and decoder.training else positions)


def _shared_attention(
    across: AcrossRanks,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention` of whole rows for this rank's heads; in evaluation mode rows are not shared."""
    if not module.training:
        return packed_attention(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (across.by_heads(states) for states in (query, key, value))
    return across.by_length(packed_attention(module, query, key, value, attention_mask, **kwargs)[0]), None


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` (batch, heads, length, head_dim) to (batch, length, heads, head_dim).

    With borders each document attends to itself, causally; without (generation, padded batches) it is SDPA.
    """
    ends = kwargs.get("cu_seq_lens_q")
    if ends is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, head_dim = query.shape
    flat = [_rows_end_to_end(states) for states in (query, key, value)]
    if query.is_cuda:
        joined = _varlen(module, flat, ends, kwargs["max_length_q"], kwargs.get("scaling"))
    else:
        joined = _by_document(module, flat, ends.diff().tolist(), kwargs.get("scaling"))
    return joined.view(batch, length, heads, head_dim), None


def _rows_end_to_end(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) to (batch * length, heads, head_dim); a view for a batch of one."""
    return states[0].transpose(0, 1) if len(states) == 1 else states.transpose(1, 2).flatten(0, 1)


def _by_document(
    module: Any, states: list[torch.Tensor], lengths: list[int], scaling: float | None
) -> torch.Tensor:  # (batch * length, heads, head_dim)
    parts = zip(*(torch.split(state, lengths) for state in states), strict=True)  # its gradient is one cat
    documents = ([part.transpose(0, 1).unsqueeze(0) for part in document] for document in parts)
    return torch.cat([sdpa_attention_forward(module, *three, None, scaling=scaling)[0][0] for three in documents])


def _varlen(
    module: Any, states: list[torch.Tensor], ends: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:  # (batch * length, heads, head_dim)
    from torch.nn.attention.varlen import varlen_attn

    dtype = get_target_dtype(states[0], module)  # PEFT keeps norms, and so 4-bit layers' outputs, in float32
    query, key, value = (state.to(dtype) if dtype else state for state in states)
    result = varlen_attn(
        *(query, key, value, ends, ends, longest, longest),
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, torch.Tensor)
    return result


def mask_where_padded(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask for padded batches and caches; none for whole rows, where causality and borders say it all."""
    if kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(**kwargs)
