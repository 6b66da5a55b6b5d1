"""The whole run's packed rows as one list, in the order of training.

Epochs are packed anew from (seed, epoch) and laid end to end, so a position in the list is a position in the run: the
order is the same for any number of ranks, and resuming means skipping. Nothing is cut at an epoch's end.
"""

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

from torch.utils.data import Dataset

from sft_core.pack import PackedDataset


class PackedStream(Dataset[list[Any]]):
    """Item i is the list of sequences that share packed row i of the run."""

    def __init__(self, packed: PackedDataset, num_epochs: float, multiple_of: int) -> None:
        self._packed = packed
        self.bins = run_bins(packed, num_epochs)
        self.rows = len(self.bins)
        self.pad_token_id = packed.pad_token_id
        self._length = math.ceil(self.rows / multiple_of) * multiple_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> list[Any]:
        """Rows past the last one are empty: they even out the ranks' batches and train nothing."""
        return [self._packed.sequence(i) for i in self.bins[index]] if index < self.rows else []


def run_bins(packed: PackedDataset, num_epochs: float) -> list[SequenceOf[int]]:
    """Bins of all epochs in order; a last partial epoch gives its first rows."""
    bins: list[SequenceOf[int]] = []
    for epoch in range(math.ceil(num_epochs)):
        rows = packed.bins(epoch)
        fraction = min(1.0, num_epochs - epoch)
        bins.extend(rows[: math.ceil(len(rows) * fraction)])
    return bins
