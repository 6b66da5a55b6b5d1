"""Packed rows on their way to the model, each with its number in the run's stream.

In: the stream. Out: what `collate` makes, with what is counted here, on the CPU, so that no micro-batch waits for a GPU
to count it: `row_numbers` and `row_tokens`, lists that never go to the device; `supervised_tokens`, a number;
`document_ends`, `supervised_targets` and `supervised_positions`, tensors (see attention.py and loss.py).
"""

from typing import Any

from torch.utils.data import Dataset

from sft_core.pack import IGNORE_INDEX
from sft_core.pack.collate import collate
from sft_core.train.attention import document_ends
from sft_core.train.loss import TARGETS, with_targets
from sft_core.train.stream import PackedStream

ROW_NUMBERS = "row_numbers"
ROW_TOKENS = "row_tokens"
SUPERVISED = "supervised_tokens"
DOCUMENT_ENDS = "document_ends"


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

    def __call__(self, rows: list[tuple[int, list[Any]]]) -> dict[str, Any]:
        batch: dict[str, Any] = with_targets(collate([row for _, row in rows], self._pad_token_id))
        batch[DOCUMENT_ENDS] = document_ends(batch["position_ids"])
        batch[SUPERVISED] = int((batch[TARGETS] != IGNORE_INDEX).sum())
        batch[ROW_NUMBERS] = [number for number, _ in rows]
        batch[ROW_TOKENS] = [sum(len(sequence.input_ids) for sequence in row) for _, row in rows]
        return batch
