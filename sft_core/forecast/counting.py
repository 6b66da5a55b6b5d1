"""What one micro-batch costs, counted on the model's own code without numbers: memory kept, memory at most, work.

In: a model on the meta device (shapes, no data), its rows and tokens, how it recomputes. Out: `Counted`. The model runs
forward and backward as in training, with the adapter and loss of training; every operation's results are followed
until they are freed, and its arithmetic and memory traffic are added up. So any architecture is counted as transformers
has written it, and nothing is known here of layers.

What a GPU does otherwise than the meta device is stood in for: attention keeps query, key, value, result and one number
a head and token (flash attention), dropout keeps one byte a number.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

from sft_core.forecast.stand_ins import Attention, Record, standing_in
from sft_core.train.loss import CHUNK_BYTES, CHUNK_FROM_VOCABULARY, _ChunkedSum, causal_lm

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A 4-bit weight with its doubly quantised scale: one byte a block of 64, one float32 for 256 of them (QLoRA)."""
ATTENTION = "counted"
FREE = ("aten.empty", "aten.new_empty")
"""Operations that move nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a micro-batch is computed."""

    rows: int = 1
    checkpoint_every: int = 0
    """0 keeps all activations, 1 recomputes all layers, n every n-th."""
    nf4: bool = False
    """Linear layers but the head are held in 4 bits."""
    liger: bool = False
    """With liger's kernels."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one kind: how many, and of each the floating-point operations and the bytes of activations that it
    reads and writes (both grow with the rows), and the bytes of weights (which do not)."""

    times: int
    flops: int
    moved: int
    weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One micro-batch of `rows` rows. Bytes, without the weights and what is kept for each trained one."""

    rows: int
    saved: int
    """Kept from forward to backward, at the end of the decoder's forward."""
    logits: int
    """On top of it while the loss is taken."""
    backward: int
    """On top of it, at most, while gradients are taken."""
    chunked: bool
    """Logits are made a few rows at a time."""
    hidden: int
    """Hidden states that enter the loss."""
    work: tuple[Work, ...]

    @property
    def peak(self) -> int:
        """At most at one time."""
        return self.saved + max(self.logits, self.backward)


def count_micro_batch(model: Any, tokens: int, way: Way) -> Counted:
    """Count rows of `tokens` tokens. `model` is on the meta device, in training's dtype, as
    `sft_core.forecast.model` makes it. Raises what the model's code raises on tensors without numbers."""
    inner = causal_lm(model)
    meter = _Meter(model, _linear_storages(inner) if way.nf4 else set())
    AttentionInterface.register(ATTENTION, partial(_attention, meter.record))  # no mask is made for this name
    for config in (inner.config, inner.config.get_text_config()):
        config._attn_implementation = ATTENTION
    _checkpoint(inner, way.checkpoint_every)
    model.train()
    ids = torch.zeros(way.rows, tokens, dtype=torch.long, device="meta")
    hooks = [p.register_post_accumulate_grad_hook(_dropped) for p in model.parameters() if p.requires_grad]
    try:
        with standing_in(model, way.liger, meter.record), meter:
            hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            saved = meter.live
            meter.peak = 0
            chunked, size = _chunks(inner), hidden.nbytes
            loss = _loss(inner, hidden.flatten(0, 1), ids.flatten(), chunked)
            logits, meter.peak = meter.peak - saved, 0
            del hidden
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return Counted(
        rows=way.rows,
        saved=saved,
        logits=max(0, logits),
        backward=max(0, meter.peak - saved),
        chunked=chunked,
        hidden=size,
        work=tuple(Work(times, *kind) for kind, times in meter.work.items()),
    )


def _chunks(inner: Any) -> bool:
    """Whether training takes its logits in chunks (`sft_core.train.loss.choose_loss`)."""
    frozen = not any(parameter.requires_grad for parameter in inner.get_output_embeddings().parameters())
    return frozen and inner.config.get_text_config().vocab_size >= CHUNK_FROM_VOCABULARY


def _loss(inner: Any, hidden: torch.Tensor, targets: torch.Tensor, chunked: bool) -> torch.Tensor:
    """As training takes it where every token is supervised; `hidden` (tokens, hidden_size). transformers' own
    `slice_logits_to_keep` picks the positions by an index as wide as the hidden states."""
    head = inner.get_output_embeddings()
    index = torch.arange(len(hidden), device=hidden.device)[:, None].expand(-1, hidden.shape[-1]) % len(hidden)
    hidden = hidden.gather(0, index)
    if chunked:
        rows = max(1, CHUNK_BYTES // (4 * inner.config.get_text_config().vocab_size))
        total: torch.Tensor = _ChunkedSum.apply(hidden, targets, head.forward, rows)  # type: ignore[no-untyped-call]
        return total
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _checkpoint(inner: Any, every: int) -> None:
    if not every:
        inner.gradient_checkpointing_disable()
        return
    more = {"every_n_layers": every} if every > 1 else {}
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **more)


def _attention(
    record: Record, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    result: torch.Tensor = Attention.apply(query, key, value, record)  # type: ignore[no-untyped-call]
    return result, None


def _linear_storages(inner: Any) -> set[int]:
    """Storages of the weights that bitsandbytes would quantise."""
    head = inner.get_output_embeddings()
    linear = (module for module in inner.modules() if isinstance(module, torch.nn.Linear) and module is not head)
    return {_storage(module.weight) for module in linear if not module.weight.requires_grad}


def _dropped(parameter: torch.Tensor) -> None:
    """Gradients of trained weights are counted with them, not here."""
    parameter.grad = None


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes alive of what was made within, and the work."""

    def __init__(self, model: Any, quantised: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work: Counter[tuple[int, int, int]] = Counter()  # (flops, bytes of activations, of weights)
        self._weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._quantised = quantised
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, follow what it made, add its work."""
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._follow(tensor)
        if not _is_view(func) and not str(func).startswith(FREE):
            self._add_work(func, (args, kwargs or {}), result, made)
        return result

    def record(self, flops: int, moved: int) -> None:
        """A kernel that is stood in for."""
        self.work[(flops, moved, 0)] += 1

    def _follow(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self._alive or key in self._weights:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _add_work(self, func: Any, given: tuple[Any, Any], result: Any, made: list[torch.Tensor]) -> None:
        args, kwargs = given
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        moved, weights = sum(tensor.nbytes for tensor in made), 0
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                continue
            if (key := _storage(leaf)) in self._weights:
                weights += leaf.nbytes
                if formula and key in self._quantised:  # a kernel before it writes the weight out
                    self.work[(0, 0, int(leaf.nbytes + leaf.numel() * NF4_BYTES))] += 1
            else:
                moved += leaf.nbytes
        self.work[(int(flops), moved, weights)] += 1


def _is_view(func: Any) -> bool:
    """Whether all its results share memory with what it was given, and nothing is written."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
