"""What a rehearsal tells about the real run: optimizer steps and tokens from the sampled lengths.

In: the recipe, what was packed, how many rows the sources have. Out: figures, with what they assume. Memory is
`sft_core.forecast`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_core.recipe import Recipe
from sft_core.rehearse.rows import SampledRows
from sft_core.shards import read_shard_list


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """The real run, with `ranks` ranks; tokens and packed rows of one epoch."""

    epoch_tokens: int
    packed_rows: int
    optimizer_steps: int
    ranks: int


def estimate_length(
    recipe: Recipe, rehearsed: Recipe, packed: Path, samples: Sequence[SampledRows]
) -> RunLength | None:
    """From the training tokens that each source's sampled rows gave; None where a source's rows cannot be counted.

    `samples` are of `recipe.datasets`, in order; `rehearsed` has another eval_fraction. Packed rows are taken as full.
    """
    if any(sample.total is None or not sample.rows for sample in samples):
        return None
    totals = {str(sample.file): (sample.total or 0) / sample.rows for sample in samples}
    kept_in_training = (1 - recipe.eval_fraction) / (1 - rehearsed.eval_fraction)
    tokens, sequences = 0.0, 0.0
    for shard in read_shard_list(packed):
        factor = totals[shard.place["dataset"]] * max(shard.place.get("weight", 1.0), 1.0) * kept_in_training
        sequences += shard.facts["kept"][0] * factor
        tokens += shard.facts["kept"][1] * factor
    train = recipe.train
    rows = sequences if recipe.pack.packing == "none" else tokens / recipe.pack.max_length
    ranks = train.num_processes or 1
    steps = train.optimizer_steps(rows * train.num_train_epochs, ranks)
    return RunLength(epoch_tokens=round(tokens), packed_rows=math.ceil(rows), optimizer_steps=steps, ranks=ranks)
