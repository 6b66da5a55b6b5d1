"""What changed between two retrainings: recipe keys, rows, scores, library versions.

In: two `Recorded` and the row_ids each was trained on (None where the store has them no more). Out: `Difference`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sft_core.explain import differences
from sft_core.lineage.ancestry import Recorded


@dataclass(frozen=True, slots=True)
class Difference:
    """From `old` to `new`. Rows are row_ids, sorted, or None if one side's are not known."""

    added: tuple[str, ...] | None
    removed: tuple[str, ...] | None
    recipe: tuple[str, ...]
    scores: Mapping[str, tuple[float | None, float | None]]
    versions: tuple[str, ...]
    same_held_out: bool
    """Whether the scores are of the same conversations; else they cannot be compared."""


def compare_recorded(
    old: Recorded, new: Recorded, old_rows: Iterable[str] | None, new_rows: Iterable[str] | None
) -> Difference:
    """Compare. Rows that stand in both, in any order and however often, are no difference."""
    added = removed = None
    if old_rows is not None and new_rows is not None:
        before, after = frozenset(old_rows), frozenset(new_rows)
        added, removed = tuple(sorted(after - before)), tuple(sorted(before - after))
    old_scores, new_scores = old.scores("tuned"), new.scores("tuned")
    return Difference(
        added=added,
        removed=removed,
        recipe=tuple(differences(dict(old.recipe), dict(new.recipe))),
        scores={name: (old_scores.get(name), new_scores.get(name)) for name in {**old_scores, **new_scores}},
        versions=tuple(differences(_versions(old), _versions(new))),
        same_held_out=_conversations(old) == _conversations(new),
    )


def _versions(recorded: Recorded) -> dict[str, Any]:
    train = recorded.manifests.get("train")
    return {**train.versions, "device": train.device} if train is not None else {}


def _conversations(recorded: Recorded) -> str | None:
    tuned = recorded.manifests.get("evaluate/tuned")
    return tuned.inputs.get("conversations") if tuned is not None else None
