"""Packed rows as tensors. Needs torch.

In: sequences and bins. Out: batches with `input_ids`, `labels`, `position_ids`, and no attention mask: positions
restart at 0 at each sequence, by which transformers' attention (without a mask, without a cache) keeps sequences apart
(`find_packed_sequence_indices` of transformers.masking_utils). The end of a row is filled with pad tokens that are a
sequence of their own, untrained. First labels are IGNORE_INDEX, so the loss never crosses a border.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import Dataset

from sft_core.pack.encoding import IGNORE_INDEX, Sequence

PackedRow = list[Sequence]


class Sequences(Protocol):
    """What `PackedRows` reads from; `PackedDataset` is one."""

    def sequence(self, index: int) -> Sequence:
        """Sequence number `index`."""
        ...


class PackedRows(Dataset[PackedRow]):
    """Item i holds the sequences that share packed row i."""

    def __init__(self, sequences: Sequences, bins: SequenceOf[SequenceOf[int]]) -> None:
        self._sequences = sequences
        self._bins = bins

    def __len__(self) -> int:
        return len(self._bins)

    def __getitem__(self, index: int) -> PackedRow:
        return [self._sequences.sequence(number) for number in self._bins[index]]


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """`collate` with its pad token, as a DataLoader's `collate_fn`."""

    pad_token_id: int

    def __call__(self, rows: SequenceOf[PackedRow]) -> dict[str, torch.Tensor]:
        return collate(rows, self.pad_token_id)


def collate(rows: SequenceOf[PackedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch; a row without sequences is all padding.

    >>> collate([[Sequence([5, 6], [-100, 6]), Sequence([7], [-100])], [Sequence([8], [-100])]], 0)["position_ids"]
    tensor([[0, 1, 0],
            [0, 0, 1]])
    """
    length = max([1, *(sum(len(sequence.input_ids) for sequence in row) for row in rows)])
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)  # (batch, length)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)  # (batch, length)
    position_ids = torch.zeros(shape, dtype=torch.long)  # (batch, length)
    for number, row in enumerate(rows):
        start = 0
        for sequence in row:
            end = start + len(sequence.input_ids)
            input_ids[number, start:end] = torch.tensor(sequence.input_ids, dtype=torch.long)
            labels[number, start + 1 : end] = torch.tensor(sequence.labels[1:], dtype=torch.long)
            position_ids[number, start:end] = torch.arange(end - start)
            start = end
        position_ids[number, start:] = torch.arange(length - start)  # padding, apart
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
