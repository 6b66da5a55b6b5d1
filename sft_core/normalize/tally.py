"""What became of the rows: the ledger, the figures, an example of every fault.

In: each row's fate, as normalize decides it. Out: a ledger that balances (rows; turns, that is answers; characters) and
facts. Turns and characters are counted of rows that became conversations; there are none to count in the others.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_core.normalize.conversation import Message

NO_FAULT = frozenset({"also_in_training", "not_sampled"})
"""Reasons that do not count against `max_quarantined_fraction`."""
DETAIL_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The first row that a reason was met in."""

    dataset: str
    file: str
    row_number: int
    detail: str
    row: str


@dataclass
class DatasetTally:
    """One data set's rows."""

    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    """By side."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """By reason."""

    @property
    def faulty(self) -> int:
        """Rows that cannot be used."""
        return sum(count for reason, count in self.set_aside.items() if reason not in NO_FAULT)


@dataclass
class _Unit:
    """Turns or characters."""

    came: int = 0
    kept: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)

    def entry(self) -> dict[str, Any]:
        return {"in": self.came, "out": self.kept, "set_aside": dict(sorted(self.set_aside.items()))}


class Tally:
    """Counts rows as they come; every row is counted in once and out once."""

    def __init__(self) -> None:
        self.datasets: dict[str, DatasetTally] = {}
        self.examples: dict[str, Example] = {}
        self._turns, self._characters = _Unit(), _Unit()

    def come(self, dataset: str) -> None:
        """A row was read."""
        self.datasets.setdefault(dataset, DatasetTally()).rows += 1

    def become(self, messages: Sequence[Message]) -> None:
        """It became a conversation."""
        turns, characters = _size(messages)
        self._turns.came += turns
        self._characters.came += characters

    def keep(self, dataset: str, side: str, messages: Sequence[Message]) -> None:
        """It was written to a side."""
        self.datasets[dataset].kept[side] += 1
        turns, characters = _size(messages)
        self._turns.kept += turns
        self._characters.kept += characters

    def set_aside(self, reason: str, example: Example, messages: Sequence[Message]) -> None:
        """It was set aside; `messages` is empty where it never became a conversation."""
        self.datasets[example.dataset].set_aside[reason] += 1
        self.examples.setdefault(reason, example)
        if messages:
            turns, characters = _size(messages)
            self._turns.set_aside[reason] += turns
            self._characters.set_aside[reason] += characters

    @property
    def rows(self) -> int:
        """Rows in."""
        return sum(entry.rows for entry in self.datasets.values())

    @property
    def faulty(self) -> int:
        """Rows that cannot be used."""
        return sum(entry.faulty for entry in self.datasets.values())

    @property
    def reasons(self) -> Counter[str]:
        """Rows set aside, by reason."""
        return sum((entry.set_aside for entry in self.datasets.values()), Counter())

    def on(self, side: str) -> int:
        """Rows written to a side."""
        return sum(entry.kept[side] for entry in self.datasets.values())

    def ledger(self) -> dict[str, dict[str, Any]]:
        """In is counted as rows come, out and set aside as they go: the counts check one another."""
        aside = dict(sorted(self.reasons.items()))
        rows = {"in": self.rows, "out": self.on("train") + self.on("heldout"), "set_aside": aside}
        return {"rows": rows, "turns": self._turns.entry(), "characters": self._characters.entry()}

    def facts(self) -> dict[str, Any]:
        """Small figures worth showing."""
        return {
            "train_rows": self.on("train"),
            "heldout_rows": self.on("heldout"),
            "quarantined_fraction": self.faulty / self.rows,
            "datasets": {name: _plain(entry) for name, entry in self.datasets.items()},
            "examples": {reason: _shown(example) for reason, example in sorted(self.examples.items())},
        }


def row_of(example: Example) -> object:
    """The row of an example, parsed; empty where it is not JSON."""
    try:
        return json.loads(example.row)
    except (ValueError, RecursionError):
        return {}


def _plain(entry: DatasetTally) -> dict[str, Any]:
    aside = dict(sorted(entry.set_aside.items()))
    return {"rows": entry.rows, "train": entry.kept["train"], "heldout": entry.kept["heldout"], "set_aside": aside}


def _shown(example: Example) -> dict[str, Any]:
    place = {"dataset": example.dataset, "file": example.file, "row_number": example.row_number}
    return {**place, "detail": example.detail[:DETAIL_CHARACTERS]}


def _size(messages: Sequence[Message]) -> tuple[int, int]:
    """(answers, characters)."""
    return sum(message["weight"] is not None for message in messages), sum(len(m["content"]) for m in messages)
