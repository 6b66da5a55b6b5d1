"""Task of the step register: reports -> verdict -> a version of a registered MLflow model, perhaps the champion.

Idempotent by the merged model's fingerprint: a second run of the same retraining, at the same time or later, finds its
version and makes none. What was judged against is read again under the registry's lock; if it moved, the model is
judged anew.
"""

from dataclasses import dataclass, replace
from typing import Any

from prefect import get_run_logger, task

from sft_core import stop
from sft_core.credentials import credentials_hidden
from sft_core.errors import RegistryError
from sft_core.plan import plan_champion
from sft_core.register import Verdict, verdict_table
from sft_core.register.stored import Judged, judge_stored
from sft_core.steps import Retraining
from tasks.approval import read_approval, request_approval
from tasks.approval_runs import announce, end_run
from tasks.challenges import count_challenges, record_challenge
from tasks.model_files import discard_copy
from tasks.model_version import create_version, merged_source, verdict_tags, write_card
from tasks.models import move_champion, note_move
from tasks.registry import (
    NO_CHAMPION,
    SETTLED,
    VERDICT_TABLE,
    RegisteredVersion,
    barred_because,
    find_champion,
    find_version,
    model_folder,
    read_version,
)
from tasks.registry_lock import registry_lock, require_held
from tasks.run_step import STEP, Job, perform
from tasks.shown import REPORT_PAGE, show_report
from tasks.tracking import client
from tasks.trained_rows import rows_known_to_judged

__all__ = ["find_champion", "model_folder", "register", "registered_summary"]
MAX_JUDGEMENTS = 4
"""Each time the champion moves meanwhile, the model is judged again; so often at most."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a judgement rests on beside the reports: the champion, and how often it was challenged."""

    champion: RegisteredVersion | None
    challenges: int

    @property
    def number(self) -> str:
        """The champion's, or NO_CHAMPION."""
        return self.champion.number if self.champion is not None else NO_CHAMPION

    def moved(self, now: "Standing") -> bool:
        """Whether a verdict reached on this standing is out of date."""
        return (self.number, self.challenges) != (now.number, now.challenges)


def registered_summary(model_name: str, merged_fingerprint: str) -> dict[str, Any] | None:
    """What `register` returned for this merged model, if it finished."""
    found = find_version(model_name, merged_fingerprint)
    return _summary(model_name, found, new=False) if found is not None and found.settled else None


@task(name="register", task_run_name="register {job.recipe.model_name}", **STEP)
@credentials_hidden()
def register(job: Job, champion: RegisteredVersion | None) -> dict[str, Any]:
    """Judge, log the merged model, register a version, move the aliases. Returns version, aliases and verdict."""
    name, merged = job.recipe.model_name, job.plan["merge"].fingerprint
    existing = find_version(name, merged)
    if existing is not None and existing.settled:
        get_run_logger().info("register: version %s of %s holds this model already", existing.number, name)
        return _summary(name, existing, new=False)
    standing = Standing(champion, count_challenges(name, champion, merged))
    if champion is not None and "evaluate/champion" not in job.plan.steps:
        job = _evaluate_champion(job, champion)
    source = None
    for _ in range(MAX_JUDGEMENTS):
        run = job.retraining(get_run_logger().info)
        judged = _judge(job, run, standing)
        source = source or merged_source(job, run)
        with registry_lock(name) as lease:
            existing = find_version(name, merged)
            if existing is not None and existing.settled:  # a run of the same retraining was faster
                discard_copy(name, existing.number, source)
                return _summary(name, existing, new=False)
            now = _standing(name, merged)
            number = existing.number if existing is not None else None
            require_held(lease, name)
            settled = None if standing.moved(now) else _settle(job, run, (source, judged.verdict), standing, number)
        if settled is not None:
            show_report(job, settled)
            return settled
        get_run_logger().info("register: the champion moved from %s to %s; judging again", standing.number, now.number)
        standing = now
        if now.champion is not None:
            job = _evaluate_champion(job, now.champion)
    raise RegistryError(f"{name}: the champion moved {MAX_JUDGEMENTS} times while this model was judged; run again")


def _judge(job: Job, run: Retraining, standing: Standing) -> Judged:
    """The verdict, shown; a merged model that was rolled back or rejected is never promoted again."""
    log = get_run_logger().info
    judged = judge_stored(
        run,
        standing.challenges + 1,
        against_champion=standing.champion is not None,
        trained_on=rows_known_to_judged(job, standing.champion, log),
    )
    reason = barred_because(job.recipe.model_name, job.plan["merge"].fingerprint)
    if reason is not None:
        notes = (*judged.verdict.notes, f"this model is barred: {reason}")
        judged = Judged(replace(judged.verdict, promote=False, notes=notes), judged.page)
    client().log_text(job.part.run_id, judged.page, REPORT_PAGE)
    return judged


def _settle(
    job: Job, run: Retraining, judged: tuple[str, Verdict], standing: Standing, existing: str | None
) -> dict[str, Any]:
    """Version, tags and aliases, under the lock: nobody else changes them meanwhile. `judged`: the merged model's
    source, verdict; `existing`: the version's number, if an earlier try got so far."""
    stop.check()
    name, (source, verdict) = job.recipe.model_name, judged
    number = existing or create_version(job, run, source, verdict, standing.number)
    if standing.champion is not None and standing.champion.number == number:  # promoted, and then interrupted
        note_move(name, standing.champion)
    else:
        _move_aliases(job, run, number, verdict, standing)
    client().set_model_version_tag(name, number, SETTLED, "true")
    get_run_logger().info("register: %s version %s %s", name, number, verdict.words)
    return _summary(name, read_version(name, number), new=existing is None)


def _move_aliases(job: Job, run: Retraining, number: str, verdict: Verdict, standing: Standing) -> None:
    """`candidate` is the newest version judged; `champion` moves only through the gate, `previous` follows it."""
    name = job.recipe.model_name
    record_challenge(name, standing.champion, job.plan["merge"].fingerprint)
    for tag, value in verdict_tags(verdict, standing.number).items():
        client().set_model_version_tag(name, number, tag, value)
    write_card(job, run, number, verdict)
    client().log_text(job.part.parent_run_id, verdict_table(verdict), VERDICT_TABLE)
    client().set_registered_model_alias(name, "candidate", number)
    if verdict.promote and verdict.manual:
        _ask(name, number, job.recipe.register_.approval_timeout_hours)
    elif verdict.promote:
        move_champion(name, number, standing.champion, verdict.words)


def _ask(name: str, number: str, hours: float) -> None:
    """Leave the version `candidate` and let a person decide; who was asked of an earlier one is asked no more."""
    for earlier in request_approval(name, number, hours):
        end_run(earlier.asked_by, "Superseded", f"version {number} of {name} passed the gate meanwhile")
    version = read_version(name, number)
    approval = read_approval(version)
    if approval is not None and approval.waiting:
        announce(name, version, approval)


def _evaluate_champion(job: Job, champion: RegisteredVersion) -> Job:
    """The job with the new champion's report in its plan."""
    job = replace(job, plan=plan_champion(job.plan, job.recipe, champion.merged_fingerprint))
    perform(job, "evaluate/champion", model_folder(job.recipe.model_name, champion))
    return job


def _standing(model_name: str, merged_fingerprint: str) -> Standing:
    champion = find_champion(model_name)
    return Standing(champion, count_challenges(model_name, champion, merged_fingerprint))


def _summary(name: str, registered: RegisteredVersion, *, new: bool) -> dict[str, Any]:
    approval = read_approval(registered)
    return {
        "model_name": name,
        "version": registered.number,
        "aliases": list(registered.aliases),
        "verdict": registered.verdict,
        "approval": approval.outcome if approval is not None else None,
        "new": new,
    }
