"""A version that passed the gate and waits for a person's answer (`register.approval: manual`): tags of the version.

In: a model's name, a version's number. Out: `Approval`s. Each request is answered once: whoever changes one holds the
registry's lock. Promotion and bars are in `tasks/models.py`; Prefect's side is in `tasks/approval_runs.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, cast

from sft_core.errors import RegistryError
from tasks.registry import (
    MAX_TAG_LENGTH,
    NO_CHAMPION,
    RegisteredVersion,
    find_champion,
    read_version,
    read_versions,
    write_history,
)
from tasks.registry_lock import registry_lock
from tasks.tracking import client

APPROVAL = "sft.approval"
WORDS = "sft.approval_words"
"""Who answered and why; or why there is no answer any more."""
UNTIL = "sft.approval_until"
"""ISO 8601 time in UTC after which there is no answer any more."""
ASKED_BY = "sft.approval_run"
"""The Prefect flow run that asks."""
State = Literal["waiting", "approved", "rejected", "expired", "superseded", "refused"]


@dataclass(frozen=True, slots=True)
class Approval:
    """A request for approval, and what became of it."""

    state: State
    words: str
    until: datetime
    asked_by: str | None

    @property
    def waiting(self) -> bool:
        """Whether an answer is still taken."""
        return self.state == "waiting"

    @property
    def overdue(self) -> bool:
        """Whether it waits, and its time is up."""
        return self.waiting and datetime.now(UTC) >= self.until

    @property
    def outcome(self) -> str:
        """In words, such as `waiting until 2026-11-24 01:30 UTC` and `approved by Ada: reads well`."""
        if not self.waiting:
            return f"{self.state}, {self.words}"
        return f"{'no answer' if self.overdue else 'waiting'} until {self.until:%Y-%m-%d %H:%M} UTC"

    @property
    def seconds_left(self) -> int:
        """Until its time is up."""
        return max(0, int((self.until - datetime.now(UTC)).total_seconds()))


def read_approval(version: RegisteredVersion) -> Approval | None:
    """The version's request, if there ever was one."""
    tags = version.tags
    if APPROVAL not in tags:
        return None
    state = cast(State, tags[APPROVAL])
    return Approval(state, tags.get(WORDS, ""), datetime.fromisoformat(tags[UNTIL]), tags.get(ASKED_BY))


def request_approval(model_name: str, number: str, hours: float) -> list[Approval]:
    """Let the version wait; earlier ones that wait are superseded, and returned. Under the registry's lock.

    A second call for one version changes nothing.
    """
    if read_approval(read_version(model_name, number)) is not None:
        return []
    superseded = []
    for version in read_versions(model_name):
        earlier = read_approval(version)
        if earlier is not None and earlier.waiting:
            record_answer(model_name, version.number, "superseded", f"version {number} passed the gate meanwhile")
            superseded.append(earlier)
    until = datetime.now(UTC) + timedelta(hours=hours)
    client().set_model_version_tag(model_name, number, UNTIL, until.isoformat(timespec="seconds"))
    client().set_model_version_tag(model_name, number, APPROVAL, "waiting")
    return superseded


def claim(
    model_name: str, wanted: str, run_id: str, asks_still: Callable[[str], bool]
) -> tuple[RegisteredVersion, Approval]:
    """Make flow run `run_id` the one that asks, unless another one asks still, or nothing is left to ask.

    A request whose time is up ends here as `expired`. RegistryError if there never was one.
    """
    with registry_lock(model_name):
        version = read_version(model_name, wanted)
        approval = read_approval(version)
        if approval is None:
            raise RegistryError(
                f"{model_name} version {version.number} does not wait for approval: the gate said {version.verdict!r}. "
                "Give a reason to promote it without asking"
            )
        if approval.overdue:
            _expire(model_name, version.number)
        elif approval.waiting and (approval.asked_by in (None, run_id) or not asks_still(str(approval.asked_by))):
            client().set_model_version_tag(model_name, version.number, ASKED_BY, run_id)
    version = read_version(model_name, version.number)
    after = read_approval(version)
    assert after is not None, "a request is never taken back"
    return version, after


def record_answer(model_name: str, number: str, state: State, words: str) -> None:
    """End the request, if there was one. Under the registry's lock."""
    if read_approval(read_version(model_name, number)) is None:
        return
    client().set_model_version_tag(model_name, number, WORDS, words[:MAX_TAG_LENGTH])
    client().set_model_version_tag(model_name, number, APPROVAL, state)


def refuse_request(model_name: str, number: str, words: str) -> None:
    """An approval came, and the version cannot be promoted any more: nobody has to answer again."""
    with registry_lock(model_name):
        approval = read_approval(read_version(model_name, number))
        if approval is not None and approval.waiting:
            record_answer(model_name, number, "refused", words)


def _expire(model_name: str, number: str) -> None:
    champion = find_champion(model_name)
    stays = champion.number if champion is not None else NO_CHAMPION
    record_answer(model_name, number, "expired", "nobody answered in time")
    write_history(model_name, f"{stays} stays: nobody answered in time whether version {number} may take its place")
