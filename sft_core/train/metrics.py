"""`metrics.jsonl`: one JSON object a logged optimizer step, written by rank 0 and read by whoever shows or stores it.

Keys: `time` (ms since 1970), `optimizer_step`, `max_steps`, `loss` (nats a supervised token), `learning_rate`,
`grad_norm`, `epoch`, `tokens`, `supervised_tokens` (both so far), `skipped_steps`, `tokens_per_second`, `memory_bytes`
(rank 0's peak: the GPU's, or the process's), `seconds_left`; where it was evaluated `eval_loss` (nats a supervised
token, held out).
"""

import json
import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any


def append_metrics(path: Path, entry: dict[str, Any]) -> None:
    """Add one line and bring it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn last one (a kill in mid-write) is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def rewind_metrics(path: Path, optimizer_step: int) -> None:
    """Drop what was logged after `optimizer_step`, so that a resumed run logs every step once."""
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(path) if entry["optimizer_step"] <= optimizer_step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), "utf-8")
    part.replace(path)


def memory_bytes() -> int:
    """Most memory held so far: allocated on the GPU, or resident where there is none."""
    import torch  # slow to import

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


def progress_line(entry: dict[str, Any]) -> str:
    """One line for a person.

    >>> entry = {"optimizer_step": 5, "max_steps": 20, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5,
    ...          "tokens_per_second": 1234.5, "supervised_tokens": 9876, "epoch": 0.75, "memory_bytes": 2.5e9,
    ...          "seconds_left": 83.4}
    >>> progress_line(entry)
    'step 5/20  loss 1.2500  lr 2.0e-04  grad 0.50  epoch 0.75  1,234 tok/s  9,876 supervised  2.5 GB  0:01:23 left'
    """
    held_out = f"  eval_loss {entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
    return (
        f"step {entry['optimizer_step']}/{entry['max_steps']}  loss {entry['loss']:.4f}{held_out}  "
        f"lr {entry['learning_rate']:.1e}  grad {entry['grad_norm']:.2f}  epoch {entry['epoch']:.2f}  "
        f"{entry['tokens_per_second']:,.0f} tok/s  {entry['supervised_tokens']:,} supervised  "
        f"{entry['memory_bytes'] / 1e9:.1f} GB  {timedelta(seconds=int(entry['seconds_left']))} left"
    )
