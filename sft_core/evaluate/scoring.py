"""Teacher-forced scores: loss and accuracy over the supervised tokens of each held-out conversation."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch

from sft_core.pack import IGNORE_INDEX, Sequence


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Sums over supervised tokens: how many, how many predicted first, loss in nats."""

    tokens: int
    correct: int
    loss_sum: float


@torch.no_grad()
def score_sequences(model: Any, sequences: SequenceOf[Sequence], batch_size: int) -> list[TokenScore]:
    """One score a sequence, in order. Batches hold sequences of similar length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    scores: dict[int, TokenScore] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        for index, score in zip(indices, _score_batch(model, [sequences[i] for i in indices]), strict=True):
            scores[index] = score
    return [scores[i] for i in range(len(sequences))]


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
    logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False).logits
    scores = []
    for row in range(len(batch)):
        positions = (labels[row, 1:] != IGNORE_INDEX).nonzero().squeeze(1)  # predicted from the token before
        targets = labels[row, 1:][positions].to(device)  # (supervised,)
        predicted = logits[row, positions.to(device)].float()  # (supervised, vocab_size)
        losses = torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
        correct = int((predicted.argmax(-1) == targets).sum())
        scores.append(TokenScore(len(positions), correct, float(losses.double().sum())))
    return scores
