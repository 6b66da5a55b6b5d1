"""Loss over supervised tokens only: no logits of prompts, padding or last tokens ever exist.

In: a causal LM (bare, with PEFT, or wrapped by DeepSpeed or DDP) and a batch with `labels`. Out: the same scalar as the
model's own forward, cross-entropy summed over supervised tokens and divided by `num_items_in_batch`: those of the whole
optimizer step (all ranks and micro-batches), so no split of the same rows changes it. A router's auxiliary loss is in
it where the model's config has `output_router_logits`, by the micro-batch's share of the step's supervised tokens: the
model itself would count it whole for every micro-batch.

Two ways, both through the model's own forward, so that wrappers, scaled or capped logits and a router's auxiliary loss
stay what they are:

- `selected`: transformers' `logits_to_keep` takes the positions, `shift_labels` the targets beside them.
- `chunked`: the head is left out of the forward and applied to a few rows at a time, each chunk's gradient taken at
  once, so at most `CHUNK_BYTES` of float32 logits live. On CUDA, liger-kernel's fused kernel does it where installed.
  It needs a frozen head, and a model that changes nothing behind it, or scales only.

A model that computes its loss otherwise keeps its `own` way. `choose_loss` tries it out on the real model.

Which positions those are is known where the batch is made (`with_targets`), so that a GPU need not be waited for: a
boolean mask would have to be counted there first.

Sources: Liger Kernel, arXiv 2410.10989, section 3.2; transformers' `slice_logits_to_keep` and `ForCausalLMLoss`.
"""

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy, pad

from sft_core.pack import IGNORE_INDEX

LossWay = Literal["chunked", "selected", "own"]
CHUNK_BYTES = 256 * 2**20
"""Float32 logits of one chunk: 524 rows of a vocabulary of 128,256."""
CHUNK_FROM_VOCABULARY = 16_384
"""Below it the logits of supervised tokens are small beside the activations, and one product is quickest."""
TARGETS, POSITIONS = "supervised_targets", "supervised_positions"
"""Of a batch, by `with_targets`."""
PROBE_LENGTH = 8
PROBE_TOLERANCE = 1e-2
"""Difference of losses over their size: bf16 rounding lies below."""


def supervised_loss(
    model: Any, batch: Mapping[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None, way: LossWay
) -> torch.Tensor:
    """Scalar loss of `batch`; `labels` is (batch, length) with IGNORE_INDEX where nothing is trained. `shift_labels`,
    where the batch has them: the token after each, which may be on another rank. With what `with_targets` adds to a
    batch on the CPU, a GPU is not waited for.

    `num_items_in_batch`: supervised tokens of the whole optimizer step; None for the mean over this batch.
    """
    apart = ("labels", "shift_labels", TARGETS, POSITIONS)
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in apart}
    inner = causal_lm(model)
    if way == "own":
        if "shift_labels" in batch:
            inputs["shift_labels"] = batch["shift_labels"]
        return _own_loss(model, inputs, batch["labels"], num_items_in_batch)
    if POSITIONS not in batch:
        batch = with_targets(batch)
    targets = batch[TARGETS]  # (batch, most), IGNORE_INDEX where a row has fewer
    flat = targets.flatten()
    inputs |= {"labels": flat, "shift_labels": flat, "logits_to_keep": batch[POSITIONS], "use_cache": False}
    with _head_left_out(inner) if way == "chunked" else nullcontext():
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
    return _weighed(output, inner, (targets != IGNORE_INDEX).sum(), num_items_in_batch)


def with_targets(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`batch` with what is predicted, `supervised_targets`, and from where, `supervised_positions`: both (batch, most),
    in order; `most` is that of the row with most supervised tokens, at least 1. Where a row has fewer, IGNORE_INDEX at
    its first position. `labels`, or `shift_labels`, are (batch, length). On a GPU the CPU waits for the count.

    >>> batch = with_targets({"labels": torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, 8]])})
    >>> batch["supervised_targets"].tolist(), batch["supervised_positions"].tolist()
    ([[5, 7], [8, -100]], [[0, 2], [2, 0]])
    """
    following = batch.get("shift_labels")
    if following is None:
        following = pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]  # (batch, length): the token after each
    supervised = following != IGNORE_INDEX
    most = max(1, int(supervised.sum(-1).max()))
    first = supervised.int().argsort(dim=-1, descending=True, stable=True)[:, :most]  # supervised ones, in order
    positions = torch.where(supervised.gather(-1, first), first, 0)
    targets = torch.where(supervised.gather(-1, first), following.gather(-1, first), IGNORE_INDEX)
    return {**batch, TARGETS: targets, POSITIONS: positions}


def choose_loss(model: Any, gathers: bool = False) -> tuple[LossWay, str]:
    """The quickest way that gives `model`'s own loss, tried out on a few tokens, and why, in words for the log.
    `gathers`: under ZeRO-3 modules bring their weights together by now; the head's are gone after its forward."""
    inner = causal_lm(model)
    if in_parts(model) and not gathers:
        return "own", "ZeRO-3 holds the weights in parts: tried out when training begins"
    head = inner.get_output_embeddings()
    vocabulary = inner.config.get_text_config().vocab_size
    batch = _probe_batch(vocabulary, _device_of(inner))
    if not _gives_own_loss(model, batch, "selected"):
        return "own", f"{type(inner).__name__} computes its loss in a way of its own"
    if in_parts(model):
        return "selected", "under ZeRO-3 the head is no longer there when a chunk would need it"
    if vocabulary < CHUNK_FROM_VOCABULARY:
        return "selected", f"a vocabulary of {vocabulary} is small"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "selected", "the output head is trained"
    if _caps_logits(inner) or not _gives_own_loss(model, batch, "chunked"):
        return "selected", "the model changes its logits after the head"
    return "chunked", f"a vocabulary of {vocabulary}"


def in_parts(model: Any) -> bool:
    """Whether ZeRO-3 shares its weights among ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def causal_lm(model: Any) -> Any:
    """The transformers model inside DeepSpeed's, DDP's and PEFT's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _own_loss(
    model: Any, inputs: dict[str, Any], labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """From whole logits. A forward that knows no `num_items_in_batch` gives a mean over its batch."""
    inner = causal_lm(model)
    supervised = (inputs.get("shift_labels", labels[:, 1:]) != IGNORE_INDEX).sum()
    parameters = inspect.signature(type(inner).forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        output = model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch, use_cache=False)
        return _weighed(output, inner, supervised, num_items_in_batch)
    output = model(**inputs, labels=labels, use_cache=False)
    mean: torch.Tensor = output.loss if supervised else output.logits.sum() * 0  # every rank has to go backward
    return mean if num_items_in_batch is None else mean * (supervised / num_items_in_batch)


def _weighed(
    output: Any, inner: Any, supervised: torch.Tensor | int, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The output's loss, its auxiliary part by the micro-batch's share of the optimizer step."""
    loss: torch.Tensor = output.loss
    auxiliary, coefficient = getattr(output, "aux_loss", None), getattr(inner, "router_aux_loss_coef", None)
    if num_items_in_batch is None or auxiliary is None or coefficient is None:
        return loss
    return loss - coefficient * (1 - supervised / num_items_in_batch) * auxiliary.to(loss.device)


def _device_of(inner: Any) -> torch.device:
    """Where inputs go; with parameters offloaded by ZeRO-3, weights lie elsewhere."""
    weight = inner.get_input_embeddings().weight
    gpu = hasattr(weight, "ds_id") and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else weight.device


def _probe_batch(vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (1, PROBE_LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[:, : PROBE_LENGTH // 2] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def _gives_own_loss(model: Any, batch: Mapping[str, torch.Tensor], way: LossWay) -> bool:
    training = model.training
    model.eval()  # no dropout between the two
    try:
        own = float(supervised_loss(model, batch, None, "own"))
        return abs(float(supervised_loss(model, batch, None, way)) - own) <= PROBE_TOLERANCE * own
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):  # a forward of another form
        return False
    finally:
        model.train(training)


def _caps_logits(inner: Any) -> bool:
    """By a hyperbolic tangent (Gemma 2), which a probe with small logits would not show."""
    return getattr(inner.config.get_text_config(), "final_logit_softcapping", None) is not None


@contextmanager
def _head_left_out(inner: Any) -> Iterator[None]:
    """Within, the head passes hidden states on, and the loss function applies it in chunks."""
    head = inner.get_output_embeddings()
    apply_head = head.forward

    def loss_function(
        logits: torch.Tensor, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        hidden, targets = logits.flatten(0, -2), kwargs["shift_labels"]  # (n, hidden_size), (n,)
        if hidden.is_cuda and _has_liger() and type(head) is torch.nn.Linear:
            total = _liger_sum(hidden, head, targets)
        else:
            rows = max(1, CHUNK_BYTES // (4 * vocab_size))
            total = _ChunkedSum.apply(hidden, targets, apply_head, rows)  # type: ignore[no-untyped-call]
        return total / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)

    with _replaced(head, "forward", lambda hidden: hidden), _replaced(inner, "_loss_function", loss_function):
        yield


class _ChunkedSum(torch.autograd.Function):
    """Sum of cross-entropy over rows with a target; the gradient of the hidden states is ready when the sum is."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Any, rows: int) -> torch.Tensor:
        """`hidden` (n, hidden_size), `targets` (n,); `head` a frozen map to (n, vocab_size)."""
        if not ctx.needs_input_grad[0]:
            parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            return torch.stack([cross_entropy(head(h).float(), t, reduction="sum") for h, t in parts]).sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy(head(part).float(), targets[start : start + rows], reduction="sum")
                (gradient[start : start + rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient at hand times the loss's."""
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grad_outputs[0]).to(gradient.dtype), None, None, None


def _liger_sum(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return liger_fused_linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), targets, bias, reduction="sum")


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An instance attribute of `module` for a while; the class's own comes back by deleting it."""
    before = module.__dict__.get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
