"""The loss: cross-entropy in float32, summed over a micro-batch's supervised tokens, divided by those of the whole
optimizer step (all ranks and micro-batches), so no split of the same rows changes it. One formula for every model."""

from typing import Any

import torch

from sft_core.pack import IGNORE_INDEX


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Trainer's `compute_loss_func`. `labels` (batch, length) are those of the tokens themselves, not shifted."""
    targets = labels[:, 1:].reshape(-1)  # (batch * (length - 1),)
    logits = outputs.logits[:, :-1].reshape(targets.numel(), -1)  # (batch * (length - 1), vocab_size)
    supervised = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    # without a supervised token the sum is 0, and still a function of the weights, as every rank has to go backward
    total = torch.nn.functional.cross_entropy(logits[supervised].float(), targets[supervised], reduction="sum")
    return total / (len(supervised) if num_items_in_batch is None else num_items_in_batch)
