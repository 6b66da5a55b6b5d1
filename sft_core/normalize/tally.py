"""What became of the rows: the ledger, the figures, an example of every fault.

In: what each shard says of its rows, and what became of those that might be held out. Out: a ledger that balances
(rows; turns, that is answers; characters of contents and thoughts) and facts. Turns and characters are counted of rows
that became conversations; there are none to count in the others.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from sft_core.account import NO_FAULT
from sft_core.shard_rows import locate

DETAIL_CHARACTERS = 200
MOST_COLUMNS, NAME_CHARACTERS = 50, 60
"""Of the unread columns, those that are named."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Rows and what is in them."""

    rows: int = 0
    turns: int = 0
    characters: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.rows + other.rows, self.turns + other.turns, self.characters + other.characters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The first row that a reason was met in. `fitting`: the map_fns that its columns fit."""

    dataset: str
    file: str
    row_number: int
    detail: str
    fitting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardExample:
    """The first in a shard; `file` and `row_number` are the shard's own."""

    file: int
    row_number: int
    detail: str
    fitting: tuple[str, ...]


@dataclass
class ShardTally:
    """One shard's rows."""

    came: Amount = Amount()
    train: Amount = Amount()
    set_aside: defaultdict[str, Amount] = field(default_factory=lambda: defaultdict(Amount))
    examples: dict[str, ShardExample] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    """Rows by the columns that a shipped map_fn did not read."""

    def as_facts(self) -> dict[str, Any]:
        """JSON-able form, for `shards.json`."""
        return {
            "came": astuple(self.came),
            "train": astuple(self.train),
            "set_aside": {reason: astuple(amount) for reason, amount in self.set_aside.items()},
            "examples": {reason: asdict(example) for reason, example in self.examples.items()},
            "unread_columns": most_common(self.unread),
        }


@dataclass
class DatasetTally:
    """One data set's rows."""

    came: Amount = Amount()
    kept: defaultdict[str, Amount] = field(default_factory=lambda: defaultdict(Amount))
    """By side."""
    set_aside: defaultdict[str, Amount] = field(default_factory=lambda: defaultdict(Amount))
    """By reason."""
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def faulty(self) -> int:
        """Rows that cannot be used."""
        return sum(amount.rows for reason, amount in self.set_aside.items() if reason not in NO_FAULT)


class Tally:
    """Adds up shards; every row is counted in once and out once."""

    def __init__(self) -> None:
        self.datasets: defaultdict[str, DatasetTally] = defaultdict(DatasetTally)
        self.examples: dict[str, Example] = {}

    def add_shard(self, facts: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        """A shard's rows but those that might be held out: of these, only that they came."""
        dataset = self.datasets[place["dataset"]]
        dataset.came += Amount(*facts["came"])
        dataset.kept["train"] += Amount(*facts["train"])
        for reason, amount in facts["set_aside"].items():
            dataset.set_aside[reason] += Amount(*amount)
        dataset.unread.update(facts["unread_columns"])
        for reason, entry in facts["examples"].items():
            self.examples.setdefault(reason, Example(**locate(entry, place)))

    def hold_out(self, dataset: str, amount: Amount) -> None:
        """Conversations were written to the held-out side."""
        self.datasets[dataset].kept["heldout"] += amount

    def set_aside(self, reason: str, example: Example, amount: Amount) -> None:
        """A conversation was taken out of the held-out side."""
        self.datasets[example.dataset].set_aside[reason] += amount
        self.examples.setdefault(reason, example)

    @property
    def rows(self) -> int:
        """Rows in."""
        return sum(entry.came.rows for entry in self.datasets.values())

    @property
    def faulty(self) -> int:
        """Rows that cannot be used."""
        return sum(entry.faulty for entry in self.datasets.values())

    @property
    def reasons(self) -> Counter[str]:
        """Rows set aside, by reason."""
        return Counter(self._aside("rows"))

    def on(self, side: str) -> int:
        """Rows written to a side."""
        return sum(entry.kept[side].rows for entry in self.datasets.values())

    def ledger(self) -> dict[str, dict[str, Any]]:
        """In is counted as rows come, out in what was written, set aside as they go: the counts check one another."""
        return {unit: self._entry(unit) for unit in ("rows", "turns", "characters")}

    def facts(self) -> dict[str, Any]:
        """Small figures worth showing."""
        return {
            "train_rows": self.on("train"),
            "heldout_rows": self.on("heldout"),
            "quarantined_fraction": self.faulty / self.rows,
            "datasets": {name: _plain(entry) for name, entry in self.datasets.items()},
            "examples": {reason: _shown(example) for reason, example in sorted(self.examples.items())},
        }

    def _entry(self, unit: str) -> dict[str, Any]:
        came = sum(getattr(entry.came, unit) for entry in self.datasets.values())
        kept = sum(getattr(amount, unit) for entry in self.datasets.values() for amount in entry.kept.values())
        return {"in": came, "out": kept, "set_aside": dict(sorted(self._aside(unit).items()))}

    def _aside(self, unit: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for entry in self.datasets.values():
            counts.update({reason: getattr(amount, unit) for reason, amount in entry.set_aside.items()})
        return {reason: count for reason, count in counts.items() if count}


def _plain(entry: DatasetTally) -> dict[str, Any]:
    aside = {reason: amount.rows for reason, amount in sorted(entry.set_aside.items())}
    sides = {side: entry.kept[side].rows for side in ("train", "heldout")}
    unread = {"unread_columns": most_common(entry.unread)} if entry.unread else {}
    return {"rows": entry.came.rows, **sides, "set_aside": aside, **unread}


def most_common(unread: Counter[str]) -> dict[str, int]:
    """The columns that most rows have, the commonest first. A name may be any text, with control characters too."""
    names = sorted(unread, key=lambda name: (-unread[name], name))[:MOST_COLUMNS]
    return {_printable(name)[:NAME_CHARACTERS]: unread[name] for name in names}


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _shown(example: Example) -> dict[str, Any]:
    place = {"dataset": example.dataset, "file": example.file, "row_number": example.row_number}
    fitting = {"fitting": list(example.fitting)} if example.fitting else {}
    return {**place, "detail": example.detail[:DETAIL_CHARACTERS], **fitting}
