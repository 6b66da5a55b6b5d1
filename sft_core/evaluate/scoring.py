"""Teacher-forced scores: loss and accuracy over the supervised tokens of each held-out conversation.

Logits exist for supervised tokens only, where the model's forward can leave the others out, and in float32 for
`CHUNK_TOKENS` of them at a time: with a vocabulary of 128,256, 16 sequences of 2,048 tokens have 8.4 GB of logits in
16 bits. Batches are bounded in tokens, and halved where memory runs out all the same.
"""

import inspect
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from sft_core.memory_faults import by_halves, naming_memory_faults
from sft_core.pack import IGNORE_INDEX, Sequence

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included; a longer sequence has one to itself."""
CHUNK_TOKENS = 512
LOWER = "lower pack.max_length: longer conversations are then set aside"


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Sums over supervised tokens: how many, how many predicted first, loss in nats."""

    tokens: int
    correct: int
    loss_sum: float


@torch.no_grad()
def score_sequences(model: Any, sequences: SequenceOf[Sequence], batch_size: int) -> list[TokenScore]:
    """One score a sequence, in order. Batches hold up to `batch_size` sequences of similar length. MemoryFault where
    memory does not suffice for a single one."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    scores: dict[int, TokenScore] = {}
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    with naming_memory_faults(f"scoring a conversation of up to {longest} tokens", LOWER):
        for batch in batches_of(order, [len(sequence.input_ids) for sequence in sequences], batch_size):
            found = by_halves(lambda part: _score_batch(model, [sequences[i] for i in part]), batch)
            scores.update(zip(batch, found, strict=True))
    return [scores[i] for i in range(len(sequences))]


def batches_of(order: SequenceOf[int], lengths: SequenceOf[int], batch_size: int) -> Iterator[list[int]]:
    """`order`, numbers into `lengths`, ascending in length, in batches of up to `batch_size` and BATCH_TOKENS.

    >>> list(batches_of([0, 1, 2, 3], [1000, 2000, 2000, 9000], 16))
    [[0, 1], [2], [3]]
    """
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[i] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(model: Any, batch: list[Sequence]) -> list[TokenScore]:
    length = max(len(sequence.input_ids) for sequence in batch)
    shape = (len(batch), length)
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sequence in enumerate(batch):
        size = len(sequence.input_ids)
        input_ids[row, :size] = torch.tensor(sequence.input_ids)
        labels[row, :size] = torch.tensor(sequence.labels)
        attention_mask[row, :size] = 1
    device = next(model.parameters()).device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), "use_cache": False}
    predicts = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))  # (batch, length): from the token before
    logits = _logits_at(model, inputs, predicts.to(device))  # (supervised, vocab_size), row after row
    targets = labels[:, 1:][predicts[:, :-1]].to(device)  # (supervised,)
    losses, correct = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.bool, device=device)]
    chunks = zip(torch.split(logits, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True)
    for some, aims in chunks:
        losses.append(torch.nn.functional.cross_entropy(some.float(), aims, reduction="none"))
        correct.append(some.float().argmax(-1) == aims)
    counts = predicts.sum(-1).tolist()
    parts = zip(counts, torch.split(torch.cat(losses), counts), torch.split(torch.cat(correct), counts), strict=True)
    return [TokenScore(count, int(right.sum()), float(loss.double().sum())) for count, loss, right in parts]


def _logits_at(model: Any, inputs: dict[str, Any], predicts: torch.Tensor) -> torch.Tensor:
    """(supervised, vocab_size) where `predicts` (batch, length) is true. A forward of an old form makes all logits."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        with suppress(IndexError, TypeError):  # one that takes numbers alone
            kept: torch.Tensor = model(**inputs, logits_to_keep=predicts).logits
            if kept.dim() == 2:
                return kept
    whole: torch.Tensor = model(**inputs).logits
    return whole[predicts]
