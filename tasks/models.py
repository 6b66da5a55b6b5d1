"""Change by hand which version consumers load: promote, reject, roll back. Serialised, checked, kept in the history.

In: a model's name, a version, a reason. Out: `Moved`. The target is loaded before any alias moves; a version that was
rolled back or rejected is barred, and its merged model never becomes champion again.
"""

import getpass
from dataclasses import dataclass

from sft_core import stop
from sft_core.errors import RegistryError
from sft_core.load_check import check_loads
from sft_core.trust import require_remote_code
from tasks.approval import read_approval, record_answer
from tasks.lineage import read_recorded
from tasks.registry import (
    JUDGED_AGAINST,
    NO_CHAMPION,
    PROMOTE,
    REPLACED,
    RegisteredVersion,
    bar,
    barred_because,
    find_champion,
    model_folder,
    read_aliases,
    read_history,
    read_version,
    write_history,
)
from tasks.registry_lock import registry_lock, require_held
from tasks.tracking import client


@dataclass(frozen=True, slots=True)
class Moved:
    """The alias `champion` went from one version to another."""

    model_name: str
    before: str | None
    after: str


class NotPromotable(RegistryError):
    """What the registry holds stands against it: a bar, another verdict, another champion, a request that ended."""


def promote(model_name: str, wanted: str, reason: str, *, override_gate: bool = False, by: str | None = None) -> Moved:
    """Make a version the champion. NotPromotable unless the gate decided so against the present champion, or it is
    overridden; a barred one is refused in any case. `by`: who answers a request for approval, which must still wait.
    """
    version, champion = read_version(model_name, wanted), find_champion(model_name)
    words = f"{by or getpass.getuser()}: {reason}"
    if champion is not None and champion.number == version.number:
        return _promoted_already(model_name, version, words)
    _refuse_barred(model_name, version)
    if not override_gate:
        _require_verdict(model_name, version, champion)
    _check(model_name, version)
    with registry_lock(model_name) as lease:
        if by is not None:
            _require_waiting(model_name, version.number)
        _require_unmoved(model_name, champion)
        _refuse_barred(model_name, version)
        require_held(lease, model_name)
        move_champion(model_name, version.number, champion, f"{'approved' if by else 'promoted'} by {words}")
        record_answer(model_name, version.number, "approved", f"by {words}")
    return Moved(model_name, champion.number if champion else None, version.number)


def reject(model_name: str, wanted: str, reason: str, *, by: str | None = None) -> str:
    """Bar a version that is not the champion; its number. `by` as of `promote`."""
    with registry_lock(model_name):
        version, champion = read_version(model_name, wanted), find_champion(model_name)
        if champion is not None and champion.number == version.number:
            raise NotPromotable(f"{model_name} version {version.number} is the champion: roll it back instead")
        _refuse_barred(model_name, version)
        if by is not None:
            _require_waiting(model_name, version.number)
        words = f"{by or getpass.getuser()}: {reason}"
        bar(model_name, version, f"rejected by {words}")
        record_answer(model_name, version.number, "rejected", f"by {words}")
        stays = champion.number if champion is not None else NO_CHAMPION
        write_history(model_name, f"{stays} stays: version {version.number} was rejected by {words}")
    return version.number


def rollback(model_name: str, reason: str, to: str | None = None) -> Moved:
    """Give consumers the previous version (or `to`) again, and bar the present champion from coming back."""
    champion = find_champion(model_name)
    if champion is None:
        raise RegistryError(f"{model_name} has no champion: there is nothing to roll back")
    if to is None and "previous" not in read_aliases(model_name):
        raise RegistryError(
            f"{model_name} has no alias `previous`: name a version with --to; `sft models list` has all"
        )
    version = read_version(model_name, to or "previous")
    if version.number == champion.number:
        raise RegistryError(f"{model_name} version {version.number} is the champion: name another one with --to")
    _refuse_barred(model_name, version)
    _check(model_name, version)
    with registry_lock(model_name) as lease:
        _require_unmoved(model_name, champion)
        stop.check()
        require_held(lease, model_name)
        bar(model_name, champion, reason)
        words = f"rolled back from {champion.number} to {version.number} by {getpass.getuser()}: {reason}"
        client().set_registered_model_alias(model_name, "champion", version.number)
        _set_previous(model_name, version)
        write_history(model_name, words)
    return Moved(model_name, champion.number, version.number)


def _promoted_already(model_name: str, version: RegisteredVersion, words: str) -> Moved:
    """A promotion that was interrupted before it noted the answer is finished; any other is refused."""
    with registry_lock(model_name):
        approval = read_approval(read_version(model_name, version.number))
        if approval is None or not approval.waiting:
            raise NotPromotable(f"{model_name} version {version.number} is the champion already")
        record_answer(model_name, version.number, "approved", f"by {words}")
    return Moved(model_name, version.tags.get(REPLACED), version.number)


def move_champion(model_name: str, number: str, champion: RegisteredVersion | None, why: str) -> None:
    """`champion` to `number`, `previous` to the one before. To be called under the registry's lock. A stopped run
    moves nothing."""
    stop.check()
    if champion is not None and champion.number != number:
        client().set_model_version_tag(model_name, number, REPLACED, champion.number)
        client().set_registered_model_alias(model_name, "previous", champion.number)
    client().set_registered_model_alias(model_name, "champion", number)
    write_history(model_name, f"{champion.number if champion else NO_CHAMPION} -> {number}: {why}")


def note_move(model_name: str, version: RegisteredVersion) -> None:
    """The history of a promotion that was interrupted before it wrote that. Under the registry's lock."""
    if not any(f"-> {version.number}:" in words for _, words in read_history(model_name)):
        write_history(model_name, f"{version.tags.get(REPLACED, NO_CHAMPION)} -> {version.number}: {version.verdict}")


def _set_previous(model_name: str, version: RegisteredVersion) -> None:
    """The champion before `version`, where there was one and it was never rolled back itself; else none."""
    earlier = version.tags.get(REPLACED)
    if earlier is not None and barred_because(model_name, read_version(model_name, earlier).merged_fingerprint) is None:
        client().set_registered_model_alias(model_name, "previous", earlier)
    elif "previous" in read_aliases(model_name):
        client().delete_registered_model_alias(model_name, "previous")


def _refuse_barred(model_name: str, version: RegisteredVersion) -> None:
    reason = barred_because(model_name, version.merged_fingerprint)
    if reason is not None:
        raise NotPromotable(f"{model_name} version {version.number} stays barred: {reason}")


def _require_waiting(model_name: str, number: str) -> None:
    approval = read_approval(read_version(model_name, number))
    if approval is None or approval.overdue or not approval.waiting:
        ended = "its time is up" if approval is None or approval.overdue else approval.outcome
        raise NotPromotable(f"{model_name} version {number} does not wait for approval any more: {ended}")


def _require_verdict(model_name: str, version: RegisteredVersion, champion: RegisteredVersion | None) -> None:
    against = champion.number if champion is not None else NO_CHAMPION
    judged = version.tags.get(JUDGED_AGAINST)
    if version.tags.get(PROMOTE) != "true":
        raise NotPromotable(
            f"{model_name} version {version.number}: the gate said {version.verdict!r}; --override-gate promotes it"
        )
    if judged != against:
        raise NotPromotable(
            f"{model_name} version {version.number} was judged against {judged}, the champion is {against}: retrain to "
            "judge anew, or --override-gate"
        )


def _require_unmoved(model_name: str, champion: RegisteredVersion | None) -> None:
    now = find_champion(model_name)
    if (now and now.number) != (champion and champion.number):
        raise NotPromotable(
            f"{model_name}: the champion moved from {champion and champion.number} to {now and now.number} meanwhile; "
            "nothing was changed. Look at `sft models list` and decide again"
        )


def _check(model_name: str, version: RegisteredVersion) -> None:
    recorded = read_recorded(model_name, version)
    trust = bool(recorded.recipe["base_model"]["trust_remote_code"])
    if trust:
        require_remote_code(f"{model_name} version {version.number} was made with base_model.trust_remote_code")
    folder = model_folder(model_name, version)
    check_loads(folder, recorded.manifests.get("merge") or recorded.manifests.get("convert"), trust_remote_code=trust)
