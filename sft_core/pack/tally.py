"""The pack step's books: what came in, what went on, what was set aside and why.

In: one call a sequence or refused row. Out: the ledger, in sequences, tokens and supervised tokens, and figures.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

UNITS = ("sequences", "tokens", "supervised_tokens")
Counts = tuple[int, int, int]
"""One figure a unit."""


@dataclass(slots=True)
class Tally:
    """Grows while rows stream by."""

    entered: list[int] = field(default_factory=lambda: [0] * len(UNITS))
    set_aside: dict[str, Counter[str]] = field(default_factory=dict)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each sequence that goes on; 4 bytes each, for this is what grows with the data."""
    supervised: int = 0
    proved: int = 0
    """Rows checked against the saved tokenizer."""
    split: int = 0
    """Sequences over `max_length` that became several."""
    typed_rows: int = 0
    """Rows in which somebody typed a special token's string."""

    def enter(self, counts: Counts) -> None:
        """Something came in."""
        for unit, count in enumerate(counts):
            self.entered[unit] += count

    def drop(self, reason: str, counts: Counts) -> None:
        """Of what came in, something is left out."""
        self.set_aside.setdefault(reason, Counter()).update(dict(zip(UNITS, counts, strict=True)))

    def keep(self, length: int, supervised: int) -> None:
        """A sequence goes on."""
        self.lengths.append(length)
        self.supervised += supervised

    def ledger(self) -> dict[str, dict[str, Any]]:
        """In, out and set aside, by unit."""
        out = dict(zip(UNITS, (len(self.lengths), sum(self.lengths), self.supervised), strict=True))
        return {
            unit: {
                "in": entered,
                "out": out[unit],
                "set_aside": {
                    reason: counts[unit] for reason, counts in sorted(self.set_aside.items()) if counts[unit]
                },
            }
            for unit, entered in zip(UNITS, self.entered, strict=True)
        }

    def reasons(self) -> str:
        """Why sequences were set aside, commonest first, for a message."""
        counts = Counter({reason: entry["sequences"] for reason, entry in self.set_aside.items()})
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "no rows came in"
