"""Proof, on the real model and attention kernel, that documents sharing a packed row do not see each other.

Two documents are packed; the first one's tokens are changed; the second one's logits must stay. Peers warn at most:
a kernel that ignores the borders trains on garbage and shows a better loss.
"""

from typing import Any

import torch

from sft_core.errors import TrainError

DOCUMENT_LENGTH = 12
RELATIVE_TOLERANCE = 1e-3
"""Change of the neighbour's logits over their size. A leak changes them by about their size; rounding far less."""


@torch.no_grad()
def check_isolation(model: Any, vocab_size: int) -> float:
    """Relative change of the untouched neighbour's logits. TrainError if the change shows a leak."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (2, 2 * DOCUMENT_LENGTH), generator=generator)  # (variant, length)
    tokens[1, DOCUMENT_LENGTH:] = tokens[0, DOCUMENT_LENGTH:]
    positions = torch.arange(DOCUMENT_LENGTH).repeat(2).unsqueeze(0)  # (1, length)
    logits = []
    for row in tokens:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # the same dropout for both
            inputs = {"input_ids": row.unsqueeze(0).to(device), "position_ids": positions.to(device)}
            logits.append(model(**inputs, use_cache=False).logits)
    first, second = (entry[0, DOCUMENT_LENGTH:].float() for entry in logits)  # (length, vocab_size)
    change = float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
    if change > RELATIVE_TOLERANCE:
        raise TrainError(
            f"packed documents see each other: changing one moved its neighbour's logits by {change:.1e} of their "
            f"size; the attention ({model.config._attn_implementation}) ignores position_ids. Set pack.packing: none"
        )
    return change
