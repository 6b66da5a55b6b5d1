"""Packed rows on their way to the model, each with its number in the run's stream.

In: the stream. Out: what `collate` makes, with `row_numbers` and `row_tokens`, both (batch,), that are not the model's.
"""

from typing import Any

import torch
from torch.utils.data import Dataset

from sft_core.pack.collate import collate
from sft_core.train.stream import PackedStream

ROW_NUMBERS = "row_numbers"
ROW_TOKENS = "row_tokens"


class NumberedRows(Dataset[tuple[int, list[Any]]]):
    """Item i is i and row i of the stream."""

    def __init__(self, stream: PackedStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, index: int) -> tuple[int, list[Any]]:
        return index, self._stream[index]


class NumberedCollator:
    """A DataLoader's `collate_fn`."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: list[tuple[int, list[Any]]]) -> dict[str, torch.Tensor]:
        batch = collate([row for _, row in rows], self._pad_token_id)
        batch[ROW_NUMBERS] = torch.tensor([number for number, _ in rows])
        batch[ROW_TOKENS] = torch.tensor([sum(len(sequence.input_ids) for sequence in row) for _, row in rows])
        return batch
