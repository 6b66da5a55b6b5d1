"""Attention inside packed documents only, for a model whose rows hold several.

In: a causal LM. Out: the model set to an attention that knows the borders, and the reason for the choice. Borders come
from `position_ids`, which restart at 0 in each document: counted where the batch is made, on the CPU, or else once a
forward. They travel under the names that transformers' flash attention takes (`cu_seq_lens_q`, `max_length_q`, ...).

The rule, in this order (figures of it: benchmarks/README.md):

1. CUDA with flash-attention installed: transformers' own `flash_attention_2`.
2. CUDA, half precision, causal attention, in whole or in a sliding window: `torch.nn.attention.varlen` under the name
   `NAME`, called with those arguments only that the installed torch has.
3. CPU, the same attention: SDPA document by document, under the same name. A mask costs the square of the row.
4. Else what the model was loaded with: capped scores, sinks, attention dropout, unknown interfaces, a torch without it.

Sources: FlashAttention's varlen interface; transformers' AttentionInterface guide.
"""

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache, partial
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
BY_BORDERS = (NAME, "flash_attention_2")
"""Attentions that know documents by `borders`, not by a mask."""
HALF = (torch.bfloat16, torch.float16)
VARLEN_HEAD_DIM = 256
"""Largest head of PyTorch's flash kernels."""
KINDS = {"full_attention", "sliding_attention"}
"""Of layers (a configuration's `layer_types`) that `packed_attention` covers."""


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
    if chosen in BY_BORDERS:
        hook = partial(_add_borders, across, chosen == NAME)
        inner.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    return chosen, reason


def goes_by_borders(model: Any) -> bool:
    """Whether the attention that `model` is set to knows documents by `borders`."""
    return causal_lm(model).config._attn_implementation in BY_BORDERS


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
    found = varlen_kernel()
    return (default, found) if isinstance(found, str) else (NAME, "torch.nn.attention.varlen")


@lru_cache(maxsize=1)
def varlen_kernel() -> Callable[..., Any] | str:
    """The installed torch's `varlen_attn`, or why it cannot be used.

    Its arguments differ: 2.10 has `is_causal` and no window, 2.11 `window_size`, 2.12 wants `enable_gqa` where heads of
    keys are fewer; before that they may be fewer without a word. What comes back takes all of 2.12's.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    has = inspect.signature(varlen_attn).parameters
    needed = [name for name in ("scale", "window_size") if name not in has]
    if needed:
        return f"torch {torch.__version__}: its torch.nn.attention.varlen takes no {' and no '.join(needed)}"
    if "enable_gqa" in has:
        return varlen_attn

    def without_enable_gqa(*states: Any, enable_gqa: bool, **options: Any) -> Any:
        return varlen_attn(*states, **options)

    return without_enable_gqa


def _not_covered(inner: Any, config: Any) -> str:
    """Why `packed_attention` cannot stand in for this model's attention; empty if it can."""
    beyond = set(getattr(config, "layer_types", None) or KINDS) - KINDS
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not (inner._supports_attention_backend and inner._supports_sdpa):
        return f"{type(inner).__name__} takes no other attention function"
    if beyond:
        return f"layers of kind {', '.join(sorted(beyond))}"
    both = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    if both or any(getattr(module, "is_causal", True) is False for module in inner.get_decoder().modules()):
        return "attention in both directions"
    if any(name.endswith("sinks") for name, _ in inner.named_parameters()):
        return "attention sinks"
    if getattr(config, "sliding_window", None) and _is_foreign(type(inner)) and not _masks_by_windows(type(inner)):
        return f"a sliding window of {config.sliding_window} tokens in code of the model's own"
    for name, module in inner.named_modules():
        if hasattr(module, "sliding_window") and module.sliding_window != window_of(module):
            return f"{name} has a sliding window that its configuration does not give it"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "capped attention scores"
    if getattr(config, "attention_dropout", 0.0):
        return "attention dropout"
    if head_dim % 8 or head_dim > VARLEN_HEAD_DIM:
        return f"heads of {head_dim} numbers"
    return ""


def _is_foreign(kind: type) -> bool:
    return not any(base.__module__.startswith("transformers.models.") for base in kind.__mro__)


def window_of(module: Any) -> int | None:
    """Tokens that an attention layer sees, itself among them; None for all. By what transformers' masks go by, which is
    the configuration, where the model's code asks for such masks: some models do not pass their window on to the
    attention function, and a Llama's `config.json` may have one left over from a Mistral that means nothing."""
    config = getattr(module, "config", None)
    if not _masks_by_windows(type(module)):
        return None
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _masks_by_windows(kind: type) -> bool:
    """Whether the file that defines a class of a model imports transformers' sliding masks."""
    return hasattr(sys.modules.get(kind.__module__), "create_sliding_window_causal_mask")


def document_ends(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin in `position_ids` (batch, length), rows laid end to end, and the end: (documents + 1,).
    On a GPU the CPU waits for the count.

    >>> document_ends(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]))
    tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    """
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten().to(torch.int32)  # (documents,)
    return torch.cat([starts, torch.tensor([flat.numel()], dtype=torch.int32, device=flat.device)])


def borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """`borders_at` for `position_ids` (batch, length), which begin anew in each row."""
    return borders_at(document_ends(position_ids), position_ids.shape[1])


def borders_at(ends: torch.Tensor, length: int) -> dict[str, Any]:
    """Keyword arguments of variable-length attention. `ends` as of `document_ends`; `length` of a row: no document is
    longer. Kernels size their grid by it; the longest document itself would have to be waited for."""
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


def _add_borders(
    across: AcrossRanks | None, unmasked: bool, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """`unmasked`: the attention needs no mask beside borders. Where none is given, transformers looks for several
    documents in a row before it leaves one out, and the CPU waits for that; one of four dimensions is passed on."""
    positions = kwargs.get("position_ids")
    if any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values")):
        return args, kwargs
    if kwargs.get("cu_seq_lens_q") is None:
        if positions is None or positions.dim() != 2:
            return args, kwargs
        named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        inputs = next(given for given in (*args[:1], *named) if given is not None)
        positions = positions.expand(inputs.shape[:2])
        positions = across.whole(positions) if across and decoder.training else positions
        kwargs = kwargs | borders(positions)
    return args, (kwargs | {"attention_mask": torch.zeros(1, 1, 1, 1)} if unmasked else kwargs)


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

    With borders each document attends to itself, causally and within the layer's window, and there is no other mask;
    without (generation, padded batches) it is SDPA. A window in whole rows without a mask: each row is a document.
    """
    ends, window = kwargs.get("cu_seq_lens_q"), window_of(module)
    batch, heads, length, head_dim = query.shape
    if ends is None and attention_mask is None and window is not None and key.shape[2] == length > window:
        ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    if ends is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    flat = [_rows_end_to_end(states) for states in (query, key, value)]
    scaling = kwargs.get("scaling")
    if query.is_cuda:
        joined = _varlen(module, flat, (ends, kwargs.get("max_length_q", length)), window, scaling)
    else:
        joined = _by_document(module, flat, ends, window, scaling)
    return joined.view(batch, length, heads, head_dim), None


def _rows_end_to_end(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) to (batch * length, heads, head_dim); a view for a batch of one."""
    return states[0].transpose(0, 1) if len(states) == 1 else states.transpose(1, 2).flatten(0, 1)


def _by_document(
    module: Any, states: list[torch.Tensor], ends: torch.Tensor, window: int | None, scaling: float | None
) -> torch.Tensor:  # (batch * length, heads, head_dim)
    lengths = ends.diff().tolist()
    parts = zip(*(torch.split(state, lengths) for state in states), strict=True)  # its gradient is one cat
    documents = ([part.transpose(0, 1).unsqueeze(0) for part in document] for document in parts)
    masks = [_banded(length, window) for length in lengths]
    outputs = (
        sdpa_attention_forward(module, *three, mask, scaling=scaling)[0][0]
        for three, mask in zip(documents, masks, strict=True)
    )
    return torch.cat(list(outputs))


def _banded(length: int, window: int | None) -> torch.Tensor | None:
    """(1, 1, length, length): each token sees itself and the `window - 1` before it; None where causality says it all.

    >>> _banded(3, 2)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    if window is None or length <= window:
        return None
    behind = torch.arange(length)[:, None] - torch.arange(length)  # (query, key)
    return ((behind >= 0) & (behind < window))[None, None]


def _varlen(
    module: Any,
    states: list[torch.Tensor],
    documents: tuple[torch.Tensor, int],
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:  # (batch * length, heads, head_dim)
    varlen_attn, (ends, longest) = varlen_kernel(), documents
    assert not isinstance(varlen_attn, str), "else it would not have been chosen"
    dtype = get_target_dtype(states[0], module)  # PEFT keeps norms, and so 4-bit layers' outputs, in float32
    query, key, value = (state.to(dtype) if dtype else state for state in states)
    result = varlen_attn(
        *(query, key, value, ends, ends, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # tokens to the left, none to the right: causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, torch.Tensor)
    return result


def mask_where_padded(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask for padded batches and caches; none for whole rows, where causality and borders say it all."""
    if kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(**kwargs)
