"""Which evaluation was best, and how many came after it.

In: the log that the Trainer keeps in a checkpoint's `trainer_state.json`, so that a killed run counts on where it was.
Out: the optimizer step with the lowest held-out loss (the first of equals), the number of evaluations since.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.errors import TrainError
from sft_core.train.checkpoints import read_mark


@dataclass(frozen=True, slots=True)
class Best:
    """An evaluation; `since`: how many came after it."""

    optimizer_step: int
    eval_loss: float
    since: int


def best_of(history: Sequence[Mapping[str, Any]]) -> Best | None:
    """The best evaluation of a log; None where there was none.

    >>> best_of([{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 3.0}])
    Best(optimizer_step=2, eval_loss=3.0, since=1)
    """
    evaluated = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    if not evaluated:
        return None
    loss, step = min(evaluated)
    return Best(step, loss, len(evaluated) - 1 - evaluated.index((loss, step)))


def best_in(checkpoint: Path) -> Best | None:
    """The best evaluation of the run up to `checkpoint`."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return best_of(state["log_history"])


def stopped_early(checkpoint: Path, patience: int | None) -> bool:
    """Whether the run ended there, as the held-out loss fell no more."""
    best = best_in(checkpoint) if patience is not None else None
    return best is not None and patience is not None and best.since >= patience


def best_checkpoint(newest: Path) -> Path:
    """The checkpoint of the best evaluation, beside the newest one; that one where there was none. TrainError if it is
    gone: the newest one's weights are not the result that was asked for."""
    best = best_in(newest)
    found = newest.with_name(f"checkpoint-{best.optimizer_step}") if best else newest
    if read_mark(found) is None:
        raise TrainError(
            f"{found}, of the best evaluation, is gone or torn; the same command goes on from the newest checkpoint "
            "before it, or anew"
        )
    return found
