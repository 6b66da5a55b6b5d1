"""The loss over held-out conversations, on the model as it is trained.

In: a Conversations folder, the packed folder's tokenizer and template. Out: nats a supervised token, by the formula of
the training loss. Nothing random is drawn: the model is in eval mode, and in its former mode again afterwards. (4-bit
layers on CPU stay as quantised: `keep_4bit_weights_unpacked` in model.py.)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_core.pack import IGNORE_INDEX, PackedDataset, Sequence, pack_lengths
from sft_core.pack.collate import collate
from sft_core.train.loss import LossWay, supervised_loss, with_targets


class HeldOut:
    """Held-out sequences in packed rows, dealt out to the ranks in turn."""

    def __init__(self, sequences: list[Sequence], packed: PackedDataset, rows_a_batch: int) -> None:
        lengths = [len(sequence.input_ids) for sequence in sequences]
        packs = packed.packing != "none"
        bins = pack_lengths(lengths, packed.max_length) if packs else [[i] for i in range(len(lengths))]
        self._rows = [[sequences[i] for i in numbers] for numbers in bins]
        self._pad_token_id = packed.pad_token_id
        self._rows_a_batch = rows_a_batch
        labels = (label for sequence in sequences for label in sequence.labels[1:])
        self.supervised_tokens = sum(label != IGNORE_INDEX for label in labels)

    def loss(
        self, model: Any, way: LossWay, device: torch.device, on_batch: Callable[[], object] = lambda: None
    ) -> float:
        """Every rank calls this, and gets the same. `on_batch` is called after each batch."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        with in_eval_mode(model):
            for batch in self._batches():
                inputs = {name: value.to(device) for name, value in batch.items()}
                total += supervised_loss(model, inputs, self.supervised_tokens, way).double()
                on_batch()
        if _world_size() > 1:
            dist.all_reduce(total)
        return float(total)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """As many on every rank, the last ones perhaps empty: under ZeRO-3 ranks go forward together."""
        rank = dist.get_rank() if _world_size() > 1 else 0
        a_turn = self._rows_a_batch * _world_size()
        for turn in range(math.ceil(len(self._rows) / a_turn)):
            start = turn * a_turn + rank * self._rows_a_batch
            yield with_targets(collate(self._rows[start : start + self._rows_a_batch] or [[]], self._pad_token_id))


def read_held_out(conversations: Path, packed: PackedDataset, tokenizer: Any, rows_a_batch: int) -> HeldOut:
    """The held-out side, encoded as in training. DataError if none of it can be scored."""
    from sft_core.evaluate.examples import read_examples

    examples, _ = read_examples(conversations, tokenizer, tokenizer.chat_template, packed.max_length)
    return HeldOut([sequence for example in examples for sequence in example.sequences], packed, rows_a_batch)


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Without dropout and gradients, for a while."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
