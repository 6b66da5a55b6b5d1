"""The pack step's books: what came in, what went on, what was set aside and why.

In: one call a sequence, a batch of them or a refused row. Out: the ledger, in rows (conversations: one goes on if a
sequence of it does), sequences, tokens and supervised tokens, and figures. Every shard keeps books of its own, its
facts; the step's are their sum.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

UNITS = ("sequences", "tokens", "supervised_tokens", "rows")
Counts = tuple[int, int, int]
"""One figure a unit; rows are counted apart."""


FIGURES = ("split", "typed_rows", "parted_turns", "dropped_thoughts", "empty_thoughts")


def _zeros() -> list[int]:
    return [0] * len(UNITS)


@dataclass(slots=True)
class Tally:
    """Grows while rows stream by. Figures are in `UNITS`."""

    entered: list[int] = field(default_factory=_zeros)
    kept: list[int] = field(default_factory=_zeros)
    set_aside: dict[str, list[int]] = field(default_factory=dict)
    split: int = 0
    """Sequences over `max_length` that became several."""
    typed_rows: int = 0
    """Rows in which somebody typed a special token's string."""
    parted_turns: int = 0
    """Answers whose beginning would merge with the last token of their prompt: sequences of their own."""
    dropped_thoughts: int = 0
    """Thoughts that `pack.reasoning: drop` left out."""
    empty_thoughts: int = 0
    """Trained answers without a thought, before which the template writes an empty one."""

    @classmethod
    def sum(cls, facts: Iterable[Mapping[str, Any]]) -> Self:
        """The books of several shards, each as its `facts()`, in one."""
        total = cls()
        for entry in facts:
            total.enter(entry["entered"])
            total.keep(entry["kept"])
            for name in FIGURES:
                setattr(total, name, getattr(total, name) + entry[name])
            for reason, counts in entry["set_aside"].items():
                total.drop(reason, counts)
        return total

    def facts(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {**asdict(self), "set_aside": dict(sorted(self.set_aside.items()))}

    def enter(self, counts: Iterable[int]) -> None:
        """Something came in."""
        _add(self.entered, counts)

    def keep(self, counts: Iterable[int]) -> None:
        """Something goes on."""
        _add(self.kept, counts)

    def drop(self, reason: str, counts: Iterable[int]) -> None:
        """Of what came in, something is left out."""
        _add(self.set_aside.setdefault(reason, _zeros()), counts)

    def count_rows(self, entered: int, set_aside: Iterable[str]) -> None:
        """Conversations came in; those of which no sequence goes on, by the reason for each."""
        lost = Counter(set_aside)
        self.enter((0, 0, 0, entered))
        self.keep((0, 0, 0, entered - lost.total()))
        for reason, count in lost.items():
            self.drop(reason, (0, 0, 0, count))

    def ledger(self) -> dict[str, dict[str, Any]]:
        """In, out and set aside, by unit."""
        return {
            unit: {
                "in": self.entered[at],
                "out": self.kept[at],
                "set_aside": {reason: counts[at] for reason, counts in sorted(self.set_aside.items()) if counts[at]},
            }
            for at, unit in enumerate(UNITS)
        }

    def reasons(self) -> str:
        """Why sequences were set aside, commonest first, for a message; empty if none were."""
        counts = Counter({reason: entry[0] for reason, entry in self.set_aside.items() if entry[0]})
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _add(figures: list[int], counts: Iterable[int]) -> None:
    for unit, count in enumerate(counts):
        figures[unit] += int(count)
