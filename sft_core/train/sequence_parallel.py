"""Sequence parallelism by Ulysses: ranks in groups of `sequence_parallel_size` share each packed row.

In: whole rows, the same on all ranks of a group. Out: each rank's part of their length, with the next token of each as
`shift_labels`; and an attention that sees whole rows: all-to-all turns (all heads, own part) into (own heads, whole
length) and back, so that documents are kept apart as on one rank. Everything else works token by token. The loss is
divided by the supervised tokens of the whole optimizer step, so a rank's part of a row counts as a row of its own
would, and gradients are averaged over all ranks as always. In evaluation mode each rank has rows of its own.

Source: DeepSpeed-Ulysses, arXiv 2309.14509. DeepSpeed's own form (ALST, through accelerate's `parallelism_config`)
replaces the attention by name, cuts rows in a DataLoader of its own that asks for one micro-batch of every rank at a
time, and takes one batch size only; borders of documents would be those of the part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.functional import pad
from torch.utils.data import Sampler

from sft_core.errors import RecipeError
from sft_core.pack import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class AcrossRanks:
    """A group of ranks that share rows; `rank` counts within it."""

    size: int
    rank: int
    group: Any

    def part(self, batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
        """This rank's part of `input_ids`, `labels`, `position_ids` (batch, length), and `shift_labels`."""
        length = batch["input_ids"].shape[1]
        more = -length % self.size
        after = pad(batch["labels"], (0, more + 1), value=IGNORE_INDEX)  # (batch, length + more + 1)
        whole = {
            "input_ids": pad(batch["input_ids"], (0, more), value=pad_token_id),
            "labels": after[:, :-1],
            "position_ids": pad(batch["position_ids"], (0, more)),  # 0: documents of one token
            "shift_labels": after[:, 1:],
        }
        return {name: tensor.chunk(self.size, dim=1)[self.rank].contiguous() for name, tensor in whole.items()}

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """(batch, part) of each rank to (batch, length), without a gradient."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def by_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, heads, part, head_dim) to (batch, own heads, length, head_dim)."""
        return self._exchange(states).movedim(0, 2).flatten(2, 3)  # from (size, batch, own heads, part, head_dim)

    def by_length(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, own heads, head_dim) to (batch, part, heads, head_dim)."""
        return self._exchange(states).movedim(0, 2).flatten(2, 3)  # from (size, batch, part, own heads, head_dim)

    def _exchange(self, states: torch.Tensor) -> torch.Tensor:
        """Piece i along dimension 1 goes to rank i; what comes back holds rank i's at i of a new first dimension."""
        parts = torch.stack(states.chunk(self.size, dim=1))
        received: torch.Tensor = all_to_all_single(torch.empty_like(parts), parts, group=self.group)
        return received


@lru_cache(maxsize=1)
def across_ranks(size: int) -> AcrossRanks | None:
    """This rank's group, made at the first call (by all ranks); None where rows are not shared."""
    if size == 1:
        return None
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(i, i + size))) for i in range(0, dist.get_world_size(), size)]
    return AcrossRanks(size, rank % size, groups[rank // size])


def check_heads(config: Any, size: int) -> None:
    """RecipeError unless each rank gets as many heads, and the loss is one of single tokens."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or config.num_attention_heads
        if heads % size:
            raise RecipeError(
                f"train.sequence_parallel_size {size}: the model has {name} {heads}, which {size} ranks cannot share"
            )
    if getattr(config, "output_router_logits", False):
        raise RecipeError(
            f"train.sequence_parallel_size {size}: the router's loss (output_router_logits) is one of whole rows"
        )


class SharedBatches(Sampler[int]):
    """Rows in order, each batch `times` in a row: the ranks of a group, who follow one another, get the same one."""

    def __init__(self, rows: int, batch_size: int, times: int) -> None:
        self._rows, self._batch_size, self._times = rows, batch_size, times

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._rows, self._batch_size):
            for _ in range(self._times):
                yield from range(start, start + self._batch_size)

    def __len__(self) -> int:
        return self._rows * self._times
