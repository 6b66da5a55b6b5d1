"""Which entries of a store can go: pure, no store is read.

In: entries of a survey, what registered versions need, the time. Out: a `Decision` an entry, with the reason. Kept is
what a registered version names, what was built or used in the last days, what a live lease is on, and all that these
were made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sft_core.store_survey import ARTIFACT, COPY, STAGED, TORN, WORK, Entry

LEFTOVER_DAYS = 1
"""Days without a write after which half a publication, a staging folder, or resumable state of a finished training is
nobody's."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an entry stays, and why."""

    entry: Entry
    keep: bool
    why: str


def decide(entries: Sequence[Entry], registered: Mapping[str, str], now: datetime, keep_days: int) -> list[Decision]:
    """One decision an entry, in their order. `registered`: who needs it, by fingerprint."""
    wanted = _wanted(entries, registered, now - timedelta(days=keep_days))
    built = {entry.fingerprint for entry in entries if entry.kind == ARTIFACT}
    training = any(entry.kind == WORK and entry.holder for entry in entries)
    return [_decide(entry, wanted, built, training, (now, keep_days)) for entry in entries]


def _decide(
    entry: Entry, wanted: Mapping[str, str], built: set[str], training: bool, when: tuple[datetime, int]
) -> Decision:
    now, keep_days = when
    unused = now - entry.last_used
    if entry.holder:
        return Decision(entry, True, f"in use by {entry.holder}")
    if entry.kind == ARTIFACT:
        why = wanted.get(entry.fingerprint)
        return Decision(entry, why is not None, why or f"not used for {unused.days} days, and not registered")
    if entry.kind == STAGED and entry.step == "train" and training:
        return Decision(entry, True, "a training is under way")
    leftover = entry.kind in (TORN, STAGED) or (entry.kind == WORK and entry.fingerprint in built)
    days = LEFTOVER_DAYS if leftover else keep_days
    words = {
        TORN: "a publication that did not end",
        STAGED: "left by a step that did not end",
        WORK: "resumable state of a training" + (" that is done" if leftover else ""),
        COPY: "on this machine",
    }[entry.kind]
    if unused < timedelta(days=days):
        return Decision(entry, True, f"{words}; changed within {days} days")
    return Decision(entry, False, f"{words}; not changed for {unused.days} days")


def _wanted(entries: Sequence[Entry], registered: Mapping[str, str], since: datetime) -> dict[str, str]:
    """Why an artifact is kept, by fingerprint: from those wanted in themselves on to what they were made of."""
    manifests = {entry.fingerprint: entry.manifest for entry in entries if entry.manifest is not None}
    wanted: dict[str, str] = {}
    queue = [(entry.fingerprint, registered[entry.fingerprint]) for entry in entries if entry.fingerprint in registered]
    for entry in entries:
        if entry.kind == ARTIFACT and (entry.last_used >= since or entry.holder):
            queue.append((entry.fingerprint, f"used on {entry.last_used:%Y-%m-%d}"))
    while queue:
        fingerprint, why = queue.pop(0)
        if fingerprint in wanted:
            continue
        wanted[fingerprint] = why
        manifest = manifests.get(fingerprint)
        if manifest is not None:
            because = f"made into {manifest.step} {fingerprint[:12]}"
            queue += [(source, because) for source in manifest.inputs.values()]
    return wanted
